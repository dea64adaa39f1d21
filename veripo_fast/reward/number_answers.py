r"""Reading numbers: `1,000`, `2.5m`, `about 2.5`, `\frac{5}{2}`, `50%`, `3 \times 10^{4}`, `twenty-one`, `x = 5`.

An answer with two different numbers ("2 or 3"), with a sum in it ("2+2", "x+1") or with a rest that changes the number
("not 12", "less than 12", "12x", "√12") is no number. Units are read, and compared in score.py.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

from veripo_fast.reward.answers import LONGEST_ANSWER, clean, plain
from veripo_fast.reward.number_signs import plain_chinese, plain_groups, plain_signs
from veripo_fast.reward.units import measure


@dataclass(frozen=True)
class Number:
    """One number in a text."""

    value: float
    """As written: 50 for `50%`."""
    percent: bool
    unit: str
    """Letters that follow it, lower case: `m`, `m2`, `km/h`, `seconds`, or empty."""
    word: str = ""
    """The words when it was spelled out, as in `twenty one`; empty for digits."""
    before: str = ""
    """The word before it, lower case, or empty."""


_FRAC = re.compile(r"(?:(?<!\d)(\d+)\s*)?\\[dt]?frac\s*\{\s*([-+]?[\d.,]+)\s*\}\s*\{\s*([\d.,]+)\s*\}")
_POWER_OF_TEN = re.compile(r"(?:(?<=\d)\s*(?:\\times|\\cdot|×|\*|x)\s*|(?<![\w.]))10\s*\^\s*\{?\s*([-+]?\d+)\s*\}?")
_UNIT_POWER = re.compile(r"(?<![A-Za-z])([A-Za-z]{1,2})\s*\^\s*\{?\s*([23])\s*\}?(?![\w^])")
_NAMED_POWER = re.compile(r"\b(square|sq\.?|cubic)\s+([a-z]+)", re.IGNORECASE)
_DEGREES = re.compile(r"\^?\s*\{?\s*\\(?:circ|degree)\b\s*\}?|°")
_SPACING = re.compile(r"\\[,;:! ]|\\q?quad\b|\\(?:approx|sim|left|right)\b|~")
_NEGATIVE = re.compile(r"\b(?:minus|negative)\s+(?=[.\d])", re.IGNORECASE)
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?![\d,])|\d+)(?:\.\d+)?|\.\d+"
_NUMBER = re.compile(
    rf"(?<![\w.])(?P<sign>[-+]?)\s?(?:(?:(?P<whole>\d+)\s+)?(?P<top>\d+)\s*/\s*(?P<bottom>\d+)(?!\s*/|[\d.])"
    rf"|(?P<decimal>{_DIGITS})(?:[eE](?P<exponent>[-+]?\d+)(?![\w]))?)"
    r"\s*(?:(?P<percent>\\?%|per\s?cent\b)|(?P<scale>hundred\b|thousand\b|million\b|billion\b|(?<=\d)[kK](?!\w)))?"
    r"\s*-?(?P<unit>[A-Za-zµ]*(?:(?<=[A-Za-z])[23](?!\w)|(?<=[A-Za-z])/[A-Za-z]+)?)")
_ALGEBRA = re.compile(r"\^|\\[A-Za-z]|[({]\s*/|/\s*[({]|[\d)]\s*[-+*×·]\s*[\d(]|\d\s*[+*×·]\s*[A-Za-z]"
                      r"|[A-Za-z](?<!\d[eE])[-+*/]\d|[A-Za-z]\s*[-+*]\s+\d")
_SCALES = {"hundred": 1e2, "thousand": 1e3, "million": 1e6, "billion": 1e9}
_KILO = {"k": 1e3, "K": 1e3}
_SMALL = {word: value for value, word in enumerate(
    ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
     "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"))}
_TENS = {word: 10 * (value + 2) for value, word in enumerate(
    ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"))}
_CARDINAL = _SMALL | _TENS


def find_numbers(text: str) -> list[Number]:
    """All numbers of a text, digits first, then the spelled-out ones; each kind in the order of the text."""
    return _find(_clean(text))


def _find(text: str) -> list[Number]:
    return [_number(match, text) for match in _NUMBER.finditer(text)] + _spelled(text)


def read_number(text: str) -> Number | None:
    """The one number that an answer states, or None when it states none or several; of `a = b` it is b.

    None too for an answer with a rest that nobody has read: another sign, a variable, a word that changes the number.
    """
    if len(text) > LONGEST_ANSWER:
        return None
    *given, text = re.split(r"[=≈]", _clean(plain_chinese(plain_signs(clean(text)))))
    number = _stated(text)
    if number is None or any(_contradicts(part, number) for part in given):
        return None
    return number


def _contradicts(part: str, number: Number) -> bool:
    """Whether one side of an equation is another plain number: `3 = 12` is no answer."""
    other = _stated(part)
    return other is not None and other.value != number.value


def _stated(text: str) -> Number | None:
    text = _fraction_in_words(plain_groups(text))
    half = _AND_A_HALF.search(text)
    if half:
        text = text[:half.start()] + text[half.end():]
    if _ALGEBRA.search(text) or _UNREAD.search(text) or CHANGED.search(text):
        return None
    found = _find(text)
    distinct = {(number.value, number.percent) for number in found}
    if len(distinct) != 1 or not math.isfinite(found[0].value) or _has_a_variable(text, found):
        return None
    if half is None:
        return found[0]
    return replace(found[0], value=found[0].value + math.copysign(_PARTS[half[1].lower()], found[0].value))


_AND_A_HALF = re.compile(r"\s+and\s+(?:a|one)\s+(half|quarter|third)\b", re.IGNORECASE)
_PARTS = {"half": 1 / 2, "quarter": 1 / 4, "third": 1 / 3}
_COUNTED = {"half": 2, "halves": 2, "third": 3, "thirds": 3, "quarter": 4, "quarters": 4, "fourths": 4, "fifth": 5,
            "fifths": 5, "sixths": 6, "eighth": 8, "eighths": 8, "tenth": 10, "tenths": 10}
_FRACTION = re.compile(
    rf"\s*(?:(?:the answer is|it is|about|approximately)\s+)?(?:(an?|{'|'.join(_SMALL)})[\s-]+)?"
    rf"({'|'.join(_COUNTED)})[\s.]*", re.IGNORECASE)
_SIGNS = r"\s\d.,:;!?'\"‘’“”()\[\]{}%$€£¥*/&+=\\…\-"
_UNREAD = re.compile(rf"[^{_SIGNS}A-Za-z\u00c0-\u024fµΩ]|\d\s*['\"’”!]+(?=\s*$|[\w(])|\d\s*[+/*](?=\s*$)"
                     r"|\d\.\.+\s*\d|\d\.\d+\.\d|\d\(|\)\(|\)\d|^\s*/|\d_|\?\s*\d")
"""A sign that is no part of a number's surroundings; a prime, a factorial or an operator behind a number."""
CHANGED = re.compile(
    r"\b(?:not|never|neither|nor|or|either|less|fewer|smaller|greater|larger|bigger|higher|lower|more than|no more"
    r"|least|most|exceed\w*|except|exclud\w+|anything but|(?:hundred|thousand|million)ths?|minus(?=\W*\Z)"
    r"|without|other than|rather than|instead|between"
    r"|squared?|cubed?|root|sqrt|log|ln"
    r"|exp|sin|cos|tan|factorial|dozens?|pairs?|double|triple|twice|half|halves|thirds?|quarters?"
    r"|multiple|power|inverse"
    r"|reciprocal|opposite|plus|times\s+(?:\d|an?\b)|divided|mod|wrong|incorrect|unknown|unclear|none|nothing"
    r"|no\s+\d+|(?:under|over|below|above|beyond|before|after|until|up to"
    r"|past)\s+(?:the\s+)?(?:about\s+)?[-+$]?"
    rf"(?:\d|(?:{'|'.join((*_SMALL, *_TENS))})\b))\b|n['’]t\b", re.IGNORECASE)
