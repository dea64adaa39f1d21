"""A checkpoint whose layers see a window is refused by name; one whose window takes nothing away is trained."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import policies
from veripo_fast.config.inputs import ModelConfig
from veripo_fast.errors import CheckpointError
from veripo_fast.model.policy import Policy, load_policy


def load(tmp_path: Path, family: str, **changes: Any) -> Policy:
    """The tiny checkpoint with other options of its language model."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(policies.checkpoint(family), folder)
    config = json.loads((folder / "config.json").read_text())
    config.get("text_config", config).pop("layer_types", None)
    config.get("text_config", config).update(changes)
    (folder / "config.json").write_text(json.dumps(config))
    return load_policy(ModelConfig(path=str(folder), device="cpu"))


WINDOW = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}


@pytest.mark.parametrize("family", [*policies.FAMILIES, "qwen3_vl_moe"])
def test_a_window_is_refused_by_name(family: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=re.escape("use_sliding_window: its layers see 4 tokens")):
        load(tmp_path, family, **WINDOW)


@pytest.mark.parametrize("family", policies.ALL_FAMILIES)
def test_a_window_of_some_layers_is_refused(family: str, tmp_path: Path) -> None:
    kinds = ["full_attention", "sliding_attention"]
    layers = policies.policy(family).num_layers
    with pytest.raises(CheckpointError, match="use_sliding_window"):
        load(tmp_path, family, use_sliding_window=True, sliding_window=4,
             layer_types=[kinds[layer == layers - 1] for layer in range(layers)])


def test_an_unknown_kind_of_layer_is_refused(tmp_path: Path) -> None:
    layers = policies.policy("qwen2_5_vl").num_layers
    with pytest.raises(CheckpointError, match="layers of the kind 'chunked_attention'"):
        load(tmp_path, "qwen2_5_vl", layer_types=["chunked_attention"] * layers)


@pytest.mark.parametrize("changes", [
    {"use_sliding_window": False, "sliding_window": 4},
    {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 99},
    {"use_sliding_window": True, "sliding_window": 1 << 20, "max_window_layers": 0}],
    ids=["off", "of layers that there are not", "longer than any sequence"])
def test_a_window_that_takes_nothing_away_is_trained(changes: dict[str, Any], tmp_path: Path) -> None:
    policy = load(tmp_path, "qwen2_5_vl", **changes)
    prompt = policies.encoded(policy.encoder, [])
    theirs = policies.plain_logits(policy, prompt, [30, 31, 32])
    ours = policies.plain_logits(policies.policy("qwen2_5_vl"), prompt, [30, 31, 32])
    assert torch.allclose(ours, theirs)
