"""The definitions: every op in a few lines of plain torch. Trainer, kernels, tests and benches use these and no others.

The token and pair formulas inside them stand in `formulas.py`, because the Triton kernels run those same lines.

Letters: T rows, V vocabulary, D hidden, M completion tokens of a packed batch, S completions, B pairs.
Packed lengths: completion i owns tokens cu_seqlens[i] to cu_seqlens[i + 1]. Logarithms are natural.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from veripo_kernels import formulas
from veripo_kernels.options import (
    AdvantageKind,
    AdvantagesPer,
    PolicyLoss,
    PreferenceLoss,
    as_policy_loss,
    as_preference_loss,
    check_counts,
)
from veripo_kernels.scalars import traced


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
    return -(logprobs.exp() * logprobs.clamp(min=torch.finfo(logprobs.dtype).min)).sum(-1)  # 0 log 0 is 0


def linear_logits(hidden: torch.Tensor, head: torch.Tensor, *, bias: torch.Tensor | None = None,
                  softcap: float | None = None) -> torch.Tensor:
    """Logits [T, V] of hidden [T, D], head [V, D] and bias [V]; softcap c: c * tanh(logits / c) (arXiv 2408.00118,
    2.4).

    The products are summed in float32 (float64 stays) and never rounded to a shorter type.
    """
    logits = F.linear(_at_least_float32(hidden), _at_least_float32(head),
                      None if bias is None else _at_least_float32(bias))
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def linear_logprobs(hidden: torch.Tensor, head: torch.Tensor, token_ids: torch.Tensor, *, temperature: float = 1.0,
                    bias: torch.Tensor | None = None, softcap: float | None = None) -> torch.Tensor:
    """`gather_logprobs` [T] of `linear_logits`."""
    return gather_logprobs(linear_logits(hidden, head, bias=bias, softcap=softcap), token_ids, temperature=temperature)


def group_advantages(rewards: torch.Tensor, group_ids: torch.Tensor, *, kind: AdvantageKind = "std",
                     eps: float = 1e-6) -> torch.Tensor:
    """Advantage of each completion relative to its group.

    std: (r - mean) / (s + eps), s with n - 1 (GRPO, arXiv 2402.03300, sec. 4.1); no_std: r - mean (Dr. GRPO,
    arXiv 2503.20783); leave_one_out: r - mean of the others (RLOO, arXiv 2402.14740); batch_std: r - mean of the group
    over (s of all rewards + eps) (arXiv 2508.08221). Equal rewards give exact zeros.

    Args:
        rewards: [S]. group_ids: int64 [S], 0 to groups - 1, each present; groups may be ragged and interleaved.
    """
    if not len(rewards):
        return torch.zeros_like(rewards)
    groups = int(group_ids.max()) + 1
    count, zeros = torch.zeros(2, groups, dtype=rewards.dtype, device=rewards.device)
    count = count.index_add(0, group_ids, torch.ones_like(rewards))
    low = torch.full_like(zeros, torch.inf).scatter_reduce(0, group_ids, rewards, "amin")
    shifted = rewards - low[group_ids]  # the same in all members of a group of equals, so that the mean is exact
    mean = zeros.index_add(0, group_ids, shifted) / count
    centred = shifted - mean[group_ids]
    if kind == "no_std":
        return centred
    if kind == "batch_std":
        return centred / (rewards.std() + eps) if len(rewards) > 1 else centred
    others = (count - 1).clamp(min=1)
    if kind == "leave_one_out":
        return centred * (count / others)[group_ids]
    variance = zeros.index_add(0, group_ids, centred.square()) / others
    return centred / (variance.sqrt() + eps)[group_ids]


def sequence_index(cu_seqlens: torch.Tensor, tokens: int) -> torch.Tensor:
    """int64 [M]: the completion that owns each of `tokens` packed tokens.

    A token behind the last completion gets S, which no index is; repeat_interleave leaves it unwritten on a GPU.
    """
    ends = cu_seqlens[1:].to(torch.int64)
    marks = torch.zeros(tokens + 1, dtype=torch.int64, device=ends.device).index_add(0, ends, torch.ones_like(ends))
    return marks[:tokens].cumsum(0)


def told_apart(advantages: torch.Tensor, cu_seqlens: torch.Tensor, tokens: int, per: AdvantagesPer | None
               ) -> torch.Tensor:
    """Advantages whose shape says what they are: [M] per token, else [S] per completion.

    Raises:
        ValueError: another shape, or M = S and nobody says which of the two they are.
    """
    sequences = len(cu_seqlens) - 1
    shapes = {"token": [tokens], "sequence": [sequences]}
    if per is not None and per not in shapes:
        raise ValueError(f"advantages_per must be 'sequence' or 'token', got {per!r}")
    allowed = [shape for name, shape in shapes.items() if per in (None, name)]
    if list(advantages.shape) not in allowed:
        raise ValueError(f"advantages must have shape {' or '.join(map(str, allowed))}, got {list(advantages.shape)}")
    if tokens != sequences or tokens < 2 or per == "token":
        return advantages
    if per is None:
        raise ValueError(f"advantages [{tokens}] may be one per token or one per completion, because there are "
                         f"{tokens} of both: say advantages_per='sequence' or 'token'")
    return advantages[sequence_index(cu_seqlens, tokens)]


def sequence_sums(values: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Sum [S] of values [M] over each completion; an empty one has 0."""
    zeros = torch.zeros(len(cu_seqlens) - 1, dtype=values.dtype, device=values.device)
    return zeros.index_add(0, sequence_index(cu_seqlens, len(values)), values)


