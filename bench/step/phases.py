"""Wall time, CPU time and memory of the phases of a step, for both sides alike."""

from __future__ import annotations

import time
from typing import Any

from veripo_fast.run.memory import reset_resident_peak, return_freed_memory, status_bytes


class Phases:
    """A clock that is switched from phase to phase; a phase may come again.

    Memory is the peak of what is resident above what was when the phase first began. Freed memory goes back to the
    system before, outside of the time, so that no phase lives on what an earlier one has left.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.cpu_seconds: dict[str, float] = {}
        """Of all threads; on several it holds what they wait for each other."""
        self.peak_bytes: dict[str, int] = {}
        self._before: dict[str, int] = {}
        self._name: str | None = None
        self._started = self._cpu_started = 0.0

    def switch(self, name: str | None) -> None:
        """End the phase that runs, and begin the next one, if any."""
        now, cpu = time.perf_counter(), time.process_time()
        if self._name is not None:
            self.seconds[self._name] = self.seconds.get(self._name, 0.0) + now - self._started
            self.cpu_seconds[self._name] = self.cpu_seconds.get(self._name, 0.0) + cpu - self._cpu_started
            peak = status_bytes("VmHWM") - self._before[self._name]
            self.peak_bytes[self._name] = max(self.peak_bytes.get(self._name, 0), peak)
        self._name = name
        if name is not None:
            return_freed_memory()
            reset_resident_peak()
            self._before.setdefault(name, status_bytes("VmRSS"))
            self._started, self._cpu_started = time.perf_counter(), time.process_time()

    def answer(self) -> dict[str, Any]:
        """As JSON."""
        return {"seconds": self.seconds, "cpu_seconds": self.cpu_seconds, "peak_bytes": self.peak_bytes}
