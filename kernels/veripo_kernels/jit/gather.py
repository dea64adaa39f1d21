"""Triton bodies of gather_logprobs: one program per row, which it reads block by block under a running maximum.

Letters: T rows, V vocabulary. Powers are of 2, so that one factor holds log2(e) and 1/temperature. Whole blocks carry
no mask and only the last one is checked against V: loads stay 16 bytes wide for every V whose rows are aligned, and V
is never compiled in. Sums are kept per lane and added up once per row; a block costs one reduction, its maximum. The
row's token is kept out of the sums, so that 1 - p keeps its digits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from veripo_kernels.jit import Sm90Case

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)
_NOTHING = tl.constexpr(-256.0)  # exponent whose power is 0 in float32: stands for -inf where 0 * -inf would be NaN

_VECTORS = ("token_ids", "logprobs", "entropy", "peak_logits", "log_totals", "doubts", "dlogprobs", "dentropy",
            "coefficient")
"""Read and written one number at a time: a slice that is not 16-byte aligned must not compile another kernel."""


@triton.jit
def _fold(x, peak, total, moment, scale, ENTROPY: tl.constexpr):
    """A block [BLOCK] joins peak = max x, total = sum 2^z and moment = sum 2^z * z, with z = (x - peak) * scale."""
    old_peak, peak = peak, tl.maximum(peak, tl.max(x, 0))
    base = tl.where(peak == float("-inf"), 0.0, peak)
    step = tl.maximum((old_peak - base) * scale, _NOTHING)
    z = (x - base) * scale
    power = tl.exp2(z)
    shrink = tl.exp2(step)
    if ENTROPY:
        moment = shrink * (moment + step * total) + power * tl.maximum(z, _NOTHING)
    return peak, shrink * total + power, moment


@triton.jit
def _log1p(x):
    """Kahan's: right to the last bits also where 1 + x rounds to 1."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def _read_row(row, V, token, logit, scale, BLOCK: tl.constexpr, ENTROPY: tl.constexpr, KEEP: tl.constexpr):
    """Of a row [V], all relative to its finite maximum: that maximum, sum 2^z of the others, 2^z of the token (0 for an
    unknown one), and sum 2^z * z of all. KEEP asks the L2 cache to hold the row for a second read."""
    columns = tl.arange(0, BLOCK)
    peak = float("-inf")
    total = tl.zeros([BLOCK], tl.float32)
    moment = tl.zeros([BLOCK], tl.float32)
    whole = V // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        x = tl.load(row + start + columns, eviction_policy="evict_last" if KEEP else "evict_first").to(tl.float32)
        x = tl.where(start + columns == token, float("-inf"), x)
        peak, total, moment = _fold(x, peak, total, moment, scale, ENTROPY)
    if whole < V:
        x = tl.load(row + whole + columns, mask=whole + columns < V, other=float("-inf")).to(tl.float32)
        x = tl.where(whole + columns == token, float("-inf"), x)
        peak, total, moment = _fold(x, peak, total, moment, scale, ENTROPY)
    highest = tl.where(token < 0, peak, tl.maximum(peak, logit))
    base = tl.where(highest == float("-inf"), 0.0, highest)
    step = tl.maximum((peak - base) * scale, _NOTHING)
    others = tl.exp2(step) * tl.sum(total, 0)
    z = (logit - base) * scale
    own = tl.where(token < 0, 0.0, tl.exp2(z))
    all_moments = others
    if ENTROPY:
        all_moments = tl.exp2(step) * tl.sum(moment, 0) + step * others
        all_moments += tl.where(token < 0, 0.0, own * tl.maximum(z, _NOTHING))
    return base, others, own, all_moments


@triton.jit
def _log_total(others, own):
    """Natural logarithm of their sum; where the token is the maximum, its own is 1 and a small rest is not lost."""
    return tl.where(own == 1.0, _log1p(others), tl.log(others + own))


@triton.jit
def _slope(x, columns, token, peak, log2_total, scale, mine, push, tilt, ENTROPY: tl.constexpr):
    """-p * (push + tilt * log2 p), with log2 p = (x - peak) * scale - log2_total; at the token `mine`."""
    log2_p = (x - peak) * scale - log2_total
    weight = push
    if ENTROPY:
        weight = push + tilt * tl.maximum(log2_p, _NOTHING)
    return tl.where(columns == token, mine, -tl.exp2(log2_p) * weight)


