"""Triton bodies of grpo_loss: one program per completion, one program that adds up, one pass that scales the slopes.

Letters: M tokens, S completions. The first kernel writes slopes [M] that lack only the factor of the whole batch, and
sums [8, S]; the second one adds these in a fixed order and leaves the factor on the device: nothing waits for the host.
The maths stands in `formulas.py`. dpo_loss shares the second and the third kernel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from veripo_kernels.jit import Sm90Case, sm90_case
from veripo_kernels.jit.formulas import (
    cispo_surrogate,
    clip_surrogate,
    gmpo_log_ratio,
    importance_log,
    importance_weight,
    kl_penalty,
    reinforce_surrogate,
    sapo_surrogate,
    squared_log_ratio,
    vespo_surrogate,
)

ROWS = 8
"""Rows of the sums: loss, five metrics, then these two."""
COUNT_ROW = 6
MAX_ROW = 7
_COUNT_ROW, _MAX_ROW = tl.constexpr(COUNT_ROW), tl.constexpr(MAX_ROW)

BLOCK = 2048
NUM_WARPS = 8
_REDUCE_BLOCK = 128

# Compiled once for all lengths and for slices that start anywhere: a completion starts anywhere as it is.
_TENSORS = ["policy_logprobs", "old_logprobs", "advantages", "cu_seqlens", "loss_mask", "ref_logprobs",
            "rollout_logprobs", "entropy"]


@triton.jit
def load_kept(pointer, at, kept):
    """Values [BLOCK] as float32; 0, whatever memory holds there, for tokens that are left out."""
    return tl.load(pointer + at, mask=kept, other=0).to(tl.float32)


@triton.jit
def load_mask(loss_mask, at, inside):
    """Mask [BLOCK] as float32; no mask is 1 on every token."""
    mask = inside.to(tl.float32)
    if loss_mask is not None:
        mask = tl.load(loss_mask + at, mask=inside, other=0).to(tl.float32)
    return mask


@triton.jit
def clear_outside(slopes, start, end, number, programs, tokens, BLOCK: tl.constexpr):
    """Zeros before the first and behind the last completion, whose program this is: or nobody would write there."""
    if number == 0:
        for offset in range(0, start, BLOCK):
            at = offset + tl.arange(0, BLOCK)
            tl.store(slopes + at, tl.zeros([BLOCK], tl.float32), mask=at < start)
    if number == programs - 1:
        for offset in range(end, tokens, BLOCK):
            at = offset + tl.arange(0, BLOCK)
            tl.store(slopes + at, tl.zeros([BLOCK], tl.float32), mask=at < tokens)


@triton.jit
def _load_pair(policy_logprobs, old_logprobs, at, kept):
    """Log-probs of the policy and of the old policy, which is the policy where none is given."""
    policy = load_kept(policy_logprobs, at, kept)
    old = policy
    if old_logprobs is not None:
        old = load_kept(old_logprobs, at, kept)
    return policy, old


@triton.jit
def _load_advantages(advantages, number, at, kept, PER_TOKEN: tl.constexpr):
    if PER_TOKEN:
        return load_kept(advantages, at, kept)
    return tl.where(kept, tl.load(advantages + number).to(tl.float32), 0.0)


@triton.jit
def _surrogate(policy, log_ratio, mean, advantage, clip_low, clip_high, dual_clip, log_low, log_high, temperature_pos,
               temperature_neg, k_pos, lambda_pos, k_neg, lambda_neg, SURROGATE: tl.constexpr):
    """Loss of each token, its slope (by `mean` for those that are COUPLED), and the two flags of the clip."""
    if SURROGATE == "cispo_sequence" or SURROGATE == "sapo_sequence" or SURROGATE == "vespo":
        log_ratio = mean + tl.zeros_like(log_ratio)
    if SURROGATE == "cispo" or SURROGATE == "cispo_sequence":
        return cispo_surrogate(policy, log_ratio, advantage, clip_high)
    if SURROGATE == "sapo" or SURROGATE == "sapo_sequence":
        return sapo_surrogate(log_ratio, advantage, temperature_pos, temperature_neg)
    if SURROGATE == "vespo":
        return vespo_surrogate(policy, log_ratio, advantage, k_pos, lambda_pos, k_neg, lambda_neg)
    if SURROGATE == "gmpo":
        _, low, high = gmpo_log_ratio(log_ratio, advantage, log_low, log_high)
        loss = -tl.exp(mean) * advantage
        return loss, loss, low, high
    if SURROGATE == "clip":
        return clip_surrogate(log_ratio, advantage, clip_low, clip_high, dual_clip)
    if SURROGATE == "gpg":
        return reinforce_surrogate(policy, advantage)
    return clip_surrogate(mean + tl.zeros_like(log_ratio), advantage, clip_low, clip_high, dual_clip)


@triton.jit
def _engine_gap(old, rollout_logprobs, at, kept):
    """old - rollout; 0 where it is NaN because the engine could not score the token."""
    gap = old - load_kept(rollout_logprobs, at, kept)
    return tl.where(gap == gap, gap, 0.0)


@triton.jit(do_not_specialize=["sequences", "tokens"], do_not_specialize_on_alignment=_TENSORS)
def forward_kernel(policy_logprobs, old_logprobs, advantages, cu_seqlens, loss_mask, ref_logprobs, rollout_logprobs,
                   entropy, slopes, entropy_slopes, sums, sequences, tokens, clip_low, clip_high, dual_clip, log_low,
                   log_high, temperature_pos, temperature_neg, k_pos, lambda_pos, k_neg, lambda_neg, kl_coef, floor,
                   cap, entropy_coef, squared_coef,
                   SURROGATE: tl.constexpr, PER_SEQUENCE: tl.constexpr, KL: tl.constexpr, LEVEL: tl.constexpr,
                   WEIGHT: tl.constexpr, SQUARED: tl.constexpr, TOKEN_ADVANTAGES: tl.constexpr, BLOCK: tl.constexpr):
    """Slopes [M] of one completion and its column of sums [8, S]; PER_SEQUENCE divides both by its token count."""
    number = tl.program_id(0).to(tl.int64)
    start = tl.load(cu_seqlens + number).to(tl.int64)
    end = tl.load(cu_seqlens + number + 1).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    COUPLED: tl.constexpr = (SURROGATE == "gspo") or (SURROGATE == "gmpo") or (SURROGATE == "sapo_sequence")
    WHOLE: tl.constexpr = SURROGATE == "vespo"  # the sum of the log-ratios, with the engine's, not their mean
    MEAN: tl.constexpr = COUPLED or WHOLE or (SURROGATE == "gspo_token") or (SURROGATE == "cispo_sequence")
    SEQUENCE_GAP: tl.constexpr = (LEVEL == "sequence") and (rollout_logprobs is not None)

    count = (end - start).to(tl.float32)
    mean = 0.0
    sequence_gap = 0.0
    total = 0.0
    if MEAN or SEQUENCE_GAP or SQUARED or (loss_mask is not None):
        counts = tl.zeros([BLOCK], tl.float32)
        ratios = tl.zeros([BLOCK], tl.float32)
        gaps = tl.zeros([BLOCK], tl.float32)
        totals = tl.zeros([BLOCK], tl.float32)
        for offset in range(start, end, BLOCK):
            at = offset + lanes
            mask = load_mask(loss_mask, at, at < end)
            kept = mask != 0.0
            counts += mask
            if MEAN or SEQUENCE_GAP or SQUARED:
                policy, old = _load_pair(policy_logprobs, old_logprobs, at, kept)
                log_ratio = policy - old
                totals += mask * log_ratio
                if SURROGATE == "gmpo":
                    advantage = _load_advantages(advantages, number, at, kept, TOKEN_ADVANTAGES)
                    log_ratio, _, _ = gmpo_log_ratio(log_ratio, advantage, log_low, log_high)
                if WHOLE:
                    log_ratio = tl.clamp(log_ratio, -20.0, 20.0)
                    if (rollout_logprobs is not None) and (LEVEL == "token"):
                        gap = mask * _engine_gap(old, rollout_logprobs, at, kept)
                        log_ratio += importance_log(gap, floor, cap, WEIGHT)
                ratios += mask * log_ratio
                if SEQUENCE_GAP:
                    gaps += mask * _engine_gap(old, rollout_logprobs, at, kept)
        count = tl.sum(counts, 0)
        mean = tl.sum(ratios, 0)
        sequence_gap = tl.sum(gaps, 0)
        total = tl.sum(totals, 0)
        if WHOLE:
            if SEQUENCE_GAP:
                mean += importance_log(sequence_gap, floor, cap, WEIGHT)
        else:
            mean /= tl.maximum(count, 1.0)

    share = 1.0
    if PER_SEQUENCE:
        share = 1.0 / tl.maximum(count, 1.0)
    squared, squared_slope = squared_log_ratio(total, count)
    losses = tl.zeros([BLOCK], tl.float32)
    lows = tl.zeros([BLOCK], tl.float32)
    highs = tl.zeros([BLOCK], tl.float32)
    kls = tl.zeros([BLOCK], tl.float32)
    entropies = tl.zeros([BLOCK], tl.float32)
    weights = tl.zeros([BLOCK], tl.float32)
    coupling = tl.zeros([BLOCK], tl.float32)
    peaks = tl.full([BLOCK], float("-inf"), tl.float32)
    for offset in range(start, end, BLOCK):
        at = offset + lanes
        inside = at < end
        mask = load_mask(loss_mask, at, inside)
        kept = mask != 0.0
        policy, old = _load_pair(policy_logprobs, old_logprobs, at, kept)
        log_ratio = policy - old
        advantage = _load_advantages(advantages, number, at, kept, TOKEN_ADVANTAGES)
        loss, slope, low, high = _surrogate(policy, log_ratio, mean, advantage, clip_low, clip_high, dual_clip, log_low,
                                            log_high, temperature_pos, temperature_neg, k_pos, lambda_pos, k_neg,
                                            lambda_neg, SURROGATE)
        if rollout_logprobs is not None:
            gap = sequence_gap + tl.zeros([BLOCK], tl.float32)
            if LEVEL == "token":
                gap = mask * _engine_gap(old, rollout_logprobs, at, kept)
            weight = importance_weight(gap, floor, cap, WEIGHT)
            if not WHOLE:
                loss *= weight
                slope *= weight
            weights += mask * tl.where(kept, weight, 0.0)
        if COUPLED:
            coupling += mask * slope
            slope = tl.zeros([BLOCK], tl.float32)
        if ref_logprobs is not None:
            kl, kl_slope = kl_penalty(policy, load_kept(ref_logprobs, at, kept), KL)
            loss += kl_coef * kl
            slope += kl_coef * kl_slope
            kls += mask * tl.where(kept, kl, 0.0)
        if SQUARED:
            loss += squared_coef * squared
            slope += squared_coef * squared_slope
        if entropy is not None:
            value = load_kept(entropy, at, kept)
            loss -= entropy_coef * value
            entropies += mask * value
        losses += mask * tl.where(kept, loss, 0.0)
        lows += tl.where(low, mask, 0.0)
        highs += tl.where(high, mask, 0.0)
        peaks = tl.maximum(peaks, tl.where(kept, log_ratio, float("-inf")))
        if not COUPLED:
            tl.store(slopes + at, tl.where(kept, mask * share * slope, 0.0), mask=inside)
        if entropy_slopes is not None:
            tl.store(entropy_slopes + at, -entropy_coef * mask * share, mask=inside)

    if COUPLED:
        by_token = tl.sum(coupling, 0) / tl.maximum(count, 1.0)
        for offset in range(start, end, BLOCK):
            at = offset + lanes
            inside = at < end
            mask = load_mask(loss_mask, at, inside)
            kept = mask != 0.0
            policy, old = _load_pair(policy_logprobs, old_logprobs, at, kept)
            slope = by_token + tl.zeros([BLOCK], tl.float32)
            if SURROGATE == "gmpo":
                advantage = _load_advantages(advantages, number, at, kept, TOKEN_ADVANTAGES)
                _, low, high = gmpo_log_ratio(policy - old, advantage, log_low, log_high)
                slope = tl.where(low | high, 0.0, slope)
            if ref_logprobs is not None:
                _, kl_slope = kl_penalty(policy, load_kept(ref_logprobs, at, kept), KL)
                slope += kl_coef * kl_slope
            if SQUARED:
                slope += squared_coef * squared_slope
            tl.store(slopes + at, tl.where(kept, mask * share * slope, 0.0), mask=inside)

    clear_outside(slopes, start, end, number, sequences, tokens, BLOCK)
    if entropy_slopes is not None:
        clear_outside(entropy_slopes, start, end, number, sequences, tokens, BLOCK)

    column = sums + number
    stride = sequences.to(tl.int64)
    tl.store(column, share * tl.sum(losses, 0))
    tl.store(column + stride, share * tl.sum(lows, 0))
    tl.store(column + 2 * stride, share * tl.sum(highs, 0))
    tl.store(column + 3 * stride, share * tl.sum(kls, 0))
    tl.store(column + 4 * stride, share * tl.sum(entropies, 0))
    if rollout_logprobs is not None:
        tl.store(column + 5 * stride, share * tl.sum(weights, 0))
    else:
        tl.store(column + 5 * stride, share * count)  # every weight is 1
    tl.store(column + _COUNT_ROW * stride, count)
    tl.store(column + _MAX_ROW * stride, tl.max(peaks, 0))


@triton.jit(do_not_specialize=["columns"])
def reduce_kernel(sums, loss, totals, columns, scale, FILLED: tl.constexpr, COUNTED: tl.constexpr, ROWS: tl.constexpr,
                  BLOCK: tl.constexpr):
    """Totals [8] of sums [8, columns], of which the first FILLED rows are written, and the loss, their first entry.

    All are multiplied by scale, with COUNTED by 1 / the counted tokens; COUNT_ROW then holds this factor, and MAX_ROW
    the exponential of its largest entry.
    """
    row = tl.arange(0, ROWS)
    added = tl.zeros([ROWS, BLOCK], tl.float32)
    largest = tl.full([ROWS, BLOCK], float("-inf"), tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        at = row[:, None].to(tl.int64) * columns + column[None, :]
        values = tl.load(sums + at, mask=(row[:, None] < FILLED) & (column[None, :] < columns), other=0.0)
        added += values
        largest = tl.maximum(largest, tl.where(column[None, :] < columns, values, float("-inf")))
    total = tl.sum(added, 1)
    factor = scale
    if COUNTED:
        factor = 1.0 / tl.maximum(tl.sum(tl.where(row == _COUNT_ROW, total, 0.0), 0), 1.0)
    result = tl.where(row == _COUNT_ROW, factor, total * factor)
    result = tl.where(row == _MAX_ROW, tl.exp(tl.max(largest, 1)), result)
    tl.store(totals + row, result)
    tl.store(loss, tl.sum(tl.where(row == 0, result, 0.0), 0))


@triton.jit(do_not_specialize=["tokens"], do_not_specialize_on_alignment=["upstream"])
def backward_kernel(slopes, entropy_slopes, totals, upstream, gradient, entropy_gradient, tokens, BLOCK: tl.constexpr):
    """Slopes [M] times the factor of the batch and the upstream gradient, in the dtypes of the outputs."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < tokens
    factor = tl.load(totals + _COUNT_ROW) * tl.load(upstream).to(tl.float32)
    slope = tl.load(slopes + at, mask=inside, other=0.0)
    tl.store(gradient + at, (slope * factor).to(gradient.dtype.element_ty), mask=inside)
    if entropy_slopes is not None:
        slope = tl.load(entropy_slopes + at, mask=inside, other=0.0)
        tl.store(entropy_gradient + at, (slope * factor).to(entropy_gradient.dtype.element_ty), mask=inside)


