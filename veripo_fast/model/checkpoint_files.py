"""Checkpoint folders on disk: where they are, how their weights are read, and what is written beside new ones."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from veripo_fast.errors import CheckpointError

TINY_POLICY = Path(__file__).parent.parent / "demo" / "tiny_policy"


def resolve_path(path: str) -> Path:
    """Folder of a checkpoint; `tiny` names the one shipped in the package."""
    return TINY_POLICY if path == "tiny" else Path(path)


def resolve_device(name: str) -> torch.device:
    """`auto` takes a GPU when there is one."""
    return torch.device("cuda" if name == "auto" and torch.cuda.is_available() else "cpu" if name == "auto" else name)


def load_weights(model_class: Any, folder: Path, dtype: str) -> Any:
    """`model_class.from_pretrained(folder)`, with every weight that it needs, or CheckpointError."""
    for name in weight_files(folder):
        with opened(folder / name):
            pass
    return from_pretrained(model_class, folder, dtype, pretrained_model_name_or_path=folder)


def from_pretrained(model_class: Any, folder: Path, dtype: str, *, prefix: str = "", **options: Any) -> Any:
    """transformers' method, or CheckpointError; weights that `folder` lacks are named with `prefix`."""
    try:
        model, info = model_class.from_pretrained(dtype=getattr(torch, dtype), attn_implementation="sdpa",
                                                  output_loading_info=True, trust_remote_code=False, **options)
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"the weights in {folder} cannot be loaded: {error}") from error
    if info["missing_keys"]:  # transformers would leave them random, with a warning
        missing = ", ".join(prefix + name for name in sorted(info["missing_keys"]))
        raise CheckpointError(f"the weights in {folder} are incomplete: {missing}")
    return model


def weight_files(folder: Path, wanted: re.Pattern[str] | None = None) -> list[str]:
    """Names of the safetensors files, of a sharded checkpoint those that hold weights with names that `wanted` matches.

    Raises:
        CheckpointError: one is not there.
    """
    index = folder / "model.safetensors.index.json"
    names = sorted({file for weight, file in json.loads(index.read_text())["weight_map"].items()
                    if wanted is None or wanted.match(weight)}) if index.is_file() else ["model.safetensors"]
    for name in names:
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} lacks the weight file {name}")
    return names


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"the weight file {path} is damaged: {error}") from error


PROCESSOR_FILES = ("tokenizer*", "vocab*", "merges*", "special_tokens_map.json", "added_tokens.json", "chat_template*",
                    "*processor_config.json")
