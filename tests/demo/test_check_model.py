"""`veripo check-model`: what it says of a checkpoint that runs, and of one that does not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.support import policies
from veripo_fast.cli import main
from veripo_fast.config.families import FAMILIES
from veripo_fast.demo import check_model as checking
from veripo_fast.errors import CheckpointError
from veripo_fast.model import delta_layers


@pytest.mark.parametrize("family", policies.ALL_FAMILIES)
def test_a_checkpoint_that_runs(family: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check-model", str(policies.checkpoint(family)), "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert f"{FAMILIES[family].title} ({family})" in text
    assert text.count("log-probs differ by") == 4
    assert text.rstrip().endswith("packed groups agree with the plain forward of transformers in float32")
    assert ("gated delta rule" in text) == bool(FAMILIES[family].delta_class)
    assert ("rollout.engine: torch, vllm" in text) == bool(FAMILIES[family].engine_rules)


def test_bfloat16(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check-model", str(policies.checkpoint("qwen3_5")), "--device", "cpu", "--dtype", "bfloat16"]) == 0
    assert "in bfloat16" in capsys.readouterr().out


def test_an_unknown_family_is_refused_with_what_is_closest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(policies.checkpoint("qwen3_vl"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "qwen3_omni"}))
    assert main(["check-model", str(folder)]) == 2
    assert "is a 'qwen3_omni' checkpoint; veripo trains qwen2_5_vl, " in capsys.readouterr().err


def test_a_leak_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Completions that begin with an empty state, as if their prompt had not been there."""
    def forgetful(*inputs, **options):
        return rule(*inputs[:6])

    rule = delta_layers.delta_rule
    monkeypatch.setattr(delta_layers, "select", lambda device: forgetful)
    with pytest.raises(CheckpointError, match=r"packed groups are off the plain forward by .* on a video"):
        checking.check_model(policies.checkpoint("qwen3_5"), "cpu", "float32")
    assert torch.is_grad_enabled()
