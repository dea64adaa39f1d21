r"""Reading numbers: `1,000`, `2.5m`, `about 2.5`, `\frac{5}{2}`, `50%`, `3 \times 10^{4}`, `twenty-one`, `x = 5`.

An answer with two different numbers ("2 or 3") or with a sum in it ("2+2", "x+1") is no number: it is left to the
mathematics of math_answers.py.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from veripo_fast.reward.answers import LONGEST_ANSWER, plain


@dataclass(frozen=True)
class Number:
    """One number in a text."""

    value: float
    """As written: 50 for `50%`."""
    percent: bool
    unit: str
    """Letters that follow it, lower case: `m`, `seconds`, or empty."""
    word: str = ""
    """The words when it was spelled out, as in `twenty one`; empty for digits."""
    before: str = ""
    """The word before it, lower case, or empty."""


_FRAC = re.compile(r"(?:(?<!\d)(\d+)\s*)?\\[dt]?frac\s*\{\s*([-+]?[\d.,]+)\s*\}\s*\{\s*([\d.,]+)\s*\}")
_POWER_OF_TEN = re.compile(r"(?:(?<=\d)\s*(?:\\times|\\cdot|×|\*|x)\s*|(?<![\w.]))10\s*\^\s*\{?\s*([-+]?\d+)\s*\}?")
_UNIT_POWER = re.compile(r"(?<=[A-Za-z])\s*\^\s*\{?\s*-?\d\s*\}?")
_SPACING = re.compile(r"\\[,;:! ]|\\q?quad\b|\\(?:approx|sim|left|right)\b|~|\^?\s*\{?\\(?:circ|degree)\b\}?")
_NEGATIVE = re.compile(r"\b(?:minus|negative)\s+(?=[.\d])", re.IGNORECASE)
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?![\d,])|\d+)(?:\.\d+)?|\.\d+"
_NUMBER = re.compile(
    rf"(?<![\w.])(?P<sign>[-+]?)\s?(?:(?:(?P<whole>\d+)\s+)?(?P<top>\d+)\s*/\s*(?P<bottom>\d+)(?!\s*/|[\d.])"
    rf"|(?P<decimal>{_DIGITS})(?:[eE](?P<exponent>[-+]?\d+)(?![\w]))?)"
    r"\s*(?:(?P<percent>\\?%|per\s?cent\b)|(?P<scale>hundred|thousand|million|billion)\b)?\s*-?(?P<unit>[A-Za-z]*)")
_ALGEBRA = re.compile(r"\^|\\[A-Za-z]|[({]\s*/|/\s*[({]|[\d)]\s*[-+*×·]\s*[\d(]|\d\s*[+*×·]\s*[A-Za-z]"
                      r"|[A-Za-z](?<!\d[eE])[-+*/]\d|[A-Za-z]\s*[-+*]\s+\d")
_SCALES = {"hundred": 1e2, "thousand": 1e3, "million": 1e6, "billion": 1e9}


def find_numbers(text: str) -> list[Number]:
    """All numbers of a text, digits first, then the spelled-out ones; each kind in the order of the text."""
    return _find(_clean(text))


def _find(text: str) -> list[Number]:
    return [_number(match, text) for match in _NUMBER.finditer(text)] + _spelled(text)


def read_number(text: str) -> Number | None:
    """The one number that an answer states, or None when it states none or several; of `a = b` it is b."""
    if len(text) > LONGEST_ANSWER:
        return None
    text = _clean(text)
    text = re.split(r"[=≈]", text)[-1]
    if _ALGEBRA.search(text):
        return None
    found = _find(text)
    distinct = {(number.value, number.percent) for number in found}
    return found[0] if len(distinct) == 1 and math.isfinite(found[0].value) else None


def _clean(text: str) -> str:
    text = plain(text).replace("\u2212", "-")
    text = _SPACING.sub(" ", text)
    text = _FRAC.sub(lambda match: f"{match[1] or ''} {match[2]}/{match[3]}", text)
    text = _POWER_OF_TEN.sub(lambda match: f"{'' if match.start() and text[match.start() - 1].isdigit() else '1'}"
                                           f"e{match[1]}", text)
    return _NEGATIVE.sub("-", _UNIT_POWER.sub("", text))


def _number(match: re.Match[str], text: str) -> Number:
    if match["top"]:
        bottom = float(match["bottom"])
        value = float(match["whole"] or 0) + (float(match["top"]) / bottom if bottom else math.nan)
    else:
        value = float(match["decimal"].replace(",", "") + (f"e{match['exponent']}" if match["exponent"] else ""))
    value *= _SCALES.get(match["scale"] or "", 1.0) * (-1.0 if match["sign"] == "-" else 1.0)
    before = re.findall(r"[^\W\d]+", text[max(0, match.start() - 40):match.start()])
    return Number(value, bool(match["percent"]), match["unit"].lower(), before=before[-1].lower() if before else "")


_SMALL = {word: value for value, word in enumerate(
    ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
     "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"))}
_TENS = {word: 10 * (value + 2) for value, word in enumerate(
    ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"))}
_CARDINAL = _SMALL | _TENS
_WORD = re.compile(r"[^\W_]+|[^\w\s-]")


def _spelled(text: str) -> list[Number]:
    """Spelled-out numbers below a billion; `and` joins only after hundred, thousand or million."""
    tokens = [token.lower() for token in _WORD.findall(text)] + [""]
    found: list[Number] = []
    start = 0
    while start < len(tokens):
        stop = _run(tokens, start)
        if stop == start:
            start += 1
            continue
        negative = start > 0 and tokens[start - 1] in ("minus", "negative")
        value = _cardinal(tokens[start:stop]) * (-1.0 if negative else 1.0)
        percent = tokens[stop] in ("%", "percent")
        unit = tokens[stop] if tokens[stop].isalpha() and not percent else ""
        found.append(Number(value, percent, unit, " ".join(tokens[start:stop]), tokens[start - 1] if start else ""))
        start = stop
    return found


def _run(tokens: list[str], start: int) -> int:
    """Index after the spelled number that begins at `start`, or `start` when none begins there."""
    stop, last = start, ""
    while stop < len(tokens):
        token = tokens[stop]
        if token == "and" and last in _SCALES and tokens[stop + 1] in _CARDINAL:
            stop += 1
            continue
        if not _continues(token, last):
            break
        stop, last = stop + 1, token
    return stop


def _continues(token: str, last: str) -> bool:
    if token in _SCALES:
        return bool(last)
    units_of_tens = last in _TENS and 0 < _SMALL.get(token, 0) < 10
    return token in _CARDINAL and (not last or last in _SCALES or units_of_tens)


def _cardinal(run: list[str]) -> float:
    total = current = 0.0
    for token in run:
        if token == "hundred":
            current *= 100
        elif token in _SCALES:
            total, current = total + current * _SCALES[token], 0.0
        else:
            current += _CARDINAL.get(token, 0)
    return total + current