@triton.jit
def _write_slopes(row, out, V, token, peak, log2_total, scale, mine, push, tilt, BLOCK: tl.constexpr,
                  ENTROPY: tl.constexpr):
    """`_slope` of every logit of a row [V], last block first: it is the one most likely still in cache."""
    columns = tl.arange(0, BLOCK)
    blocks = V // BLOCK
    whole = blocks * BLOCK
    if whole < V:
        inside = whole + columns < V
        x = tl.load(row + whole + columns, mask=inside, other=float("-inf")).to(tl.float32)
        slope = _slope(x, whole + columns, token, peak, log2_total, scale, mine, push, tilt, ENTROPY)
        tl.store(out + whole + columns, slope.to(out.dtype.element_ty), mask=inside)
    for number in range(0, blocks):
        start = (blocks - 1 - number) * BLOCK
        x = tl.load(row + start + columns, eviction_policy="evict_first").to(tl.float32)
        slope = _slope(x, start + columns, token, peak, log2_total, scale, mine, push, tilt, ENTROPY)
        tl.store(out + start + columns, slope.to(out.dtype.element_ty), cache_modifier=".cs")


@triton.jit
def _read_token(row, token_ids, number, V):
    """Id (-1 when outside of 0 to V - 1) and its logit (then NaN)."""
    token = tl.load(token_ids + number)
    known = (token >= 0) & (token < V)
    logit = tl.load(row + token, mask=known, other=float("nan")).to(tl.float32)
    return tl.where(known, token, -1).to(tl.int32), logit


@triton.jit(do_not_specialize=["V"], do_not_specialize_on_alignment=_VECTORS)
def forward_kernel(logits, token_ids, logprobs, entropy, peak_logits, log_totals, doubts, V, row_stride,
                   inverse_temperature, BLOCK: tl.constexpr, ENTROPY: tl.constexpr):
    """log p(token) [T], with ENTROPY the entropy in nats [T]; largest logit [T], log sum of exponentials below it, and
    1 - p(token) [T]."""
    number = tl.program_id(0).to(tl.int64)
    row = logits + number * row_stride
    token, logit = _read_token(row, token_ids, number, V)
    peak, others, own, moment = _read_row(row, V, token, logit, inverse_temperature * _LOG2_E, BLOCK, ENTROPY, False)
    log_total = _log_total(others, own)
    tl.store(logprobs + number, (logit - peak) * inverse_temperature - log_total)
    tl.store(peak_logits + number, peak)
    tl.store(log_totals + number, log_total)
    tl.store(doubts + number, others / (others + own))
    if ENTROPY:
        tl.store(entropy + number, log_total - moment / (others + own) * _LN_2)


@triton.jit(do_not_specialize=["V"], do_not_specialize_on_alignment=_VECTORS)
def backward_kernel(logits, token_ids, peak_logits, log_totals, doubts, entropy, dlogprobs, dentropy, dlogits, V,
                    row_stride, out_stride, inverse_temperature, BLOCK: tl.constexpr, ENTROPY: tl.constexpr):
    """(dlogprobs * [column = token] - p * (dlogprobs + dentropy * (log p + entropy))) / temperature, for [T, V]."""
    number = tl.program_id(0).to(tl.int64)
    row = logits + number * row_stride
    token, logit = _read_token(row, token_ids, number, V)
    scale = inverse_temperature * _LOG2_E
    peak = tl.load(peak_logits + number)
    log2_total = tl.load(log_totals + number) * _LOG2_E
    push = tl.load(dlogprobs + number) * inverse_temperature
    mine = push * tl.load(doubts + number)
    tilt = 0.0
    if ENTROPY:
        tilt = tl.load(dentropy + number) * inverse_temperature
        push += tilt * tl.load(entropy + number)
        log2_p = (logit - peak) * scale - log2_total
        spread = tl.load(entropy + number) + tl.maximum(log2_p, _NOTHING) * _LN_2
        mine -= tl.exp2(log2_p) * tilt * spread
    _write_slopes(row, dlogits + number * out_stride, V, token, peak, log2_total, scale, mine, push, tilt * _LN_2,
                  BLOCK, ENTROPY)


@triton.jit(do_not_specialize=["V"], do_not_specialize_on_alignment=_VECTORS)
def fused_kernel(logits, token_ids, coefficient, logprobs, dlogits, V, row_stride, out_stride, inverse_temperature,
                 BLOCK: tl.constexpr):
    """log p(token) [T] and coefficient * d log p(token) / d logits [T, V] in two passes over a row.

    Memory is read once as long as the rows that are in flight fit into the L2 cache.
    """
    number = tl.program_id(0).to(tl.int64)
    row = logits + number * row_stride
    scale = inverse_temperature * _LOG2_E
    token, logit = _read_token(row, token_ids, number, V)
    peak, others, own, _ = _read_row(row, V, token, logit, scale, BLOCK, False, True)
    log_total = _log_total(others, own)
    tl.store(logprobs + number, (logit - peak) * inverse_temperature - log_total)
    push = tl.load(coefficient + number) * inverse_temperature
    mine = push * (others / (others + own))
    _write_slopes(row, dlogits + number * out_stride, V, token, peak, log_total * _LOG2_E, scale, mine, push, 0.0,
                  BLOCK, False)


class Launch(NamedTuple):
    """Columns that a program reads at a time, and its warps of 32 threads."""

    block: int
    num_warps: int


