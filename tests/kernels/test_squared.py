"""Kimi k1.5's squared log-ratio of a completion (arXiv 2501.12599, section 2.3.2), beside any policy loss.

Letters: M tokens, S completions, V vocabulary, D hidden.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from veripo_kernels import grpo_loss, linear_policy_loss, reference
from veripo_kernels.options import PolicyLoss

from tests.support.loss_cases import POLICY_LOSSES, batch, cu_seqlens, on_device, policy, rand  # noqa: F401 (a fixture)

LENGTHS = (3, 0, 12, 5)
TAU = 0.3


def kimi(**options: Any) -> PolicyLoss:
    """The loss of the paper but for a constant: a sum over tokens, a mean over completions."""
    return PolicyLoss("gpg", aggregation="constant", constant_length=1, squared_coef=TAU, **options)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_it_is_the_equation_of_the_paper(impl: str) -> None:
    """-(1/k) sum over j of (r_j - mean r) log pi(y_j) - (tau/2) (log pi(y_j) / pi_i(y_j))^2, and its gradient."""
    case, dtype = batch(LENGTHS), torch.float64 if impl == "torch" else torch.float32
    value, _, (gradient,) = case.run(kimi(), dtype, impl)
    leaf = case.policy.detach().clone().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for start, end, advantage in zip(case.cu_seqlens, case.cu_seqlens[1:], case.advantages, strict=False):
        logprob, old = leaf[start:end].sum(), case.old[start:end].sum()
        total = total - (advantage * logprob - TAU / 2 * (logprob - old).square()) / len(LENGTHS)
    total.backward()
    exact = {"rtol": 1e-12, "atol": 1e-12} if impl == "torch" else {"rtol": 3e-6, "atol": 3e-6}
    torch.testing.assert_close(value.double(), total.detach(), **exact)
    torch.testing.assert_close(gradient.double(), leaf.grad, **exact)
    assert (leaf.grad - -case.advantages.repeat_interleave(torch.tensor(LENGTHS)) / 4).abs().max() > 0.05


@pytest.mark.parametrize("aggregation", ["sequence", "token", "constant"])
@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_the_slopes_in_closed_form_are_autograds(name: str, aggregation: Any) -> None:
    """In float64, under every loss, with engine weights and a mask of parts."""
    case = batch(LENGTHS, rollout=True, ref=True)
    mask = rand(len(case.policy), seed=9).abs().clamp(max=1) * (rand(len(case.policy), seed=8) > -0.5)
    loss = policy(name, aggregation=aggregation, squared_coef=TAU, kl_coef=0.2, importance="token_truncate",
                  importance_floor=0.7, importance_cap=1.2)
    leaf = case.policy.detach().clone().requires_grad_()
    owner = reference.sequence_index(case.cu_seqlens, len(leaf))
    terms = reference.policy_terms(leaf, case.old, case.advantages[owner], case.cu_seqlens, mask, loss,
                                   ref_logprobs=case.named["ref_logprobs"],
                                   rollout_logprobs=case.named["rollout_logprobs"], entropy=None)
    weights = reference.token_weights(case.cu_seqlens, mask, loss)
    if name != "gspo_token":  # whose value is another than what its gradient is of
        want, = torch.autograd.grad(reference.weighted_sum(terms.loss, weights), leaf)
        torch.testing.assert_close(reference.policy_slopes(terms, weights, case.cu_seqlens).detach(), want, rtol=1e-10,
                                   atol=1e-12)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_before_the_policy_has_moved_it_changes_nothing(impl: str) -> None:
    case = batch(LENGTHS, old=False)
    dtype = torch.float32
    plain = case.run(PolicyLoss("gpg", aggregation="constant", constant_length=1), dtype, impl)
    squared = case.run(kimi(), dtype, impl)
    assert torch.equal(plain[0], squared[0]) and torch.equal(plain[2][0], squared[2][0])


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("rows", [2, 100])
def test_a_completion_without_an_advantage_is_pulled_back_too(impl: str, rows: int) -> None:
    """The fused loss forms the gradient of all tokens then, those of whole completions together."""
    tokens, vocabulary, width = sum(LENGTHS), 70, 8
    hidden, head = rand(tokens, width).float(), rand(vocabulary, width, seed=1).float()
    ids = torch.arange(tokens) * 3
    bounds = cu_seqlens(LENGTHS)
    old = reference.linear_logprobs(hidden, head, ids) + rand(tokens, seed=2, scale=0.2).float()
    advantages = torch.tensor([1.0, 0.0, 0.0, -1.0])
    hidden.requires_grad_()
    loss, _, _ = linear_policy_loss(hidden, head, ids, old, advantages, bounds, loss=kimi(), impl=impl,
                                    workspace_bytes=rows * 512)
    loss.backward()
    leaf = hidden.detach().double().requires_grad_()
    logprobs = reference.linear_logprobs(leaf, head.double(), ids)
    want, _ = grpo_loss(logprobs, old.double(), advantages.double(), bounds, loss=kimi(), impl="torch")
    want.backward()
    torch.testing.assert_close(hidden.grad.double(), leaf.grad, rtol=1e-4, atol=1e-5)
    assert leaf.grad[3:15].abs().max() > 0.01  # of the completion whose advantage is 0


def test_a_negative_weight_is_refused() -> None:
    with pytest.raises(ValueError, match=r"squared_coef must be 0 or larger, got -1"):
        PolicyLoss(squared_coef=-1)
