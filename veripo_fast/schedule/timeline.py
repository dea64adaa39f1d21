"""Where time goes on a rank: spans of what its threads do, what the main one waits for, and counters.

A process has one timeline at a time; `span` and `count` write into it from anywhere, and do nothing where there is
none. What a span of the main thread is named decides what it counts as: `wait for ...` is idle time, every other one
that lies in no other is a phase. A phase's own time is without the waits inside it, so phases, waits and a rest add up
to the window that they lie in: one step, or what is done between two steps.

Times are microseconds of a monotonic clock since the timeline began. Ranks begin together, behind a barrier, and note
when they leave the exchange that collects their spans, at the end of each step. These moments are the same up to how
much later one rank leaves than another: well under a millisecond on one machine, a few between machines. Clocks that
drift apart (1 ppm is 4 ms in an hour) are moved together by them, and the machines' wall clocks are never compared.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

MAX_SPANS = 512
"""Spans, and samples of counters, that a window keeps of a rank. More are counted as dropped; sums miss none."""
MAIN = "main"
"""The lane of the thread that trains; others are named as their threads."""
WAIT = "wait for "
"""What the names of waits begin with."""
FOR_RANKS, FOR_MEDIA, FOR_CHECKPOINT = f"{WAIT}ranks", f"{WAIT}media", f"{WAIT}checkpoint"


@dataclass
class Window:
    """A step, or what is done between two steps."""

    start: int
    stage: str = ""
    step: int | None = None
    """Of the stage; None between steps."""
    own: dict[str, int] = field(default_factory=dict)
    """Of each phase: its time without the waits inside."""
    waits: dict[str, int] = field(default_factory=dict)
    spans: list[tuple[str, str, int, int]] = field(default_factory=list)
    """Name, lane, start and end, as they ended."""
    counts: list[tuple[str, int, float]] = field(default_factory=list)
    """Name, time and value."""
    dropped: int = 0

    def row(self, end: int) -> dict[str, Any]:
        """The window as one rank's part of a line; times are in microseconds."""
        return {"start_us": self.start, "end_us": end, "own_us": self.own, "waits_us": self.waits,
                "spans": self.spans, "counts": self.counts, "dropped": self.dropped}


class Timeline:
    """Records the spans of this process, from any thread; made by the one that trains.

    Args:
        clock: monotonic seconds. wall: seconds since 1970.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter, wall: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._zero = clock()
        self.began = round(wall(), 6)
        """Seconds since 1970, by this machine's clock."""
        self.left = 0
        """When this rank left the last exchange."""
        self.keep_spans = True
        """Off: only sums are kept."""
        self._main = threading.get_ident()
        self._open: list[int] = []
        """Of each open span of the main thread: the waits inside it so far."""
        self._lock = threading.Lock()
        self._window = Window(0)
        self._closed: list[tuple[Window, int]] = []

    def now(self) -> int:
        """Microseconds since the timeline began."""
        return int((self._clock() - self._zero) * 1e6)

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Record a block, in the lane of the thread that runs it."""
        main = threading.get_ident() == self._main
        if main:
            self._open.append(0)
        start = self.now()
        try:
            yield
        finally:
            end = self.now()
            if main:
                self._sum(name, end - start, self._open.pop())
            with self._lock:
                if self._room(len(self._window.spans)):
                    lane = MAIN if main else threading.current_thread().name
                    self._window.spans.append((name, lane, start, end))

    def count(self, name: str, value: float) -> None:
        """Record what a counter stands at now."""
        with self._lock:
            if self._room(len(self._window.counts)):
                self._window.counts.append((name, self.now(), value))

    def begin_step(self, stage: str, step: int) -> None:
        """Close what is open between steps, and open the window of a step."""
        self._close(stage)
        self._window.stage, self._window.step = stage, step

    def take(self, stage: str) -> list[dict[str, Any]]:
        """The windows since the last call, the open one included; it goes on between steps.

        Args:
            stage: whose windows those between steps are.
        """
        self._close(stage)
        closed, self._closed = self._closed, []
        return [{"stage": window.stage, "step": window.step, "left_us": self.left, **window.row(end)}
                for window, end in closed]

    def exchanged(self) -> None:
        """Note that all ranks have just left the same exchange."""
        self.left = self.now()

    def _close(self, stage: str) -> None:
        end = self.now()
        with self._lock:
            self._window.stage = self._window.stage or stage
            self._closed.append((self._window, end))
            self._window = Window(end)

    def _sum(self, name: str, length: int, waited: int) -> None:
        """Add a span of the main thread to what it counts as."""
        window = self._window
        if name.startswith(WAIT):
            window.waits[name] = window.waits.get(name, 0) + length
            waited = length
        elif not self._open:
            window.own[name] = window.own.get(name, 0) + length - waited
        if self._open:
            self._open[-1] += waited

    def _room(self, count: int) -> bool:
        if self.keep_spans and count < MAX_SPANS:
            return True
        self._window.dropped += 1
        return False


_current: list[Timeline] = []
"""The timeline of this process, where it has one."""


def span(name: str) -> AbstractContextManager[None]:
    """Record a block in the timeline of this process, if it has one."""
    return _current[0].span(name) if _current else nullcontext()


def count(name: str, value: float) -> None:
    """Record what a counter stands at, in the timeline of this process, if it has one."""
    if _current:
        _current[0].count(name, value)


def begin(timeline: Timeline) -> None:
    """Make a timeline that of this process."""
    _current[:] = [timeline]


def end() -> None:
    """Record nothing any more."""
    _current.clear()


def lines(parts: list[list[dict[str, Any]]], global_step: int, began: float) -> list[dict[str, Any]]:
    """The lines of timeline.jsonl, one per window, from what each rank took.

    Args:
        parts: of each rank, as many windows.
        began: of rank 0.
    """
    made = []
    for windows in zip(*parts, strict=True):
        first = windows[0]
        ranks = []
        for window in windows:
            own = {name: value for name, value in window.items() if name not in ("stage", "step", "left_us")}
            ranks.append({"offset_us": first["left_us"] - window["left_us"], **own})
        made.append({"global_step": global_step, "stage": first["stage"], "step": first["step"], "began": began,
                     "ranks": ranks})
    return made
