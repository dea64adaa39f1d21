"""Rewards and advantages of whole groups, and whether a group says anything."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from veripo_kernels import group_advantages

from veripo_fast.config.schema import Config
from veripo_fast.reward.math_answers import math_budget
from veripo_fast.reward.score import score, scores_of, total
from veripo_fast.types import RolloutGroup


def reward_groups(groups: Sequence[RolloutGroup], config: Config) -> None:
    """Fill in accuracy, format, reward and advantage of every completion."""
    completions = [completion for group in groups for completion in group.completions]
    with math_budget(config.reward.math_seconds_per_batch):
        for group in groups:
            _score_group(group, config)
    if not completions:
        return
    owners = torch.tensor([number for number, group in enumerate(groups) for _ in group.completions])
    rewards = torch.tensor([completion.reward for completion in completions], dtype=torch.float64)
    advantages = group_advantages(rewards, owners, kind=config.grpo.advantage)
    for completion, advantage in zip(completions, advantages.tolist(), strict=True):
        completion.advantage = advantage


def _score_group(group: RolloutGroup, config: Config) -> None:
    for completion in group.completions:
        scored = score(completion.text, group.prompt, config.reward, group.think_opened)
        completion.accuracy, completion.format = scored.accuracy, scored.format
        completion.reward = total(scored, config.reward)


def has_signal(group: RolloutGroup) -> bool:
    """Whether any completion of the group would move the policy."""
    return any(advantage != 0 for advantage in scores_of(group, "advantage"))
