"""How numbers, sizes, durations and counts are written for people: one definition for every page and message."""

from __future__ import annotations

import math


def number(value: float) -> str:
    """A plain number of four significant digits: `0.25`, `1,200`, `5e-7`."""
    size = abs(value)
    if size and (size < 1e-3 or size >= 1e6):
        mantissa, exponent = f"{value:.3e}".split("e")
        return with_minus_sign(f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}")
    decimals = max(0, 3 - math.floor(math.log10(size))) if size else 0
    text = f"{value:,.{decimals}f}"
    return with_minus_sign(text.rstrip("0").rstrip(".") if "." in text else text)


def with_minus_sign(text: str) -> str:
    """A number's text with a real minus sign in place of a hyphen."""
    return "−" + text[1:] if text.startswith("-") else text


def plural(count: int, noun: str) -> str:
    """`1 line`, `1,200 lines`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


_UNITS = ("B", "KB", "MB", "GB", "TB", "PB")


def memory(count: float) -> str:
    """Bytes for people, in decimal units: `1.5 GB`."""
    power = min(max(int(math.log10(count) // 3), 0), len(_UNITS) - 1) if count >= 1 else 0
    return f"{number(round(count / 1000**power, 1))} {_UNITS[power]}"


def duration(seconds: float) -> str:
    """`0.42 s`, `12.3 s`, `4 min 05 s`, `2 h 07 min`, `3 days 4 h`."""
    if seconds < 1:
        return f"{seconds:.2f} s"
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"
    minutes = round(seconds / 60)
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(minutes / 60)
    return f"{hours // 24} days {hours % 24} h"
