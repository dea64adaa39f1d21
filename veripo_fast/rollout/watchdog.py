"""Ends a process whose engine hangs: a call into it cannot be taken back, but a run goes on from its checkpoint.

It looks at progress, not at total time: a long batch is no hang as long as tokens come. Neither is a process that was
stopped as a whole.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

EXIT_STALLED = 75
"""EX_TEMPFAIL of sysexits.h: try again, as after train.max_hours."""


class Watchdog:
    """Watches blocks that call `progress` as they go.

    Args:
        seconds: longest time between two signs of progress.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._watching = False
        self._last = time.monotonic()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch a block."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, name="engine-watchdog", daemon=True)
            self._thread.start()
        self.progress()
        self._watching = True
        try:
            yield
        finally:
            self._watching = False

    def progress(self) -> None:
        """Say that something was finished."""
        self._last = time.monotonic()

    def close(self) -> None:
        """Stop watching for good."""
        self._closed.set()

    def _watch(self) -> None:
        pause, seen = min(self.seconds / 4, 5.0), time.monotonic()
        while not self._closed.wait(pause):
            now = time.monotonic()
            if now - seen > 2 * pause:  # the whole process stood still (Ctrl-Z, a suspended job), not the engine
                self._last += now - seen
            seen = now
            if self._watching and time.monotonic() - self._last > self.seconds:
                self._end()

    def _end(self) -> None:
        faulthandler.dump_traceback(file=sys.stderr)
        print(f"veripo: the rollout engine has finished nothing for {self.seconds:g} seconds (rollout.stall_seconds); "
              "where it stands is above. The process ends; the last checkpoint is whole, and --resume goes on from it",
              file=sys.stderr, flush=True)
        os._exit(EXIT_STALLED)
