"""What an exception keeps alive, let go: its traceback holds the frames that it came through, with all their variables.

Clearing a frame's variables does not do: the frame holds its function, and a closure holds what it closes over (torch
calls every module through one). So frames that have ended leave the traceback, and stand in a note as text.
"""

from __future__ import annotations

import traceback
from types import TracebackType


def forget(error: BaseException) -> None:
    """Let go of every frame that has ended behind an error, and behind those that led to it."""
    seen: set[int] = set()
    left: list[BaseException | None] = [error]
    while left:
        one = left.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        _cut(one)
        left += [one.__cause__, one.__context__]
        if isinstance(one, BaseExceptionGroup):
            left += one.exceptions


def _cut(error: BaseException) -> None:
    """Cut a traceback behind its last running frame; the rest becomes a note."""
    running: TracebackType | None = None
    entry = error.__traceback__
    while entry is not None:
        try:
            entry.tb_frame.clear()
        except RuntimeError:  # it is running
            running = entry
        entry = entry.tb_next
    ended = error.__traceback__ if running is None else running.tb_next
    if ended is None:
        return
    error.add_note("It was raised in:\n" + "".join(traceback.format_tb(ended)).rstrip())
    if running is None:
        error.__traceback__ = None
    else:
        running.tb_next = None
