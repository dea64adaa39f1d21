"""Slopes that stand beside the formulas, for kernels to use, against autograd of the values beside them, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from veripo_kernels import formulas

from tests.support.loss_cases import PREFERENCE_LOSSES, preference, rand

TOKENS = 400


def slope_of(function: Callable[[torch.Tensor], torch.Tensor], at: torch.Tensor) -> torch.Tensor:
    leaf = at.clone().requires_grad_()
    return torch.autograd.grad(function(leaf).sum(), leaf)[0]


def assert_same(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert want.abs().max() > 0


@pytest.mark.parametrize(("clip_high", "dual_clip"), [(0.3, 1e30), (0.3, 1.5), (-0.1, 1.3), (-0.3, 1.3)])
def test_clip_slope(clip_high: float, dual_clip: float) -> None:
    """Also where the upper bound lies below 1, and below the lower one."""
    log_ratio, advantage = rand(TOKENS), rand(TOKENS, seed=1)

    def clip(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return formulas.clip_surrogate(x, advantage, 0.2, clip_high, dual_clip)

    _, slope, low, high = clip(log_ratio)
    assert_same(slope, slope_of(lambda x: clip(x)[0], log_ratio))
    assert ((slope == 0) == (low | high)).all() and low.any() and high.any() and not (low & high).any()


def test_cispo_slope_is_by_the_logprob_alone() -> None:
    logprob, log_ratio, advantage = rand(TOKENS), rand(TOKENS, seed=2), rand(TOKENS, seed=1)
    _, slope, low, high = formulas.cispo_surrogate(logprob, log_ratio, advantage, 0.5)
    assert_same(slope, slope_of(lambda x: formulas.cispo_surrogate(x, log_ratio, advantage, 0.5)[0], logprob))
    torch.testing.assert_close(slope, -log_ratio.exp().clamp(max=1.5) * advantage)
    assert high.any() and not low.any()


def test_sapo_slope() -> None:
    log_ratio, advantage = rand(TOKENS), rand(TOKENS, seed=1)
    _, slope, _, _ = formulas.sapo_surrogate(log_ratio, advantage, 1.0, 1.4)
    assert_same(slope, slope_of(lambda x: formulas.sapo_surrogate(x, advantage, 1.0, 1.4)[0], log_ratio))
    at_one = formulas.sapo_surrogate(torch.zeros(2), torch.tensor([1.0, -1.0]), 1.0, 1.4)[1]
    assert at_one.tolist() == [-1.0, 1.0]  # the gate is scaled so that on-policy it is REINFORCE


def test_vespo_slope_is_by_the_logprob_alone() -> None:
    logprob, log_weight, advantage = rand(TOKENS), rand(TOKENS, seed=2, scale=8.0), rand(TOKENS, seed=1)
    numbers = (2.0, 3.0, 3.0, 2.0)
    _, slope, low, high = formulas.vespo_surrogate(logprob, log_weight, advantage, *numbers)
    assert_same(slope, slope_of(lambda x: formulas.vespo_surrogate(x, log_weight, advantage, *numbers)[0], logprob))
    weight = log_weight.clamp(math.log(1e-8), 20).exp()
    k, decay = (torch.where(advantage >= 0, *pair) for pair in ((2.0, 3.0), (3.0, 2.0)))
    torch.testing.assert_close(slope, -weight ** k * torch.exp(decay * (1 - weight)) * advantage)
    assert not (low | high).any()
    too_large = formulas.vespo_surrogate(logprob, torch.full_like(logprob, 15.0), advantage, 10.0, 1e-9, 10.0, 1e-9)[1]
    assert (too_large == 0).all()


def test_reinforce_and_squared_slopes() -> None:
    logprob, advantage = rand(TOKENS), rand(TOKENS, seed=1)
    _, slope, low, high = formulas.reinforce_surrogate(logprob, advantage)
    assert_same(slope, slope_of(lambda x: formulas.reinforce_surrogate(x, advantage)[0], logprob))
    assert not (low | high).any()
    for counted in (8.0, 0.25):  # tokens that a completion counts; fewer than 1 are divided by 1
        count = torch.full_like(logprob, counted)
        _, slope = formulas.squared_log_ratio(logprob, count)
        assert_same(slope, slope_of(lambda x, n=count: n * formulas.squared_log_ratio(x, n)[0], logprob))


@pytest.mark.parametrize(("kind", "alpha"), [("forward_kl", 0.5), ("js", 0.5), ("alpha", 0.4), ("alpha", 3.0)])
def test_divergence_slope(kind: str, alpha: float) -> None:
    log_ratio = rand(TOKENS, scale=3.0)
    value, slope = formulas.divergence_score(log_ratio, alpha, kind)
    assert_same(slope, slope_of(lambda x: formulas.divergence_score(x, alpha, kind)[0], log_ratio))
    assert (slope > 0).all()
    ratio = log_ratio.exp()
    torch.testing.assert_close(value, {"forward_kl": 1 - 1 / ratio, "js": (2 * ratio / (1 + ratio)).log(),
                                       "alpha": (ratio ** (alpha - 1) - 1) / (alpha - 1)}[kind])
    assert formulas.divergence_score(torch.zeros(1), alpha, kind)[0].abs() < 1e-7


def test_alpha_divergence_is_flat_far_away() -> None:
    value, slope = formulas.divergence_score(torch.tensor([39.0, 1e5]), 3.0, "alpha")
    assert value.isfinite().all() and slope[0] > 1e30 and slope[1] == 0


def test_gmpo_cuts_where_it_says() -> None:
    log_ratio, advantage = rand(TOKENS), rand(TOKENS, seed=1)
    cut, low, high = formulas.gmpo_log_ratio(log_ratio, advantage, -0.4, 0.5)
    slope = slope_of(lambda x: formulas.gmpo_log_ratio(x, advantage, -0.4, 0.5)[0], log_ratio)
    assert (slope == 1 - (low | high).double()).all() and low.any() and high.any()
    assert (cut[low] == -0.4).all() and (cut[high] == 0.5).all()
    assert torch.equal(cut[~(low | high)], log_ratio[~(low | high)])


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_kl_slope(kind: str) -> None:
    policy, ref = rand(TOKENS), rand(TOKENS, seed=1)
    _, slope = formulas.kl_penalty(policy, ref, kind)
    assert_same(slope, slope_of(lambda x: formulas.kl_penalty(x, ref, kind)[0], policy))


def test_importance_weight() -> None:
    logs = torch.tensor([-3.0, -0.1, 0.0, 0.5, 2.0, torch.nan, torch.inf, -torch.inf], dtype=torch.float64)
    inside = [torch.tensor(value, dtype=torch.float64).exp().item() for value in (-0.1, 0.0, 0.5)]
    truncated = formulas.importance_weight(logs, 0.5, 2.0, "truncate").tolist()
    assert truncated == pytest.approx([0.5, *inside, 2.0, 1.0, 2.0, 0.5])
    assert formulas.importance_weight(logs, 0.5, 2.0, "mask").tolist() == pytest.approx([0, *inside, 0, 1, 0, 0])


def test_logsigmoid_far_away() -> None:
    x = torch.tensor([-1e4, -90.0, -39.9, -1.0, 0.0, 30.0, 1e4], dtype=torch.float32)
    torch.testing.assert_close(formulas.logsigmoid(x), torch.nn.functional.logsigmoid(x), rtol=2e-7, atol=1e-7)
    assert slope_of(formulas.logsigmoid, x).isfinite().all()
    assert slope_of(formulas.logsigmoid, torch.zeros(1)).item() == 0.5


@pytest.mark.parametrize(("name", "smoothing"), [*((name, 0.0) for name in PREFERENCE_LOSSES if name != "exo"),
                                                 ("sigmoid", 0.2), ("robust", 0.2), ("exo", 0.1), ("exo", 0.3)])
def test_preference_slopes(name: str, smoothing: float) -> None:
    loss = preference(name, dpo_beta=0.4, label_smoothing=smoothing)
    chosen, rejected = rand(TOKENS, scale=4.0), rand(TOKENS, seed=1, scale=4.0)

    def value(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return formulas.preference_loss(a, b, loss.dpo_beta, loss.label_smoothing, loss.discopop_tau, name)[0]

    _, up, down = formulas.preference_loss(chosen, rejected, loss.dpo_beta, loss.label_smoothing,
                                           loss.discopop_tau, name)
    assert_same(up, slope_of(lambda x: value(x, rejected), chosen))
    assert_same(down, slope_of(lambda x: value(chosen, x), rejected))
