"""Adapter folders on disk: peft's adapter_config.json and adapter_model.safetensors, beside base.json, which says what
they belong to."""

from __future__ import annotations

from pathlib import Path

import torch

from veripo_fast.errors import CheckpointError
from veripo_fast.model.checkpoint_files import opened
from veripo_fast.run.inputs import base_differences
from veripo_fast.run.weight_files import read_json

CONFIG, WEIGHTS, BASE = "adapter_config.json", "adapter_model.safetensors", "base.json"
NAME = "default"
"""peft's name of the adapters in a model."""
OUTSIDE = "base_model.model."
"""What peft puts before the names of weights in a file."""


def file_name(name: str) -> str:
    """The name of an adapter's matrix in a file of peft's."""
    return OUTSIDE + name.replace(f".{NAME}.weight", ".weight")


def is_adapter_folder(folder: Path) -> bool:
    """Whether a folder holds adapters and no model."""
    return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()


def refuse_adapters(folder: Path) -> None:
    """CheckpointError where a folder that should hold a model holds adapters."""
    if is_adapter_folder(folder):
        base = read_json(folder / CONFIG).get("base_model_name_or_path") or "not named there"
        raise CheckpointError(f"{folder} holds LoRA adapters and not the model that they belong to ({base}); give that "
                              "as model.path and this folder as model.lora.adapter, or merge both: veripo merge")


def check_base(folder: Path, base: Path) -> None:
    """CheckpointError unless a folder holds adapters, and those of this base."""
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder} holds no LoRA adapters: it has no {CONFIG}")
    if not (folder / BASE).is_file():
        return  # of peft alone: names and shapes are compared
    stored = read_json(folder / BASE)
    changed = base_differences(stored.get("files") or {}, base)
    if changed:
        raise CheckpointError(f"the adapters in {folder} were trained on another base than {base}: {changed[0]}; "
                              f"theirs was {stored.get('path')}")


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The matrices of an adapter folder. Raises CheckpointError."""
    with opened(folder / WEIGHTS) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)


def named_pairs(folder: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Name of each adapted weight in its base -> A [rank, in] and B [out, rank]. Raises CheckpointError."""
    tensors = read_weights(folder)
    pairs = {}
    for name, a in tensors.items():
        layer, is_a, _ = name.removeprefix(OUTSIDE).partition(".lora_A.")
        if not is_a:
            continue
        b = tensors.get(name.replace(".lora_A.", ".lora_B."))
        if b is None or a.ndim != 2 or b.ndim != 2 or len(a) != b.shape[1]:
            raise CheckpointError(f"the adapters in {folder} are broken: {name} has no matrix that it goes with")
        pairs[f"{layer}.weight"] = (a, b)
    if 2 * len(pairs) != len(tensors):
        raise CheckpointError(f"{folder / WEIGHTS} holds more than matrices A and B of linear layers")
    return pairs