def token_weights(cu_seqlens: torch.Tensor, loss_mask: torch.Tensor, loss: PolicyLoss, *,
                  num_sequences: int | None = None, num_tokens: int | None = None) -> torch.Tensor:
    """Weight [M] of each token, so that a loss is the plain weighted sum of its tokens; 0 where loss_mask [M] is.

    The counts are those of the whole optimizer step when a micro-batch holds a part of it (default: what is here).
    """
    check_counts(num_sequences=num_sequences, num_tokens=num_tokens)
    sequences = num_sequences or len(cu_seqlens) - 1
    if loss.weighting == "sequence":
        counts = sequence_sums(loss_mask, cu_seqlens).clamp(min=1) * sequences
        return loss_mask / counts[sequence_index(cu_seqlens, len(loss_mask))]
    if loss.weighting == "token":
        return loss_mask / (num_tokens or loss_mask.sum().clamp(min=1))
    return loss_mask / (sequences * float(loss.length or 1))


@dataclass(frozen=True)
class PolicyTerms:
    """What every token of a packed batch contributes to a policy loss, before weights; all [M]."""

    loss: torch.Tensor
    """Surrogate times importance, plus KL and squared log-ratio, minus entropy bonus: the loss is its weighted sum."""
    slope: torch.Tensor
    """Slope of the surrogate by the log-ratio of the token; by that of its completion where tokens are coupled."""
    kl_slope: torch.Tensor
    """Slope by the token's log-prob of kl_coef times the KL, and of the squared log-ratio of its completion."""
    coupling: torch.Tensor | None
    """Slope of the completion's log-ratio by the token's (gspo, gmpo); None where each token has its own ratio."""
    metrics: dict[str, torch.Tensor]


