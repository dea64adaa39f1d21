"""Triton bodies around the linear ops' two gradient products: rows scaled on the way in, scaled and spread on the way
out, and the unit in which runs of rows are summed.

Letters: R rows of a run, D hidden.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from veripo_kernels.jit import Sm90Case


@triton.jit(do_not_specialize=["rows"])
def choose_unit(scale, peak, unit, rows, FIRST: tl.constexpr, BR: tl.constexpr):
    """In which unit the head's gradient is summed, so that scale [R] times the hidden states fits float16; one program.

    unit: float32 [3], a power of two, its inverse, and what the sum so far is to be multiplied by. The first run's
    largest number comes to [2^10, 2^11), far from float16's largest and smallest; a later run changes the unit only if
    its own would pass 2^15.
    """
    largest = tl.zeros((BR,), tl.float32)
    for first in range(0, rows, BR):
        r = first + tl.arange(0, BR)
        here = r < rows
        size = tl.abs(tl.load(scale + r, mask=here, other=0.0)) * tl.load(peak + r, mask=here, other=0.0)
        largest = tl.maximum(largest, size)
    top = tl.max(largest, 0)
    exponent = top.to(tl.int32, bitcast=True) >> 23  # biased by 127; that of an inverse is 254 minus it
    inverse = tl.minimum(tl.maximum(127 + 10 - (exponent - 127), 1), 253)
    change = 127
    if not FIRST:
        before = tl.load(unit + 1).to(tl.int32, bitcast=True) >> 23
        fits = exponent - 127 + before - 127 < 15
        inverse = tl.where(fits, before, inverse)
        change = tl.maximum(inverse - before + 127, 0)
    tl.store(unit, ((254 - inverse) << 23).to(tl.float32, bitcast=True))
    tl.store(unit + 1, (inverse << 23).to(tl.float32, bitcast=True))
    tl.store(unit + 2, (change + tl.zeros_like(inverse) << 23).to(tl.float32, bitcast=True))


@triton.jit
def change_unit(values, unit, count, BLOCK: tl.constexpr):
    """Multiplies values [count] by unit[2]; where that is 1, as nearly always, nothing is read."""
    change = tl.load(unit + 2)
    if change != 1.0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        tl.store(values + at, tl.load(values + at, mask=at < count) * change, mask=at < count)


@triton.jit
def scale_rows(hidden, scale, unit, scaled, width, hidden_stride, BD: tl.constexpr):
    """scaled [R, D] = hidden * scale / unit: the right side of the head's gradient. One program per row."""
    row = tl.program_id(0).to(tl.int64)
    factor, inverse = tl.load(scale + row), tl.load(unit + 1)
    for first in range(0, width, BD):
        d = first + tl.arange(0, BD)
        x = tl.load(hidden + row * hidden_stride + d, mask=d < width, other=0.0).to(tl.float32)
        x = tl.where(factor == 0.0, 0.0, x * factor * inverse)
        tl.store(scaled + row * width + d, x.to(scaled.dtype.element_ty), mask=d < width)


@triton.jit
def spread_rows(product, scale, rows, gradient, width, BD: tl.constexpr):
    """gradient[rows[r]] = scale[r] * product[r], product float32 [R, D]. One program per row."""
    row = tl.program_id(0).to(tl.int64)
    factor, place = tl.load(scale + row), tl.load(rows + row)
    for first in range(0, width, BD):
        d = first + tl.arange(0, BD)
        values = tl.load(product + row * width + d, mask=d < width, other=0.0)
        values = tl.where(factor == 0.0, 0.0, values * factor)
        tl.store(gradient + place * width + d, values.to(gradient.dtype.element_ty), mask=d < width)


_SHARED: Any = {"num_warps": 4, "num_stages": 3, "wgmma": False}
_CASES: list[Any] = [
    *({"name": f"choose_unit{'_first' if first else ''}", "kernel": choose_unit,
       "signature": {"scale": "*fp32", "peak": "*fp32", "unit": "*fp32", "rows": "i32"},
       "constexprs": {"FIRST": first, "BR": 1024}, "divisible_by_16": ("scale", "peak", "unit"), **_SHARED}
      for first in (False, True)),
    {"name": "change_unit", "kernel": change_unit,
     "signature": {"values": "*fp32", "unit": "*fp32", "count": "i64"}, "constexprs": {"BLOCK": 4096},
     "divisible_by_16": ("values", "unit", "count"), **_SHARED},
    {"name": "scale_rows_bf16", "kernel": scale_rows,
     "signature": {"hidden": "*bf16", "scale": "*fp32", "unit": "*fp32", "scaled": "*fp16", "width": "i32",
                   "hidden_stride": "i64"},
     "constexprs": {"BD": 1024},
     "divisible_by_16": ("hidden", "scale", "unit", "scaled", "width", "hidden_stride"), **_SHARED},
    {"name": "spread_rows_bf16", "kernel": spread_rows,
     "signature": {"product": "*fp32", "scale": "*fp32", "rows": "*i64", "gradient": "*bf16", "width": "i32"},
     "constexprs": {"BD": 1024}, "divisible_by_16": ("product", "scale", "rows", "gradient", "width"), **_SHARED},
]
SM90_CASES: list[Sm90Case] = _CASES
