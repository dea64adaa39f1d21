"""Triton bodies of the linear ops: tiles of logits that are reduced, or kept as exponentials, but never written as
logits.

`logit_tile` multiplies a tile, float32 in registers, and in one of three modes
  STATISTICS  writes the tile's maximum and sums of every row;
  KEEP        also writes exp(logit - offset), offset being a guess of logsumexp - 8: the logits of a run in two bytes
  each;
  GRADIENT    writes the logits' gradient, for statistics that are known.
`combine` turns the tiles' sums into log-probs and entropy; `settle` repairs the rows whose guess was too low, and puts
the own token's gradient in. What is kept is relative to the row: a row's gradient is `scale` times it, so that float16
(11 bits of fraction, where bfloat16 has 8) has room for it. A power too large for float16 cannot occur: a tile whose
maximum is more than _ROOM above the guess is kept relative to its own maximum, which `combine` and `settle` see from
the same number.

Letters: R rows of a run, V vocabulary, D hidden.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import triton
import triton.language as tl

from veripo_kernels.jit import Sm90Case

STATISTICS, KEEP, GRADIENT = "statistics", "keep", "gradient"
_ROOM = tl.constexpr(11.0)  # exp(11) = 59,874 is still a float16
_LIFT = tl.constexpr(8.0)  # a row is kept at exp(8) times its probabilities: down to 2e-11 they keep a bit
_LOWEST = tl.constexpr(-3.0e38)


@triton.jit
def _tanh(x):
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@triton.jit
def _log1p(x):
    """Kahan's: right to the last bits also where 1 + x rounds to 1."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def _tile_offset(maximum, offset):
    return tl.where(maximum - offset > _ROOM, maximum, offset)


