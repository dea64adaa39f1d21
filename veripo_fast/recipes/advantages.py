"""The advantages that are shipped: of S rewards in groups, in one call (definitions: veripo_kernels.reference).

Args of each: rewards float64 [S]; group_ids int64 [S], 0 to groups - 1.
"""

from __future__ import annotations

import torch
from veripo_kernels import group_advantages


def std(rewards: torch.Tensor, group_ids: torch.Tensor, *, eps: float = 1e-6) -> torch.Tensor:
    """(r - mean) / (std + eps) of the group (GRPO)."""
    return group_advantages(rewards, group_ids, kind="std", eps=eps)


def no_std(rewards: torch.Tensor, group_ids: torch.Tensor) -> torch.Tensor:
    """r - mean of the group (Dr. GRPO)."""
    return group_advantages(rewards, group_ids, kind="no_std")


def leave_one_out(rewards: torch.Tensor, group_ids: torch.Tensor) -> torch.Tensor:
    """r - mean of the others of the group (RLOO)."""
    return group_advantages(rewards, group_ids, kind="leave_one_out")


def live_scaled(rewards: torch.Tensor, group_ids: torch.Tensor) -> torch.Tensor:
    """r - mean of the group, times groups / groups whose rewards differ (GPG, arXiv 2504.02546): groups that
    say nothing do not make the step smaller."""
    centred = group_advantages(rewards, group_ids, kind="no_std")
    groups = int(group_ids.max()) + 1 if len(group_ids) else 0
    live = len(group_ids[centred != 0].unique())
    return centred * (groups / max(live, 1))


def batch_std(rewards: torch.Tensor, group_ids: torch.Tensor, *, eps: float = 1e-6) -> torch.Tensor:
    """(r - mean of the group) / (std of all rewards + eps)."""
    return group_advantages(rewards, group_ids, kind="batch_std", eps=eps)
