"""An advantage with a memory: rewards over the std of their task, which moves from step to step.

Source: EMA-GRPO of OneThinker (arXiv 2512.03043). Tasks whose rewards differ much and tasks whose rewards differ little
then pull alike, and a group is not blown up because its own rewards happen to lie close together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from veripo_kernels import group_advantages

from veripo_fast.errors import ConfigError
from veripo_fast.recipes.view import side_of
from veripo_fast.types import Prompt

Moments: TypeAlias = dict[str, list[float]]
"""By task: the moving means of its rewards and of their squares."""
PROBLEM_TYPE = "problem_type"
FIELDS = (PROBLEM_TYPE, "data_source")
"""What a task can be beside a key of the records."""


def task_std(rewards: torch.Tensor, group_ids: torch.Tensor, tasks: Sequence[str], moments: Moments, *,
             by: str = PROBLEM_TYPE, decay: float = 0.99, guard: float = 5.0, eps: float = 1e-6
             ) -> tuple[torch.Tensor, Moments]:
    """(r - mean of the group) / (sigma of the task + eps), with sigma^2 = m2 - m1^2 and m <- decay * m + (1 - decay) *
    mean over this step's rewards of the task. The moments move before they are used; those of a new task begin at its
    first step's. A group in which an advantage would exceed `guard` takes its own std.

    Args:
        rewards: float64 [S]. group_ids: int64 [S], 0 to groups - 1.
        tasks: of each group. moments: before this step; they stay as they are.
        by: what a task is, see `task_of`.

    Returns:
        float64 [S] and the moments after this step.

    Raises:
        ConfigError: an option is out of its range.
    """
    if not (0 <= decay < 1 and guard > 0 and eps >= 0):
        raise ConfigError("grpo.advantage task_std needs decay in [0, 1), guard above 0 and eps of 0 or more, got "
                          f"decay {decay}, guard {guard}, eps {eps}")
    names = [tasks[number] for number in group_ids.tolist()]
    after = dict(moments)
    for task in sorted(set(names)):
        own = rewards[[name == task for name in names]]
        seen = [own.mean().item(), own.square().mean().item()]
        after[task] = [decay * old + (1 - decay) * new for old, new in zip(moments.get(task, seen), seen, strict=True)]
    sigma = {task: max(second - first * first, 0.0) ** 0.5 for task, (first, second) in after.items()}
    scale = torch.tensor([sigma[name] + eps for name in names], dtype=rewards.dtype)
    advantages = group_advantages(rewards, group_ids, kind="no_std") / scale
    wild = torch.zeros(len(tasks), dtype=torch.bool)
    wild[group_ids[advantages.abs() > guard]] = True
    return torch.where(wild[group_ids], group_advantages(rewards, group_ids, kind="std", eps=eps), advantages), after


def task_of(prompt: Prompt, by: str) -> str:
    """Of a prompt: its `problem_type`, its `data_source`, or the record's own value of a key; `none` without."""
    if by in FIELDS:
        return str(getattr(prompt, by))
    value = side_of(prompt).get(by)
    return "none" if value is None else str(value)