@triton.jit
def _halves(tile, BR: tl.constexpr, BV: tl.constexpr):
    """Left and right columns of a tile [BR, BV]."""
    return tl.split(tl.permute(tl.reshape(tile, (BR, 2, BV // 2)), (0, 2, 1)))


@triton.jit
def _quarters(tile, BR: tl.constexpr, BV: tl.constexpr):
    """The columns of a tile in four: what follows takes them in turn, so that its registers are a quarter's."""
    left, right = _halves(tile, BR, BV)
    a, b = _halves(left, BR, BV // 2)
    c, d = _halves(right, BR, BV // 2)
    return a, b, c, d


@triton.jit
def _others(logits, token, v, vocabulary):
    """A quarter without the own token, which is kept out of all sums so that 1 - p is exact."""
    return tl.where((v[None, :] == token[:, None]) | (v >= vocabulary)[None, :], float("-inf"), logits)


@triton.jit
def _exponentials(logits, peak, v, here, vocabulary, lift, at, KEEP: tl.constexpr, ENTROPY: tl.constexpr):
    """Sum and moment [BR] of a quarter's exp(logits - peak), which are kept (times exp(lift)) where KEEP."""
    logits = tl.maximum(logits - peak[:, None], _LOWEST)
    powers = tl.exp(logits)
    total = tl.sum(powers, 1)
    moment = total
    if ENTROPY:
        moment = tl.sum(powers * logits, 1)
    if KEEP:
        powers *= tl.exp(lift)[:, None]
        tl.store(at + v[None, :], powers.to(at.dtype.element_ty), mask=here[:, None] & (v < vocabulary)[None, :])
    return total, moment


@triton.jit
def _differentiate(logits, row, bend, v, vocabulary, at, ENTROPY: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """The gradient of a quarter by its logits, times `factor` [BR], goes to `at`."""
    token, log_sum, slope, pull, tilt, row_entropy, factor, here = row
    log_p = tl.maximum(logits - log_sum[:, None], _LOWEST)
    p = tl.exp(log_p)
    gradient = tl.where(v[None, :] == token[:, None], pull[:, None], -p * slope[:, None])
    if ENTROPY:
        gradient -= p * tilt[:, None] * (log_p + row_entropy[:, None])
    if HAS_SOFTCAP:
        gradient *= 1.0 - bend * bend * logits * logits
    gradient *= factor[:, None]
    tl.store(at + v[None, :], gradient.to(at.dtype.element_ty), mask=here[:, None] & (v < vocabulary)[None, :])


@triton.jit
def _narrow(weight, narrow, tile, vocabulary, width, BV: tl.constexpr, BD: tl.constexpr):
    """The head's rows of a tile, in the type of `narrow` [V, D]; the tile has just read them, so a cache has them."""
    v = tile * BV + tl.arange(0, BV)
    at = narrow + v.to(tl.int64)[:, None] * width
    for first in range(0, width, BD):
        d = first + tl.arange(0, BD)
        values = weight.load([tile * BV, first]).to(narrow.dtype.element_ty)
        tl.store(at + d[None, :], values, mask=(v < vocabulary)[:, None] & (d < width)[None, :])


@triton.jit(do_not_specialize=["rows", "inverse_temperature", "softcap"])
def logit_tile(hidden, weight, bias, token_ids, offset, maximum, others, moment, kept,
               logsumexp, entropy, rest, slopes, entropy_slopes, inverse_scale, narrow,
               rows, vocabulary, width, kept_stride, inverse_temperature, softcap,
               MODE: tl.constexpr, ENTROPY: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
               NARROW: tl.constexpr, PRECISION: tl.constexpr, BR: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr):
    """One [BR, BV] tile; rows fastest, so that the programs that run together share the head's tiles.

    hidden, weight: descriptors [R, D], [V, D] of blocks [BR, BD], [BV, BD]. maximum, others, moment: [tiles, R].
    rest: 1 - p of the own token [R]. NARROW: the head is written to `narrow` [V, D] on the way, by the first rows'
    programs.
    """
    row_blocks = tl.cdiv(rows, BR)
    first_row = (tl.program_id(0) % row_blocks) * BR
    tile = tl.program_id(0) // row_blocks
    logits = tl.zeros((BR, BV), tl.float32)
    for d in range(0, width, BD):
        logits = tl.dot(hidden.load([first_row, d]), weight.load([tile * BV, d]).T, logits, input_precision=PRECISION)
    r = first_row + tl.arange(0, BR)
    here = r < rows
    if HAS_BIAS:
        columns = tile * BV + tl.arange(0, BV)
        logits += tl.load(bias + columns, mask=columns < vocabulary, other=0.0).to(tl.float32)[None, :]
    if HAS_SOFTCAP:
        logits = _tanh(logits / softcap) * softcap
    logits *= inverse_temperature
    token = tl.load(token_ids + r, mask=here, other=-1)
    at = kept + r.to(tl.int64)[:, None] * kept_stride
    BQ: tl.constexpr = BV // 4
    v = tile * BV + tl.arange(0, BQ)
    a, b, c, d = _quarters(logits, BR, BV)
    if MODE == "gradient":
        log_sum = tl.load(logsumexp + r, mask=here, other=0.0)
        slope = tl.load(slopes + r, mask=here, other=0.0)
        factor = tl.load(inverse_scale + r, mask=here, other=0.0)
        pull = slope * tl.load(rest + r, mask=here, other=0.0)  # 1 - p from here would have lost its bits
        tilt, row_entropy = slope, slope
        if ENTROPY:
            tilt = tl.load(entropy_slopes + r, mask=here, other=0.0)
            row_entropy = tl.load(entropy + r, mask=here, other=0.0)
        bend = 1.0 / (inverse_temperature * softcap)
        row = (token, log_sum, slope, pull, tilt, row_entropy, factor, here)
        _differentiate(a, row, bend, v, vocabulary, at, ENTROPY, HAS_SOFTCAP)
        _differentiate(b, row, bend, v + BQ, vocabulary, at, ENTROPY, HAS_SOFTCAP)
        _differentiate(c, row, bend, v + 2 * BQ, vocabulary, at, ENTROPY, HAS_SOFTCAP)
        _differentiate(d, row, bend, v + 3 * BQ, vocabulary, at, ENTROPY, HAS_SOFTCAP)
    else:
        a = _others(a, token, v, vocabulary)
        b = _others(b, token, v + BQ, vocabulary)
        c = _others(c, token, v + 2 * BQ, vocabulary)
        d = _others(d, token, v + 3 * BQ, vocabulary)
        peak = tl.maximum(tl.maximum(tl.max(a, 1), tl.max(b, 1)), tl.maximum(tl.max(c, 1), tl.max(d, 1)))
        peak = tl.maximum(peak, _LOWEST)
        KEEP: tl.constexpr = MODE == "keep"
        lift = peak
        if KEEP:
            lift = peak - _tile_offset(peak, tl.load(offset + r, mask=here, other=0.0))
        total_a, moment_a = _exponentials(a, peak, v, here, vocabulary, lift, at, KEEP, ENTROPY)
        total_b, moment_b = _exponentials(b, peak, v + BQ, here, vocabulary, lift, at, KEEP, ENTROPY)
        total_c, moment_c = _exponentials(c, peak, v + 2 * BQ, here, vocabulary, lift, at, KEEP, ENTROPY)
        total_d, moment_d = _exponentials(d, peak, v + 3 * BQ, here, vocabulary, lift, at, KEEP, ENTROPY)
        slot = tile.to(tl.int64) * rows + r
        tl.store(maximum + slot, peak, mask=here)
        tl.store(others + slot, (total_a + total_b) + (total_c + total_d), mask=here)
        if ENTROPY:
            tl.store(moment + slot, (moment_a + moment_b) + (moment_c + moment_d), mask=here)
    if NARROW and first_row == 0:
        _narrow(weight, narrow, tile, vocabulary, width, BV, BD)


@triton.jit(do_not_specialize=["inverse_temperature", "softcap"])
def own_logit(hidden, weight, bias, token_ids, target, peak, vocabulary, width, hidden_stride, weight_stride,
              inverse_temperature, softcap, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BD: tl.constexpr):
    """The logit of every row's token, float32 [R], NaN for an id outside the vocabulary; and the largest number of its
    hidden state (`peak`), which `choose_unit` wants. One program per row."""
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(token_ids + row)
    known = (token >= 0) & (token < vocabulary)
    line = weight + tl.where(known, token, 0) * weight_stride
    total = tl.zeros((BD,), tl.float32)
    largest = tl.zeros((BD,), tl.float32)
    for start in range(0, width, BD):
        d = start + tl.arange(0, BD)
        x = tl.load(hidden + row * hidden_stride + d, mask=d < width, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(x))
        total += x * tl.load(line + d, mask=d < width, other=0.0).to(tl.float32)
    logit = tl.sum(total, 0)
    if HAS_BIAS:
        logit += tl.load(bias + tl.where(known, token, 0)).to(tl.float32)
    if HAS_SOFTCAP:
        logit = _tanh(logit / softcap) * softcap
    tl.store(target + row, tl.where(known, logit * inverse_temperature, float("nan")))
    tl.store(peak + row, tl.max(largest, 0))


@triton.jit(do_not_specialize=["rows", "tiles"])
def combine(maximum, others, moment, target, offset, logprobs, entropy, logsumexp, settled, rest, scale, rows, tiles,
            ENTROPY: tl.constexpr, KEEP: tl.constexpr, BR: tl.constexpr, BT: tl.constexpr):
    """Sums of the tiles to logprobs, entropy, logsumexp [R]; for KEEP the offset a row ends with (`settled`), the sum
    of what is kept for the other tokens (`rest`), and -1 / the sum of all (`scale`)."""
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    here = r < rows
    mine = tl.load(target + r, mask=here, other=0.0)
    peak = tl.where(mine == mine, mine, _LOWEST)
    total = tl.zeros((BR,), tl.float32)
    weighted = tl.zeros((BR,), tl.float32)
    for first in range(0, tiles, BT):
        t = first + tl.arange(0, BT)
        inside = (t < tiles)[:, None] & here[None, :]
        slot = t.to(tl.int64)[:, None] * rows + r[None, :]
        m = tl.load(maximum + slot, mask=inside, other=_LOWEST)
        s = tl.load(others + slot, mask=inside, other=0.0)
        higher = tl.maximum(peak, tl.max(m, 0))
        step, steps = peak - higher, m - higher[None, :]
        if ENTROPY:
            q = tl.load(moment + slot, mask=inside, other=0.0)
            grown = tl.where(s > 0.0, (q + s * steps) * tl.exp(steps), 0.0)
            weighted = tl.where(total > 0.0, (weighted + total * step) * tl.exp(step), 0.0) + tl.sum(grown, 0)
        total = total * tl.exp(step) + tl.sum(s * tl.exp(steps), 0)
        peak = higher
    own = tl.exp(mine - peak)
    everything = total + own
    lse = peak + tl.log(everything)
    tl.store(logsumexp + r, lse, mask=here)
    tl.store(logprobs + r, tl.where(own > total, -_log1p(total / tl.maximum(own, total)), mine - lse), mask=here)
    if ENTROPY:
        weighted += tl.where(own > 0.0, own * (mine - peak), 0.0)
        tl.store(entropy + r, tl.log(everything) - weighted / everything, mask=here)
    else:
        tl.store(entropy + r, tl.zeros_like(everything), mask=here)
    if KEEP:
        guess = tl.load(offset + r, mask=here, other=0.0)
        final = tl.where(lse - guess > _ROOM, lse - _LIFT, guess)
        tl.store(settled + r, final, mask=here)
        tl.store(rest + r, total * tl.exp(peak - final), mask=here)
        tl.store(scale + r, -tl.exp(final - lse), mask=here)


@triton.jit(do_not_specialize=["rows", "tiles"])
def settle(kept, maximum, token_ids, offset, settled, rest, logprobs, entropy, logsumexp, slopes, entropy_slopes,
           inverse_scale, rows, vocabulary, tiles, kept_stride, ENTROPY: tl.constexpr, BV: tl.constexpr,
           SPAN: tl.constexpr):
    """What is kept of SPAN tiles of a row becomes its gradient over `scale`; without ENTROPY only the rows whose offset
    moved are rewritten, and of the others the own token.

    inverse_scale [R]: with ENTROPY what the gradient is divided by to be kept.
    """
    row = tl.program_id(0).to(tl.int64)
    guess, final = tl.load(offset + row), tl.load(settled + row)
    token = tl.load(token_ids + row)
    line = kept + row * kept_stride
    first = tl.program_id(1) * SPAN
    if ENTROPY or final != guess:
        lse = tl.load(logsumexp + row)
        for tile in range(first, tl.minimum(first + SPAN, tiles)):
            v = tile * BV + tl.arange(0, BV)
            start = _tile_offset(tl.load(maximum + tl.cast(tile, tl.int64) * rows + row), guess)
            value = tl.load(line + v, mask=v < vocabulary, other=0.0).to(tl.float32)
            if ENTROPY:
                slope, tilt = tl.load(slopes + row), tl.load(entropy_slopes + row)
                lift = tilt * tl.load(entropy + row)
                log_p = tl.log(value) + (start - lse)
                p = value * tl.exp(start - lse)
                new = tl.where(p > 0.0, -p * (slope + tilt * log_p + lift), 0.0)
                own_log_p = tl.load(logprobs + row)
                own_p = tl.exp(own_log_p)
                mine = slope * (tl.load(rest + row) * tl.exp(final - lse)) - own_p * (tilt * own_log_p + lift)
                inverse = tl.load(inverse_scale + row)
                new = tl.where(v == token, mine, new) * inverse
            else:
                new = tl.where(v == token, -tl.load(rest + row), value * tl.exp(start - final))
            tl.store(line + v, new.to(kept.dtype.element_ty), mask=v < vocabulary)
    elif (token >= first * BV) & (token < tl.minimum((first + SPAN) * BV, vocabulary)):
        tl.store(line + token, (-tl.load(rest + row)).to(kept.dtype.element_ty))


def tile_shape(dtype: str) -> dict[str, int]:
    """Blocks, warps and stages of `logit_tile` on Hopper for hidden states of a dtype ("bf16", "fp16", "fp32")."""
    if dtype == "fp32":
        return {"BR": 64, "BV": 64, "BD": 32, "num_warps": 8, "num_stages": 3}
    return {"BR": 128, "BV": 256, "BD": 64, "num_warps": 8, "num_stages": 3}


def _cases() -> list[Sm90Case]:
    cases: list[Sm90Case] = []
    narrow_or_not = product((STATISTICS, KEEP, GRADIENT), (False, True), (False, True))
    two_bytes = [("bf16", "fp16", *case) for case in narrow_or_not if case[0] != STATISTICS or not case[2]]
    for dtype, kept, mode, entropy, narrow in (
            *two_bytes, ("fp32", "fp32", KEEP, False, False), ("fp32", "fp32", KEEP, True, False)):
        shape = tile_shape(dtype)
        blocks = {name: shape[name] for name in ("BR", "BV", "BD")}
        floats = ("offset", "maximum", "others", "moment", "logsumexp", "entropy", "rest", "slopes",
                  "entropy_slopes", "inverse_scale")
        cases.append({
            "name": f"logit_tile_{dtype}_{mode}{'_entropy' if entropy else ''}{'_narrow' if narrow else ''}",
            "kernel": logit_tile,
            "signature": {"hidden": f"tensordesc<{dtype}[{blocks['BR']}, {blocks['BD']}]>",
                          "weight": f"tensordesc<{dtype}[{blocks['BV']}, {blocks['BD']}]>", "bias": f"*{dtype}",
                          "token_ids": "*i64", **dict.fromkeys(("kept", "narrow"), f"*{kept}"),
                          **dict.fromkeys(floats, "*fp32"), "rows": "i32", "vocabulary": "i32", "width": "i32",
                          "kept_stride": "i64", "inverse_temperature": "fp32",
                          "softcap": "fp32"},
            "constexprs": {"MODE": mode, "ENTROPY": entropy, "HAS_BIAS": False, "HAS_SOFTCAP": False, "NARROW": narrow,
                           "PRECISION": "ieee", **blocks},
            "divisible_by_16": ("bias", "token_ids", "kept", "narrow", *floats, "vocabulary", "width", "kept_stride"),
            "num_warps": shape["num_warps"], "num_stages": shape["num_stages"], "wgmma": dtype != "fp32"})
    return cases


def _row_cases() -> list[Sm90Case]:
    tables = dict.fromkeys(("maximum", "others", "moment", "target", "offset", "logprobs", "entropy", "logsumexp",
                            "settled", "rest", "scale"), "*fp32")
    settled = dict.fromkeys(("maximum", "offset", "settled", "rest", "logprobs", "entropy", "logsumexp", "slopes",
                             "entropy_slopes", "inverse_scale"), "*fp32")
    read = {"hidden": "*bf16", "weight": "*bf16", "bias": "*bf16", "token_ids": "*i64", "target": "*fp32",
            "peak": "*fp32"}
    shared: Any = {"num_warps": 4, "num_stages": 3, "wgmma": False}
    cases: list[Any] = [
        {"name": "own_logit_bf16", "kernel": own_logit,
         "signature": {**read, "vocabulary": "i32", "width": "i32", "hidden_stride": "i64", "weight_stride": "i64",
                       "inverse_temperature": "fp32", "softcap": "fp32"},
         "constexprs": {"HAS_BIAS": False, "HAS_SOFTCAP": False, "BD": 1024},
         "divisible_by_16": (*read, "width", "hidden_stride", "weight_stride"), **shared},
        *({"name": f"combine_keep{'_entropy' if entropy else ''}", "kernel": combine,
           "signature": {**tables, "rows": "i32", "tiles": "i32"},
           "constexprs": {"ENTROPY": entropy, "KEEP": True, "BR": 32, "BT": 32}, "divisible_by_16": tuple(tables),
           **shared} for entropy in (False, True)),
        *({"name": f"settle{'_entropy' if entropy else ''}", "kernel": settle,
           "signature": {"kept": "*fp16", "token_ids": "*i64", **settled, "rows": "i32", "vocabulary": "i32",
                         "tiles": "i32", "kept_stride": "i64"},
           "constexprs": {"ENTROPY": entropy, "BV": 256, "SPAN": 16},
           "divisible_by_16": ("kept", "token_ids", *settled, "vocabulary", "kept_stride"), **shared}
          for entropy in (False, True))]
    return cases


SM90_CASES: list[Sm90Case] = [*_cases(), *_row_cases()]
