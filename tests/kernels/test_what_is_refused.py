"""Arguments that would turn a loss around or be misread, and derivatives that would be zeros, are refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad
from veripo_kernels import (
    PolicyLoss,
    dispatch,
    dpo_loss,
    grpo_loss,
    linear_dpo_loss,
    linear_policy_loss,
    reference,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() and not dispatch.interpreted() else "cpu")
IMPLS = ["torch", "triton"]


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


BOUNDS = torch.tensor([0, 2, 2, 3, 4], device=DEVICE)
"""Four completions of four tokens, one of them empty: the shape of the advantages does not say what they are."""
GAINS = torch.tensor([1.0, -3.0, 0.5, 2.0], device=DEVICE)
IDS = torch.arange(4, device=DEVICE)
HIDDEN, HEAD = rand(4, 6, seed=1), rand(9, 6, seed=2)


def linear_policy(gains: torch.Tensor, impl: str, **options: Any) -> Any:
    return linear_policy_loss(HIDDEN, HEAD, IDS, None, gains, BOUNDS, impl=impl, **options)[0]  # type: ignore[arg-type]


def policy(gains: torch.Tensor, impl: str, **options: Any) -> Any:
    logprobs = reference.linear_logprobs(HIDDEN, HEAD, IDS)
    if impl == "reference":
        return reference.grpo_loss(logprobs, None, gains, BOUNDS, **options)[0]
    return grpo_loss(logprobs, None, gains, BOUNDS, impl=impl, **options)[0]  # type: ignore[arg-type]


OPS = [(linear_policy, impl) for impl in IMPLS] + [(policy, impl) for impl in (*IMPLS, "reference")]


# -- counts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [-3, 0])
@pytest.mark.parametrize("name", ["num_sequences", "num_tokens"])
@pytest.mark.parametrize(("op", "impl"), OPS)
def test_counts_below_1_of_a_policy_loss(op: Callable[..., Any], impl: str, name: str, count: int) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got {count}"):
        op(GAINS, impl, advantages_per="sequence", **{name: count})


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
@pytest.mark.parametrize("pairs", [-1, 0])
def test_counts_below_1_of_a_preference_loss(pairs: int, impl: str) -> None:
    with pytest.raises(ValueError, match=f"num_pairs must be at least 1, got {pairs}"):
        if impl == "reference":
            reference.dpo_loss(rand(4), rand(4), BOUNDS, num_pairs=pairs)
        else:
            dpo_loss(rand(4), rand(4), BOUNDS, num_pairs=pairs, impl=impl)  # type: ignore[arg-type]
    if impl != "reference":
        with pytest.raises(ValueError, match=f"num_pairs must be at least 1, got {pairs}"):
            linear_dpo_loss(HIDDEN, HEAD, IDS, rand(4), BOUNDS, num_pairs=pairs, impl=impl)  # type: ignore[arg-type]


@pytest.mark.parametrize("length", [-16, 0])
def test_constant_length_below_1(length: int) -> None:
    for loss in ("dr_grpo", "grpo"):
        with pytest.raises(ValueError, match="constant_length"):
            PolicyLoss(loss, constant_length=length)  # type: ignore[arg-type]


# -- advantages ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("op", "impl"), OPS)
def test_as_many_completions_as_tokens(op: Callable[..., Any], impl: str) -> None:
    """Nobody says what the advantages are: refused. Said: the loss of [M] that are written out, or of the tokens."""
    with pytest.raises(ValueError, match="say advantages_per='sequence' or 'token'"):
        op(GAINS, impl)
    spread = torch.stack([GAINS[0], GAINS[0], GAINS[2], GAINS[3]])
    by_token = op(spread, impl, advantages_per="token")
    torch.testing.assert_close(op(GAINS, impl, advantages_per="sequence"), by_token)
    assert not torch.isclose(op(GAINS, impl, advantages_per="token"), by_token)


@pytest.mark.parametrize(("op", "impl"), OPS)
def test_advantages_of_another_shape_than_said(op: Callable[..., Any], impl: str) -> None:
    with pytest.raises(ValueError, match=r"advantages must have shape \[4\]"):
        op(GAINS[:3], impl, advantages_per="sequence")
    with pytest.raises(ValueError, match="advantages_per must be 'sequence' or 'token', got 'completion'"):
        op(GAINS, impl, advantages_per="completion")


def test_two_completions_of_two_tokens() -> None:
    """The least for which the shape does not say it: one completion owns both tokens."""
    bounds = torch.tensor([0, 2, 2], device=DEVICE)
    gains = torch.tensor([1.0, -3.0], device=DEVICE)
    with pytest.raises(ValueError, match="say advantages_per='sequence' or 'token'"):
        reference.told_apart(gains, bounds, 2, None)
    assert reference.told_apart(gains, bounds, 2, "sequence").tolist() == [1.0, 1.0]
    assert reference.told_apart(gains, bounds, 2, "token").tolist() == [1.0, -3.0]


def test_shapes_that_say_it_need_no_word() -> None:
    bounds = torch.tensor([0, 3, 4], device=DEVICE)
    for gains in (GAINS[:2], GAINS):
        assert grpo_loss(rand(4), None, gains, bounds)[0].isfinite()
    one = torch.tensor([0, 1], device=DEVICE)
    assert grpo_loss(rand(1), None, GAINS[:1], one)[0].isfinite()
    with pytest.raises(ValueError, match=r"advantages must have shape \[2\], got \[4\]"):
        grpo_loss(rand(4), None, GAINS, bounds, advantages_per="sequence")


# -- derivatives of others (those of the ops: test_transforms.py) ------------------------------------------------------


def test_forward_mode_through_the_copied_keys_is_refused() -> None:
    from veripo_fast.model.packed_attention import copy_keys, varlen_plan
    from veripo_fast.model.shared_prefix import GroupSpan

    plan = varlen_plan((GroupSpan(0, 2, (1, 1)),), torch.device("cpu"))
    keys = torch.randn(4, 1, 2)
    with pytest.raises(NotImplementedError, match="forward mode"), forward_ad.dual_level():
        copy_keys(forward_ad.make_dual(keys, keys), plan)
