"""The definitions against float64 log_softmax, closed forms, and loops over single tokens written out by hand."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from veripo_kernels import formulas, reference
from veripo_kernels.options import PolicyLoss, PreferenceLoss

KINDS = ("std", "no_std", "leave_one_out")


def rand(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- log-probabilities -----------------------------------------------------------------------------------------------


def truth(logits: torch.Tensor, ids: torch.Tensor, temperature: float) -> torch.Tensor:
    return torch.log_softmax(logits.double() / temperature, -1)[torch.arange(len(ids)), ids]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 30.0, 1e4])
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_gather_logprobs_is_log_softmax(dtype: torch.dtype, scale: float, temperature: float) -> None:
    logits = rand(17, 129, scale=scale).to(dtype)
    ids = torch.arange(17) * 7 % 129
    ids[0], ids[1] = logits[0].argmax(), logits[1].argmin()
    got, expected = reference.gather_logprobs(logits, ids, temperature=temperature), truth(logits, ids, temperature)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    unit = torch.finfo(got.dtype).eps  # of the largest number in the subtraction: no exponential may overflow
    assert ((got - expected).abs() <= 8 * unit * (1 + (logits.double().abs().amax(-1) / temperature))).all()


def test_a_certain_and_an_impossible_token() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0]] * 3)
    assert reference.gather_logprobs(logits, torch.tensor([0, 1, 2])).tolist() == [0.0, -2e4, -1e4]


def test_entropy_is_minus_the_mean_logprob() -> None:
    logits = torch.cat([rand(6, 65), rand(2, 65, scale=50.0), torch.full((1, 65), 7.0, dtype=torch.float64)])
    logprobs = torch.log_softmax(logits / 0.7, -1)
    expected = -(logprobs.exp() * logprobs).sum(-1)
    torch.testing.assert_close(reference.entropy(logits, temperature=0.7), expected, rtol=1e-12, atol=1e-12)
    assert expected[-1].item() == pytest.approx(math.log(65))
    half = reference.entropy(logits.bfloat16(), temperature=0.7)
    assert half.dtype == torch.float32
    assert (half - reference.entropy(logits.bfloat16().double(), temperature=0.7)).abs().max() < 1e-5


def test_entropy_of_a_certain_token_is_zero_not_nan() -> None:
    assert reference.entropy(torch.tensor([[1e4, -1e4, -1e4]])).tolist() == [0.0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_linear_logprobs_applies_the_head_first(dtype: torch.dtype) -> None:
    hidden, head, ids = rand(9, 16).to(dtype), rand(40, 16, seed=1).to(dtype), torch.arange(9) * 4
    expected = truth(hidden.double() @ head.double().T, ids, 0.6)  # the products are not rounded to bfloat16
    assert (reference.linear_logprobs(hidden, head, ids, temperature=0.6) - expected).abs().max() < 1e-5


def test_linear_logprobs_gradients() -> None:
    hidden, head = rand(4, 5).requires_grad_(), rand(7, 5, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda h, w: reference.linear_logprobs(h, w, torch.tensor([0, 6, 3, 3]), temperature=0.7), (hidden, head))


# -- advantages ------------------------------------------------------------------------------------------------------


def advantages_by_hand(rewards: list[list[float]], kind: str) -> list[float]:
    out = []
    for group in rewards:
        mean = sum(group) / len(group)
        for number, reward in enumerate(group):
            others = group[:number] + group[number + 1:]
            if kind == "leave_one_out":
                out.append(reward - sum(others) / len(others) if others else 0.0)
                continue
            spread = math.sqrt(sum((r - mean) ** 2 for r in group) / max(len(group) - 1, 1))
            out.append((reward - mean) / (spread + 1e-6) if kind == "std" else reward - mean)
    return out


def grouped(rewards: list[list[float]]) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.repeat_interleave(torch.arange(len(rewards)), torch.tensor([len(group) for group in rewards]))
    return torch.tensor([reward for group in rewards for reward in group], dtype=torch.float64), ids


@pytest.mark.parametrize("kind", KINDS)
def test_advantages_of_ragged_groups(kind: str) -> None:
    rewards = [[1.5, 0.0, 0.5, 1.5], [0.25, 1.0], [0.5], [-3.0, 100.0, 2.0]]
    values, ids = grouped(rewards)
    expected = torch.tensor(advantages_by_hand(rewards, kind), dtype=torch.float64)
    torch.testing.assert_close(reference.group_advantages(values, ids, kind=kind), expected, rtol=1e-9, atol=1e-9)
    order = torch.tensor([9, 3, 0, 6, 5, 1, 8, 2, 7, 4])  # members of a group need not stand together
    torch.testing.assert_close(reference.group_advantages(values[order], ids[order], kind=kind), expected[order],
                               rtol=1e-9, atol=1e-9)


def test_batch_std_divides_by_the_spread_of_all_rewards() -> None:
    values, ids = grouped([[1.5, 0.0, 0.5], [0.25, 1.0]])
    rewards = values.tolist()
    mean = sum(rewards) / 5
    spread = math.sqrt(sum((reward - mean) ** 2 for reward in rewards) / 4)
    centres = [2 / 3] * 3 + [0.625] * 2
    expected = [(reward - centre) / (spread + 1e-6) for reward, centre in zip(rewards, centres, strict=True)]
    assert reference.group_advantages(values, ids, kind="batch_std").tolist() == pytest.approx(expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_and_lone_completions_give_exact_zeros(kind: str, dtype: torch.dtype) -> None:
    rewards = torch.tensor([0.1] * 7 + [1 / 3] * 3 + [0.7] + [1.5, 0.0], dtype=dtype)  # 7 * 0.1 / 7 is not 0.1
    ids = torch.tensor([0] * 7 + [1] * 3 + [2] + [3, 3])
    advantages = reference.group_advantages(rewards, ids, kind=kind)
    assert (advantages[:11] == 0).all()
    assert advantages[11] > 0 > advantages[12]
    assert advantages.dtype == dtype


# -- KL, weights -----------------------------------------------------------------------------------------------------


def kl(policy: torch.Tensor, ref: torch.Tensor, kind: str) -> torch.Tensor:
    return formulas.kl_penalty(policy, ref, kind)[0]


def kl_by_hand(policy: float, ref: float, kind: str) -> float:
    return {"k1": policy - ref, "k2": (policy - ref) ** 2 / 2,
            "k3": math.exp(ref) / math.exp(policy) - 1 - (ref - policy)}[kind]


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_kl_estimates(kind: str) -> None:
    policy, ref = rand(50, scale=2.0), rand(50, seed=1, scale=2.0)
    for p, r, value in zip(policy.tolist(), ref.tolist(), kl(policy, ref, kind).tolist(), strict=True):
        assert value == pytest.approx(kl_by_hand(p, r, kind))
        assert value >= 0 or kind == "k1"
    assert (kl(policy, policy, kind) == 0).all()


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_k1_and_k3_estimate_the_divergence_of_a_distribution(kind: str) -> None:
    policy, ref = torch.log_softmax(rand(30), -1), torch.log_softmax(rand(30, seed=1), -1)
    exact = (policy.exp() * (policy - ref)).sum()
    assert (policy.exp() * kl(policy, ref, kind)).sum().item() == pytest.approx(exact.item())


def weights_by_hand(mask: list[list[int]], aggregation: str, sequences: int, tokens: int, constant: int) -> list[float]:
    share = {"sequence": lambda row: 1 / max(sum(row), 1) / sequences, "token": lambda row: 1 / tokens,
             "constant": lambda row: 1 / sequences / constant}[aggregation]
    return [kept * share(row) for row in mask for kept in row]


def weigher(aggregation: str) -> PolicyLoss:
    return PolicyLoss(aggregation=aggregation, constant_length=8)


def cu_seqlens(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


@pytest.mark.parametrize("aggregation", ["sequence", "token", "constant"])
@pytest.mark.parametrize("mask", [[[1, 1, 1], [1], [1] * 6], [[1, 0, 1], [0], [], [0, 1, 1, 1]]])
def test_token_weights(aggregation: str, mask: list[list[int]]) -> None:
    flat = torch.tensor([float(kept) for row in mask for kept in row])
    weights = reference.token_weights(cu_seqlens([len(row) for row in mask]), flat, weigher(aggregation))
    assert weights.tolist() == pytest.approx(weights_by_hand(mask, aggregation, len(mask), int(flat.sum()), 8))


@pytest.mark.parametrize("aggregation", ["sequence", "token", "constant"])
def test_token_weights_of_micro_batches_add_up_to_the_whole(aggregation: str) -> None:
    lengths = [3, 1, 6, 2, 5]
    whole = reference.token_weights(cu_seqlens(lengths), torch.ones(17), weigher(aggregation))
    parts = [reference.token_weights(cu_seqlens(part), torch.ones(sum(part)), weigher(aggregation), num_sequences=5,
                                     num_tokens=17) for part in (lengths[:2], lengths[2:3], lengths[3:])]
    torch.testing.assert_close(torch.cat(parts), whole)


def test_constant_weights_need_a_length() -> None:
    for options in ({"loss": "dr_grpo"}, {"aggregation": "constant"}):
        with pytest.raises(ValueError, match="constant_length"):
            PolicyLoss(**options)


def test_sequence_sums_stay_inside_their_completion() -> None:
    lengths, values = [3, 1, 0, 4], rand(8)
    bounds = cu_seqlens(lengths).tolist()
    expected = [sum(values[a:b].tolist()) for a, b in pairwise(bounds)]
    assert reference.sequence_sums(values, cu_seqlens(lengths)).tolist() == pytest.approx(expected)
    leaf = values.clone().requires_grad_()
    reference.sequence_sums(leaf, cu_seqlens(lengths))[0].backward()
    assert leaf.grad.tolist() == [1.0] * 3 + [0.0] * 5


# -- GRPO ------------------------------------------------------------------------------------------------------------


def surrogate(log_ratio: float, advantage: float, low: float, high: float, dual: float | None) -> tuple[float, float]:
    """Loss of one token and its derivative by the log-ratio, branch by branch."""
    ratio = math.exp(log_ratio)
    if advantage > 0 and ratio > 1 + high:
        return -(1 + high) * advantage, 0.0
    if advantage < 0 and ratio < 1 - low:
        return -(1 - low) * advantage, 0.0
    if advantage < 0 and dual is not None and ratio > dual:
        return -dual * advantage, 0.0
    return -ratio * advantage, -ratio * advantage


RATIOS = (0.1, 0.79, 0.81, 1.0, 1.15, 1.27, 1.29, 2.9, 3.1, 40.0)
ADVANTAGES = (-2.0, -0.5, 0.0, 0.5, 2.0)


@pytest.mark.parametrize("dual", [None, 3.0])
@pytest.mark.parametrize(("low", "high"), [(0.2, 0.28), (0.2, 0.2), (0.0, 0.0)])
def test_clipped_surrogate_branch_by_branch(dual: float | None, low: float, high: float) -> None:
    cases = [(ratio, advantage) for ratio in RATIOS for advantage in ADVANTAGES
             if (low, ratio) != (0.0, 1.0)]  # exactly on the clip the derivative is not defined
    log_ratios = torch.tensor([math.log(ratio) for ratio, _ in cases], dtype=torch.float64).requires_grad_()
    advantages = torch.tensor([advantage for _, advantage in cases], dtype=torch.float64)
    loss, _, below, above = formulas.clip_surrogate(log_ratios, advantages, low, high, 1e30 if dual is None else dual)
    loss.sum().backward()
    expected = [surrogate(math.log(ratio), advantage, low, high, dual) for ratio, advantage in cases]
    assert loss.tolist() == pytest.approx([value for value, _ in expected], abs=1e-12)
    assert log_ratios.grad.tolist() == pytest.approx([slope for _, slope in expected], abs=1e-12)
    assert (below | above).tolist() == [slope == 0 and advantage != 0
                                        for (_, slope), (_, advantage) in zip(expected, cases, strict=True)]
    low_taken, high_taken = (dict(zip(cases, flags.tolist(), strict=True)) for flags in (below, above))
    assert high_taken[1.29, 2.0] and not high_taken[1.29, -2.0] and low_taken[0.1, -2.0] and not low_taken[0.1, 2.0]
    assert high_taken[3.1, -0.5] == (dual is not None) and not low_taken[3.1, -0.5]


LENGTHS = [4, 1, 7, 3]
NAMES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "gspo", "gspo_token", "gmpo", "luspo", "vespo",
         "cispo_sequence", "sapo_sequence", "gpg")


def grpo_case() -> tuple[torch.Tensor, ...]:
    """policy, old, ref, rollout log-probs, advantages [S], entropy; ratios away from the clip's corners."""
    tokens = sum(LENGTHS)
    old = -rand(tokens).abs()
    policy = old + rand(tokens, seed=1, scale=0.4)
    advantages = torch.tensor([1.2, -0.7, 0.3, -0.9], dtype=torch.float64)
    ref, rollout = policy + rand(tokens, seed=2, scale=0.3), old + rand(tokens, seed=3, scale=0.3)
    return policy, old, ref, rollout, advantages, rand(tokens, seed=4).abs()


