"""`veripo merge`: adapters and their base as one checkpoint, which needs neither peft nor the base any more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from veripo_fast.config.inputs import ModelConfig
from veripo_fast.errors import CheckpointError, ConfigError
from veripo_fast.model.adapter_files import CONFIG, check_base, named_pairs
from veripo_fast.model.checkpoint_files import resolve_path
from veripo_fast.model.policy import load_policy, save_policy
from veripo_fast.run.folder import make_out
from veripo_fast.run.weight_files import read_json

_OTHERS = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save", "fan_in_fan_out")
"""What peft can do besides, which changes what is added to a weight."""


def merge_command(adapter: str, out: Path, base: str = "") -> Path:
    """Write W + alpha / rank * B A of every adapted weight, and the rest of the base, as a checkpoint folder.

    Sums are float32; the weights are written in the dtype that the base's config.json names.

    Args:
        adapter: folder of adapters; RUN/checkpoints/latest is the newest of a run.
        base: folder of their base; empty: the one that the adapters name.

    Raises:
        CheckpointError: no adapters there, or of another kind or base.
        ConfigError: `out` is not empty or cannot be written.
    """
    folder = resolve_path(adapter)
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder} holds no LoRA adapters: it has no {CONFIG}")
    described = read_json(folder / CONFIG)
    named = base or str(described.get("base_model_name_or_path") or "")
    start = resolve_path(named)
    if not named or not (start / "config.json").is_file():
        raise CheckpointError(f"{folder} holds adapters of {named or 'a base that it does not name'}, which is no "
                              "checkpoint folder here; name theirs with --base")
    check_base(folder, start)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out} exists and is not empty; name another folder")
    scaling = _scaling(described, folder)
    policy = load_policy(ModelConfig(path=str(start), device="cpu"))
    weights = dict(policy.model.named_parameters())
    for name, (a, b) in named_pairs(folder).items():
        if name not in weights or weights[name].shape != (len(b), a.shape[1]):
            raise CheckpointError(f"the adapters in {folder} are of another base than {start}: it has no weight "
                                  f"{name} of shape {(len(b), a.shape[1])}")
        weights[name].data.addmm_(b.float(), a.float(), alpha=scaling)
    policy.model.to(_dtype_of(start))
    make_out(out)
    save_policy(policy, out)
    return out


def _scaling(described: dict[str, Any], folder: Path) -> float:
    other = [name for name in _OTHERS if described.get(name)]
    rank, alpha = described.get("r"), described.get("lora_alpha")
    if other or not isinstance(rank, int) or rank < 1 or not isinstance(alpha, (int, float)):
        raise CheckpointError(f"the adapters in {folder} cannot be merged: {CONFIG} "
                              + (f"has {other[0]}, which veripo does not know" if other else "has no r or lora_alpha"))
    return alpha / rank


def _dtype_of(base: Path) -> torch.dtype:
    """float32, or bfloat16 where the base says so."""
    config = read_json(base / "config.json")
    return torch.bfloat16 if "bfloat16" in (config.get("dtype"), config.get("torch_dtype")) else torch.float32