def launch_of(vocabulary: int, *, second_read: bool = False) -> Launch:
    """16 columns per thread in blocks of up to 4,096.

    With a second read up to 16,384: a program then fills an H100's multiprocessor, so that only 132 rows are in flight.
    In bfloat16 at V = 151,936 they are 40 MB, less than its L2 cache of 50 MB.
    """
    block = min(triton.next_power_of_2(vocabulary), 16_384 if second_read else 4_096)
    return Launch(block, max(1, block // 512))


def forward(logits: torch.Tensor, token_ids: torch.Tensor, temperature: float, entropy: bool
            ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """float32 logprobs [T], entropy [T] ([0] unless asked for), normalizer [3, T]; columns of logits have stride 1."""
    rows, vocabulary = logits.shape
    logprobs, normalizer = logits.new_empty(rows, dtype=torch.float32), logits.new_empty(3, rows, dtype=torch.float32)
    entropies = logits.new_empty(rows if entropy else 0, dtype=torch.float32)
    block, num_warps = launch_of(vocabulary)
    with torch.cuda.device_of(logits):
        forward_kernel[(rows,)](logits, token_ids, logprobs, entropies, *normalizer, vocabulary, logits.stride(0),
                                1 / temperature, BLOCK=block, ENTROPY=entropy, num_warps=num_warps)
    return logprobs, entropies, normalizer


def backward(logits: torch.Tensor, token_ids: torch.Tensor, normalizer: torch.Tensor, entropy: torch.Tensor,
             dlogprobs: torch.Tensor, dentropy: torch.Tensor, temperature: float) -> torch.Tensor:
    """Gradient [T, V] in the dtype of logits; empty entropy and dentropy stand for a forward without them."""
    rows, vocabulary = logits.shape
    dlogits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    block, num_warps = launch_of(vocabulary)
    with torch.cuda.device_of(logits):
        backward_kernel[(rows,)](logits, token_ids, *normalizer, entropy, dlogprobs, dentropy, dlogits, vocabulary,
                                 logits.stride(0), dlogits.stride(0), 1 / temperature, BLOCK=block,
                                 ENTROPY=entropy.numel() > 0, num_warps=num_warps)
    return dlogits


def fused(logits: torch.Tensor, token_ids: torch.Tensor, coefficient: torch.Tensor, temperature: float
          ) -> tuple[torch.Tensor, torch.Tensor]:
    """logprobs [T] float32 and dlogits [T, V] of the sum of coefficient [T] float32 times logprobs."""
    rows, vocabulary = logits.shape
    logprobs = logits.new_empty(rows, dtype=torch.float32)
    dlogits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    block, num_warps = launch_of(vocabulary, second_read=True)
    with torch.cuda.device_of(logits):
        fused_kernel[(rows,)](logits, token_ids, coefficient, logprobs, dlogits, vocabulary, logits.stride(0),
                              dlogits.stride(0), 1 / temperature, BLOCK=block, num_warps=num_warps)
    return logprobs, dlogits


def _case(name: str, kernel: Any, dtype: str, *, aligned: bool = True, **flags: bool) -> Sm90Case:
    """A launch of forward, backward or fused on rows of 151,936 logits."""
    second_read = kernel is fused_kernel
    launch = launch_of(151_936, second_read=second_read)
    runtime = [parameter for parameter in kernel.arg_names if not parameter.isupper() or parameter == "V"]
    types = {"logits": f"*{dtype}", "dlogits": f"*{dtype}", "token_ids": "*i64", "V": "i32", "row_stride": "i32",
             "out_stride": "i32", "inverse_temperature": "fp32"}
    divisible = ("logits", "dlogits", *(("row_stride", "out_stride") if aligned else ()))
    return {"name": name, "kernel": kernel, "signature": {name: types.get(name, "*fp32") for name in runtime},
            "constexprs": {"BLOCK": launch.block, **flags},
            "divisible_by_16": tuple(name for name in divisible if name in runtime),
            "num_warps": launch.num_warps, "num_stages": 3, "wgmma": False}


SM90_CASES: list[Sm90Case] = [
    _case("forward_bf16", forward_kernel, "bf16", ENTROPY=False),
    _case("forward_entropy_bf16", forward_kernel, "bf16", ENTROPY=True),
    _case("forward_entropy_fp32", forward_kernel, "fp32", ENTROPY=True),
    _case("forward_unaligned_bf16", forward_kernel, "bf16", aligned=False, ENTROPY=True),
    _case("backward_bf16", backward_kernel, "bf16", ENTROPY=False),
    _case("backward_entropy_bf16", backward_kernel, "bf16", ENTROPY=True),
    _case("backward_entropy_fp32", backward_kernel, "fp32", ENTROPY=True),
    _case("fused_bf16", fused_kernel, "bf16"),
    _case("fused_fp32", fused_kernel, "fp32"),
]