def token_losses_by_hand(name: str, policy: list[float], old: list[float], advantage: float) -> list[float]:
    """Surrogate losses of one completion with clip 0.2 and 0.3, sapo temperatures 1 and 1.05."""
    log_ratios = [p - o for p, o in zip(policy, old, strict=True)]
    mean = sum(log_ratios) / len(log_ratios)
    if name.endswith("_sequence"):
        name, log_ratios = name.removesuffix("_sequence"), [mean] * len(log_ratios)
    if name == "vespo":
        k, decay, weight = *((2.0, 3.0) if advantage >= 0 else (3.0, 2.0)), math.exp(sum(log_ratios))
        return [-weight ** k * math.exp(decay * (1 - weight)) * advantage * p for p in policy]
    if name == "gpg":
        return [-advantage * p for p in policy]
    if name == "cispo":
        return [-min(math.exp(x), 1.3) * advantage * p for x, p in zip(log_ratios, policy, strict=True)]
    if name == "sapo":
        heat = 1.0 if advantage > 0 else 1.05
        return [-4 / heat / (1 + math.exp(-heat * (math.exp(x) - 1))) * advantage for x in log_ratios]
    if name.startswith(("gspo", "luspo")):
        return [surrogate(mean, advantage, 0.2, 0.3, None)[0]] * len(policy)
    if name == "gmpo":
        cut = [min(x, math.log(1.3)) if advantage > 0 else max(x, math.log(0.8)) for x in log_ratios]
        return [-math.exp(sum(cut) / len(cut)) * advantage] * len(policy)
    return [surrogate(x, advantage, 0.2, 0.3, None)[0] for x in log_ratios]


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
@pytest.mark.parametrize("name", NAMES)
def test_grpo_loss_is_the_weighted_sum_of_its_tokens(name: str, kind: str) -> None:
    policy, old, ref, _, advantages, entropy = grpo_case()
    loss = PolicyLoss(name, clip_high=0.3, kl_coef=0.3, kl_kind=kind, entropy_coef=0.1, constant_length=8)
    value, metrics = reference.grpo_loss(policy.requires_grad_(), old, advantages, cu_seqlens(LENGTHS), loss=loss,
                                         ref_logprobs=ref, entropy=entropy)
    constant = 1 if name == "luspo" else 8
    weights = weights_by_hand([[1] * length for length in LENGTHS], loss.weighting, 4, sum(LENGTHS), constant)
    surrogates = [token for a, b, advantage in zip(*zip(*pairwise(cu_seqlens(LENGTHS).tolist()), strict=True),
                                                   advantages.tolist(), strict=True)
                  for token in token_losses_by_hand(name, policy[a:b].tolist(), old[a:b].tolist(), advantage)]
    kls = [kl_by_hand(p, r, kind) for p, r in zip(policy.tolist(), ref.tolist(), strict=True)]
    bonuses = entropy.tolist()
    terms = zip(weights, surrogates, kls, bonuses, strict=True)
    total = sum(weight * (token + 0.3 * k - 0.1 * h) for weight, token, k, h in terms)
    assert value.item() == pytest.approx(total)
    assert metrics["kl"].item() == pytest.approx(sum(w * k for w, k in zip(weights, kls, strict=True)))
    assert metrics["entropy"].item() == pytest.approx(sum(w * h for w, h in zip(weights, bonuses, strict=True)))
    assert metrics["ratio_max"].item() == pytest.approx((policy - old).exp().max().item())
    assert metrics["importance"].item() == pytest.approx(sum(weights))
    assert not any(metric.requires_grad for metric in metrics.values())


