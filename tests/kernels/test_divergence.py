"""Divergence of a group's completions, position by position, and TW-GRPO's weights of their tokens.

The oracle is TW-GRPO's published rule on padded tensors, written anew from its formulas (arXiv 2505.24718, repository
longmalongma/TW-GRPO). Letters: G completions of a group, C padded tokens, V vocabulary, D hidden, M tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from veripo_kernels import linear_torch
from veripo_kernels.divergence import divergence_weights, group_divergence, linear_group_divergence

from tests.support.loss_cases import cu_seqlens, on_device, rand  # noqa: F401 (a fixture)

GROUPS = ((3, 1, 5), (4,), (2, 2), (0, 3))
VOCABULARY, WIDTH = 70, 6


def case(dtype: torch.dtype = torch.float64, scale: float = 1.0) -> tuple[torch.Tensor, ...]:
    """hidden, head, cu_seqlens, cu_groups."""
    lengths = [length for group in GROUPS for length in group]
    bounds = cu_seqlens(lengths)
    return (rand(int(bounds[-1]), WIDTH, scale=scale).to(dtype), rand(VOCABULARY, WIDTH, seed=1).to(dtype), bounds,
            cu_seqlens([len(group) for group in GROUPS]))


def padded_rule(logprobs: torch.Tensor, mask: torch.Tensor, largest: float) -> torch.Tensor:
    """Weights [G, C] of one group, log-probs [G, C, V] and mask [G, C]."""
    known = torch.where(mask[..., None], logprobs, torch.full_like(logprobs, -math.log(logprobs.shape[-1])))
    gap = (known.mean(0, keepdim=True) - known).clamp(-11, 11)
    spread = (gap.exp() - gap - 1).sum(-1).mean(0)
    normal = (spread - spread.min()) / (spread.max() - spread.min() + 1e-8)
    return (1 + (largest - 1) * normal).expand_as(mask)


@pytest.mark.parametrize("scale", [0.1, 1.0, 12.0])
def test_weights_are_those_of_the_published_rule(scale: float) -> None:
    hidden, head, bounds, groups = case(scale=scale)
    got = divergence_weights(linear_group_divergence(hidden, head, bounds, groups, temperature=0.7), bounds, groups,
                             largest=1.7)
    logprobs = torch.log_softmax(hidden @ head.T / 0.7, -1)
    start, want = 0, []
    for lengths in GROUPS:
        rows = logprobs[start:start + sum(lengths)].split(list(lengths))
        start += sum(lengths)
        width = max(lengths)
        mask = torch.arange(width) < torch.tensor(lengths)[:, None]
        full = torch.stack([torch.cat([row, row.new_zeros(width - len(row), VOCABULARY)]) for row in rows])
        want.append(padded_rule(full, mask, 1.7)[mask])
    torch.testing.assert_close(got, torch.cat(want), rtol=1e-9, atol=1e-9)
    assert got.min() >= 1 and got.max() > 1.69


@pytest.mark.parametrize("rows", [1, 4, 2048])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_tiles_give_the_definition(dtype: torch.dtype, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_torch, "TILE", 16)
    monkeypatch.setattr(linear_torch, "ROWS", rows)
    hidden, head, bounds, groups = case(dtype)
    got = linear_group_divergence(hidden, head, bounds, groups, temperature=1.3)
    want = group_divergence(hidden.double() @ head.double().T / 1.3, bounds, groups)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    step = torch.finfo(got.dtype).eps * VOCABULARY
    torch.testing.assert_close(got.double(), want, rtol=4 * step, atol=step)


def test_equal_distributions_do_not_differ_and_a_lone_completion_neither() -> None:
    _, head, bounds, groups = case()
    same = rand(1, WIDTH).expand(int(bounds[-1]), WIDTH)
    found = linear_group_divergence(same, head, bounds, groups)
    alone = slice(9, 13)  # the group of one completion
    assert found[alone].abs().max() < 1e-12
    both = found[13:15]  # positions where both completions of the group are there
    assert both.abs().max() < 1e-12
    assert found[1] > 0  # a completion has ended there, which is uniform
    assert torch.equal(divergence_weights(torch.zeros(int(bounds[-1])), bounds, groups, largest=3.0),
                       torch.ones(int(bounds[-1])))


def test_tokens_that_cannot_be_drawn() -> None:
    logits = torch.tensor([[0.0, 1.0, -torch.inf], [1.0, 0.0, -torch.inf]], dtype=torch.float64)
    found = group_divergence(logits, torch.tensor([0, 1, 2]), torch.tensor([0, 2]))
    gap = torch.tensor([0.5, -0.5], dtype=torch.float64)
    torch.testing.assert_close(found, (torch.expm1(gap) - gap).sum().expand(2))


def test_no_gradient_and_no_tokens() -> None:
    hidden, head, bounds, groups = case()
    assert not linear_group_divergence(hidden.requires_grad_(), head.requires_grad_(), bounds, groups).requires_grad
    nothing = linear_group_divergence(hidden[:0], head, torch.zeros(1, dtype=torch.int64),
                                      torch.zeros(1, dtype=torch.int64))
    assert nothing.shape == (0,)
    assert divergence_weights(nothing, torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64),
                              largest=2.0).shape == (0,)


@pytest.mark.parametrize(("change", "message"), [
    ({"cu_groups": torch.tensor([0, 3])}, r"cu_groups must rise from 0 to 8, the number of completions, got \[0, 3\]"),
    ({"cu_groups": torch.tensor([0, 5, 3, 8])}, "cu_groups must rise from 0 to 8"),
    ({"cu_groups": torch.tensor([0.0, 8.0])}, r"cu_groups must be int32 or int64 of shape \[groups \+ 1\]"),
    ({"temperature": 0.0}, "temperature must be positive and finite, got 0.0"),
])
def test_refusals(change: dict[str, Any], message: str) -> None:
    hidden, head, bounds, groups = case()
    call: Callable[..., Any] = linear_group_divergence
    with pytest.raises(ValueError, match=message):
        call(hidden, head, bounds, **{"cu_groups": groups, **change})


def test_a_largest_weight_below_1() -> None:
    _, _, bounds, groups = case()
    with pytest.raises(ValueError, match=r"largest must be at least 1, got 0.5"):
        divergence_weights(torch.zeros(int(bounds[-1])), bounds, groups, largest=0.5)
