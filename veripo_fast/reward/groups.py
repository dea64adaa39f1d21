"""Rewards and advantages of whole groups, and whether a group says anything."""

from __future__ import annotations

from collections.abc import Sequence
from queue import SimpleQueue
from threading import Thread

import torch

from veripo_fast.config.objectives import GrpoConfig
from veripo_fast.config.schema import Config
from veripo_fast.errors import TrainingError
from veripo_fast.recipes.moving import PROBLEM_TYPE, Moments, task_of
from veripo_fast.recipes.own import as_column, described, named
from veripo_fast.recipes.tables import ADVANTAGES, MOVING_ADVANTAGES
from veripo_fast.reward.columns import columns_of, total, view_of
from veripo_fast.reward.math_answers import math_budget
from veripo_fast.reward.score import parsed_score, scores_of
from veripo_fast.reward.spans import Parsed, parse_group
from veripo_fast.schedule.timeline import span
from veripo_fast.types import LoadedPrompt, RolloutGroup


def reward_groups(groups: Sequence[RolloutGroup], config: Config, loaded: Sequence[LoadedPrompt | None] = (),
                  moments: Moments | None = None) -> Moments:
    """Fill in accuracy, format, reward and advantage of every completion; those that have a reward keep it.

    Args:
        loaded: the prompts of the groups as the policy reads them, for rewards that look at their media.
        moments: what the advantage remembers of earlier steps.

    Returns:
        What it remembers after these groups, if they are those of a step; empty for an advantage without a memory.

    Raises:
        TrainingError: a function of the user's failed.
    """
    score_groups(groups, config, loaded)
    if not any(group.completions for group in groups):
        return moments or {}
    owners = torch.tensor([number for number, group in enumerate(groups) for _ in group.completions])
    rewards = torch.tensor([value for group in groups for value in scores_of(group, "reward")], dtype=torch.float64)
    values, moments = advantages_of(rewards, owners, groups, config.grpo, moments or {})
    advantages = iter(values)
    for group in groups:
        for completion in group.completions:
            completion.advantage = next(advantages)
    return moments


def score_groups(groups: Sequence[RolloutGroup], config: Config, loaded: Sequence[LoadedPrompt | None] = ()) -> None:
    """As `reward_groups`, without advantages."""
    with math_budget(config.reward.math_seconds_per_batch):
        for group, prompt in zip(groups, loaded or [None] * len(groups), strict=True):
            if any(completion.reward is None for completion in group.completions):
                _score_group(group, config, prompt)
            elif group.contrast is not None and any(row.accuracy is None for row in group.contrast.completions):
                _graded(group.contrast, config)  # the group was stored, and its contrast is not


def advantages_of(rewards: torch.Tensor, owners: torch.Tensor, groups: Sequence[RolloutGroup], config: GrpoConfig,
                  moments: Moments) -> tuple[list[float], Moments]:
    """One number for each reward: of a shipped function in one call, of a user's group by group.

    Args:
        rewards, owners: float64 [S] of all completions in a row, int64 [S] the number of the group of each.
        moments: see `reward_groups`, also for the second value that is returned.
    """
    if config.advantage in MOVING_ADVANTAGES:
        tasks = [task_of(group.prompt, config.advantage_options.get("by", PROBLEM_TYPE)) for group in groups]
        moved, after = MOVING_ADVANTAGES[config.advantage](rewards, owners, tasks, moments, **config.advantage_options)
        return moved.tolist(), after
    function = named(config.advantage, ADVANTAGES)
    if config.advantage in ADVANTAGES:
        return function(rewards, owners, **config.advantage_options).tolist(), {}
    advantages: list[float] = []
    for number, group in enumerate(groups):
        what = f"advantage {config.advantage}, on prompt {group.prompt.prompt_id},"
        try:
            values = function(rewards[owners == number], **config.advantage_options)
        except Exception as error:  # of whatever a user's function does
            raise TrainingError(f"{what} failed: {described(error)}") from error
        advantages += as_column(values, len(group.completions), what)
    return advantages, {}


class StreamedScores:
    """Scores groups in a thread of its own while others are still sampled: a context manager around the sampling.

    `add` is what an engine calls with each finished group; `wait` returns when all groups have scores.

    Args:
        loaded: the prompts that are sampled.
    """

    def __init__(self, config: Config, loaded: Sequence[LoadedPrompt] = ()) -> None:
        self._config = config
        self._loaded = loaded
        self._groups: SimpleQueue[tuple[RolloutGroup, LoadedPrompt | None] | None] = SimpleQueue()
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

    def wait(self, groups: Sequence[RolloutGroup] = ()) -> None:
        """Wait for the scores, and score those of the sampled groups that were not added: an engine that was built
        again adds none. Raises what went wrong in the thread."""
        self._groups.put(None)
        if self._config.reward.streamed:
            self._thread.join()
        else:
            self._work()
        if self._error is not None:
            raise self._error
        if groups:
            score_groups(groups, self._config, self._loaded)

    def add(self, number: int, group: RolloutGroup) -> None:
        """Score a group soon; `number` is that of its prompt among `loaded`."""
        self._groups.put((group, self._loaded[number] if self._loaded else None))

    def _work(self) -> None:
        with math_budget(self._config.reward.math_seconds_per_batch):
            for group, prompt in iter(self._groups.get, None):
                if self._ended:
                    break
                try:
                    with span("score"):
                        _score_group(group, self._config, prompt)
                except Exception as error:  # of whatever a reward does; it belongs to the thread that samples
                    self._error = self._error or error


def _score_group(group: RolloutGroup, config: Config, loaded: LoadedPrompt | None = None) -> None:
    parsed = _graded(group, config)
    if group.contrast is not None:
        _graded(group.contrast, config)
    columns = columns_of(view_of(group, parsed, loaded), config.reward)
    known = {"accuracy": scores_of(group, "accuracy"), "format": scores_of(group, "format"), **columns}
    rewards = total(known, config.reward.terms, len(parsed))
    for number, completion in enumerate(group.completions):
        completion.columns = {name: None if column is None else column[number] for name, column in columns.items()}
        completion.reward = rewards[number]


def _graded(group: RolloutGroup, config: Config) -> list[Parsed]:
    """Fill in accuracy and format of every completion; returns what was read."""
    parsed = parse_group(group)
    for completion, item in zip(group.completions, parsed, strict=True):
        scored = parsed_score(item, group.prompt, config.reward)
        completion.accuracy, completion.format = scored.accuracy, scored.format
    return parsed


def has_signal(group: RolloutGroup) -> bool:
    """Whether any completion of the group would move the policy."""
    return any(advantage != 0 for advantage in scores_of(group, "advantage"))