@pytest.mark.parametrize("importance", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_importance_weighs_the_surrogate_and_not_the_kl(importance: str) -> None:
    policy, old, ref, rollout, advantages, _ = grpo_case()
    rollout[2] = torch.nan
    loss = PolicyLoss("dapo", kl_coef=0.3, importance=importance, importance_floor=0.8, importance_cap=1.1)
    level, treatment = importance.split("_")
    gaps = (old - rollout).nan_to_num(nan=0.0).split(LENGTHS)
    logs = [gap.sum().expand(len(gap)) if level == "sequence" else gap for gap in gaps]
    ratios = [math.exp(value) for log in logs for value in log.tolist()]
    cut = treatment == "truncate"
    expected = [min(max(ratio, 0.8), 1.1) if cut else ratio * (0.8 <= ratio <= 1.1) for ratio in ratios]
    owners = torch.repeat_interleave(advantages, torch.tensor(LENGTHS)).tolist()
    rows = zip(expected, policy.tolist(), old.tolist(), owners, ref.tolist(), strict=True)
    total = sum(weight * surrogate(p - o, a, 0.2, 0.2, None)[0] + 0.3 * kl_by_hand(p, r, "k3")
                for weight, p, o, a, r in rows) / sum(LENGTHS)
    value, metrics = reference.grpo_loss(policy, old, advantages, cu_seqlens(LENGTHS), loss=loss, ref_logprobs=ref,
                                         rollout_logprobs=rollout)
    assert value.item() == pytest.approx(total)
    assert metrics["importance"].item() == pytest.approx(sum(expected) / sum(LENGTHS))


@pytest.mark.parametrize("name", NAMES)
def test_closed_form_slopes_are_the_gradient(name: str) -> None:
    policy, old, ref, rollout, advantages, _ = grpo_case()
    loss = PolicyLoss(name, dual_clip=1.5, kl_coef=0.3, importance="sequence_truncate", constant_length=8)
    mask = (rand(sum(LENGTHS), seed=5) > -0.7).double()
    policy.requires_grad_()
    named = {"ref_logprobs": ref, "rollout_logprobs": rollout}
    value, _ = reference.grpo_loss(policy, old, advantages, cu_seqlens(LENGTHS), loss=loss, loss_mask=mask, **named)
    bounds = cu_seqlens(LENGTHS)
    terms = reference.policy_terms(policy.detach(), old, advantages, bounds, mask, loss, entropy=None, **named)
    slopes = reference.policy_slopes(terms, reference.token_weights(bounds, mask, loss), bounds)
    torch.testing.assert_close(slopes, torch.autograd.grad(value, policy)[0])


@pytest.mark.parametrize("options", [{}, {"loss": "gspo"}, {"loss": "gmpo"}, {"loss": "sapo"}, {"dual_clip": 1.5},
                                     {"kl_coef": 0.3, "kl_kind": "k2"}, {"kl_coef": 0.3}])
def test_grpo_loss_gradients(options: dict) -> None:
    policy, old, ref, _, advantages, entropy = grpo_case()
    loss = PolicyLoss(entropy_coef=0.1, **options)

    def value(p: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        return reference.grpo_loss(p, old, advantages, cu_seqlens(LENGTHS), loss=loss, ref_logprobs=ref, entropy=h)[0]

    assert torch.autograd.gradcheck(value, (policy.requires_grad_(), entropy.requires_grad_()))


def test_gspo_token_has_the_value_of_gspo_and_a_gradient_per_token() -> None:
    policy, old, _, _, advantages, _ = grpo_case()
    policy.requires_grad_()
    advantages = rand(sum(LENGTHS), seed=9)
    values, gradients, bounds = [], [], cu_seqlens(LENGTHS)
    for name in ("gspo", "gspo_token"):
        values.append(reference.grpo_loss(policy, old, advantages, bounds, loss=PolicyLoss(name, clip_low=0.9))[0])
        gradients.append(torch.autograd.grad(values[-1], policy)[0])
    assert values[0].item() == pytest.approx(values[1].item())
    assert not torch.allclose(*gradients)
    per_completion = [reference.sequence_sums(gradient, bounds).tolist() for gradient in gradients]
    assert per_completion[0] == pytest.approx(per_completion[1])


@pytest.mark.parametrize("name", NAMES)
def test_at_ratio_one_the_gradient_is_reinforce(name: str) -> None:
    policy, _, _, _, advantages, _ = grpo_case()
    policy.requires_grad_()
    loss = PolicyLoss(name, constant_length=8)
    weights = reference.token_weights(cu_seqlens(LENGTHS), torch.ones_like(policy).detach(), loss)
    expected = -weights * advantages.repeat_interleave(torch.tensor(LENGTHS))
    for old in (policy.detach(), None):
        value, metrics = reference.grpo_loss(policy, old, advantages, cu_seqlens(LENGTHS), loss=loss)
        torch.testing.assert_close(torch.autograd.grad(value, policy)[0], expected)
        assert metrics["clip_low_share"] == 0 and metrics["ratio_max"] == 1 and metrics["kl"] == 0


@pytest.mark.parametrize("name", NAMES)
def test_zero_advantages_give_no_gradient(name: str) -> None:
    policy, old, _, _, advantages, _ = grpo_case()
    policy.requires_grad_()
    loss = PolicyLoss(name, constant_length=8)
    value, _ = reference.grpo_loss(policy, old, 0 * advantages, cu_seqlens(LENGTHS), loss=loss)
    value.backward()
    assert value == 0 and (policy.grad == 0).all()


# -- DPO -------------------------------------------------------------------------------------------------------------

PAIRS = [(3, 4), (5, 2), (2, 2), (9, 7), (4, 1), (1, 6)]
PAIR_BOUNDS = cu_seqlens([length for pair in PAIRS for length in pair])


def dpo_case() -> tuple[torch.Tensor, torch.Tensor]:
    """policy and reference log-probs of six pairs."""
    tokens = int(PAIR_BOUNDS[-1])
    return -rand(tokens).abs(), -rand(tokens, seed=1).abs()


def preference_by_hand(name: str, chosen: float, rejected: float, beta: float, smoothing: float) -> float:
    def log_sigmoid(x: float) -> float:
        return -math.log1p(math.exp(-x))

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    margin = beta * (chosen - rejected)
    keep, flip = log_sigmoid(margin), log_sigmoid(-margin)
    return {
        "sigmoid": lambda: -(1 - smoothing) * keep - smoothing * flip,
        "robust": lambda: (-(1 - smoothing) * keep + smoothing * flip) / (1 - 2 * smoothing),
        "ipo": lambda: (chosen - rejected - 1 / (2 * beta)) ** 2,
        "hinge": lambda: max(0.0, 1 - margin),
        "exo": lambda: (sigmoid(margin) * (keep - math.log(1 - smoothing))
                        + sigmoid(-margin) * (flip - math.log(smoothing))),
        "nca": lambda: -log_sigmoid(beta * chosen) - (log_sigmoid(-beta * chosen) + log_sigmoid(-beta * rejected)) / 2,
        "sppo": lambda: (chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2,
        "apo_zero": lambda: 1 - sigmoid(beta * chosen) + sigmoid(beta * rejected),
        "bco": lambda: -log_sigmoid(beta * chosen) - log_sigmoid(-beta * rejected),
        "discopop": lambda: (math.exp(-margin) * sigmoid(margin / 0.05) - keep * sigmoid(-margin / 0.05)),
        "apo_down": lambda: sigmoid(beta * chosen) + 1 - sigmoid(margin)}[name]()


@pytest.mark.parametrize("ld_alpha", [None, 0.4])
@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("name", ["sigmoid", "ipo", "hinge", "robust", "exo", "nca", "apo_zero", "apo_down", "sppo",
                                  "bco", "discopop"])
def test_dpo_loss_closed_forms(name: str, normalised: bool, ld_alpha: float | None) -> None:
    (policy, ref), beta, smoothing = dpo_case(), 0.3, 0.1 if name in ("sigmoid", "robust", "exo") else 0.0
    loss = PreferenceLoss(name, beta, smoothing, length_normalize=normalised, ld_alpha=ld_alpha, nll_coef=0.2)
    total, margins, right, start = 0.0, 0.0, 0, 0
    for lengths in PAIRS:
        ratios, sums = [], []
        for length in lengths:
            tail = [1.0 if ld_alpha is None or place < min(lengths) else ld_alpha for place in range(length)]
            p, r = (sum(w * x for w, x in zip(tail, side[start:start + length].tolist(), strict=True))
                    for side in (policy, ref))
            ratios.append((p - r) / (length if normalised else 1))
            sums.append(policy[start:start + length].mean().item())
            start += length
        total += preference_by_hand(name, *ratios, beta, smoothing) - 0.2 * sums[0]
        margins += beta * (ratios[0] - ratios[1])
        right += ratios[0] > ratios[1]
    value, metrics = reference.dpo_loss(policy, ref, PAIR_BOUNDS, loss=loss)
    assert value.item() == pytest.approx(total / len(PAIRS))
    assert metrics["margin"].item() == pytest.approx(margins / len(PAIRS))
    assert metrics["preference_accuracy"].item() == pytest.approx(right / len(PAIRS))
    sums_before = reference.pair_sums(ref, PAIR_BOUNDS, loss=loss)
    assert reference.dpo_loss(policy, sums_before, PAIR_BOUNDS, loss=loss)[0].item() == pytest.approx(value.item())


def test_dpo_loss_far_away_stays_finite() -> None:
    far = torch.tensor([-1e5, 0, 1e5, 0], dtype=torch.float32).requires_grad_()
    value, _ = reference.dpo_loss(far, torch.zeros(4), cu_seqlens([1, 1, 1, 1]), num_pairs=1)
    value.backward()
    assert value.item() == pytest.approx(1e4) and far.grad.tolist() == pytest.approx([-0.1, 0.1, 0.0, 0.0])


@pytest.mark.parametrize("name", ["sigmoid", "ipo"])
def test_dpo_gradient_raises_the_chosen_and_lowers_the_rejected(name: str) -> None:
    policy = torch.full((6,), -4.0, dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([-4.0, -3.9, -4.1, -4.1, -3.9, -4.0], dtype=torch.float64)
    reference.dpo_loss(policy, ref, cu_seqlens([1] * 6), loss=name)[0].backward()
    chosen, rejected = policy.grad.view(3, 2).unbind(1)
    assert (chosen < 0).all() and (rejected > 0).all()
    torch.testing.assert_close(chosen, -rejected)


@pytest.mark.parametrize("name", ["sigmoid", "ipo", "nca", "apo_down"])
def test_dpo_gradients_and_closed_form_slopes(name: str) -> None:
    policy, ref = dpo_case()
    loss = PreferenceLoss(name, 0.3, length_normalize=name == "ipo", ld_alpha=0.4, nll_coef=0.2)
    mask = (rand(len(policy), seed=5) > -0.7).double()
    policy.requires_grad_()

    def value(p: torch.Tensor) -> torch.Tensor:
        return reference.dpo_loss(p, ref, PAIR_BOUNDS, loss=loss, loss_mask=mask)[0]

    assert torch.autograd.gradcheck(value, (policy,))
    slopes = reference.pair_terms(policy.detach(), ref, PAIR_BOUNDS, loss, mask).slope / len(PAIRS)
    torch.testing.assert_close(slopes, torch.autograd.grad(value(policy), policy)[0])
