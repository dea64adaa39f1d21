"""The definitions against float64 log_softmax, closed forms, and loops over single tokens written out by hand."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from veripo_kernels import reference

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
    expected = truth((hidden @ head.T), ids, 0.6)
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


def test_kl_estimates() -> None:
    policy, ref = rand(50, scale=2.0), rand(50, seed=1, scale=2.0)
    for p, r, k1, k2, k3 in zip(policy.tolist(), ref.tolist(), *(
            reference.kl_estimate(policy, ref, kind=kind).tolist() for kind in ("k1", "k2", "k3")), strict=True):
        assert k1 == pytest.approx(p - r)
        assert k2 == pytest.approx((p - r) ** 2 / 2)
        assert k3 == pytest.approx(math.exp(r) / math.exp(p) - 1 - (r - p))
        assert k3 >= 0
    for kind in ("k1", "k2", "k3"):
        assert (reference.kl_estimate(policy, policy, kind=kind) == 0).all()


def test_k1_and_k3_estimate_the_divergence_of_a_distribution() -> None:
    policy, ref = torch.log_softmax(rand(30), -1), torch.log_softmax(rand(30, seed=1), -1)
    exact = (policy.exp() * (policy - ref)).sum()
    for kind in ("k1", "k3"):
        estimate = (policy.exp() * reference.kl_estimate(policy, ref, kind=kind)).sum()
        assert estimate.item() == pytest.approx(exact.item())


def weights_by_hand(lengths: list[int], aggregation: str, sequences: int, tokens: int, constant: int) -> list[float]:
    share = {"sequence": lambda n: 1 / n / sequences, "token": lambda n: 1 / tokens,
             "constant": lambda n: 1 / sequences / constant}[aggregation]
    return [share(length) for length in lengths for _ in range(length)]


@pytest.mark.parametrize("aggregation", ["sequence", "token", "constant"])
def test_token_weights(aggregation: str) -> None:
    lengths = [3, 1, 6]
    weights = reference.token_weights(cu_seqlens(lengths), aggregation=aggregation, constant_length=8)
    assert weights.tolist() == pytest.approx(weights_by_hand(lengths, aggregation, 3, 10, 8))


@pytest.mark.parametrize("aggregation", ["sequence", "token", "constant"])
def test_token_weights_of_micro_batches_add_up_to_the_whole(aggregation: str) -> None:
    lengths = [3, 1, 6, 2, 5]
    options = {"aggregation": aggregation, "constant_length": 8}
    whole = reference.token_weights(cu_seqlens(lengths), **options)
    parts = [reference.token_weights(cu_seqlens(part), num_sequences=5, num_tokens=17, **options)
             for part in (lengths[:2], lengths[2:3], lengths[3:])]
    torch.testing.assert_close(torch.cat(parts), whole)


def test_constant_weights_need_a_length() -> None:
    with pytest.raises(ValueError, match="constant_length"):
        reference.token_weights(cu_seqlens([2]), aggregation="constant")


def cu_seqlens(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def test_sequence_sums_stay_inside_their_completion_and_mask() -> None:
    lengths, values = [3, 1, 0, 4], rand(8)
    mask = torch.tensor([1.0, 0, 1, 1, 0, 0, 0, 1])
    bounds = cu_seqlens(lengths).tolist()
    expected = [sum(values[i].item() for i in range(a, b) if mask[i]) for a, b in pairwise(bounds)]
    assert reference.sequence_sums(values, mask, cu_seqlens(lengths)).tolist() == pytest.approx(expected)
    leaf = values.clone().requires_grad_()
    reference.sequence_sums(leaf, mask, cu_seqlens(lengths)).sum().backward()
    assert leaf.grad.tolist() == mask.tolist()


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
    old = rand(len(cases))
    log_ratios = torch.tensor([math.log(ratio) for ratio, _ in cases], dtype=torch.float64)
    advantages = torch.tensor([advantage for _, advantage in cases], dtype=torch.float64)
    policy = (old + log_ratios).requires_grad_()
    loss, active = reference.grpo_token_loss(policy, old, advantages, clip_low=low, clip_high=high, dual_clip=dual)
    loss.sum().backward()
    expected = [surrogate(math.log(ratio), advantage, low, high, dual) for ratio, advantage in cases]
    assert loss.tolist() == pytest.approx([value for value, _ in expected], abs=1e-12)
    assert policy.grad.tolist() == pytest.approx([slope for _, slope in expected], abs=1e-12)
    assert active.tolist() == [slope == 0 and advantage != 0
                               for (_, slope), (_, advantage) in zip(expected, cases, strict=True)]
    taken = {(ratio, advantage): flag for (ratio, advantage), flag in zip(cases, active.tolist(), strict=True)}
    assert taken[1.29, 2.0] and not taken[1.29, -2.0] and taken[0.1, -2.0] and not taken[0.1, 2.0]
    assert taken[3.1, -0.5] == (dual is not None)


LENGTHS = [4, 1, 7, 3]


def grpo_case() -> tuple[torch.Tensor, ...]:
    """policy, old, ref log-probs, advantages and weights of a packed batch, ratios away from the clip's corners."""
    tokens = sum(LENGTHS)
    old = -rand(tokens).abs()
    policy = old + rand(tokens, seed=1, scale=0.4)
    advantages = torch.tensor([1.2, -0.7, 0.3, -0.9], dtype=torch.float64).repeat_interleave(torch.tensor(LENGTHS))
    weights = reference.token_weights(cu_seqlens(LENGTHS)).double()
    return policy, old, policy + rand(tokens, seed=2, scale=0.3), advantages, weights


