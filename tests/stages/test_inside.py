"""Evaluation inside of a stage, the best checkpoint, the early end, and options by part of the model."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import ranks, runs
from tests.support.run_compare import assert_same, records, written
from veripo_fast.config.load import apply_overrides
from veripo_fast.config.schema import Config, EvalConfig, OptimizerConfig
from veripo_fast.distributed.parts import PARTS, part_of
from veripo_fast.errors import ConfigError
from veripo_fast.model.checkpoint_files import resolve_path
from veripo_fast.run.folder import RunDir
from veripo_fast.stages.inside import SCORES, Inside
from veripo_fast.stages.saves import State

OPTIONS = {"eval__every": 1, "eval__every_limit": 3, "eval__keep_best": True, "optimizer__part_norms": True,
           "grpo__steps": 4, "checkpoint__every": 50, "stages": [{"kind": "grpo"}, {"kind": "dpo"}]}


@pytest.fixture(scope="module")
def forks() -> runs.Forks:
    return runs.forks()


def trained(forks: runs.Forks, folder: Path, **options: Any) -> Path:
    folder.mkdir(exist_ok=True)
    ended = forks.run("train", "--config", written(runs.config(folder / "run", **options), folder))
    assert ended.code == 0, ended.output
    return folder / "run"


@pytest.fixture(scope="module")
def whole(forks: runs.Forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(forks, tmp_path_factory.mktemp("whole"), **OPTIONS)


def test_scores_are_in_the_metrics(whole: Path) -> None:
    """Of every step, and those of the last one are what the evaluation behind the stage gives of the same prompts."""
    steps = records(RunDir(whole).metrics)
    for step in steps:
        assert {f"eval_{name}" for name in SCORES} <= step.keys()
        assert 0 <= step["eval_accuracy"] <= 1
    assert (whole / "eval" / "grpo-1_step_000004_greedy.parquet").is_file()


def test_it_changes_nothing_that_is_trained(forks: runs.Forks, whole: Path, tmp_path: Path) -> None:
    """Not one bit of any metric, nor of the weights."""
    plain = trained(forks, tmp_path, **{name: value for name, value in OPTIONS.items()
                                        if not name.startswith("eval") and name != "optimizer__part_norms"})
    for step, other in zip(records(RunDir(whole).metrics), records(RunDir(plain).metrics), strict=True):
        extra = step.keys() - other.keys()
        assert {name: step[name] for name in other} == other
        assert all(name.startswith(("eval_", "grad_norm_")) for name in extra)
    ends = [(run / "checkpoints" / "step_000006" / "model.safetensors").read_bytes() for run in (whole, plain)]
    assert ends[0] == ends[1]


def test_the_best_checkpoint_is_kept(whole: Path) -> None:
    steps = records(RunDir(whole).metrics)
    best = max(step["eval_accuracy"] for step in steps)
    first = next(step["global_step"] for step in steps if step["eval_accuracy"] == best)
    assert resolve_path(str(whole / "checkpoints" / "best")) == whole / "checkpoints" / f"step_{first:06d}"
    assert (whole / "checkpoints" / f"step_{first:06d}" / "manifest.json").is_file()
    state = json.loads((whole / "checkpoints" / "step_000006" / "trainer" / "state.json").read_text())
    assert state["best"] == f"step_{first:06d}" and state["best_score"] == best


@pytest.mark.parametrize("moment", ["rename .*eval/grpo-1_step_000002", "rename .*rollouts/grpo-1/step_000003",
                                    "rename .*tmp-best", "rename .*eval/dpo-1_step_000001"])
def test_killed_and_resumed(moment: str, forks: runs.Forks, whole: Path, tmp_path: Path) -> None:
    path = written(runs.config(tmp_path / "run", **OPTIONS), tmp_path)
    assert forks.run("train", "--config", path, at=moment).code == -signal.SIGKILL
    ended = forks.run("train", "--config", path, "--resume")
    assert ended.code == 0, ended.output
    assert_same(tmp_path / "run", whole)


def test_the_stage_ends_early(forks: runs.Forks, tmp_path: Path) -> None:
    """A policy that does not move is no better in its second evaluation. The next stage begins, killed or not."""
    options = {**OPTIONS, "eval__patience": 2, "eval__keep_best": False, "grpo__learning_rate": 1e-12, "grpo__steps": 9}
    (tmp_path / "a").mkdir()
    path = written(runs.config(tmp_path / "a" / "run", **options), tmp_path / "a")
    ended = forks.run("train", "--config", path)
    assert ended.code == 0 and "grpo-1 ends at step 3 of 9: eval_accuracy was no better" in ended.output, ended.output
    steps = [step["stage"] for step in records(RunDir(tmp_path / "a" / "run").metrics)]
    assert steps.count("grpo-1") == 3 and steps.count("dpo-1") >= 1
    (tmp_path / "b").mkdir()
    path = written(runs.config(tmp_path / "b" / "run", **options), tmp_path / "b")
    assert forks.run("train", "--config", path, at="rename .*tmp-step_000003").code == -signal.SIGKILL
    assert forks.run("train", "--config", path, "--resume").code == 0
    assert_same(tmp_path / "b" / "run", tmp_path / "a" / "run")


def test_two_ranks(forks: runs.Forks, tmp_path: Path) -> None:
    """Norms of parts and rates of parts, over shards as in one process; a trained tower; evaluations of both ranks."""
    options = {**OPTIONS, "model__freeze_vision": False, "optimizer__tower_rate": 0.25, "optimizer__merger_rate": 2.0,
               "optimizer__language_rate": 0.5, "stages": [{"kind": "grpo"}], "grpo__steps": 2}
    ends = []
    for size in (1, 2):
        folder = tmp_path / str(size)
        folder.mkdir()
        ended = ranks.train(size, written(runs.config(folder / "run", **options), folder))
        assert ranks.codes(ended) == [0] * size, ended
        ends.append(folder / "run")
    ranks.assert_close(ends[1], ends[0])
    for row in records(RunDir(ends[1]).metrics):
        parts = [row[f"grad_norm_{part}"] for part in PARTS if f"grad_norm_{part}" in row]
        assert len(parts) == 3 and math.hypot(*parts) == pytest.approx(row["grad_norm"], rel=1e-5)


# -- rules ------------------------------------------------------------------------------------------------------------

def test_what_is_better() -> None:
    values = iter([0.5, 0.4, 0.5, 0.3, 0.2])
    inside = Inside(EvalConfig(every=2, metric="inconsistency_rate", keep_best=True, patience=2),
                    lambda stage, step: dict.fromkeys(SCORES, 0.0) | {"inconsistency_rate": next(values)})
    state = State(step=1)
    assert not inside.due(state)
    state.step = 2
    assert inside.due(state)
    found = []
    for number in range(5):
        inside.scores(state, "s", f"step_{number}")
        found.append((state.best, state.stale, inside.ends(state)))
    assert found == [("step_0", 0, False), ("step_1", 0, False), ("step_1", 1, False), ("step_3", 0, False),
                     ("step_4", 0, False)]


def test_parts() -> None:
    names = {"model.visual.blocks.0.attn.qkv.weight": "tower", "model.visual.pos_embed.weight": "tower",
             "model.visual.merger.linear_fc1.weight": "merger",
             "model.visual.deepstack_merger_list.0.norm.bias": "merger",
             "model.visual.merger.linear_fc1.lora_A.default.weight": "merger",
             "model.language_model.embed_tokens.weight": "language_model", "lm_head.weight": "head",
             "model.language_model.layers.3.mlp.up_proj.lora_B.default.weight": "language_model"}
    assert {name: part_of(name) for name in names} == names


def test_rates_are_multiples() -> None:
    """The first AdamW step moves every weight by its rate: the ratio of two parts' steps is that of their rates."""
    from tests.support import policies
    from veripo_fast.config.inputs import ModelConfig
    from veripo_fast.distributed.backend import LocalBackend
    from veripo_fast.model.policy import load_policy

    policy = load_policy(ModelConfig(path=str(policies.checkpoint("qwen3_vl")), device="cpu", freeze_vision=False))
    backend = LocalBackend(policy.step, policy.all_parameters)
    backend.begin(OptimizerConfig(tower_rate=0.25, merger_rate=3.0, language_rate=0.5), 1e-3)
    before = {name: parameter.detach().clone() for name, parameter in policy.parameters()}
    for _, parameter in policy.parameters():
        parameter.grad = torch.full_like(parameter, 1e-2)
    backend.step(0.0, 1e-3, 1e9)
    for name, parameter in policy.parameters():
        expected = {"tower": 0.25e-3, "merger": 3e-3}.get(part_of(name), 0.5e-3)
        step = (before[name] - parameter.detach()).mean().item()
        assert step == pytest.approx(expected, rel=1e-3), name
    state = backend.optimizer_state()
    assert len([name for name in state if name.startswith("exp_avg/")]) == len(before)


@pytest.mark.parametrize(("options", "message"), [
    ({"eval.keep_best": True}, "keep_best changes nothing while every is null"),
    ({"eval.every": 0}, "every must be greater than 0"),
    ({"eval.every": 5}, "data.eval names no files"),
    ({"eval.every": 5, "eval.metric": "format_rate", "data.eval": ["x"]}, "decides nothing without keep_best"),
    ({"optimizer.tower_rate": 0.1}, "optimizer.tower_rate changes nothing while model.freeze_vision is true"),
    ({"optimizer.language_rate": 0.0}, "language_rate must be greater than 0"),
    ({"optimizer.part_norms": True, "distributed.backend": "deepspeed"}, "part_norms cannot be read from deepspeed"),
])
def test_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        apply_overrides(Config(), options)
