"""Advantages of completions relative to their group, in one launch that nothing waits for. S completions.

Definition: reference.group_advantages.
"""

from __future__ import annotations

from typing import get_args

import torch

from veripo_kernels import reference
from veripo_kernels.derivatives import refuse_transforms
from veripo_kernels.dispatch import Impl, choose
from veripo_kernels.reference import AdvantageKind
from veripo_kernels.scalars import as_tensor


def group_advantages(rewards: torch.Tensor, group_ids: torch.Tensor, *, kind: AdvantageKind = "std",
                     eps: float = 1e-6, impl: Impl = "auto") -> torch.Tensor:
    """Advantage of each completion relative to its group (kinds and sources: `reference.group_advantages`).

    Equal rewards give exact zeros, however they were rounded; sums are centred, so that large rewards lose nothing.

    Args:
        rewards: [S], any float dtype; bfloat16 and float16 are computed in float32.
        group_ids: int64 [S], 0 to groups - 1, each present; groups may be ragged and interleaved.

    Returns:
        [S] float32 (float64 for float64 rewards), without gradient.

    Raises:
        ValueError: wrong shape, dtype, device or kind. RuntimeError: `impl` cannot be used here.
    """
    if rewards.ndim != 1 or not rewards.is_floating_point():
        raise ValueError(f"rewards must be a float tensor of shape [S], got {rewards.dtype} {list(rewards.shape)}")
    if group_ids.dtype != torch.int64 or group_ids.shape != rewards.shape:
        raise ValueError(f"group_ids must be int64 of shape {list(rewards.shape)}, got {group_ids.dtype} "
                         f"{list(group_ids.shape)}")
    if group_ids.device != rewards.device:
        raise ValueError(f"group_ids must be on {rewards.device}, got {group_ids.device}")
    if group_ids.device.type == "cpu" and not torch.compiler.is_compiling() and (group_ids < 0).any():
        raise ValueError(f"group_ids must be 0 or larger, got {int(group_ids.min())}")
    if kind not in get_args(AdvantageKind):
        raise ValueError(f"kind must be one of {', '.join(get_args(AdvantageKind))}, got {kind!r}")
    refuse_transforms("group_advantages", rewards)
    rewards = rewards.detach()
    if rewards.dtype != torch.float64:
        rewards = rewards.float()
    if choose("group_advantages", impl, rewards.device) == "torch":
        return reference.group_advantages(rewards, group_ids, kind=kind, eps=eps)
    return _forward(rewards, group_ids, kind, as_tensor(eps))


@torch.library.custom_op("veripo::group_advantages", mutates_args=())
def _forward(rewards: torch.Tensor, group_ids: torch.Tensor, kind: str, eps: torch.Tensor) -> torch.Tensor:
    from veripo_kernels.jit import advantages as bodies

    return bodies.forward(rewards.contiguous(), group_ids.contiguous(), kind, eps.item())


@_forward.register_fake
def _(rewards: torch.Tensor, group_ids: torch.Tensor, kind: str, eps: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(rewards, memory_format=torch.contiguous_format)
