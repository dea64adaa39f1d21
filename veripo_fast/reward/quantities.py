"""Grading numbers: exactly, as far as the gold is rounded, and as estimates.

Numbers with units are compared as quantities: 250 cm is 2.5 m, 2.5 km is not, and 1:30 is 90 seconds.
"""

from __future__ import annotations

import math
import re

from veripo_fast.reward.answers import clean, plain
from veripo_fast.reward.number_answers import Number, read_number
from veripo_fast.reward.units import in_unit, measure

FLOAT_SLACK = 1e-9
_CLOCK = re.compile(r"(?:(\d{1,3}):([0-5]\d)|(\d{1,3})):([0-5]\d(?:\.\d{1,6})?)")
"""h:mm:ss or m:ss."""
_DECIMALS = re.compile(r"\d*\.(\d+)(?!\d)")
_EXACT = re.compile(r"/|frac|[½⅓⅔¼¾⅕-⅞]")
_SCALED = re.compile(r"\d\s*[eE][-+]?\d|10\s*\^|\\times|×")


def number_accuracy(answer: str, gold: str, tolerance: float = 1e-6) -> float:
    """1 for the gold's number within a relative tolerance (a gold of 0: exactly), else 0."""
    pair = comparable(answer, gold)
    return 0.0 if pair is None else float(close(*pair, tolerance))


def rounded_accuracy(answer: str, gold: str, tolerance: float = 1e-6) -> float:
    """1 for a number that is the gold when it is rounded to as many decimals as the gold has, else 0.

    Gold 0.67: 0.667 and 2/3 count, 0.7 and 0.66 do not: an answer with fewer decimals is not rounded up to the gold. A
    whole gold is a count and is compared as `number_accuracy` does. Halves count both ways: 0.125 is 0.12 and 0.13.
    """
    pair, wanted = comparable(answer, gold), read_number(gold)
    if pair is None or wanted is None:
        return 0.0
    decimals = _decimals(gold)
    finer = bool(_EXACT.search(answer)) or _decimals(answer) > decimals
    if close(*pair, tolerance) or not decimals or not finer:
        return float(close(*pair, tolerance))
    half = 0.5 * 10.0 ** -decimals * (abs(pair[1] / wanted.value) if wanted.value else 1.0)
    return float(abs(pair[0] - pair[1]) <= half * (1 + FLOAT_SLACK))


def _decimals(text: str) -> int:
    found = _DECIMALS.search(text)
    return 0 if found is None or _SCALED.search(text) else len(found[1])


def estimate_accuracy(answer: str, gold: str) -> float:
    """`mra` of the answer's number, 0 without one."""
    pair = comparable(answer, gold)
    return 0.0 if pair is None else mra(*pair)


def mra(prediction: float, gold: float) -> float:
    """Mean Relative Accuracy (Yang et al. 2024, VSI-Bench): the share of the thresholds .50, .55, ..., .95 for which
    |prediction - gold| / |gold| <= 1 - threshold, robust to float rounding.

    Relative errors of 0.05, 0.10, 0.20, 0.30, 0.50 and 0.51 give 1.0, 0.9, 0.7, 0.5, 0.1 and 0. A gold of 0 counts
    exact predictions only; a prediction or gold that is not finite gives 0.
    """
    if not (math.isfinite(prediction) and math.isfinite(gold)):
        return 0.0
    if gold == 0:
        return float(prediction == 0)
    error = abs(prediction - gold) / abs(gold)
    return sum(error <= step / 20 + FLOAT_SLACK for step in range(1, 11)) / 10


def close(value: float, wanted: float, tolerance: float) -> bool:
    """Whether a number is within a relative tolerance of the wanted one."""
    return abs(value - wanted) <= tolerance * abs(wanted) * (1 + FLOAT_SLACK)


def is_number(text: str) -> bool:
    """Whether a text states one number, or a time as a clock shows it."""
    return read_number(text) is not None or _clock(text) is not None


def comparable(answer: str, gold: str) -> tuple[float, float] | None:
    """The (answer, gold) values to compare, in the gold's unit; None when they measure different things.

    `4%` is 0.04 and nothing else. For a gold of 50 %, a bare 0.5 is a share and a bare 50 means percent. A clock (1:30)
    is compared with another clock or with a number that has a unit of time.
    """
    given, wanted = read_number(answer), read_number(gold)
    clocks = (_clock(answer) if given is None else None, _clock(gold) if wanted is None else None)
    if clocks != (None, None):
        given, wanted = clocks[0] or given, clocks[1] or wanted
        if given is None or wanted is None or not (_is_time(given) and _is_time(wanted)):
            return None
    return values_to_compare(given, wanted)


def values_to_compare(answer: Number | None, gold: Number | None) -> tuple[float, float] | None:
    """`comparable`, of numbers that have been read."""
    if answer is None or gold is None:
        return None
    value = in_unit(answer.value, answer.unit, gold.unit)
    if value is None:
        return None
    if answer.percent == gold.percent:
        return value, gold.value
    if answer.percent:
        return value / 100, gold.value
    return value, gold.value / 100 if abs(value) <= 1 else gold.value


def _clock(text: str) -> Number | None:
    match = _CLOCK.fullmatch(plain(clean(text)).strip(" .")) if len(text) < 40 else None
    if match is None:
        return None
    minutes = int(match[2]) + 60 * int(match[1]) if match[1] else int(match[3])
    return Number(60 * minutes + float(match[4]), False, "s")


def _is_time(number: Number) -> bool:
    found = measure(number.unit)
    return found is not None and found[0] == "time"
