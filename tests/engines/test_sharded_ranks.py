"""Two ranks that share a policy (FSDP2, ZeRO) and sample with the real engine: one over both, or one in each."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from tests.support import runs
from tests.support.children import run
from tests.support.paths import PYTHONPATH
from tests.support.run_compare import written
from veripo_fast.run.folder import RunDir

RUN = {"rollout__engine": "vllm", "data__max_prompt_tokens": 512, "rollout__parity_every": 1, "eval__at": "ends",
       "eval__samples": 0, "stages": [{"kind": "grpo"}, {"kind": "dpo"}]}


def trained(folder: Path, **options: object) -> list[dict]:
    """The metrics of a run of two ranks."""
    config = written(runs.config(folder / "run", **RUN, **options), folder)
    done = run(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m",
               "veripo_fast", "train", "--config", str(config), env={**os.environ, "PYTHONPATH": PYTHONPATH})
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in RunDir(folder / "run").metrics.read_text().splitlines()]


@pytest.mark.parametrize(("together", "backend"), [(1, {}), (2, {}),
                                                   (2, {"backend": "deepspeed", "zero_stage": 3}),
                                                   (1, {"backend": "deepspeed", "zero_stage": 1})])
def test_resharding_into_engines(together: int, backend: dict[str, object], tmp_path: Path) -> None:
    """The engine's log-probs are the trainer's after every update: checked by the gate, and again by the loss."""
    steps = trained(tmp_path, rollout__tensor_parallel=together,
                    **{f"distributed__{name}": value for name, value in backend.items()})
    steps = [step for step in steps if step["kind"] == "grpo"]
    assert len(steps) == 2
    assert all(step["engine_parity_max"] < 5e-5 and step["parity_max"] < 5e-5 for step in steps if "parity_max" in step)
    assert all(step["sync_bytes"] > 1e6 for step in steps), "every engine is written whole, because it slept"


@pytest.mark.parametrize(("family", "together"), [("qwen3_5_moe", 2), ("qwen3_vl_moe", 1)])
def test_experts_and_recurrent_layers(family: str, together: int, tmp_path: Path) -> None:
    """By FSDP2, which cuts the experts of a layer into rows of experts."""
    steps = trained(tmp_path, model__path=str(runs.model(family)), rollout__tensor_parallel=together)
    assert all(step["engine_parity_max"] < 5e-5 for step in steps if step["kind"] == "grpo")


def test_a_trained_tower_goes_along(tmp_path: Path) -> None:
    """It is whole on every rank, and each engine has a tower of its own, fed with pixels."""
    steps = trained(tmp_path, model__path=str(runs.model("qwen2_5_vl")), model__freeze_vision=False,
                    rollout__vision="pixels", rollout__tensor_parallel=2)
    assert all(step["engine_parity_max"] < 5e-5 for step in steps if step["kind"] == "grpo")
