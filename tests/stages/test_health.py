"""What a stage says when its rollouts teach nothing: once per stage, counted in every step, the same after a resume."""

from __future__ import annotations

import logging
import math

import pytest

from tests.support import policies, runs
from veripo_fast.errors import TrainingError
from veripo_fast.rollout.torch_engine import TorchEngine
from veripo_fast.run.folder import RunDir
from veripo_fast.run.metrics import read_records
from veripo_fast.stages.grpo import rollout_metrics
from veripo_fast.stages.health import StageHealth
from veripo_fast.trainer import train
from veripo_fast.types import Completion, Prompt, RolloutGroup

PROMPT = Prompt("p", (), "text", "yes")
GRPO_ONLY = {"eval__at": "never", "stages": [{"kind": "grpo"}]}


def group(rewards: list[float], same: bool = False, finished: bool = True) -> RolloutGroup:
    mean = sum(rewards) / len(rewards)
    return RolloutGroup(PROMPT, [
        Completion([7 if same else number], "", [-1.0], "stop" if finished else "length", 0, reward, 0.0, reward,
                   reward - mean) for number, reward in enumerate(rewards)])


GOOD, ZEROS, EQUAL = group([1.0, 0.0]), group([0.0, 0.0]), group([0.5, 0.5])
SAME, UNFINISHED = group([0.5, 0.5], same=True), group([1.0, 0.0], finished=False)


def watch(steps: list[list[RolloutGroup]], records: list[dict] | None = None) -> list[dict]:
    """The metrics of the steps of one stage."""
    health = StageHealth("grpo-1", records or [])
    written = []
    for groups in steps:
        means = rollout_metrics(groups)
        written.append(means | health.observe(groups, means))
    return written


def test_good_steps_say_nothing(caplog) -> None:
    written = watch([[GOOD, ZEROS], [GOOD], [], [group([0.1, 0.0])]])
    assert written[-1].items() >= {"zero_reward_steps": 0, "steps_without_signal": 0, "collapsed_steps": 0}.items()
    assert not caplog.text


@pytest.mark.parametrize(("steps", "counted", "said"), [
    ([[ZEROS, ZEROS]] * 3, {"zero_reward_steps": 3, "collapsed_steps": 0}, "all rewards of a step are 0"),
    ([[EQUAL]] * 6, {"steps_without_signal": 6}, "no group carried a signal for 5 steps"),
    ([[EQUAL]] * 4 + [[GOOD]] + [[EQUAL]] * 4, {"steps_without_signal": 4}, ""),
    ([[EQUAL]] * 4 + [[]] + [[EQUAL]], {"steps_without_signal": 5}, "no group carried a signal for 5 steps"),
    ([[GOOD], [group([-1.0, 1.0])], [GOOD]], {"collapsed_steps": 1}, "reward_mean fell to 0 from 0.50"),
    ([[GOOD], [UNFINISHED], [UNFINISHED]], {"collapsed_steps": 2}, "finished_share fell to 0 from 1.00"),
    ([[SAME, GOOD]], {"collapsed_steps": 0}, ""),
    ([[SAME, SAME], [SAME]], {"collapsed_steps": 2}, "the completions of every group are all the same"),
    ([[group([1.0])]], {"collapsed_steps": 0}, "")], ids=str)
def test_what_is_counted_and_said_once(caplog, steps, counted, said) -> None:
    written = watch(steps)
    assert written[-1].items() >= counted.items()
    assert len(caplog.records) == bool(said) and said in caplog.text


@pytest.mark.parametrize("at", range(8))
def test_a_resumed_stage_counts_and_speaks_as_if_it_had_not_stopped(caplog, at: int) -> None:
    steps = [[GOOD], [EQUAL], [EQUAL], [EQUAL], [EQUAL], [EQUAL], [ZEROS], [UNFINISHED]]
    whole = watch(steps)
    said = [record.message for record in caplog.records]
    caplog.clear()
    first = watch(steps[:at])
    assert first + watch(steps[at:], first) == whole
    assert [record.message for record in caplog.records] == said and len(said) == 3


def test_a_run_that_earns_nothing_says_so(tmp_path, caplog) -> None:
    with caplog.at_level(logging.WARNING):
        untaught = str(policies.checkpoint("qwen3_vl"))
        train(runs.config(tmp_path / "run", model__path=untaught, **GRPO_ONLY))
    assert caplog.text.count("grpo-1: all rewards of a step are 0") == 1
    assert [row["zero_reward_steps"] for row in read_records(RunDir(tmp_path / "run").metrics)] == [1, 2]


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_rollouts_without_log_probs_end_the_run(tmp_path, monkeypatch, value: float) -> None:
    plain = TorchEngine.generate

    def broken(*arguments, **options) -> list[RolloutGroup]:
        groups = plain(*arguments, **options)
        groups[-1].completions[1].rollout_logprobs[0] = value
        return groups

    monkeypatch.setattr(TorchEngine, "generate", broken)
    with pytest.raises(TrainingError, match=r"1 of 16 completions in .*step_000000.parquet have rollout log-probs"):
        train(runs.config(tmp_path / "run", **GRPO_ONLY))
    assert not read_records(RunDir(tmp_path / "run").metrics)
