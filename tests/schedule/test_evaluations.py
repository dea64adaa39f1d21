"""Evaluations in the memory ledger: inside of a stage, behind it, and with a judge that runs in the process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support import judges, policies, runs
from veripo_fast.config.load import apply_overrides
from veripo_fast.config.schema import Config
from veripo_fast.errors import ConfigError
from veripo_fast.report.memory import memory_table
from veripo_fast.report.run_data import load_run
from veripo_fast.run.folder import RunDir
from veripo_fast.schedule.hardware import H100_SXM
from veripo_fast.schedule.judge import judge_shapes, judging_owners
from veripo_fast.schedule.ledger import predict
from veripo_fast.schedule.phase import Phase
from veripo_fast.schedule.shapes import read_shape
from veripo_fast.trainer import train

GIB = 1 << 30


def phases(gpu_bytes: int = 0, ranks: int = 1, **changes: Any) -> dict[str, Phase]:
    """Of the one stage of a run on a tiny Qwen3-VL."""
    options = {"stages": [{"kind": "grpo"}], "data.eval": ["heldout.jsonl"], "data.max_prompt_tokens": 500,
               "model.path": str(policies.checkpoint("qwen3_vl"))}
    config = apply_overrides(Config(), options | {name.replace("__", "."): value for name, value in changes.items()})
    found = predict(read_shape(policies.checkpoint("qwen3_vl")), config, ranks, gpu_bytes=gpu_bytes,
                    judges=judge_shapes(config))["grpo-1"]
    return {phase.name: phase for phase in found}


def test_which_evaluations_there_are() -> None:
    assert "evaluation" in phases() and "eval" not in phases()
    assert "evaluation" not in phases(eval__at="never") and "evaluation" not in phases(data__eval=[])
    both = phases(eval__every=5)
    assert list(both) == ["load", "vision", "rollout", "update", "eval", "checkpoint", "evaluation"]
    only = phases(eval__every=5, eval__at="never")
    assert "eval" in only and "evaluation" not in only


def test_one_inside_of_a_stage_stands_beside_adamw() -> None:
    moments = {"eval__every": 1, "eval__every_limit": 64, "eval__samples": 0}
    found = phases(**moments)
    inside, behind = found["eval"].device, found["evaluation"].device
    extra = {owner: count for owner, count in inside.items() if behind.get(owner) != count}
    assert extra == {"AdamW's moments": found["update"].device["AdamW's moments"]}
    one = phases(**moments, grpo__steps=1)
    assert one["eval"].device["AdamW's moments"] and "AdamW's moments" not in one["rollout"].device
    away = phases(gpu_bytes=80 * GIB, **moments, optimizer__offload=True)["eval"]
    assert "AdamW's moments" not in away.device and away.host["offloaded AdamW"]


def test_what_makes_one_larger() -> None:
    def cached(name: str, **changes: Any) -> int:
        phase = phases(eval__every=1, **changes)[name]
        return phase.device["prompt cache"] + phase.device["completion cache"]

    assert cached("evaluation", eval__samples=8) > cached("evaluation", eval__samples=4)
    assert cached("evaluation", eval__prompts_per_batch=128) == 2 * cached("evaluation")
    assert cached("evaluation", eval__limit=16) < cached("evaluation")
    assert cached("eval", eval__samples=8) == cached("eval"), "inside of a stage it is greedy"
    assert cached("eval", eval__every_limit=48) * 4 == cached("eval") * 3
    assert cached("evaluation", ranks=4) < cached("evaluation")


def test_a_judge_in_the_process_is_an_owner() -> None:
    options = {"eval.judge": "llm", "eval.judge_options": {"llm_path": str(judges.judge_folder())}}
    wanted = judging_owners(judge_shapes(apply_overrides(Config(), options)).popitem()[1], 4, 0)
    small = {name.replace(".", "__"): value for name, value in options.items()} | {
        "eval__every": 1, "eval__every_limit": 1, "eval__limit": 1, "eval__samples": 0, "video__min_frames": 2,
        "video__max_frames": 2,
        "video__max_pixels": 4096, "video__min_pixels": 1024, "rollout__max_new_tokens": 2}
    for name in ("eval", "evaluation"):
        found = phases(**small)[name].device
        assert wanted.items() <= found.items() and "prompt cache" not in found


@pytest.mark.parametrize(("changes", "words"), [
    ({"eval__prompts_per_batch": 10_000_000, "eval__samples": 3},
     r"in its phase evaluation, .*lower eval\.prompts_per_batch \(now 10000000\) or eval\.samples \(now 3\)"),
    ({"eval__prompts_per_batch": 10_000_000, "eval__at": "never", "eval__every": 1, "eval__every_limit": 9_000_000},
     r"in its phase eval, .*lower eval\.prompts_per_batch \(now 10000000\) or eval\.every_limit \(now 9000000\)")])
def test_one_that_does_not_fit_names_its_options(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        train(runs.config(tmp_path / "run", stages=[{"kind": "grpo"}], **changes))
    assert not (tmp_path / "run").exists()


def test_a_judge_that_does_not_fit_names_its_options() -> None:
    from veripo_fast.schedule.admission import Excess, refusal

    shape = read_shape(policies.checkpoint("qwen3_vl"))
    excess = Excess("grpo-1", Phase("evaluation", {"judge weights": 9}), "cpu", 9, 1, "judge weights", 9)
    assert "take a smaller judge (llm_path in eval.judge_options), or eval.judge endpoint" in refusal(
        excess, apply_overrides(Config(), {"stages": [{"kind": "grpo"}]}), shape, 1)


def test_a_plan_counts_them() -> None:
    from veripo_fast.schedule.costs import Rates
    from veripo_fast.schedule.planner import plan

    options = {"stages": [{"kind": "grpo"}], "data.eval": ["heldout.jsonl"], "eval.prompts_per_batch": 1_000_000}
    made = plan(read_shape(policies.checkpoint("qwen3_vl")), apply_overrides(Config(), options), 1, H100_SXM,
                Rates.assumed(H100_SXM), {})
    [stage] = made.stages
    assert not made.fits and stage.excess is not None and stage.excess.phase.name == "evaluation"


def test_a_run_notes_what_they_took(tmp_path: Path) -> None:
    made = runs.config(tmp_path / "run", stages=[{"kind": "grpo"}], grpo__steps=2, eval__every=1, eval__samples=0)
    train(made)
    lines = [json.loads(line) for line in RunDir(tmp_path / "run").memory.read_text().splitlines()]
    assert [(line["stage"], "evaluation" in line["peak_bytes"], "update" in line["peak_bytes"]) for line in lines] == [
        ("start", True, False), ("grpo-1", False, True), ("grpo-1", True, False)]
    assert lines[0]["predicted"].keys() == lines[2]["predicted"].keys() == {"evaluation"}
    assert {"load", "eval", "checkpoint"} <= lines[1]["peak_bytes"].keys() <= {*lines[1]["predicted"], "sync", "reward",
                                                                               "parity"}
    for line, name in ((lines[0], "evaluation"), (lines[1], "eval"), (lines[2], "evaluation")):
        owners = line["predicted"][name]["device"]
        assert {"weights", "tower"} <= owners.keys() and min(owners.values()) > 0  # how near: bench_ledger.py
        assert line["peak_bytes"][name] > owners["weights"]
    table = memory_table(load_run(tmp_path / "run"))
    assert table is not None and table.rows[0][:2] == ["start", "evaluation"]
