"""Scores that are given while others are still sampled are the same, and none is lost."""

from __future__ import annotations

import threading
from copy import deepcopy

import pytest

from tests.support import policies
from veripo_fast.config.schema import Config
from veripo_fast.reward import groups as module
from veripo_fast.reward.groups import StreamedScores, reward_groups
from veripo_fast.types import Completion, LoadedPrompt, RolloutGroup


def groups_of(count: int) -> list[RolloutGroup]:
    """Groups of numbers, some of which are right."""
    prompts = [policies.prompt_of("2+2?", prompt_id=f"p{number}", problem_type="math", gold=str(number % 3))
               for number in range(count)]
    return [RolloutGroup(prompt, [
        Completion([1], f"<think>so</think><answer>{answer}</answer>", [0.0], "stop", 0) for answer in range(4)])
        for prompt in prompts]


def test_streamed_scores_are_the_same() -> None:
    plain, streamed = groups_of(8), groups_of(8)
    reward_groups(plain, Config())
    with StreamedScores(Config()) as scores:
        for number, group in list(enumerate(streamed))[::-1]:
            scores.add(number, group)
        scores.wait()
    assert all(row.reward is not None and row.advantage is None for group in streamed for row in group.completions)
    reward_groups(streamed, Config())
    assert streamed == plain


def test_a_group_that_was_not_streamed_is_scored_at_the_end() -> None:
    """An engine that was built again gives no groups on the way."""
    plain, groups = groups_of(3), groups_of(3)
    reward_groups(plain, Config())
    with StreamedScores(Config()) as scores:
        scores.add(0, groups[0])
        scores.add(1, deepcopy(groups[1]))
        scores.wait()
    reward_groups(groups, Config())
    assert groups == plain


def test_scoring_runs_beside_the_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, scored = module._score_group, threading.Event()

    def score(group: RolloutGroup, config: Config, loaded: LoadedPrompt | None) -> None:
        assert threading.current_thread() is not threading.main_thread()
        plain(group, config, loaded)
        scored.set()

    monkeypatch.setattr(module, "_score_group", score)
    with StreamedScores(Config()) as scores:
        scores.add(0, groups_of(1)[0])
        assert scored.wait(60), "nothing was scored before the block ended"


def test_an_error_reaches_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    def score(group: RolloutGroup, config: Config, loaded: LoadedPrompt | None) -> None:
        raise ZeroDivisionError(group.prompt.prompt_id)

    monkeypatch.setattr(module, "_score_group", score)
    with pytest.raises(ZeroDivisionError, match="p0"), StreamedScores(Config()) as scores:
        for number, group in enumerate(groups_of(2)):
            scores.add(number, group)
        scores.wait()


def test_an_interrupt_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = threading.Event()
    monkeypatch.setattr(module, "_score_group", lambda group, config, loaded: blocked.wait(60))
    with pytest.raises(KeyboardInterrupt), StreamedScores(Config()) as scores:
        scores.add(0, groups_of(1)[0])
        raise KeyboardInterrupt
    blocked.set()
