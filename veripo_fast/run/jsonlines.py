"""Files of one JSON object per line: how a line is read, and how lines are added after a crash tore the last one."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def parse_object(line: str | bytes) -> dict[str, Any] | None:
    """The object of a line; None when the line is anything else."""
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def read_objects(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """All objects of a file in order, and the numbers of the lines that are none, from 1.

    A missing file is empty; empty lines do not count.
    """
    if not path.exists():
        return [], []
    objects: list[dict[str, Any]] = []
    bad_lines: list[int] = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        value = parse_object(line)
        if value is not None:
            objects.append(value)
        elif line.strip():
            bad_lines.append(number)
    return objects, bad_lines


def dump_objects(objects: Iterable[Mapping[str, Any]]) -> str:
    """The text of a file: one line per object. ValueError for NaN and infinity, which JSON does not have."""
    return "".join(json.dumps(item, allow_nan=False) + "\n" for item in objects)


def append_objects(path: Path, objects: Iterable[Mapping[str, Any]]) -> bool:
    """Add lines; they have reached the operating system when this returns. Raises OSError.

    Returns:
        whether the file ended in a torn line, which was cut.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    text = dump_objects(objects)
    with path.open("a+b") as file:
        torn = _cut_torn_line(file, path)
        file.write(text.encode())
    return torn


def _cut_torn_line(file: Any, path: Path) -> bool:
    """Cut what a crash left after the last newline, so that the next line stands on its own."""
    end = file.seek(0, 2)
    if end == 0:
        return False
    file.seek(-1, 2)
    if file.read(1) == b"\n":
        return False
    file.truncate(path.read_bytes().rfind(b"\n") + 1)
    return True