"""Words that make another number of the one beside them, or none."""
_ORDINALS = frozenset(("st", "nd", "rd", "th"))
_LETTER = re.compile(r"(?<![\w'’])([^\W\d_])(?![\w'’])")


def _fraction_in_words(text: str) -> str:
    """`two thirds` as 2/3; only where it is the whole text, so that `the second half` stays words."""
    match = _FRACTION.fullmatch(text)
    if match is None or (match[1] is None and match[2].lower() != "half"):
        return text
    count = match[1] or "a"
    return f"{_SMALL.get(count.lower(), 1)}/{_COUNTED[match[2].lower()]}"


def _has_a_variable(text: str, found: list[Number]) -> bool:
    """Whether a letter stands beside the number (`12x`, `x 12`) that is no unit, no article and no pronoun."""
    for number in found:
        if not number.word and 0 < len(number.unit) <= 2 and not (measure(number.unit) or number.unit in _ORDINALS):
            glued = re.search(rf"\d{re.escape(number.unit)}(?!\w)", text, re.IGNORECASE)
            if glued or len(number.unit) == 1:
                return True
    units = {number.unit for number in found if measure(number.unit)}
    return any(letter.lower() not in units and letter not in ("a", "I", "A") for letter in _LETTER.findall(
        re.sub(r"[A-Za-z]+/[A-Za-z]+", " ", text)))


def _clean(text: str) -> str:
    text = plain(text).replace("\u2212", "-")
    text = _DEGREES.sub(" deg", text)
    text = _SPACING.sub(" ", text)
    text = _FRAC.sub(lambda match: f"{match[1] or ''} {match[2]}/{match[3]}", text)
    text = _POWER_OF_TEN.sub(lambda match: f"{'' if match.start() and text[match.start() - 1].isdigit() else '1'}"
                                           f"e{match[1]}", text)
    text = _NAMED_POWER.sub(_named_power, _UNIT_POWER.sub(r"\1\2", text))
    return _NEGATIVE.sub("-", text)


_BASES = {"meters": "m", "meter": "m", "metres": "m", "metre": "m", "m": "m", "centimeters": "cm", "cm": "cm",
          "feet": "ft", "foot": "ft", "ft": "ft", "kilometers": "km", "km": "km", "mm": "mm", "millimeters": "mm"}


def _named_power(match: re.Match[str]) -> str:
    base = _BASES.get(match[2].lower())
    return match[0] if base is None else base + ("3" if match[1].lower() == "cubic" else "2")


def _number(match: re.Match[str], text: str) -> Number:
    if match["top"]:
        bottom = float(match["bottom"])
        value = float(match["whole"] or 0) + (float(match["top"]) / bottom if bottom else math.nan)
    else:
        value = float(match["decimal"].replace(",", "") + (f"e{match['exponent']}" if match["exponent"] else ""))
    value *= (_SCALES | _KILO).get(match["scale"] or "", 1.0) * (-1.0 if match["sign"] == "-" else 1.0)
    before = re.findall(r"[^\W\d]+", text[max(0, match.start() - 40):match.start()])
    return Number(value, bool(match["percent"]), match["unit"].lower(), before=before[-1].lower() if before else "")


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
        if start > 0 and tokens[start - 1] in _SCALES:  # `a hundred twelve` is not 12
            value = math.nan
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
