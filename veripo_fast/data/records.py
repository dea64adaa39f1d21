"""What reading a record gives: the record, or why it cannot be used."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from veripo_fast.types import Media, Message


class RecordError(Exception):
    """Why a record cannot be used; the reader adds where it stands."""

    def __init__(self, reason: str, path: str = "") -> None:
        super().__init__(reason)
        self.path = path
        """The media file at fault, or empty."""


UNUSABLE = (RecordError, OSError, ValueError, OverflowError, RecursionError)
"""What reading one record may raise: values nest as deeply, and are as long, as whoever wrote them likes."""


def reason_of(error: BaseException) -> str:
    """One sentence that says why a record cannot be used."""
    if isinstance(error, RecursionError):
        return "is nested too deeply to be read"
    if isinstance(error, OSError):
        return f"cannot be read: {error.strerror or error}"
    if isinstance(error, ValueError) and "integer string conversion" in str(error):
        return "holds a number of more than 4300 digits"
    return re.sub(r"\s*\n\s*", " ", str(error)) or type(error).__name__


class Record(NamedTuple):
    """What a record says, before the gold is checked and an instruction is added."""

    messages: tuple[Message, ...]
    gold: str
    options: tuple[str, ...]
    declared_type: str | None
    prompt_id: str | None
    data_source: str


class FlatRecord(NamedTuple):
    """A record whose only message is a medium and a question; else as `Record`."""

    medium: Media
    question: str
    gold: str
    options: tuple[str, ...]
    declared_type: str | None
    prompt_id: str | None
    data_source: str


def short(value: Any) -> str:
    """A value as an error quotes it: at most 80 characters, whatever it holds."""
    try:
        return f"{value!r:.80}"
    except (ValueError, RecursionError):
        return f"a {type(value).__name__} that cannot be printed"