Results = tuple[torch.Tensor, torch.Tensor]


def reduce(sums: torch.Tensor, filled: int, scale: float | None) -> Results:
    """loss [] and totals [8] of sums [8, S]; scale None is 1 / the counted tokens."""
    loss, totals = sums.new_empty(()), sums.new_empty(ROWS)
    reduce_kernel[(1,)](sums, loss, totals, sums.shape[1], 1.0 if scale is None else scale, FILLED=filled,
                        COUNTED=scale is None, ROWS=ROWS, BLOCK=_REDUCE_BLOCK, num_warps=NUM_WARPS)
    return loss, totals


def forward(tensors: tuple[torch.Tensor | None, ...], kinds: list[str], numbers: list[float],
            scale: float | None, entropy_slope: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """loss [], totals [8], slopes [M], entropy slopes ([M], [0] unless asked for), all float32.

    Args:
        tensors: contiguous policy_logprobs, old_logprobs, advantages, cu_seqlens, loss_mask, ref_logprobs,
            rollout_logprobs, entropy. kinds: surrogate, weighting, KL, level and treatment of the importance weights,
            `squared` or `plain`.
        numbers: the sixteen of `forward_kernel`, in its order. scale: of the whole batch; None counts the tokens.
    """
    policy, advantages, cu_seqlens = tensors[0], tensors[2], tensors[3]
    assert policy is not None and advantages is not None and cu_seqlens is not None
    sequences = len(cu_seqlens) - 1
    new = policy.new_empty if sequences else policy.new_zeros
    slopes = new(len(policy), dtype=torch.float32)
    entropy_slopes = new(len(policy) if entropy_slope else 0, dtype=torch.float32)
    sums = policy.new_empty(ROWS, sequences, dtype=torch.float32)
    surrogate, weighting, kl, level, treatment, squared = kinds
    with torch.cuda.device_of(policy):
        if sequences:
            forward_kernel[(sequences,)](
                *tensors, slopes, entropy_slopes if entropy_slope else None, sums, sequences, len(policy),
                *numbers,
                SURROGATE=surrogate, PER_SEQUENCE=weighting == "sequence", KL=kl, LEVEL=level, WEIGHT=treatment,
                SQUARED=squared == "squared", TOKEN_ADVANTAGES=advantages.shape == policy.shape, BLOCK=BLOCK,
                num_warps=NUM_WARPS)
        return *reduce(sums, ROWS, scale), slopes, entropy_slopes


def backward(upstream: torch.Tensor, totals: torch.Tensor, slopes: torch.Tensor, entropy_slopes: torch.Tensor | None,
             dtype: torch.dtype, entropy_dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients by the log-probs [M] and, with entropy_slopes, by the entropy ([M], else [0])."""
    tokens = len(slopes)
    gradient = torch.empty_like(slopes, dtype=dtype)
    entropy_gradient = slopes.new_empty(tokens if entropy_slopes is not None else 0, dtype=entropy_dtype)
    if tokens:
        with torch.cuda.device_of(slopes):
            backward_kernel[(triton.cdiv(tokens, BLOCK),)](
                slopes, entropy_slopes, totals, upstream, gradient,
                entropy_gradient if entropy_slopes is not None else None, tokens, BLOCK=BLOCK, num_warps=NUM_WARPS)
    return gradient, entropy_gradient


def _forward_case(surrogate: str, level: str, dtype: str, squared: bool = False, /, **absent: None) -> Sm90Case:
    by_sequence = surrogate not in ("cispo", "cispo_sequence", "vespo", "gpg")
    flags = {"SURROGATE": surrogate, "PER_SEQUENCE": by_sequence, "KL": "k3", "LEVEL": level,
             "WEIGHT": "truncate", "SQUARED": squared, "TOKEN_ADVANTAGES": False, "BLOCK": BLOCK}
    name = f"forward_{surrogate}_{dtype}{'_plain' * bool(absent)}{'_squared' * squared}"
    return sm90_case(name, forward_kernel, flags | absent, dtype=dtype, num_warps=NUM_WARPS)


_PLAIN: dict[str, None] = dict.fromkeys(
    ("old_logprobs", "loss_mask", "ref_logprobs", "rollout_logprobs", "entropy", "entropy_slopes"))
_REDUCE = {"ROWS": ROWS, "BLOCK": _REDUCE_BLOCK}

SM90_CASES: list[Sm90Case] = [
    *(_forward_case(surrogate, level, "fp32") for surrogate, level in (
        ("clip", "token"), ("cispo", "token"), ("sapo", "sequence"), ("gspo", "token"), ("gspo_token", "sequence"),
        ("gmpo", "sequence"), ("vespo", "token"), ("cispo_sequence", "token"), ("sapo_sequence", "sequence"))),
    _forward_case("vespo", "sequence", "bf16"),
    _forward_case("clip", "token", "bf16"),
    _forward_case("gpg", "token", "fp32", True),
    _forward_case("gmpo", "token", "fp32", True),
    _forward_case("clip", "token", "fp32", **_PLAIN),
    _forward_case("gmpo", "token", "fp32", **_PLAIN),
    sm90_case("reduce_grpo", reduce_kernel, {"FILLED": ROWS, "COUNTED": True, **_REDUCE}, num_warps=NUM_WARPS),
    sm90_case("reduce_dpo", reduce_kernel, {"FILLED": COUNT_ROW, "COUNTED": False, **_REDUCE}, num_warps=NUM_WARPS),
    sm90_case("backward_fp32", backward_kernel, {"entropy_slopes": None, "entropy_gradient": None, "BLOCK": BLOCK},
              num_warps=NUM_WARPS),
    sm90_case("backward_entropy_bf16", backward_kernel, {"BLOCK": BLOCK}, dtype="bf16", num_warps=NUM_WARPS),
]