@pytest.mark.parametrize("options", [{}, {"clip_high": 0.28, "dual_clip": 1.5}, {"kl_coef": 0.3},
                                     {"kl_coef": 0.3, "kl_kind": "k2"}, {"kl_coef": 0.3, "kl_kind": "k1"}])
def test_grpo_loss_gradients(options: dict) -> None:
    policy, old, ref, advantages, weights = grpo_case()
    options = options | ({"ref_logprobs": ref} if "kl_coef" in options else {})
    assert torch.autograd.gradcheck(
        lambda p: reference.grpo_loss(p, old, advantages, weights, **options)[0], (policy.requires_grad_(),))


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_grpo_loss_is_the_weighted_sum_of_its_tokens(kind: str) -> None:
    policy, old, ref, advantages, weights = grpo_case()
    total = clips = kls = 0.0
    for p, o, r, a, w in zip(*(values.tolist() for values in (policy, old, ref, advantages, weights)), strict=True):
        value, slope = surrogate(p - o, a, 0.2, 0.2, None)
        kl = {"k1": p - r, "k2": (r - p) ** 2 / 2, "k3": math.exp(r - p) - 1 - (r - p)}[kind]
        total += w * (value + 0.3 * kl)
        clips += w * (slope == 0)
        kls += w * kl
    loss, metrics = reference.grpo_loss(policy.requires_grad_(), old, advantages, weights, ref_logprobs=ref,
                                        kl_coef=0.3, kl_kind=kind)
    assert loss.item() == pytest.approx(total)
    assert metrics["clip_share"].item() == pytest.approx(clips) and clips > 0
    assert metrics["kl"].item() == pytest.approx(kls)
    assert metrics["ratio_max"].item() == pytest.approx((policy - old).exp().max().item())
    assert not any(value.requires_grad for value in metrics.values())


def test_at_ratio_one_the_gradient_is_reinforce() -> None:
    policy, _, _, advantages, weights = grpo_case()
    policy.requires_grad_()
    loss, metrics = reference.grpo_loss(policy, policy.detach(), advantages, weights)
    loss.backward()
    torch.testing.assert_close(policy.grad, -weights * advantages)
    assert metrics["clip_share"] == 0 and metrics["ratio_max"] == 1 and metrics["kl"] == 0


def test_zero_advantages_give_no_gradient() -> None:
    policy, old, _, _, weights = grpo_case()
    policy.requires_grad_()
    loss, _ = reference.grpo_loss(policy, old, torch.zeros_like(old), weights)
    loss.backward()
    assert loss == 0 and (policy.grad == 0).all()


# -- DPO -------------------------------------------------------------------------------------------------------------


def dpo_case() -> list[torch.Tensor]:
    return [-rand(6, seed=seed, scale=8.0).abs() for seed in range(4)]


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_dpo_loss_closed_forms(loss: str, normalised: bool) -> None:
    sums, beta = dpo_case(), 0.3
    lengths = torch.tensor([3.0, 5, 2, 9, 4, 1]), torch.tensor([4.0, 2, 2, 7, 1, 6])
    options = {"chosen_lengths": lengths[0], "rejected_lengths": lengths[1]} if normalised else {}
    values, margins = reference.dpo_loss(*sums, dpo_beta=beta, loss=loss, **options)
    for number, (pc, pr, rc, rr) in enumerate(zip(*(side.tolist() for side in sums), strict=True)):
        chosen, rejected = pc - rc, pr - rr
        if normalised:
            chosen, rejected = chosen / lengths[0][number].item(), rejected / lengths[1][number].item()
        margin = chosen - rejected
        expected = (margin - 1 / (2 * beta)) ** 2 if loss == "ipo" else math.log1p(math.exp(-beta * margin))
        assert values[number].item() == pytest.approx(expected)
        assert margins[number].item() == pytest.approx(beta * margin)


def test_dpo_loss_far_away_stays_finite() -> None:
    far = torch.tensor([-1e5, 1e5], dtype=torch.float32).requires_grad_()
    loss, _ = reference.dpo_loss(far, torch.zeros(2), torch.zeros(2), torch.zeros(2), dpo_beta=0.1)
    loss.sum().backward()
    assert loss.tolist() == [pytest.approx(1e4), 0.0] and far.grad.tolist() == [pytest.approx(-0.1), 0.0]


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_dpo_gradient_raises_the_chosen_and_lowers_the_rejected(loss: str) -> None:
    chosen, rejected = (torch.full((3,), -4.0, dtype=torch.float64, requires_grad=True) for _ in range(2))
    ref = torch.tensor([-4.0, -3.9, -4.1], dtype=torch.float64)
    values, _ = reference.dpo_loss(chosen, rejected, ref, ref.flip(0), dpo_beta=0.1, loss=loss)
    values.sum().backward()
    assert (chosen.grad < 0).all() and (rejected.grad > 0).all()
    torch.testing.assert_close(chosen.grad, -rejected.grad)
    leaves = [side.clone().requires_grad_() for side in dpo_case()]
    assert torch.autograd.gradcheck(lambda *sides: reference.dpo_loss(*sides, loss=loss)[0], leaves)
