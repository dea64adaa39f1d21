"""The advantage with a memory (EMA-GRPO) against numbers worked by hand, and through whole runs that are killed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import policies, runs
from tests.support.run_compare import assert_resumes
from veripo_fast.config.inputs import DataConfig
from veripo_fast.config.objectives import GrpoConfig
from veripo_fast.config.plans import PlanConfig
from veripo_fast.config.schema import Config
from veripo_fast.errors import ConfigError
from veripo_fast.recipes.moving import task_of, task_std
from veripo_fast.stages.saves import read_state

OWNERS = torch.tensor([0, 0, 1, 1])


def given(*rewards: float) -> torch.Tensor:
    return torch.tensor(rewards, dtype=torch.float64)


def test_each_task_is_divided_by_its_own_std() -> None:
    values, moments = task_std(given(1, 0, 0.6, 0.4), OWNERS, ["number", "box"], {}, eps=0.0)
    assert moments == {"number": [0.5, 0.5], "box": pytest.approx([0.5, 0.26])}
    assert values.tolist() == pytest.approx([1, -1, 1, -1])  # sigma 0.5 and 0.1


def test_moments_move_before_they_are_used() -> None:
    before = {"number": [0.5, 0.5]}
    values, after = task_std(given(1, 0, 1, 1), OWNERS, ["number", "number"], before, decay=0.9, eps=0.0)
    assert after["number"] == pytest.approx([0.9 * 0.5 + 0.1 * 0.75] * 2)
    sigma = (0.525 - 0.525 ** 2) ** 0.5
    assert values.tolist() == pytest.approx([0.5 / sigma, -0.5 / sigma, 0, 0])
    assert before == {"number": [0.5, 0.5]}


def test_a_task_that_is_not_in_the_step_stays() -> None:
    _, after = task_std(given(1, 0, 1, 0), OWNERS, ["number", "number"], {"box": [0.2, 0.1]})
    assert after["box"] == [0.2, 0.1] and set(after) == {"box", "number"}


def test_a_group_beyond_the_guard_takes_its_own_std() -> None:
    narrow = {"number": [0.5, 0.25]}  # sigma 0 before this step
    values, _ = task_std(given(1, 0, 1, 1), OWNERS, ["number", "number"], narrow, decay=0.999, eps=0.0)
    assert values.tolist() == pytest.approx([0.5 ** 0.5, -0.5 ** 0.5, 0, 0])


def test_equal_rewards_give_exactly_nothing() -> None:
    values, _ = task_std(given(0.3, 0.3, 0.1, 0.1), OWNERS, ["a", "b"], {})
    assert values.tolist() == [0, 0, 0, 0]


def test_a_task_is_a_field_or_a_key_of_the_record() -> None:
    prompt = policies.prompt_of("1+1?", problem_type="number", gold="2", data_source="clevrer", side='{"level": 3}')
    assert [task_of(prompt, by) for by in ("problem_type", "data_source", "level", "place")] == [
        "number", "clevrer", "3", "none"]


@pytest.mark.parametrize("options", [{"decay": 1.0}, {"decay": -0.1}, {"guard": 0.0}, {"eps": -1.0}])
def test_options_out_of_range(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="task_std needs decay in"):
        task_std(given(1, 0, 1, 0), OWNERS, ["a", "a"], {}, **options)


def test_what_a_configuration_refuses() -> None:
    by = GrpoConfig(advantage="task_std", advantage_options={"by": "level"})
    with pytest.raises(ConfigError, match=r"advantage_options.by level is read of the records; name it in "):
        Config(grpo=by)
    assert Config(grpo=by, data=DataConfig(keep_keys=("level",))).grpo is by
    plan = PlanConfig(wordings=2, pairing="all")
    with pytest.raises(ConfigError, match=r"plan.pairing all takes the advantage over two kinds of groups"):
        Config(grpo=GrpoConfig(advantage="task_std"), plan=plan,
               data=DataConfig(keep_keys=(plan.question_key, plan.wordings_key)))


@pytest.mark.parametrize("changes", [{}, {"plan__refill": 1, "rollout__group_size": 2}], ids=["plain", "refill"])
def test_killed_and_resumed_it_remembers(tmp_path: Path, changes: dict[str, Any]) -> None:
    whole, _ = assert_resumes(tmp_path, "rename .*tmp-step_000002", lambda run: runs.config(
        run, stages=[{"kind": "grpo"}], eval__at="never", grpo__steps=3, grpo__prompts_per_step=4,
        grpo__advantage="task_std", checkpoint__keep=9, **changes))
    states = [read_state(whole / "checkpoints" / f"step_00000{step}") for step in (1, 2, 3)]
    assert states[0].moments and states[0].moments != states[1].moments
    assert states[2].moments == {}  # of the next stage
