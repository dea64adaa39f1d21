"""What an exception keeps alive, let go: the frames that it came through hold their local variables."""

from __future__ import annotations

import traceback


def forget(error: BaseException) -> None:
    """Clear the local variables of all frames behind an error, and behind those that led to it, but of running ones."""
    seen: set[int] = set()
    left: list[BaseException | None] = [error]
    while left:
        one = left.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        traceback.clear_frames(one.__traceback__)
        left += [one.__cause__, one.__context__]
        if isinstance(one, BaseExceptionGroup):
            left += one.exceptions
