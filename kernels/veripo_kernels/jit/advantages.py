"""Triton body of group_advantages: each program compares a few completions with all others.

So members of a group may stand anywhere, and nothing asks the device how many groups there are: S * S comparisons in
one launch, and S is thousands at most. Letters: S completions.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from veripo_kernels.jit import Sm90Case

_ROWS = 16
_COLUMNS = 128


@triton.jit
def _group_sums(rewards, group_ids, group, base, mean, S, SQUARE: tl.constexpr, ROWS: tl.constexpr,
                COLUMNS: tl.constexpr):
    """Sums [ROWS] of reward - base - mean, or of its square, over the members of group [ROWS]."""
    sums = tl.zeros([ROWS, COLUMNS], rewards.dtype.element_ty)
    for start in range(0, S, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        same = group[:, None] == tl.load(group_ids + column, mask=column < S, other=-1)[None, :]
        reward = tl.load(rewards + column, mask=column < S, other=0.0)
        gap = reward[None, :] - base[:, None] - mean[:, None]
        if SQUARE:
            gap *= gap
        sums += tl.where(same, gap, 0.0)
    return tl.sum(sums, 1)


@triton.jit
def _all_spread(rewards, S, COLUMNS: tl.constexpr):
    """Standard deviation (S - 1) of all rewards; those less the first one are centred, then squared."""
    first = tl.load(rewards)
    sums = tl.zeros([COLUMNS], rewards.dtype.element_ty)
    for start in range(0, S, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        sums += tl.where(column < S, tl.load(rewards + column, mask=column < S, other=0.0) - first, 0.0)
    mean = tl.sum(sums, 0) / S
    squares = tl.zeros([COLUMNS], rewards.dtype.element_ty)
    for start in range(0, S, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        gap = tl.load(rewards + column, mask=column < S, other=0.0) - first - mean
        squares += tl.where(column < S, gap * gap, 0.0)
    return tl.sqrt(tl.sum(squares, 0) / tl.maximum(S - 1, 1))


@triton.jit(do_not_specialize=["S"], do_not_specialize_on_alignment=["rewards", "group_ids"])
def advantages_kernel(rewards, group_ids, advantages, S, eps, KIND: tl.constexpr, ROWS: tl.constexpr,
                      COLUMNS: tl.constexpr):
    """Advantages of ROWS completions, in the dtype of rewards."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    group = tl.load(group_ids + row, mask=row < S, other=-2)
    reward = tl.load(rewards + row, mask=row < S, other=0.0)
    low = tl.full([ROWS, COLUMNS], float("inf"), reward.dtype)
    members = tl.zeros([ROWS, COLUMNS], reward.dtype)
    for start in range(0, S, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        same = group[:, None] == tl.load(group_ids + column, mask=column < S, other=-1)[None, :]
        other = tl.load(rewards + column, mask=column < S, other=0.0)[None, :]
        low = tl.minimum(low, tl.where(same, other, float("inf")))
        members += same.to(reward.dtype)
    # Differences from the lowest reward are exact zeros in a group of equals, and then so is their mean.
    base = tl.where(row < S, tl.min(low, 1), 0.0)
    count = tl.maximum(tl.sum(members, 1), 1.0)
    others = tl.maximum(count - 1.0, 1.0)
    mean = _group_sums(rewards, group_ids, group, base, tl.zeros_like(base), S, False, ROWS, COLUMNS) / count
    result = reward - base - mean
    if KIND == "std":
        squares = _group_sums(rewards, group_ids, group, base, mean, S, True, ROWS, COLUMNS)
        result = result / (tl.sqrt(squares / others) + eps)
    if KIND == "leave_one_out":
        result = result * (count / others)
    if KIND == "batch_std":
        result = result / (_all_spread(rewards, S, COLUMNS) + eps)
    tl.store(advantages + row, result, mask=row < S)


def forward(rewards: torch.Tensor, group_ids: torch.Tensor, kind: str, eps: float) -> torch.Tensor:
    """Advantages [S] of contiguous rewards [S] float32 or float64 and group_ids [S]."""
    advantages = torch.empty_like(rewards)
    if len(rewards):
        with torch.cuda.device_of(rewards):
            advantages_kernel[(triton.cdiv(len(rewards), _ROWS),)](
                rewards, group_ids, advantages, len(rewards), eps, KIND=kind, ROWS=_ROWS, COLUMNS=_COLUMNS, num_warps=4)
    return advantages


SM90_CASES: list[Sm90Case] = [
    {"name": f"{kind}_{dtype}", "kernel": advantages_kernel,
     "signature": {"rewards": f"*{dtype}", "group_ids": "*i64", "advantages": f"*{dtype}", "S": "i32", "eps": "fp32"},
     "constexprs": {"KIND": kind, "ROWS": _ROWS, "COLUMNS": _COLUMNS}, "divisible_by_16": ("advantages",),
     "num_warps": 4, "num_stages": 3, "wgmma": False}
    for kind, dtype in (("std", "fp32"), ("no_std", "fp32"), ("leave_one_out", "fp32"), ("batch_std", "fp32"),
                        ("std", "fp64"))]
