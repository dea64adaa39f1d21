"""How numbers, sizes, durations, counts, and texts of others are written for people: one definition for every page and
message."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import unicodedata
from typing import Any
from urllib.parse import quote


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


# -- what others wrote ------------------------------------------------------------------------------------------------

_SHORTEST_SECRET = 8
"""Characters; a shorter key is a placeholder (`none`, `EMPTY`), and hiding it would tear up ordinary words."""


def printable(text: str) -> str:
    r"""A text of others on one line, as a terminal may show it: what is no visible character becomes `\x1b`, `\u202e`.

    File names, servers and checkpoints could otherwise move the cursor, colour the rest, or forge a line of ours.
    """
    return text if text.isprintable() else "".join(map(_visible, text))


def _visible(character: str) -> str:
    if character.isprintable() or unicodedata.category(character) == "Zs":  # spaces, such as the wide one of CJK
        return character
    return character.encode("unicode_escape").decode("ascii")


def one_line(text: str) -> str:
    """`printable`, with a space for each line break."""
    return printable(" ".join(line.strip() for line in text.splitlines()))


def rank_prefix() -> str:
    """What stands before the messages of a rank that is not the first; empty where there are no others."""
    rank = os.environ.get("RANK", "0")
    return f"rank {rank}: " if os.environ.get("WORLD_SIZE", "1") != "1" and rank != "0" else ""


class OneLine(logging.Formatter):
    """Log messages on one line that starts with our name, whatever they repeat; a traceback keeps its lines."""

    def __init__(self, prefix: str = "") -> None:
        super().__init__()
        self.prefix = prefix

    def formatMessage(self, record: logging.LogRecord) -> str:
        return f"veripo: {self.prefix}{one_line(record.message)}"

    def formatException(self, ei: Any) -> str:
        return "\n".join(map(printable, super().formatException(ei).split("\n")))


def hidden(text: str, secret: str) -> str:
    """`text` with `***` for a secret, also as JSON or a URL would write it."""
    if len(secret) < _SHORTEST_SECRET:
        return text
    as_json = json.dumps(secret)[1:-1]
    for form in (secret, as_json, as_json.replace("/", r"\/"), quote(secret, safe="")):
        text = text.replace(form, "***")
    return text


_USER_INFO = re.compile(r"(\w://)[^\s/'\"]+@")
_QUERY = re.compile(r"(endpoint_url:\s*['\"]?[^\s?#'\"]*)[?#][^\s'\"]*")


def without_credentials(yaml: str) -> str:
    """A configuration's text with `***` for what its addresses hold besides host and path.

    `VerifierConfig` refuses such an address; the config.yaml of an older run may hold one.
    """
    return _QUERY.sub(r"\1***", _USER_INFO.sub(r"\1***@", yaml))
