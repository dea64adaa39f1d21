"""The definitions: every op in a few lines of plain torch. Trainer, kernels, tests and benches use these and no others.

Letters: T rows, V vocabulary, D hidden, M completion tokens of a packed batch, S completions, B pairs.
Packed lengths: completion i owns tokens cu_seqlens[i] to cu_seqlens[i + 1]. Logarithms are natural.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

Aggregation = Literal["sequence", "token", "constant"]


def gather_logprobs(logits: torch.Tensor, token_ids: torch.Tensor, *, temperature: float = 1.0) -> torch.Tensor:
    """log softmax(logits / temperature) at token_ids.

    Args:
        logits: [T, V], any float type; computed in float32 (float64 stays).
        token_ids: int64 [T].

    Returns:
        [T] float32 (float64 for float64 logits).
    """
    scaled = _at_least_float32(logits) / temperature
    return scaled.gather(-1, token_ids[:, None])[:, 0] - scaled.logsumexp(-1)


def entropy(logits: torch.Tensor, *, temperature: float = 1.0) -> torch.Tensor:
    """Entropy in nats [T] of softmax(logits / temperature), logits [T, V]."""
    logprobs = torch.log_softmax(_at_least_float32(logits) / temperature, -1)
    return -(logprobs.exp() * logprobs).sum(-1)


def linear_logprobs(hidden: torch.Tensor, head: torch.Tensor, token_ids: torch.Tensor, *,
                    temperature: float = 1.0) -> torch.Tensor:
    """`gather_logprobs` of hidden [T, D] @ head.T, head [V, D]."""
    return gather_logprobs(F.linear(hidden, head), token_ids, temperature=temperature)


def group_advantages(rewards: torch.Tensor, group_ids: torch.Tensor, *,
                     kind: Literal["std", "no_std", "leave_one_out"] = "std", eps: float = 1e-6) -> torch.Tensor:
    """Advantage of each completion relative to its group.

    std: (r - mean) / (s + eps), s with n - 1 (GRPO, arXiv 2402.03300, sec. 4.1); no_std: r - mean (Dr. GRPO,
    arXiv 2503.20783); leave_one_out: r - mean of the others (RLOO, arXiv 2402.14740). Equal rewards give exact zeros.

    Args:
        rewards: [S]. group_ids: int64 [S], 0 to groups - 1, each present; groups may be ragged.
    """
    groups = int(group_ids.max()) + 1
    count = torch.zeros(groups, dtype=rewards.dtype).index_add(0, group_ids, torch.ones_like(rewards))
    low = torch.full((groups,), torch.inf, dtype=rewards.dtype).scatter_reduce(0, group_ids, rewards, "amin")
    shifted = rewards - low[group_ids]  # the same in all members of a group of equals, so that the mean is exact
    mean = torch.zeros(groups, dtype=rewards.dtype).index_add(0, group_ids, shifted) / count
    centred = shifted - mean[group_ids]
    if kind == "no_std":
        return centred
    others = (count - 1).clamp(min=1)
    if kind == "leave_one_out":
        return centred * (count / others)[group_ids]
    variance = torch.zeros(groups, dtype=rewards.dtype).index_add(0, group_ids, centred.square()) / others
    return centred / (variance.sqrt() + eps)[group_ids]


def kl_estimate(policy_logprobs: torch.Tensor, ref_logprobs: torch.Tensor, *,
                kind: Literal["k1", "k2", "k3"] = "k3") -> torch.Tensor:
    """Per-token estimate of KL(policy || reference) (Schulman 2020, "Approximating KL divergence").

    With d = ref - policy: k1 = -d, k2 = d^2 / 2, k3 = exp(d) - 1 - d. As a loss k1 has no useful gradient in
    expectation; it is meant for monitoring.
    """
    difference = ref_logprobs - policy_logprobs
    if kind == "k1":
        return -difference
    return difference.square() / 2 if kind == "k2" else difference.exp() - 1 - difference


def token_weights(cu_seqlens: torch.Tensor, *, aggregation: Aggregation = "sequence", num_sequences: int | None = None,
                  num_tokens: int | None = None, constant_length: int | None = None) -> torch.Tensor:
    """Weight [M] of each token, so that a loss is the plain weighted sum of its tokens.

    sequence: mean per completion, then over completions; token: mean over all tokens; constant: sum over tokens
    divided by completions times `constant_length`. The counts are those of the whole optimizer step when a micro-batch
    holds a part of it (default: what cu_seqlens holds).
    """
    lengths = cu_seqlens.diff()
    sequences = num_sequences or len(lengths)
    if aggregation == "sequence":
        per_sequence = 1.0 / (lengths.clamp(min=1) * sequences)
    elif aggregation == "token":
        per_sequence = torch.full((len(lengths),), 1.0 / (num_tokens or int(lengths.sum())))
    else:
        if not constant_length:
            raise ValueError("aggregation `constant` needs constant_length")
        per_sequence = torch.full((len(lengths),), 1.0 / (sequences * constant_length))
    return torch.repeat_interleave(per_sequence.to(cu_seqlens.device), lengths)


def grpo_token_loss(policy_logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor, *,
                    clip_low: float = 0.2, clip_high: float = 0.2, dual_clip: float | None = None
                    ) -> tuple[torch.Tensor, torch.Tensor]:
    """Clipped surrogate per token (PPO, arXiv 1707.06347, eq. 7; asymmetric clip: DAPO, arXiv 2503.14476, eq. 10).

    -min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A), and with `dual_clip` c the objective of a negative
    advantage is bounded below by c * A (arXiv 1912.09729, eq. 5).

    Args:
        policy_logprobs, old_logprobs, advantages: [M].

    Returns:
        loss [M] and bool [M]: True where a clip took the gradient away.
    """
    ratio = (policy_logprobs - old_logprobs).exp()
    plain, clipped = ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    objective = torch.minimum(plain, clipped)
    active = clipped < plain
    if dual_clip is not None:
        bound = dual_clip * advantages
        bounded = (advantages < 0) & (bound > objective)
        objective, active = torch.where(bounded, bound, objective), active | bounded
    return -objective, active


def grpo_loss(policy_logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor,
              weights: torch.Tensor, *, clip_low: float = 0.2, clip_high: float = 0.2, dual_clip: float | None = None,
              ref_logprobs: torch.Tensor | None = None, kl_coef: float = 0.0, kl_kind: Literal["k1", "k2", "k3"] = "k3",
              ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """GRPO loss (arXiv 2402.03300, eq. 3): weighted sum of the clipped surrogate and kl_coef times the KL.

    Args:
        policy_logprobs, old_logprobs, advantages, weights: [M]; weights from `token_weights`.
        ref_logprobs: [M], needed when kl_coef is not 0.

    Returns:
        scalar loss, and detached weighted sums over the same tokens: clip_share, kl (0 without reference); ratio_max.
    """
    loss, clipped = grpo_token_loss(policy_logprobs, old_logprobs, advantages, clip_low=clip_low,
                                    clip_high=clip_high, dual_clip=dual_clip)
    kl = torch.zeros_like(loss)
    if ref_logprobs is not None:
        kl = kl_estimate(policy_logprobs, ref_logprobs, kind=kl_kind)
        loss = loss + kl_coef * kl
    metrics = {"clip_share": (weights * clipped).sum(), "kl": (weights * kl).sum().detach(),
               "ratio_max": (policy_logprobs - old_logprobs).detach().exp().amax()}
    return (weights * loss).sum(), metrics


def sequence_sums(values: torch.Tensor, loss_mask: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Sum [S] of values [M] over the tokens of each completion whose loss_mask [M] is 1."""
    lengths = cu_seqlens.diff()
    owner = torch.repeat_interleave(torch.arange(len(lengths), device=values.device), lengths.to(values.device))
    return torch.zeros(len(lengths), dtype=values.dtype, device=values.device).index_add(0, owner, values * loss_mask)


