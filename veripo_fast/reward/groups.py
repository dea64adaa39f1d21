"""Rewards and advantages of whole groups, and whether a group says anything."""

from __future__ import annotations

from collections.abc import Sequence
from queue import SimpleQueue
from threading import Thread

import torch
from veripo_kernels import group_advantages

from veripo_fast.config.schema import Config
from veripo_fast.reward.math_answers import math_budget
from veripo_fast.reward.score import score, scores_of, total
from veripo_fast.schedule.timeline import span
from veripo_fast.types import RolloutGroup


def reward_groups(groups: Sequence[RolloutGroup], config: Config) -> None:
    """Fill in accuracy, format, reward and advantage of every completion; those that have a reward keep it."""
    completions = [completion for group in groups for completion in group.completions]
    with math_budget(config.reward.math_seconds_per_batch):
        for group in groups:
            if any(completion.reward is None for completion in group.completions):
                _score_group(group, config)
    if not completions:
        return
    owners = torch.tensor([number for number, group in enumerate(groups) for _ in group.completions])
    rewards = torch.tensor([completion.reward for completion in completions], dtype=torch.float64)
    advantages = group_advantages(rewards, owners, kind=config.grpo.advantage)
    for completion, advantage in zip(completions, advantages.tolist(), strict=True):
        completion.advantage = advantage


class StreamedScores:
    """Scores groups in a thread of its own while others are still sampled: a context manager around the sampling.

    `add` is what an engine calls with each finished group; `wait` returns when all that were added have scores.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._groups: SimpleQueue[RolloutGroup | None] = SimpleQueue()
        self._error: Exception | None = None
        self._ended = False
        self._thread = Thread(target=self._work, name="rewards", daemon=True)

    def __enter__(self) -> StreamedScores:
        if self._config.reward.streamed:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended = True
        self._groups.put(None)

    def wait(self) -> None:
        """Wait for the scores. Raises what went wrong in the thread."""
        self._groups.put(None)
        if self._config.reward.streamed:
            self._thread.join()
        else:
            self._work()
        if self._error is not None:
            raise self._error

    def add(self, number: int, group: RolloutGroup) -> None:
        """Score a group soon."""
        self._groups.put(group)

    def _work(self) -> None:
        with math_budget(self._config.reward.math_seconds_per_batch):
            for group in iter(self._groups.get, None):
                if self._ended:
                    break
                try:
                    with span("score"):
                        _score_group(group, self._config)
                except Exception as error:  # of whatever a reward does; it belongs to the thread that samples
                    self._error = self._error or error


def _score_group(group: RolloutGroup, config: Config) -> None:
    for completion in group.completions:
        scored = score(completion.text, group.prompt, config.reward, group.think_opened)
        completion.accuracy, completion.format = scored.accuracy, scored.format
        completion.reward = total(scored, config.reward)


def has_signal(group: RolloutGroup) -> bool:
    """Whether any completion of the group would move the policy."""
    return any(advantage != 0 for advantage in scores_of(group, "advantage"))
