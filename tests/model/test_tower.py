"""A vision tower loaded by itself is that of the policy, bit for bit, and says what its checkpoint lacks."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support import policies
from veripo_fast.cache.entries import tower_version
from veripo_fast.config.families import FAMILIES
from veripo_fast.config.inputs import ModelConfig
from veripo_fast.errors import CheckpointError
from veripo_fast.model.policy import load_policy
from veripo_fast.model.tower import load_tower

SIZES = [("video", 4, 2, 3), ("image", 2, 1, 2)]


def renamed(folder: Path, source: Path, rename: Callable[[str], str | None]) -> Path:
    """A copy of a checkpoint with its weights under other names; None: left out."""
    shutil.copytree(source, folder)
    weights = {rename(name): value for name, value in load_file(source / "model.safetensors").items()}
    save_file({name: value for name, value in weights.items() if name}, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", policies.ALL_FAMILIES)
def test_the_tower_alone_is_that_of_the_policy(family: str, dtype: str, capfd: pytest.CaptureFixture[str]) -> None:
    config = ModelConfig(path=str(policies.checkpoint(family)), device="cpu", dtype=dtype, freeze_vision=True)
    policy = load_policy(config)
    capfd.readouterr()
    tower = load_tower(config)
    assert "UNEXPECTED" not in "".join(capfd.readouterr()), "the language model's weights are left out on purpose"
    assert tower_version(tower) == tower_version(policy) and tower.patch_dtype == getattr(torch, dtype)
    assert not any(parameter.requires_grad for parameter in tower.visual.parameters())
    media = policies.random_media(policy.encoder, SIZES)
    ours, theirs = (owner.vision_features(media) for owner in (tower, policy))
    assert bool(ours.deepstack) == FAMILIES[family].deepstack
    for own, other in zip((ours.embeddings, *ours.deepstack), (theirs.embeddings, *theirs.deepstack), strict=True):
        assert own.dtype == getattr(torch, dtype) and torch.equal(own, other)


def test_names_of_older_checkpoints(tmp_path: Path) -> None:
    config = ModelConfig(path=str(policies.checkpoint("qwen2_5_vl")), device="cpu")
    for number, prefix in enumerate(("visual.", "model.visual.")):
        folder = renamed(tmp_path / str(number), Path(config.path),
                         lambda name, prefix=prefix: re.sub(r"^(model\.)?visual\.", prefix, name))
        assert tower_version(load_tower(replace(config, path=str(folder)))) == tower_version(load_tower(config))


def test_only_the_files_with_its_weights_are_needed(tmp_path: Path) -> None:
    """Of a sharded checkpoint; the language model's may be anywhere, and are 97 % of a large one."""
    source = policies.checkpoint("qwen3_vl")
    folder = renamed(tmp_path / "sharded", source, lambda name: None)
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for number, (name, value) in enumerate(sorted(load_file(source / "model.safetensors").items())):
        parts.setdefault(f"tower-{number % 2}" if "visual." in name else "language", {})[name] = value
    (folder / "model.safetensors").unlink()
    for part, weights in parts.items():
        if part != "language":
            save_file(weights, folder / f"{part}.safetensors", {"format": "pt"})
    index = {name: f"{part}.safetensors" for part, weights in parts.items() for name in weights}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    config = ModelConfig(path=str(folder), device="cpu")
    assert tower_version(load_tower(config)) == tower_version(load_tower(replace(config, path=str(source))))
    with pytest.raises(CheckpointError, match=r"lacks the weight file language\.safetensors"):
        load_policy(config)
    (folder / "tower-1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks the weight file tower-1\.safetensors"):
        load_tower(config)


def test_a_missing_weight_of_the_tower_is_named(tmp_path: Path) -> None:
    source = policies.checkpoint("qwen3_vl")
    folder = renamed(tmp_path / "less", source, lambda name: None if "visual.merger.norm.weight" in name else name)
    with pytest.raises(CheckpointError, match=r"are incomplete: visual\.merger\.norm\.weight$"):
        load_tower(ModelConfig(path=str(folder), device="cpu"))
    (folder / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(CheckpointError, match=r"the weight file .*model\.safetensors is damaged"):
        load_tower(ModelConfig(path=str(folder), device="cpu"))
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks the weight file model\.safetensors"):
        load_tower(ModelConfig(path=str(folder), device="cpu"))
