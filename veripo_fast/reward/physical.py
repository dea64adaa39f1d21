r"""Quantities with any unit (`9.8 m/s^2`, `5 kN\cdot m`, `25 °C`), converted by pint; a wrong unit is wrong.

units.py holds the few units of everyday answers and needs no library; `number` and `estimate` use it. The library pint
knows the rest. It never sees an answer: only names of units, a few letters each.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from veripo_fast.errors import UserError
from veripo_fast.reward.answers import clean, plain
from veripo_fast.reward.number_answers import read_number
from veripo_fast.reward.number_signs import plain_groups, plain_signs
from veripo_fast.reward.quantities import close

LONGEST_QUANTITY = 200
"""Characters; a longer answer is no quantity."""
_MOST_FACTORS, _HIGHEST_POWER, _FEWEST_DIGITS = 8, 9, 3
_LEAD = re.compile(r"(?:(?:so|thus|therefore|the|final|answer|result|value|is|it|about|approximately|roughly|around"
                   r"|approx)\b[.,:]?\s*|[≈~=:]\s*|\\approx\s*|[A-Za-z]\s*=\s*)*", re.IGNORECASE)
_NUMBER = re.compile(
    r"[-+]?\s?(?:10\s*\^\s*\{?\s*[-+]?\d{1,3}\s*\}?|\\[dt]?frac\s*\{\s*\d+\s*\}\s*\{\s*\d+\s*\}"
    r"|\d+\s*/\s*\d+(?![\d.])|(?:\d[\d,]*\.?\d*|\.\d+)"
    r"(?:[eE][-+]?\d{1,3}(?!\d))?(?:\s*(?:\\times|\\cdot|×|⋅|·|x|\*)\s*10\s*\^\s*\{?\s*[-+]?\d{1,3}\s*\}?)?)")
_SIGNS = (("\\,", " "), ("\\ ", " "), ("\\;", " "), ("~", " "), ("\\cdot", "*"), ("\\times", "*"), ("\\%", "%"),
          ("·", "*"), ("⋅", "*"), ("×", "*"), ("**", "^"), ("^{\\circ}", " deg"), ("^\\circ", " deg"),
          ("\\degree", " deg"), ("°C", " degC"), ("°F", " degF"), ("° C", " degC"), ("° F", " degF"), ("°", " deg"),
          ("deg C", "degC"), ("deg F", "degF"), ("µ", "u"), ("μ", "u"), ("\\mu", "u"), ("\\Omega", "ohm"), ("Ω", "ohm"))
_TORQUE = re.compile(r"\b([kMGmµ]?N)-?m\b")
"""Newton metres; pint knows `Nm` as a measure of yarn."""
_PER = re.compile(r"\bper\b", re.IGNORECASE)
_NAMED_POWER = re.compile(r"\b(square|sq\.?|cubic|cu\.?)\s+([A-Za-z]+)|\b([A-Za-z]+)\s+(squared|cubed)\b",
                          re.IGNORECASE)
_FACTOR = re.compile(r"(\s*[*/]\s*|\s+)?(\(\s*)?([A-Za-z%]{1,30}|1(?=\s*/))"
                     r"(?:\s*\^\s*(?:\{\s*([-+]?\d)\s*\}|([-+]?\d))|(\d))?(?![\d.])(\s*\))?")


@dataclass(frozen=True)
class Quantity:
    """A number and the product of its units; empty for a bare number."""

    value: float
    units: tuple[tuple[str, int], ...]
    """(name of a unit as pint knows it, power)."""
    digits: str
    """The number as it was written."""


def quantity_accuracy(answer: str, gold: str, tolerance: float = 1e-6) -> float:
    """1 for the gold's quantity in whatever unit, within a relative tolerance, else 0. A bare number is in the gold's.

    In another unit than the gold's an answer may be rounded, to three digits or more: 1 mile is 1.61 km. Temperatures
    are points on their scales: 25 °C is 298.15 K.

    Raises:
        UserError: pint is not installed.
    """
    wanted, given = read_quantity(gold), read_quantity(answer)
    if wanted is None or given is None:
        return 0.0
    if not given.units or given.units == wanted.units:
        return float(close(given.value, wanted.value, tolerance))
    value, back = _converted(given, wanted), _converted(wanted, given)
    if value is None or back is None:
        return 0.0
    return float(close(value, wanted.value, max(tolerance, 1e-9)) or _rounds_to(back, given))


def _rounds_to(value: float, given: Quantity) -> bool:
    """Whether a value is the given number when it is rounded as that is written, to three digits or more."""
    written = re.fullmatch(r"[-+]?(\d+)(?:\.(\d+))?", given.digits.replace(",", ""))
    if written is None or len((written[1] + (written[2] or "")).lstrip("0")) < _FEWEST_DIGITS:
        return False
    return abs(value - given.value) <= 0.5 * 10.0 ** -len(written[2] or "") * (1 + 1e-9)


def read_quantity(text: str) -> Quantity | None:
    """The one quantity of a text; None when there is none, a rest is left, or a unit is not known.

    Raises:
        UserError: pint is not installed.
    """
    if len(text) > LONGEST_QUANTITY:
        return None
    text = plain_signs(plain(clean(unicodedata.normalize("NFC", text).replace("°", " ° "))))
    for sign, ours in _SIGNS:
        text = text.replace(sign, ours)
    text = plain_groups(" ".join(text.split()))
    text = text[_LEAD.match(text).end():]  # type: ignore[union-attr]
    match = _NUMBER.match(text)
    number = read_number(match[0].replace("*10", "\\times 10").replace("* 10", "\\times 10")) if match else None
    if match is None or number is None:
        return None
    units = _units(text[match.end():].strip(" ."))
    return None if units is None else Quantity(number.value, units, match[0].strip())


def _units(text: str) -> tuple[tuple[str, int], ...] | None:
    """The factors of a product of units: `/` divides by the next factor, or by what stands in brackets."""
    text = _TORQUE.sub(r"\1*m", text)
    text = _NAMED_POWER.sub(_with_power, _PER.sub("/", text)).strip(" -")
    powers: dict[str, int] = {}
    place, below = 0, False
    for _ in range(_MOST_FACTORS):
        if place == len(text):
            break
        match = _FACTOR.match(text, place)
        if match is None or (place and not match[1]):
            return None
        power = int(match[4] or match[5] or match[6] or 1)
        opened = bool(match[2])
        divided = below or (match[1] or "").strip() == "/"
        below = (below or (opened and divided)) and not match[7]
        if match[3] != "1":
            name = _known(match[3])
            if name is None or abs(power) > _HIGHEST_POWER:
                return None
            powers[name] = powers.get(name, 0) + (-power if divided else power)
        place = match.end()
    return tuple(sorted((name, power) for name, power in powers.items() if power)) if place == len(text) else None


def _with_power(match: re.Match[str]) -> str:
    name, word = (match[2], match[1]) if match[2] else (match[3], match[4])
    return f"{name}^{3 if word.lower().startswith('cu') else 2}"


@lru_cache(maxsize=4096)
def _known(name: str) -> str | None:
    """What pint calls a unit, or None. A name that it does not know in this case is looked up in lower case."""
    registry = _registry()
    from pint import errors

    for spelling in dict.fromkeys((name, name.lower())):
        try:
            return str(registry.Unit("percent" if spelling == "%" else spelling))
        except (errors.PintError, AttributeError, ValueError, TypeError):  # of a name that is none
            continue
    return None


def _converted(quantity: Quantity, wanted: Quantity) -> float | None:
    """The value in the other's units; None where they measure different things."""
    registry = _registry()
    from pint import errors

    try:
        product = registry.Quantity(quantity.value, registry.UnitsContainer(dict(quantity.units)))
        return float(product.to(registry.UnitsContainer(dict(wanted.units))).magnitude)
    except (errors.PintError, OverflowError, ZeroDivisionError):
        return None


@lru_cache(maxsize=1)
def _registry() -> Any:
    try:
        import pint
    except ImportError as error:
        raise UserError("problem_type quantity needs the package pint, which is not installed: pip install "
                          "'veripo-fast[answers]'") from error
    return pint.UnitRegistry()
