"""What is said and done when chosen completions become less likely than under the reference."""

import logging
from dataclasses import replace

import pytest

from tests.support import runs
from veripo_fast.config.schema import Config
from veripo_fast.errors import ConfigError, TrainingError
from veripo_fast.run.metrics import read_records
from veripo_fast.stages.guard import ChosenGuard
from veripo_fast.trainer import train


def guard(records=(), **options):
    config = Config()
    return ChosenGuard("dpo-1", replace(config, dpo=replace(config.dpo, guard_drift=0.1, **options)), records)


def test_a_fall_is_said_once(caplog):
    with caplog.at_level(logging.WARNING):
        one = guard()
        assert [one.observe({"chosen_drift": drift}) for drift in (0.0, -0.1, -0.11, 0.2, -0.5)] == [{}] * 5
        assert one.of_step().dpo.nll_coef == 0 and one.observe({}) == {}
    [line] = [record.getMessage() for record in caplog.records]
    assert line == ("dpo-1: chosen completions have become less likely than under the reference, by 0.11 nats per "
                    "token (dpo.guard_drift 0.1); lower dpo.learning_rate, raise dpo.dpo_beta or dpo.nll_coef, or take "
                    "dpo.guard nll")
    with caplog.at_level(logging.WARNING):
        guard([{"chosen_drift": -0.2}, {"chosen_drift": 0.0}]).observe({"chosen_drift": -0.3})
    assert len(caplog.records) == 1, "a resumed stage has said it before"


def test_a_likelihood_term_while_they_lie_low():
    one = guard(guard="nll", guard_nll=0.5, nll_coef=0.25)
    assert one.of_step().dpo.nll_coef == 0.25 and one.observe({"chosen_drift": -0.2}) == {"guarded": 0.0}
    assert one.of_step().dpo.nll_coef == 0.75 and one.observe({"chosen_drift": -0.05}) == {"guarded": 1.0}
    assert one.of_step().dpo.nll_coef == 0.25
    resumed = guard([{"chosen_drift": 0.0}, {"chosen_drift": -0.2}], guard="nll", guard_nll=0.5)
    assert resumed.of_step().dpo.nll_coef == 0.5
    resumed.observe({})  # a skipped step says nothing
    assert resumed.of_step().dpo.nll_coef == 0.5


def test_the_end_of_a_run():
    with pytest.raises(TrainingError, match=r"dpo-1: chosen completions .* by 0.2 nats .*, and dpo.guard is stop"):
        guard(guard="stop").observe({"chosen_drift": -0.2})
    with pytest.raises(ConfigError, match="guard_nll changes nothing while guard is none"):
        guard(guard_nll=2.0)


def test_the_term_acts_in_a_run(tmp_path):
    """From the step after the fall on, and only with `nll`: a learning rate that throws the policy far."""
    made = {}
    for name in ("none", "nll"):
        options = {"dpo__guard": name, "dpo__guard_drift": 1e-4, "dpo__learning_rate": 3e-3, "dpo__max_steps": 4,
                   "dpo__pairs_per_step": 1, "eval__at": "never", "stages": [{"kind": "grpo"}, {"kind": "dpo"}]}
        train(runs.config(tmp_path / name, **options))
        made[name] = [row for row in read_records(tmp_path / name / "metrics.jsonl") if row["kind"] == "dpo"]
    low = [row["chosen_drift"] < -1e-4 for row in made["nll"]]
    assert any(low[:-1]), "no step fell, so nothing is tested"
    assert [row["guarded"] for row in made["nll"]] == [0.0, *map(float, low[:-1])]
    first = low.index(True)
    assert [row["loss"] for row in made["none"]][:first + 1] == [row["loss"] for row in made["nll"]][:first + 1]
    assert made["none"][first + 1]["loss"] != made["nll"][first + 1]["loss"]
    assert "guarded" not in made["none"][0]
