"""ZeRO on two ranks against one process: zero_ranks.py measures once, for all tests here."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import pytest

from tests.support import policies
from tests.support.children import run
from tests.support.paths import PYTHONPATH

STAGES = (1, 2, 3)
ROUNDING = 5e-5
"""Relative, after twenty updates by AdamW in float32. It hangs on the machine: 3e-7 is measured on some
(bench/results/curve.jsonl), and up to 1.7e-5 was seen on one."""


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    pytest.importorskip("deepspeed")
    out = tmp_path_factory.mktemp("zero")
    home = out / "home"
    home.mkdir()
    done = run(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m",
               "tests.distributed.zero_ranks", policies.checkpoint("qwen3_vl"),
               policies.untied_checkpoint("qwen2_5_vl"), out, cwd=home,
               env={**os.environ, "PYTHONPATH": PYTHONPATH, "HOME": str(home)})
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert not [line for line in lines if not line.startswith("{")], "DeepSpeed printed"
    assert not [path for path in home.rglob("*") if path.is_file()], "it left files"
    return {line.pop("case"): line for line in map(json.loads, lines)}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("folder", ["tied", "untied"])
@pytest.mark.parametrize("tower", ["frozen", "trained"])
def test_twenty_uneven_updates(measured: dict, stage: int, folder: str, tower: str) -> None:
    found = measured[f"updates {stage} {folder} {tower}"]
    assert found["loss"] < ROUNDING and found["norm"] < ROUNDING and found["weights"] < 1e-4


@pytest.mark.parametrize("stage", STAGES)
def test_the_guard_leaves_everything_as_it_was(measured: dict, stage: int) -> None:
    """A NaN loss, a NaN gradient of one rank, discarded gradients; then updates go on, in a fresh stage too."""
    found = measured[f"guard {stage}"]
    assert found["kept"] and found["nan"] and found["finite"] and found["fresh"]
    assert found["loss"] < ROUNDING and found["norm"] < ROUNDING and found["weights"] < 1e-4


@pytest.mark.parametrize("stage", [1, 3])
def test_a_state_goes_on_under_other_backends(measured: dict, stage: int) -> None:
    """By way of torch.distributed.checkpoint: into one process, FSDP2 and a fresh ZeRO, and back from each."""
    found = measured[f"exchange {stage}"]
    for name in ("local", "fsdp", "zero", "from_local", "from_fsdp"):
        assert found[f"{name}_state"] == 0.0 and found[f"{name}_loss"] < ROUNDING
        assert found.get(f"{name}_weights", 0.0) < ROUNDING
    assert found["zero_loss"] == found["from_local_loss"] == found["from_fsdp_loss"] == 0.0


@pytest.mark.parametrize("stage", STAGES)
def test_held_weights_and_whole_ones(measured: dict, stage: int) -> None:
    found = measured[f"held {stage}"]
    assert found["covered"] and found["sharded"] and found["difference"] < 1e-5
    assert found["share"] == (0.5 if stage == 3 else 1.0)


@pytest.mark.parametrize("case", ["bfloat16 1", "bfloat16 3", "cpu 2", "cpu 3", "True 3"])
def test_other_weights_and_places(measured: dict, case: str) -> None:
    """bfloat16 weights: nearer to one process than that is to float32. The optimizer in host memory, and gradient
    checkpointing, where ZeRO-3 gathers weights again for a layer: as always."""
    found = measured[case]
    assert found["loss"] < found["own_loss"] + ROUNDING and found["norm"] < found["own_norm"] + ROUNDING
    assert found["kept"] and found["rounded"] and found["goes_on"]
    assert (found["masters"] > 0) == case.startswith("bfloat16")


def test_torch_is_as_it_was(measured: dict) -> None:
    assert measured["process"]["torch_as_it_was"]
