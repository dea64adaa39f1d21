"""Requests to stop: Ctrl-C, SIGTERM (Slurm, Kubernetes), SIGHUP (a terminal that closes), and a limit of time.

The first request lets the step that runs finish and be saved. A second signal ends the process at once.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, NamedTuple

from veripo_fast.errors import Interrupted

log = logging.getLogger(__name__)
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
EXIT_INTERRUPTED = 130
"""As after Ctrl-C."""
EXIT_TIME_UP = 75
"""Exit code of a run whose time is up: EX_TEMPFAIL of sysexits.h, try again."""


class Request(NamedTuple):
    """Why a run should stop."""

    reason: str
    exit_code: int


class StopRequests:
    """A context manager that turns signals into requests.

    Args:
        max_hours: ask to stop before this time is over; None: no limit.
        clock: seconds that only grow.
        say: say at once that a signal came; where a launcher signals all ranks, one of them does.
    """

    def __init__(self, max_hours: float | None = None, clock: Callable[[], float] = time.monotonic,
                 say: bool = True) -> None:
        self.say = say
        self.max_seconds = None if max_hours is None else max_hours * 3600
        self.clock = clock
        self.started = self.last_step = clock()
        self.longest_step = 0.0
        self._signal = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequests:
        if threading.current_thread() is threading.main_thread():  # only there may a handler be set
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
                    self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def step_done(self) -> None:
        """Note that a step ended: the longest one so far decides whether another fits into the time."""
        now = self.clock()
        self.longest_step = max(self.longest_step, now - self.last_step)
        self.last_step = now

    def request(self) -> Request | None:
        """Why the run should stop; None when it should not."""
        if self._signal:
            return Request(f"interrupted by {signal.Signals(self._signal).name}", 128 + self._signal)
        if self.time_is_up():
            hours = (self.clock() - self.started) / 3600
            return Request(f"stopped after {hours:.2f} hours, because train.max_hours does not allow another step",
                           EXIT_TIME_UP)
        return None

    def time_is_up(self) -> bool:
        """Whether another step as long as the longest one would pass the limit."""
        if self.max_seconds is None:
            return False
        return self.clock() - self.started + self.longest_step > self.max_seconds

    def stop(self) -> None:
        """Raise Interrupted with the reason when the run should stop."""
        if (request := self.request()) is not None:
            raise Interrupted(*request)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self._signal:
            raise Interrupted(f"interrupted by {name} for the second time, nothing more was saved", 128 + number)
        self._signal = number
        if not self.say:
            return
        log.warning("%s: finishing this step, then saving; once more ends at once",
                    "Ctrl-C" if number == signal.SIGINT else name)