def policy_terms(policy_logprobs: torch.Tensor, old_logprobs: torch.Tensor | None, advantages: torch.Tensor,
                 cu_seqlens: torch.Tensor, mask: torch.Tensor, loss: PolicyLoss, *, ref_logprobs: torch.Tensor | None,
                 rollout_logprobs: torch.Tensor | None, entropy: torch.Tensor | None) -> PolicyTerms:
    """The terms of `grpo_loss` (arguments there); `loss` carries their gradient for autograd, the slopes say it in
    closed form."""
    owner = sequence_index(cu_seqlens, len(policy_logprobs))
    counts = sequence_sums(mask, cu_seqlens).clamp(min=1)

    def kept(values: torch.Tensor) -> torch.Tensor:
        return torch.where(mask != 0, values, 0)  # what is left out may be NaN, and 0 * NaN is NaN in a gradient too

    policy_logprobs = kept(policy_logprobs)
    old_logprobs = policy_logprobs.detach() if old_logprobs is None else kept(old_logprobs)
    advantages = kept(advantages if advantages.shape == mask.shape else advantages[owner])
    log_ratio, coupling = policy_logprobs - old_logprobs, None

    def sequence_mean(values: torch.Tensor) -> torch.Tensor:
        return (sequence_sums(values * mask, cu_seqlens) / counts)[owner]

    scope, treatment = loss.importance.split("_")
    floor, cap = traced(mask, loss.importance_floor, loss.importance_cap)
    gap = None
    if rollout_logprobs is not None:
        gap = torch.nan_to_num(old_logprobs - rollout_logprobs.to(old_logprobs.dtype)) * mask
        gap = sequence_sums(gap, cu_seqlens)[owner] if scope == "sequence" else gap
    clip = traced(mask, loss.clip_low, loss.clip_high, loss.dual)
    if loss.surrogate in ("cispo", "cispo_sequence"):
        level = log_ratio.detach() if loss.surrogate == "cispo" else sequence_mean(log_ratio.detach())
        surrogate, slope, low, high = formulas.cispo_surrogate(policy_logprobs, level, advantages, clip[1])
    elif loss.surrogate in ("sapo", "sapo_sequence"):
        by_sequence = loss.surrogate == "sapo_sequence"
        surrogate, slope, low, high = formulas.sapo_surrogate(
            sequence_mean(log_ratio) if by_sequence else log_ratio, advantages,
            *traced(mask, loss.sapo_temperature_pos, loss.sapo_temperature_neg))
        coupling = mask / counts[owner] if by_sequence else None
    elif loss.surrogate == "vespo":
        log_weight = sequence_sums(log_ratio.detach().clamp(-20, 20) * mask, cu_seqlens)[owner]
        if gap is not None:
            logs = formulas.importance_log(gap, floor, cap, treatment)
            log_weight = log_weight + (logs if scope == "sequence" else sequence_sums(logs * mask, cu_seqlens)[owner])
        surrogate, slope, low, high = formulas.vespo_surrogate(
            policy_logprobs, log_weight, advantages, *traced(mask, loss.vespo_k_pos, loss.vespo_lambda_pos,
                                                             loss.vespo_k_neg, loss.vespo_lambda_neg))
    elif loss.surrogate == "gpg":
        surrogate, slope, low, high = formulas.reinforce_surrogate(policy_logprobs, advantages)
    elif loss.surrogate == "gspo":
        surrogate, slope, low, high = formulas.clip_surrogate(sequence_mean(log_ratio), advantages, *clip)
        coupling = mask / counts[owner]
    elif loss.surrogate == "gspo_token":
        level = sequence_mean(log_ratio.detach()) + log_ratio - log_ratio.detach()
        surrogate, slope, low, high = formulas.clip_surrogate(level, advantages, *clip)
    elif loss.surrogate == "gmpo":
        cut, low, high = formulas.gmpo_log_ratio(log_ratio, advantages, *_log_clip(loss, mask))
        surrogate = slope = -sequence_mean(cut).exp() * advantages
        coupling = torch.where(low | high, 0, mask / counts[owner])
    else:
        surrogate, slope, low, high = formulas.clip_surrogate(log_ratio, advantages, *clip)
    importance, kl, kl_slope = torch.ones_like(mask), torch.zeros_like(mask), torch.zeros_like(mask)
    if gap is not None:
        importance = formulas.importance_weight(gap, floor, cap, treatment)
    if ref_logprobs is not None:
        kl, kl_slope = formulas.kl_penalty(policy_logprobs, kept(ref_logprobs), loss.kl_kind)
    bonus = torch.zeros_like(mask) if entropy is None else kept(entropy)
    metrics = {"clip_low_share": low, "clip_high_share": high, "kl": kl.detach(), "entropy": bonus.detach(),
               "importance": importance, "ratio_max": log_ratio.detach()}
    if loss.surrogate != "vespo":  # whose own weight holds it
        surrogate, slope = surrogate * importance, slope * importance
    penalty, penalty_slope = loss.kl_coef * kl, loss.kl_coef * kl_slope
    if loss.squared_coef:
        squared = formulas.squared_log_ratio(sequence_sums(log_ratio * mask, cu_seqlens)[owner],
                                             sequence_sums(mask, cu_seqlens)[owner])
        penalty, penalty_slope = (part + loss.squared_coef * more
                                  for part, more in zip((penalty, penalty_slope), squared, strict=True))
    return PolicyTerms(surrogate + penalty - loss.entropy_coef * bonus, slope, penalty_slope, coupling, metrics)


def _log_clip(loss: PolicyLoss, like: torch.Tensor) -> tuple[Any, ...]:
    """`loss.log_clip`; a graph that is being compiled has no logarithm of a number that may change."""
    if not torch.compiler.is_compiling():
        return loss.log_clip
    low, high = traced(like, 1 - loss.clip_low, loss.clip_high)
    return low.log(), high.log1p()


