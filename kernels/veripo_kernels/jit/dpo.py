"""Triton body of dpo_loss: one program per pair; adding up and scaling are the kernels of grpo_loss.

Letters: M tokens, B pairs. Completion 2b is the chosen one of pair b, 2b + 1 the rejected one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from veripo_kernels.jit import Sm90Case, sm90_case
from veripo_kernels.jit.formulas import divergence_score, preference_loss
from veripo_kernels.jit.grpo import COUNT_ROW, ROWS, clear_outside, load_kept, load_mask, reduce

BLOCK = 512
NUM_WARPS = 4


@triton.jit
def _count(loss_mask, start, end, BLOCK: tl.constexpr):
    """Kept tokens from start to end."""
    count = (end - start).to(tl.float32)
    if loss_mask is not None:
        counts = tl.zeros([BLOCK], tl.float32)
        for offset in range(start, end, BLOCK):
            at = offset + tl.arange(0, BLOCK)
            counts += load_mask(loss_mask, at, at < end)
        count = tl.sum(counts, 0)
    return count


@triton.jit
def _weights(mask, before, shorter, tail_weight, LD: tl.constexpr):
    """mask [BLOCK], with tail_weight on the tokens beyond the shorter completion, and the kept tokens so far."""
    weight = mask
    if LD:
        seen = before + tl.cumsum(mask, 0)
        weight = tl.where(seen > shorter, mask * tail_weight, mask)
        before += tl.sum(mask, 0)
    return weight, before


@triton.jit
def _sums(policy_logprobs, ref_logprobs, loss_mask, start, end, shorter, tail_weight, LD: tl.constexpr,
          REF_TOKENS: tl.constexpr, BLOCK: tl.constexpr):
    """Weighted sums of the policy and of the reference (0 unless it has tokens), and the masked sum of the policy."""
    policy_sums = tl.zeros([BLOCK], tl.float32)
    ref_sums = tl.zeros([BLOCK], tl.float32)
    plain_sums = tl.zeros([BLOCK], tl.float32)
    before = 0.0
    for offset in range(start, end, BLOCK):
        at = offset + tl.arange(0, BLOCK)
        mask = load_mask(loss_mask, at, at < end)
        weight, before = _weights(mask, before, shorter, tail_weight, LD)
        policy = load_kept(policy_logprobs, at, mask != 0.0)
        policy_sums += weight * policy
        plain_sums += mask * policy
        if REF_TOKENS:
            ref_sums += weight * load_kept(ref_logprobs, at, mask != 0.0)
    return tl.sum(policy_sums, 0), tl.sum(ref_sums, 0), tl.sum(plain_sums, 0)


@triton.jit
def _write_slopes(slopes, loss_mask, start, end, shorter, tail_weight, slope, plain_slope, LD: tl.constexpr,
                  BLOCK: tl.constexpr):
    """slope times the weight of each token, plus plain_slope times its mask."""
    before = 0.0
    for offset in range(start, end, BLOCK):
        at = offset + tl.arange(0, BLOCK)
        mask = load_mask(loss_mask, at, at < end)
        weight, before = _weights(mask, before, shorter, tail_weight, LD)
        tl.store(slopes + at, slope * weight + plain_slope * mask, mask=at < end)


@triton.jit(do_not_specialize=["pairs", "tokens"],
            do_not_specialize_on_alignment=["policy_logprobs", "ref_logprobs", "cu_seqlens", "loss_mask",
                                            "pair_weights"])
def forward_kernel(policy_logprobs, ref_logprobs, cu_seqlens, loss_mask, pair_weights, slopes, sums, pairs, tokens,
                   dpo_beta, smoothing, tail_weight, nll_coef, tau, alpha, KIND: tl.constexpr, SCORE: tl.constexpr,
                   NORMALIZE: tl.constexpr, LD: tl.constexpr, REF_TOKENS: tl.constexpr, BLOCK: tl.constexpr):
    """Slopes [M] of one pair and its column of sums [8, B]: loss, accuracy, margin, two means, drift."""
    pair = tl.program_id(0).to(tl.int64)
    start = tl.load(cu_seqlens + 2 * pair).to(tl.int64)
    middle = tl.load(cu_seqlens + 2 * pair + 1).to(tl.int64)
    end = tl.load(cu_seqlens + 2 * pair + 2).to(tl.int64)
    clear_outside(slopes, start, end, pair, pairs, tokens, BLOCK)  # first: behind the sums it spills registers
    chosen_count = _count(loss_mask, start, middle, BLOCK)
    rejected_count = _count(loss_mask, middle, end, BLOCK)
    shorter = tl.minimum(chosen_count, rejected_count)
    chosen_share = 1.0 / tl.maximum(chosen_count, 1.0)
    rejected_share = 1.0 / tl.maximum(rejected_count, 1.0)
    chosen, chosen_ref, chosen_plain = _sums(policy_logprobs, ref_logprobs, loss_mask, start, middle, shorter,
                                             tail_weight, LD, REF_TOKENS, BLOCK)
    rejected, rejected_ref, _ = _sums(policy_logprobs, ref_logprobs, loss_mask, middle, end, shorter, tail_weight, LD,
                                      REF_TOKENS, BLOCK)
    if not REF_TOKENS:
        chosen_ref = tl.load(ref_logprobs + 2 * pair).to(tl.float32)
        rejected_ref = tl.load(ref_logprobs + 2 * pair + 1).to(tl.float32)

    up, down = chosen - chosen_ref, rejected - rejected_ref
    drift = up * chosen_share
    high, low = up, down
    if SCORE != "reverse_kl":
        high, chosen_steepness = divergence_score(up, alpha, SCORE)
        low, rejected_steepness = divergence_score(down, alpha, SCORE)
    if NORMALIZE:
        up *= chosen_share
        down *= rejected_share
        high *= chosen_share
        low *= rejected_share
    loss, chosen_slope, rejected_slope = preference_loss(high, low, dpo_beta, smoothing, tau, KIND)
    if NORMALIZE:
        chosen_slope *= chosen_share
        rejected_slope *= rejected_share
    if SCORE != "reverse_kl":
        chosen_slope *= chosen_steepness
        rejected_slope *= rejected_steepness
    loss -= nll_coef * chosen_plain * chosen_share
    nll_slope = -nll_coef * chosen_share
    if pair_weights is not None:
        factor = tl.load(pair_weights + pair).to(tl.float32)
        loss *= factor
        chosen_slope *= factor
        rejected_slope *= factor
        nll_slope *= factor
    _write_slopes(slopes, loss_mask, start, middle, shorter, tail_weight, chosen_slope, nll_slope, LD, BLOCK)
    _write_slopes(slopes, loss_mask, middle, end, shorter, tail_weight, rejected_slope, 0.0, LD, BLOCK)

    margin = dpo_beta * (up - down)
    column = sums + pair
    stride = pairs.to(tl.int64)
    tl.store(column, loss)
    tl.store(column + stride, tl.where(margin > 0.0, 1.0, 0.0))
    tl.store(column + 2 * stride, margin)
    tl.store(column + 3 * stride, chosen * chosen_share)
    tl.store(column + 4 * stride, rejected * rejected_share)
    tl.store(column + 5 * stride, drift)


def forward(policy_logprobs: torch.Tensor, ref_logprobs: torch.Tensor, cu_seqlens: torch.Tensor,
            loss_mask: torch.Tensor | None, weights: torch.Tensor | None, kinds: list[str], numbers: list[float],
            normalize: bool, scale: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """loss [], totals [8] and slopes [M], all float32, of contiguous tensors.

    Args:
        weights: [B] or None. kinds: loss and divergence. scale: 1 / pairs.
        numbers: dpo_beta, label smoothing, weight of the tail, weight of the negative log-prob, tau, alpha.
    """
    pairs = len(cu_seqlens) // 2
    new = policy_logprobs.new_empty if pairs else policy_logprobs.new_zeros
    slopes = new(len(policy_logprobs), dtype=torch.float32)
    sums = policy_logprobs.new_empty(ROWS, pairs, dtype=torch.float32)
    with torch.cuda.device_of(policy_logprobs):
        if pairs:
            forward_kernel[(pairs,)](
                policy_logprobs, ref_logprobs, cu_seqlens, loss_mask, weights, slopes, sums, pairs,
                len(policy_logprobs), *numbers, KIND=kinds[0], SCORE=kinds[1], NORMALIZE=normalize,
                LD=numbers[2] != 1, REF_TOKENS=ref_logprobs.dim() == 1, BLOCK=BLOCK, num_warps=NUM_WARPS)
        return *reduce(sums, COUNT_ROW, scale), slopes


def _case(kind: str, *, score: str = "reverse_kl", dtype: str = "fp32", tokens: bool = True, ld: bool = False,
          **absent: None) -> Sm90Case:
    types = {"pairs": "i32", "tokens": "i32", "ref_logprobs": f"*{dtype}", **dict.fromkeys(
        ("dpo_beta", "smoothing", "tail_weight", "nll_coef", "tau", "alpha"), "fp32")}
    name = f"{kind}_{dtype}{'' if tokens else '_sums'}{'_ld' * ld}{f'_{score}' * (score != 'reverse_kl')}"
    return sm90_case(name, forward_kernel, {"KIND": kind, "SCORE": score, "NORMALIZE": kind == "ipo", "LD": ld,
                                            "REF_TOKENS": tokens, "BLOCK": BLOCK, **absent},
                     dtype=dtype, types=types, num_warps=NUM_WARPS)


SM90_CASES: list[Sm90Case] = [
    *(_case(kind) for kind in ("sigmoid", "ipo", "hinge", "robust", "exo", "nca", "sppo", "apo_zero", "apo_down", "bco",
                               "discopop")),
    *(_case("sigmoid", score=score, pair_weights=None) for score in ("forward_kl", "js", "alpha")),
    _case("ipo", score="js"),
    _case("sigmoid", dtype="bf16", ld=True),
    _case("sigmoid", tokens=False, loss_mask=None, pair_weights=None),
    _case("sigmoid", ld=True, tokens=False),
]
