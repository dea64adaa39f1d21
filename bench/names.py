"""Lists of names that the options of benches take."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from difflib import get_close_matches


def known_names(text: str, known: Collection[str], what: str, parser: argparse.ArgumentParser) -> list[str]:
    """The names of `a,b`, all of them known; else the parser ends with the nearest one."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            close = get_close_matches(name, known, 1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"
            parser.error(f"unknown {what} {name!r}; {hint}")
    return names
