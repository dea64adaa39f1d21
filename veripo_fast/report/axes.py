"""Numbers as a reader wants them on an axis: round marks, honest ranges, labels with equal decimals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from veripo_fast.text import number, with_minus_sign


def tick_labels(marks: Sequence[float]) -> list[str]:
    """Labels with the same number of decimals, enough to tell the marks apart."""
    step = min((b - a for a, b in pairwise(marks)), default=0.0)
    largest = max(abs(mark) for mark in marks)
    if step <= 0 or largest < 1e-3 or largest >= 1e6:
        return [number(mark) for mark in marks]
    decimals = next(d for d in range(20) if abs(step * 10**d - round(step * 10**d)) < 1e-6)
    return [with_minus_sign(f"{mark + 0.0:,.{decimals}f}") for mark in marks]


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers from `low` to `high`, inclusive."""
    rough = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def y_range(values: Sequence[float], fixed: tuple[float, float] | None) -> tuple[float, float]:
    """The fixed range if all values lie in it; else from zero when nothing is negative, widened to round numbers."""
    low, high = min(values), max(values)
    if fixed and fixed[0] <= low and high <= fixed[1]:
        return fixed
    low = min(low, 0.0) if low >= 0 else low
    if high == low:
        low, high = low - abs(low) * 0.5, high + (abs(high) * 0.5 or 1.0)
    marks = ticks(low, high, 4)
    step = marks[1] - marks[0] if len(marks) > 1 else high - low
    return math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
