"""The gated delta rule (arXiv 2412.06464) on sequences side by side: by chunks in torch, and one token at a time.

A head has a state S [dk, dv]. A token with query q, key k, value v, decay g <= 0 and strength b in (0, 1) does

    S <- exp(g) S;   S <- S + b k (v - k^T S)^T;   o = S^T q

on normalised q and k. A chunk of C tokens that begins at S is a triangular system (arXiv 2406.06484, section 3):

    c = cumsum(g);   D_ij = exp(c_i - c_j) for i >= j;   A_ij = b_i (k_i . k_j) D_ij for i > j
    [U, W] = (I + A)^-1 [b v, b exp(c) k];   N = U - W S
    o = exp(c) q S + ((q k^T) * D) N;   S <- exp(c_C) S + (exp(c_C - c) k)^T N

Chunks of all sequences form their systems in one batch; only the two lines with S run chunk after chunk. No sequence is
padded to the length of another: shorter ones drop out of the batch. The sibling is transformers' own function.

Letters: T tokens, S sequences, C tokens in a chunk, N chunks, K key heads, V value heads, R = V / K, d head sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

import torch
from torch.autograd.function import once_differentiable

CHUNK = 64
"""Tokens in a chunk."""
EPSILON = 1e-6
"""In the normalisation of queries and keys, as transformers and fla have it."""

DeltaRule: TypeAlias = Callable[..., tuple[torch.Tensor, torch.Tensor]]
"""`delta_rule`, or what agrees with it."""


@dataclass(frozen=True, eq=False)
class ChunkPlan:
    """Sequences as chunks: the first chunks of all sequences, the longest first, then the second chunks, and so on."""

    rows: torch.Tensor
    """int64 [N * C]: the token at each place; where a chunk is not full, some token."""
    filled: torch.Tensor
    """bool [N, C]: whether a place holds its token."""
    places: torch.Tensor
    """int64 [T]: where each token is in `rows`."""
    order: torch.Tensor
    """int64 [S]: the sequences, longest first."""
    counts: tuple[int, ...]
    """Sequences that have a first chunk, a second, and so on."""


@lru_cache(maxsize=8)
def chunk_plan(lengths: tuple[int, ...], device: torch.device) -> ChunkPlan:
    """The chunks of sequences of `lengths` tokens, all above 0; made once for all layers."""
    sizes = torch.tensor(lengths)
    starts = sizes.cumsum(0) - sizes
    order = torch.argsort(sizes, descending=True, stable=True)
    chunks = -(-sizes[order] // CHUNK)
    counts = tuple(int((chunks > step).sum()) for step in range(int(chunks[0])))
    firsts, fills = [], []
    for step, count in enumerate(counts):
        own = order[:count]
        firsts.append(starts[own] + step * CHUNK)
        fills.append((sizes[own] - step * CHUNK).clamp(max=CHUNK))
    offsets = torch.arange(CHUNK)
    first, fill = torch.cat(firsts)[:, None], torch.cat(fills)[:, None]
    filled = offsets < fill
    rows = torch.where(filled, first + offsets, first).flatten()
    places = torch.empty(int(sizes.sum()), dtype=torch.long)
    taken = filled.flatten().nonzero()[:, 0]
    places[rows[taken]] = taken
    return ChunkPlan(rows.to(device), filled.to(device), places.to(device), order.to(device), counts)


class _Spread(torch.autograd.Function):
    """Tokens [T, ...] -> places [N * C, ...]; what lies at places that are not filled has no gradient."""

    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor, plan: ChunkPlan) -> torch.Tensor:
        ctx.plan = plan
        return tokens.index_select(0, plan.rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad.index_select(0, ctx.plan.places), None


class _Collect(torch.autograd.Function):
    """Places [N * C, ...] -> tokens [T, ...]."""

    @staticmethod
    def forward(ctx: Any, places: torch.Tensor, plan: ChunkPlan) -> torch.Tensor:
        ctx.plan = plan
        return places.index_select(0, plan.places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        plan = ctx.plan
        spread = grad.index_select(0, plan.rows)
        return spread.mul_(plan.filled.view(-1, *[1] * (grad.dim() - 1))), None


def wide(rows: torch.Tensor) -> torch.Tensor:
    """In float32, or as they are in float64."""
    return rows if rows.dtype == torch.float64 else rows.float()


def normalised(rows: torch.Tensor) -> torch.Tensor:
    """Queries or keys [..., d] of length 1, `wide`."""
    rows = wide(rows)
    return rows * torch.rsqrt((rows * rows).sum(-1, keepdim=True) + EPSILON)


def delta_rule(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, decay: torch.Tensor,
               strength: torch.Tensor, lengths: tuple[int, ...], initial: torch.Tensor | None = None,
               ) -> tuple[torch.Tensor, torch.Tensor]:
    """The gated delta rule on sequences that lie one behind the other.

    Args:
        query, key: [T, K, dk], not normalised yet.
        value: [T, V, dv].
        decay, strength: [T, V]: g and b.
        lengths: tokens of each sequence, all above 0; they add up to T.
        initial: float32 [S, V, dk, dv], the state that each sequence begins with; None: zeros.

    Returns:
        [T, V, dv] in the dtype of `value`, and float32 [S, V, dk, dv]: the states behind the last tokens.
    """
    plan = chunk_plan(lengths, query.device)
    key_heads, size = key.shape[1:]
    heads, width = value.shape[1:]
    each = heads // key_heads

    def chunks(tokens: torch.Tensor, *inner: int) -> torch.Tensor:
        """[T, heads, ...] -> [N, K, heads / K, C, ...], `wide`."""
        spread = _Spread.apply(tokens, plan).view(-1, CHUNK, key_heads, tokens.shape[1] // key_heads, *inner)
        return wide(spread.movedim(1, 3))

    queries = chunks(normalised(query) * size ** -0.5, size)
    keys, values = chunks(normalised(key), size), chunks(value, width)
    filled = plan.filled[:, None, None]
    strengths = chunks(strength) * filled
    sums = (chunks(decay) * filled).cumsum(-1)
    lower = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=query.device).tril()
    decays = (sums[..., :, None] - sums[..., None, :]).masked_fill(~lower, float("-inf")).exp()
    system = (keys @ keys.transpose(-1, -2)) * decays * strengths[..., None]
    grown = sums.exp()[..., None]
    wanted = torch.cat([values, keys.expand(-1, -1, each, -1, -1) * grown], -1) * strengths[..., None]
    solved = torch.linalg.solve_triangular(system, wanted, upper=False, unitriangular=True)
    news, reads = solved.split([width, size], -1)
    scores = (queries @ keys.transpose(-1, -2)) * decays
    last = sums[..., -1:]
    written = keys * (last - sums).exp()[..., None]
    state = query.new_zeros(len(lengths), key_heads, each, size, width, dtype=values.dtype)
    if initial is not None:
        state = initial.view_as(state)[plan.order]
    outputs, finals = [], []
    steps = (part.split(plan.counts) for part in (queries * grown, news, reads, scores, written, last.exp()[..., None]))
    for seen, new, read, score, write, left in zip(*steps, strict=True):
        if len(state) > len(new):
            finals.append(state[len(new):])
            state = state[:len(new)]
        corrected = new - read @ state
        outputs.append(seen @ state + score @ corrected)
        state = state * left + write.transpose(-1, -2) @ corrected
    final = torch.cat([state, *reversed(finals)]).flatten(1, 2)
    out = torch.cat(outputs).movedim(3, 1).reshape(-1, heads, width)
    return _Collect.apply(out, plan).to(value.dtype), final[torch.argsort(plan.order)]


def delta_step(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, decay: torch.Tensor,
               strength: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One token of each sequence, by the rule itself.

    Args:
        query, key, value, decay, strength: of S tokens, as `delta_rule` takes them.
        state: float32 [S, V, dk, dv].

    Returns:
        [S, V, dv] in the dtype of `value`, and the new state.
    """
    each = value.shape[1] // key.shape[1]
    queries = (normalised(query) * query.shape[-1] ** -0.5).repeat_interleave(each, 1)[..., None, :]
    keys = normalised(key).repeat_interleave(each, 1)[..., None, :]
    state = state * wide(decay).exp()[..., None, None]
    change = (wide(value)[..., None, :] - keys @ state) * wide(strength)[..., None, None]
    state = state + keys.transpose(-1, -2) * change
    return (queries @ state)[..., 0, :].to(value.dtype), state
