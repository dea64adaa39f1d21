"""Empty inputs of every op in every implementation: no rows, no tokens, no pairs, no completions. Zeros, never NaN.

Letters: M tokens, S completions, B pairs, V vocabulary, D hidden.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from veripo_kernels import (
    copy_slices,
    dispatch,
    dpo_loss,
    gather_logprobs,
    gather_logprobs_fused,
    group_advantages,
    grpo_loss,
    linear_dpo_loss,
    linear_logprobs,
    linear_policy_loss,
    reference,
)

from tests.support.loss_cases import POLICY_LOSSES, PREFERENCE_LOSSES, policy, preference

DEVICE = torch.device("cuda" if torch.cuda.is_available() and not dispatch.interpreted() else "cpu")
BOUNDS = {"no completions": [0], "empty completions": [0, 0, 0]}


def impls(op: str) -> list[Any]:
    return [pytest.param(impl, marks=[pytest.mark.skip(reason=why)] if (why := dispatch.refusal(impl, DEVICE)) else [])
            for impl in dispatch.OPS[op]]


def none(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, device=DEVICE)


IDS = torch.zeros(0, dtype=torch.int64, device=DEVICE)


def assert_nothing(value: torch.Tensor, metrics: dict[str, torch.Tensor], *leaves: torch.Tensor) -> None:
    assert value == 0 and all(metric == 0 for metric in metrics.values()), (value, metrics)
    for leaf, gradient in zip(leaves, torch.autograd.grad(value, leaves, allow_unused=True), strict=True):
        assert gradient is None or (gradient.shape == leaf.shape and not gradient.any())


@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize("name", POLICY_LOSSES)
@pytest.mark.parametrize("impl", [*impls("grpo_loss"), "reference"])
def test_policy_losses(impl: Any, name: str, bounds: str) -> None:
    cu_seqlens, leaf = torch.tensor(BOUNDS[bounds], device=DEVICE), none(0).requires_grad_()
    loss = policy(name, kl_coef=0.1, entropy_coef=0.1)
    options: dict[str, Any] = {"loss": loss, "ref_logprobs": none(0), "rollout_logprobs": none(0), "entropy": none(0)}
    if impl == "reference":
        assert_nothing(*reference.grpo_loss(leaf, none(0), none(len(cu_seqlens) - 1), cu_seqlens, **options), leaf)
    else:
        assert_nothing(*grpo_loss(leaf, none(0), none(len(cu_seqlens) - 1), cu_seqlens, impl=impl, **options), leaf)


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
@pytest.mark.parametrize("impl", [*impls("dpo_loss"), "reference"])
@pytest.mark.parametrize("sums", [False, True])
def test_preference_losses_of_no_pairs(impl: Any, name: str, sums: bool) -> None:
    """The loss of empty completions is that of a log-ratio of 0 (test_dpo_loss.py); of no pairs it is 0."""
    bounds, leaf, ref = torch.tensor([0], device=DEVICE), none(0).requires_grad_(), none(0, 2) if sums else none(0)
    loss = preference(name, nll_coef=0.2)
    if impl == "reference":
        assert_nothing(*reference.dpo_loss(leaf, ref, bounds, loss=loss), leaf)
    else:
        assert_nothing(*dpo_loss(leaf, ref, bounds, loss=loss, impl=impl), leaf)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("impl", impls("linear_policy_loss"))
def test_linear_losses(impl: Any, frozen: bool) -> None:
    leaves = [none(0, 6).requires_grad_(), torch.ones(9, 6, device=DEVICE).requires_grad_(not frozen)]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    for bounds in BOUNDS.values():
        cu_seqlens = torch.tensor(bounds, device=DEVICE)
        for name in ("grpo", "gspo", "dr_grpo"):
            value, metrics, logprobs = linear_policy_loss(
                *leaves, IDS, none(0), none(len(bounds) - 1), cu_seqlens, loss=policy(name, kl_coef=0.1),
                ref_logprobs=none(0), rollout_logprobs=none(0), impl=impl)
            assert_nothing(value, metrics, *wanted)
            assert logprobs.shape == (0,)
    value, metrics, logprobs = linear_dpo_loss(*leaves, IDS, none(0), torch.tensor([0], device=DEVICE), impl=impl)
    assert_nothing(value, metrics, *wanted)
    assert logprobs.shape == (0,)


@pytest.mark.parametrize("impl", impls("gather_logprobs"))
def test_no_rows_of_logits(impl: Any) -> None:
    leaf = none(0, 9).requires_grad_()
    logprobs, entropy = gather_logprobs(leaf, IDS, entropy=True, impl=impl)
    assert logprobs.shape == entropy.shape == (0,)
    (logprobs.sum() + entropy.sum()).backward()
    assert leaf.grad.shape == (0, 9)
    assert [part.shape for part in gather_logprobs_fused(leaf, IDS, none(0), impl=impl)] == [(0,), (0, 9)]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("impl", impls("linear_logprobs"))
def test_no_rows_of_hidden_states(impl: Any, frozen: bool) -> None:
    leaf, head = none(0, 6).requires_grad_(), torch.ones(9, 6, device=DEVICE).requires_grad_(not frozen)
    linear_logprobs(leaf, head, IDS, impl=impl).sum().backward()
    assert leaf.grad.shape == (0, 6) and (frozen or not head.grad.any())


@pytest.mark.parametrize("kind", ["std", "no_std", "leave_one_out", "batch_std"])
@pytest.mark.parametrize("impl", impls("group_advantages"))
def test_no_completions_have_no_advantages(impl: Any, kind: Any) -> None:
    assert group_advantages(none(0), IDS, kind=kind, impl=impl).shape == (0,)


@pytest.mark.parametrize("impl", impls("copy_slices"))
def test_no_slices_and_slices_without_elements(impl: Any) -> None:
    assert copy_slices([], [], impl=impl).tolist() == [0, 0]
    for shape in ((0, 3), (3, 0)):
        assert copy_slices([none(*shape)], [none(*shape)], impl=impl).tolist() == [0, 0]
