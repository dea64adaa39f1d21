"""How much the completions of a group differ at each position, and weights of their tokens by it (TW-GRPO).

TW-GRPO is arXiv 2505.24718; the formulas are those of its code, `compute_token_importance_kl_logs_uniform`. That code
lets gradients through the weights, and here they are constants, as a weight of a token is.

Letters: M completion tokens, V vocabulary, D hidden, P positions of all groups, R rows of a run, G completions of a
group. `cu_groups` int64 [groups + 1]: group g owns completions cu_groups[g] to cu_groups[g + 1].
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch

from veripo_kernels import linear_torch
from veripo_kernels.grpo import check_cu_seqlens, check_device
from veripo_kernels.linear import check_linear
from veripo_kernels.linear_torch import Head
from veripo_kernels.reference import sequence_index

LARGEST = 11.0
"""Differences of log-probs are cut here, as in the code of TW-GRPO."""
_LOWEST = -1e4
"""Stands for the log-prob of a token that cannot be drawn: two of them do not differ."""


def group_divergence(logits: torch.Tensor, cu_seqlens: torch.Tensor, cu_groups: torch.Tensor) -> torch.Tensor:
    """Divergence [M] of each token's position in its group: the definition of `linear_group_divergence`.

    With l_i the log-probs of the vocabulary at a position in completion i of G, those of a completion that has ended
    before being -log(V), m their mean over i and d_i = m - l_i between -11 and 11: the mean over i of the sum over the
    vocabulary of exp(d_i) - 1 - d_i. It is 0 where all completions have one distribution.

    Args:
        logits: [M, V] over the temperature. cu_seqlens: int [S + 1].
    """
    logprobs = torch.log_softmax(logits, -1).clamp(min=_LOWEST)
    divergence = logits.new_empty(len(logits))
    for first, last in pairwise(cu_groups.tolist()):
        bounds = cu_seqlens[first:last + 1].tolist()
        rows = [logprobs[start:end] for start, end in pairwise(bounds)]
        for position in range(max((len(row) for row in rows), default=0)):
            ended = torch.full_like(logprobs[0], 1 / logits.shape[1]).log()
            known = torch.stack([row[position] if position < len(row) else ended for row in rows])
            gap = (known.mean(0) - known).clamp(-LARGEST, LARGEST)
            value = (torch.expm1(gap) - gap).sum(1).mean()
            for start, row in zip(bounds, rows, strict=False):
                if position < len(row):
                    divergence[start + position] = value
    return divergence


@dataclass(frozen=True)
class _Positions:
    """Tokens sorted by the position in their group that they stand at."""

    rows: torch.Tensor
    """int64 [M]: numbers of the tokens, those of a position together."""
    of_row: torch.Tensor
    """int64 [M]: position of each of `rows`, ascending from 0."""
    present: torch.Tensor
    """int64 [P]: completions that have not ended there."""
    size: torch.Tensor
    """int64 [P]: completions of the group."""


@torch.no_grad()
def linear_group_divergence(hidden: torch.Tensor, head: torch.Tensor, cu_seqlens: torch.Tensor, cu_groups: torch.Tensor,
                            *, temperature: float = 1.0) -> torch.Tensor:
    """`group_divergence` of softmax(hidden @ head.T / temperature), with tiles of the logits in memory, never all.

    Two matrix products with the head, without a gradient; sums are float32 (float64 stays).

    Args:
        hidden: [M, D] at the positions that predict the packed completion tokens. head: [V, D] of the same dtype.
        cu_seqlens: int32 or int64 [S + 1], from 0 to M. cu_groups: int32 or int64 [groups + 1], from 0 to S.

    Returns:
        [M] float32 (float64 for float64), one value for all tokens of a position of a group.

    Raises:
        ValueError: an argument of the wrong shape or type, by name and value.
    """
    check_linear(hidden, head, torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device), temperature)
    check_cu_seqlens(cu_seqlens, hidden)
    check_groups(cu_groups, cu_seqlens)
    dtype = linear_torch.product_dtype(hidden)
    places = _positions(cu_seqlens.to(torch.int64), cu_groups.to(torch.int64), len(hidden))
    found = torch.zeros(len(places.size), dtype=dtype, device=hidden.device)
    for first, last, rows in _runs(places):
        number = places.of_row[rows] - first
        found[first:last] = _run(hidden[places.rows[rows]].to(dtype), Head(head, temperature=temperature), number,
                                 places.present[first:last].to(dtype), places.size[first:last].to(dtype))
    return torch.empty_like(found[places.of_row]).index_copy_(0, places.rows, found[places.of_row])


def _positions(cu_seqlens: torch.Tensor, cu_groups: torch.Tensor, tokens: int) -> _Positions:
    owner = sequence_index(cu_seqlens, tokens)
    place = torch.arange(tokens, device=owner.device) - cu_seqlens[owner]
    group = sequence_index(cu_groups, len(cu_seqlens) - 1)[owner]
    key = group * (tokens + 1) + place
    rows = key.argsort(stable=True)
    values, of_row, present = key[rows].unique_consecutive(return_inverse=True, return_counts=True)
    return _Positions(rows, of_row, present, cu_groups.diff()[values // (tokens + 1)])


def _runs(places: _Positions) -> Iterator[tuple[int, int, slice]]:
    """Whole positions, from and to, and their rows, at most `linear_torch.ROWS` unless one position has more."""
    counts = places.present.tolist()
    first = start = end = 0
    for number, count in enumerate(counts):
        if end > start and end + count - start > linear_torch.ROWS:
            yield first, number, slice(start, end)
            first, start = number, end
        end += count
    if end > start:
        yield first, len(counts), slice(start, end)


def _run(hidden: torch.Tensor, head: Head, number: torch.Tensor, present: torch.Tensor, size: torch.Tensor
         ) -> torch.Tensor:
    """Divergence [P] of positions, `number` int64 [R] that of each row of hidden [R, D]; present, size [P]."""
    ids = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
    total = linear_torch.statistics(hidden, head, ids, entropy=False).logsumexp
    ended, uniform = size - present, -torch.full_like(size, head.vocabulary).log()
    found = torch.zeros_like(size)
    for start in range(0, head.vocabulary, linear_torch.TILE):
        tile = head.weight[start:start + linear_torch.TILE].to(hidden.dtype)
        logprobs = (hidden @ tile.t()).div_(head.temperature).sub_(total[:, None]).clamp_(min=_LOWEST)
        mean = (ended * uniform)[:, None].expand(-1, len(tile)).index_add(0, number, logprobs) / size[:, None]
        of_rows = _spread(mean[number] - logprobs)
        found += torch.zeros_like(size).index_add_(0, number, of_rows) + ended * _spread(mean - uniform[:, None])
    return found / size


def _spread(gap: torch.Tensor) -> torch.Tensor:
    """Sum over the last dimension of exp(d) - 1 - d."""
    gap = gap.clamp_(-LARGEST, LARGEST)
    return (torch.expm1(gap) - gap).sum(-1)


def divergence_weights(divergence: torch.Tensor, cu_seqlens: torch.Tensor, cu_groups: torch.Tensor, *, largest: float
                       ) -> torch.Tensor:
    """Weights [M] from 1, where a group differs least, to `largest`, where it differs most, linear in between.

    A group that differs nowhere has weights of 1.

    Args:
        divergence: [M], of `linear_group_divergence`. largest: at least 1 (the code of TW-GRPO: 1.7).
    """
    if largest < 1:
        raise ValueError(f"largest must be at least 1, got {largest}")
    check_groups(cu_groups, cu_seqlens)
    group = sequence_index(cu_groups, len(cu_seqlens) - 1)[sequence_index(cu_seqlens, len(divergence))]
    ends = divergence.new_zeros(2, len(cu_groups) - 1)
    low = ends[0].scatter_reduce(0, group, divergence, "amin", include_self=False)
    high = ends[1].scatter_reduce(0, group, divergence, "amax", include_self=False)
    return 1 + (largest - 1) * (divergence - low[group]) / (high - low + 1e-8)[group]


def check_groups(cu_groups: torch.Tensor, cu_seqlens: torch.Tensor) -> None:
    """cu_groups bounds groups of the completions that cu_seqlens bounds. Raises ValueError."""
    if cu_groups.ndim != 1 or not len(cu_groups) or cu_groups.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_groups must be int32 or int64 of shape [groups + 1], got {cu_groups.dtype} "
                         f"{list(cu_groups.shape)}")
    check_device("cu_groups", cu_groups, cu_seqlens)
    bounds = cu_groups.tolist()
    if bounds[0] != 0 or bounds[-1] != len(cu_seqlens) - 1 or bounds != sorted(bounds):
        raise ValueError(f"cu_groups must rise from 0 to {len(cu_seqlens) - 1}, the number of completions, got "
                         f"{bounds}")