def grpo_loss(policy_logprobs: torch.Tensor, old_logprobs: torch.Tensor | None, advantages: torch.Tensor,
              cu_seqlens: torch.Tensor, *, loss: PolicyLoss | str = "grpo", loss_mask: torch.Tensor | None = None,
              ref_logprobs: torch.Tensor | None = None, rollout_logprobs: torch.Tensor | None = None,
              entropy: torch.Tensor | None = None, num_sequences: int | None = None, num_tokens: int | None = None,
              advantages_per: AdvantagesPer | None = None,
              ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Policy loss of packed completions (which one, with its source: `PolicyLoss`).

    Args:
        policy_logprobs: [M] with gradient. old_logprobs: [M], or None when they are the policy's own.
        advantages: [M] per token or [S] per completion. cu_seqlens: int [S + 1].
        loss_mask: [M], 0 leaves a token out. ref_logprobs, rollout_logprobs: [M]. entropy: [M], may have a gradient.
        num_sequences, num_tokens: counts of the whole optimizer step when this is a part of it.
        advantages_per: what the advantages are, which their shape does not say where M = S.

    Returns:
        scalar loss, and detached metrics: clip_low_share, clip_high_share, kl, entropy, importance (means under the
        tokens' weights, so that those of micro-batches add up) and ratio_max.
    """
    loss = as_policy_loss(loss)
    advantages = told_apart(advantages, cu_seqlens, len(policy_logprobs), advantages_per)
    mask = torch.ones_like(policy_logprobs) if loss_mask is None else loss_mask.to(policy_logprobs.dtype)
    terms = policy_terms(policy_logprobs, old_logprobs, advantages, cu_seqlens, mask, loss, ref_logprobs=ref_logprobs,
                         rollout_logprobs=rollout_logprobs, entropy=entropy)
    weights = token_weights(cu_seqlens, mask, loss, num_sequences=num_sequences, num_tokens=num_tokens)
    return weighted_sum(terms.loss, weights), policy_metrics(terms, weights)


def weighted_sum(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Scalar; a value that has no weight may be anything, NaN too."""
    return (weights * torch.where(weights != 0, values, 0)).sum()


def policy_metrics(terms: PolicyTerms, weights: torch.Tensor) -> dict[str, torch.Tensor]:
    """The metrics of `grpo_loss` from its terms and token weights [M]."""
    metrics = {name: weighted_sum(value, weights) for name, value in terms.metrics.items()}
    ratios = torch.where(weights != 0, terms.metrics["ratio_max"], -torch.inf)
    return metrics | {"ratio_max": F.pad(ratios, (0, 1), value=-torch.inf).amax().exp()}


def policy_slopes(terms: PolicyTerms, weights: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Gradient [M] of `grpo_loss` by the policy's log-probs in closed form: for callers inside an op, where autograd is
    off."""
    slope = torch.where(weights != 0, weights * terms.slope, 0)
    if terms.coupling is not None:
        slope = sequence_sums(slope, cu_seqlens)[sequence_index(cu_seqlens, len(slope))] * terms.coupling
    return slope + torch.where(weights != 0, weights * terms.kl_slope, 0)


def dpo_loss(policy_logprobs: torch.Tensor, ref_logprobs: torch.Tensor, cu_seqlens: torch.Tensor, *,
             loss: PreferenceLoss | str = "sigmoid", loss_mask: torch.Tensor | None = None,
             weights: torch.Tensor | None = None, num_pairs: int | None = None,
             ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Preference loss of packed pairs: completion 2b is the chosen one of pair b, 2b + 1 the rejected one.

    Args:
        policy_logprobs: [M] with gradient. cu_seqlens: int [2B + 1]. loss_mask: [M], 0 leaves a token out.
        ref_logprobs: [M] per token, or [B, 2] summed as here (`pair_sums`), when they were computed before.
        weights: [B], factor of each pair's loss, without gradient (WPO, arXiv 2406.11827, eq. 2).
        num_pairs: pairs of the whole optimizer step when this is a part of it (default B).

    Returns:
        scalar loss, and detached metrics, means over the pairs: preference_accuracy, margin (dpo_beta times the
        difference of the log-ratios), chosen_logprobs_mean, rejected_logprobs_mean, chosen_drift (per token).
    """
    check_counts(num_pairs=num_pairs)
    terms = pair_terms(policy_logprobs, ref_logprobs, cu_seqlens, as_preference_loss(loss), loss_mask)
    pairs = num_pairs or max(len(terms.loss), 1)  # the loss of no pairs is 0, as that of no tokens
    losses = terms.loss if weights is None else terms.loss * weights.detach().to(terms.loss.dtype)
    return losses.sum() / pairs, {name: value.sum() / pairs for name, value in terms.metrics.items()}


@dataclass(frozen=True)
class PairTerms:
    """What every pair contributes to a preference loss."""

    loss: torch.Tensor
    """[B]"""
    slope: torch.Tensor
    """[M]: its slope by every token's log-prob."""
    metrics: dict[str, torch.Tensor]


def pair_terms(policy_logprobs: torch.Tensor, ref_logprobs: torch.Tensor, cu_seqlens: torch.Tensor,
               loss: PreferenceLoss, loss_mask: torch.Tensor | None) -> PairTerms:
    """The terms of `dpo_loss` (arguments there); `loss` carries their gradient for autograd, `slope` says it in closed
    form."""
    mask = torch.ones_like(policy_logprobs) if loss_mask is None else loss_mask.to(policy_logprobs.dtype)
    weights, lengths = pair_weights(cu_seqlens, mask, loss), sequence_sums(mask, cu_seqlens).clamp(min=1).view(-1, 2)
    sums = _masked_sums(policy_logprobs, weights, cu_seqlens)
    ref = ref_logprobs if ref_logprobs.dim() == 2 else _masked_sums(ref_logprobs, weights, cu_seqlens)
    normalizer = lengths if loss.length_normalize else torch.ones_like(lengths)
    scores, steepness = sums - ref, torch.ones_like(sums)
    if loss.score != "reverse_kl":
        scores, steepness = formulas.divergence_score(scores, traced(sums, loss.divergence_alpha)[0], loss.score)
    scores = scores / normalizer
    per_pair, by_chosen, by_rejected = formulas.preference_loss(
        scores[:, 0], scores[:, 1], loss.dpo_beta, loss.label_smoothing, loss.discopop_tau, loss.loss)
    slopes, nll = torch.stack([by_chosen, by_rejected], 1) * steepness / normalizer, torch.zeros_like(lengths)
    if loss.nll_coef:
        per_pair = per_pair - loss.nll_coef * _masked_sums(policy_logprobs, mask, cu_seqlens)[:, 0] / lengths[:, 0]
        nll[:, 0] = loss.nll_coef / lengths[:, 0]
    owner = sequence_index(cu_seqlens, len(mask))
    sums = sums.detach()
    ratios = (sums - ref) / normalizer
    margin = loss.dpo_beta * (ratios[:, 0] - ratios[:, 1])
    metrics = {"preference_accuracy": (margin > 0).to(margin.dtype), "margin": margin,
               "chosen_logprobs_mean": sums[:, 0] / lengths[:, 0], "rejected_logprobs_mean": sums[:, 1] / lengths[:, 1],
               "chosen_drift": (sums - ref)[:, 0] / lengths[:, 0]}
    return PairTerms(per_pair, slopes.flatten()[owner] * weights - nll.flatten()[owner] * mask, metrics)


def pair_weights(cu_seqlens: torch.Tensor, mask: torch.Tensor, loss: PreferenceLoss) -> torch.Tensor:
    """Weight [M] of each token in the sums of a pair: its mask [M], times `ld_alpha` beyond the length of the shorter
    completion (arXiv 2409.06411, eq. 8; kept tokens count)."""
    if loss.ld_alpha is None:
        return mask
    owner, lengths = sequence_index(cu_seqlens, len(mask)), sequence_sums(mask, cu_seqlens)
    shorter = lengths.view(-1, 2).amin(1).repeat_interleave(2)
    place = mask.cumsum(0) - (lengths.cumsum(0) - lengths)[owner]  # 1 for the first kept token of a completion
    tail, whole = traced(mask, loss.ld_alpha, 1.0)
    return mask * torch.where(place > shorter[owner], tail, whole)


def pair_sums(logprobs: torch.Tensor, cu_seqlens: torch.Tensor, *, loss: PreferenceLoss | str = "sigmoid",
              loss_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Summed log-probs [B, 2] of (chosen, rejected) as `dpo_loss` sums them: logprobs [M], cu_seqlens int [2B + 1]."""
    mask = torch.ones_like(logprobs) if loss_mask is None else loss_mask.to(logprobs.dtype)
    return _masked_sums(logprobs, pair_weights(cu_seqlens, mask, as_preference_loss(loss)), cu_seqlens)


def _masked_sums(values: torch.Tensor, weights: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    return sequence_sums(torch.where(weights != 0, values * weights, 0), cu_seqlens).view(-1, 2)


def _at_least_float32(values: torch.Tensor) -> torch.Tensor:
    return values if values.dtype == torch.float64 else values.float()
