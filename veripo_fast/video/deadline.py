"""Decoding within a time limit."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Generic

from veripo_fast.errors import MediaError
from veripo_fast.video.pool import Result


def check_deadline(path: str, deadline: float) -> None:
    """Raise MediaError when the monotonic clock has passed `deadline`."""
    if time.monotonic() > deadline:
        raise MediaError(f"{path} took longer to decode than video.timeout_seconds allows")


GRACE_SECONDS = 1.0
"""How long a decoder that watches its deadline may take to notice it before its thread is left behind."""


def run_with_deadline(function: Callable[[float], Result], path: str, timeout_seconds: float) -> Result:
    """`function(deadline)` in a thread of its own, its errors raised here; MediaError after `timeout_seconds`.

    A thread cannot be stopped from outside. One that watches its deadline ends by itself; one that is stuck inside
    FFmpeg or the file system (a dead network mount) is left behind as a daemon and keeps its memory until it returns.
    """
    call = _Call(function, time.monotonic() + timeout_seconds)
    call.start()
    call.join(timeout_seconds + GRACE_SECONDS)
    if call.is_alive():
        raise MediaError(f"{path} took longer than {timeout_seconds:g} s (video.timeout_seconds) to decode")
    if call.error is not None:
        raise call.error
    return call.results[0]


class _Call(threading.Thread, Generic[Result]):
    def __init__(self, function: Callable[[float], Result], deadline: float) -> None:
        super().__init__(name="veripo-decode", daemon=True)
        self.function, self.deadline = function, deadline
        self.results: list[Result] = []
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.results.append(self.function(self.deadline))
        except BaseException as error:  # handed to the waiting thread, which raises it
            self.error = error