def dpo_loss(policy_chosen: torch.Tensor, policy_rejected: torch.Tensor, ref_chosen: torch.Tensor,
             ref_rejected: torch.Tensor, *, dpo_beta: float = 0.1, loss: Literal["sigmoid", "ipo"] = "sigmoid",
             chosen_lengths: torch.Tensor | None = None, rejected_lengths: torch.Tensor | None = None,
             ) -> tuple[torch.Tensor, torch.Tensor]:
    """Preference loss per pair, from summed log-probabilities [B] of each completion.

    With h = (policy - ref) of chosen minus that of rejected (each divided by its length when lengths are given):
    sigmoid: -log sigmoid(beta * h) (arXiv 2305.18290, eq. 7); ipo: (h - 1 / (2 beta))^2 (arXiv 2310.12036, eq. 17).

    Returns:
        loss [B] and the implicit reward margin beta * h [B].
    """
    chosen, rejected = policy_chosen - ref_chosen, policy_rejected - ref_rejected
    if chosen_lengths is not None and rejected_lengths is not None:
        chosen, rejected = chosen / chosen_lengths, rejected / rejected_lengths
    margin = chosen - rejected
    if loss == "ipo":
        return (margin - 1 / (2 * dpo_beta)).square(), dpo_beta * margin
    return -F.logsigmoid(dpo_beta * margin), dpo_beta * margin


def _at_least_float32(values: torch.Tensor) -> torch.Tensor:
    return values if values.dtype == torch.float64 else values.float()
