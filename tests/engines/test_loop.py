"""The whole loop with vLLM, through the command line: train, kill, resume, evaluate, interrupt."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from tests.support import policies, runs
from tests.support.run_compare import assert_same, records, written
from veripo_fast.run.folder import RunDir

VLLM = {"rollout__engine": "vllm", "data__max_prompt_tokens": 512}


@pytest.fixture(scope="module")
def forks() -> runs.Forks:
    return runs.forks()


@pytest.fixture(scope="module")
def whole(forks: runs.Forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    ended = forks.run("train", "--config", written(runs.config(folder / "run", **VLLM), folder))
    assert ended.code == 0, ended.output
    return folder / "run"


def test_a_run(whole: Path) -> None:
    """Log-probs are the trainer's at every step, and no weights are moved."""
    steps = [json.loads(line) for line in RunDir(whole).metrics.read_text().splitlines()]
    grpo = [step for step in steps if step["kind"] == "grpo"]
    assert len(grpo) == 4 and len(steps) > 4
    assert all(step["sync_bytes"] == 0 for step in grpo if "sync_bytes" in step)
    assert all(step["parity_max"] < 5e-5 for step in grpo if "parity_max" in step)
    assert grpo[0]["engine_parity_max"] < 5e-5 and "engine_parity_max" not in grpo[1]
    assert {"sync", "rollout", "parity"} <= set(grpo[0]["seconds"])
    assert len(records(RunDir(whole).evals)) == 8


def test_no_video_is_decoded_or_encoded_again(forks: runs.Forks, whole: Path, tmp_path: Path) -> None:
    """The engine decodes nothing and has no tower, so the counts are those of the torch engine, and of all work."""
    config = written(runs.config(tmp_path / "run", data__max_prompt_tokens=512), tmp_path)
    assert forks.run("train", "--config", config).code == 0
    one, other = ([json.loads(line) for line in RunDir(run).metrics.read_text().splitlines()]
                  for run in (whole, tmp_path / "run"))
    for name in ("video_decodes", "tower_runs", "cache_hits"):
        assert [step.get(name) for step in one if step["stage"] == "grpo-1"] == [
            step.get(name) for step in other if step["stage"] == "grpo-1"]
    assert sum(step.get("tower_runs", 0) for step in one) <= len(
        (runs.corpus() / "train.jsonl").read_text().splitlines()) - 1, "one for each prompt with media"


@pytest.mark.parametrize("moment", ["rename .*rollouts/grpo-1/step_000001", r"mkdir .*\.tmp-step_000001$",
                                    "rename .*eval/grpo-2_greedy"])
def test_killed_and_resumed(moment: str, forks: runs.Forks, whole: Path, tmp_path: Path) -> None:
    """The next step is bitwise that of a run that was never killed."""
    config = written(runs.config(tmp_path / "run", **VLLM), tmp_path)
    assert forks.run("train", "--config", config, at=moment).code == -signal.SIGKILL
    ended = forks.run("train", "--config", config, "--resume")
    assert ended.code == 0, ended.output
    assert_same(tmp_path / "run", whole)


@pytest.mark.parametrize("family", policies.NEW_FAMILIES)
def test_each_family_killed_and_resumed(family: str, forks: runs.Forks, tmp_path: Path) -> None:
    """The engine's log-probs are the trainer's at every step, and the run ends with the bits of one without a kill."""
    options = VLLM | {"model__path": str(runs.model(family)), "rollout__parity_every": 1, "eval__at": "ends",
                      "eval__samples": 0}
    (tmp_path / "whole").mkdir()
    whole = written(runs.config(tmp_path / "whole" / "run", **options), tmp_path / "whole")
    ended = forks.run("train", "--config", whole)
    assert ended.code == 0, ended.output
    config = written(runs.config(tmp_path / "run", **options), tmp_path)
    assert forks.run("train", "--config", config, at="rename .*rollouts/grpo-1/step_000001").code == -signal.SIGKILL
    ended = forks.run("train", "--config", config, "--resume")
    assert ended.code == 0, ended.output
    assert_same(tmp_path / "run", tmp_path / "whole" / "run")
    steps = [step for step in records(RunDir(tmp_path / "run").metrics) if step["kind"] == "grpo"]
    assert len(steps) == 4 and all(step["engine_parity_max"] < 5e-5 for step in steps)
    assert all(step["sync_bytes"] == 0 for step in steps if "sync_bytes" in step)


def test_sigterm_while_sampling_saves(forks: runs.Forks, whole: Path, tmp_path: Path) -> None:
    config = written(runs.config(tmp_path / "run", **VLLM), tmp_path)
    ended = forks.run("train", "--config", config, at="rename .*rollouts/grpo-1/step_000000", send=signal.SIGTERM)
    assert ended.code == 128 + signal.SIGTERM, ended.output
    assert "--resume goes on" in ended.output
    assert forks.run("train", "--config", config, "--resume").code == 0
    assert_same(tmp_path / "run", whole)


def test_evaluate(forks: runs.Forks, whole: Path, tmp_path: Path) -> None:
    """`veripo eval` with the engine scores the greedy completions that the run's own evaluation scored."""
    config = written(runs.config(tmp_path / "run", **VLLM | {"model__path": str(RunDir(whole).checkpoints / "latest")}),
                     tmp_path)
    ended = forks.run("eval", "--config", config, "--out", tmp_path / "eval")
    assert ended.code == 0, ended.output
    greedy = [record for record in records(tmp_path / "eval" / "evals.jsonl") if record["mode"] == "greedy"]
    last = [record for record in records(RunDir(whole).evals) if record["mode"] == "greedy"][-1]
    assert greedy[0]["accuracy"] == last["accuracy"] and greedy[0]["length_mean"] == last["length_mean"]


def test_a_trained_tower(forks: runs.Forks, tmp_path: Path) -> None:
    """The engine gets pixels, keeps a tower of its own in step, and agrees with the trainer at every step."""
    options = {"model__freeze_vision": False, "rollout__vision": "pixels", "rollout__parity_every": 1,
               "grpo__steps": 3, "eval__at": "never", "stages": [{"kind": "grpo"}]}
    config = written(runs.config(tmp_path / "run", **VLLM | options), tmp_path)
    ended = forks.run("train", "--config", config)
    assert ended.code == 0, ended.output
    steps = records(RunDir(tmp_path / "run").metrics)
    assert len(steps) == 3 and all(step["engine_parity_max"] < 5e-5 for step in steps)


def test_a_stage_cannot_change_the_engine(forks: runs.Forks, tmp_path: Path) -> None:
    path = written(runs.config(tmp_path / "run"), tmp_path)
    path.write_text(path.read_text().replace("grpo.drop_easy: 1.0", "rollout.engine: vllm"))
    ended = forks.run("train", "--config", path)
    assert ended.code == 2 and "rollout.engine holds for the whole run" in ended.output
