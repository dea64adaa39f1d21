"""High-water marks of memory: what a device's allocator, or on a CPU the process, held at most during a phase."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from veripo_fast.run.jsonlines import append_objects

if TYPE_CHECKING:
    import torch


def status_bytes(key: str) -> int:
    """A size from /proc/self/status, such as VmRSS or VmHWM, in bytes. Raises OSError where there is none."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


def reset_resident_peak() -> None:
    """Let VmHWM begin again at what is resident now. Raises OSError where Linux does not allow it."""
    Path("/proc/self/clear_refs").write_text("5")


def return_freed_memory() -> None:
    """Give freed blocks back to the system: glibc keeps them, and they count as resident."""
    with suppress(AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


class HighWater:
    """Peak bytes per phase: allocated ones on a GPU, resident ones on a CPU; nothing where neither can be read."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.peaks: dict[str, int] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure a block; the larger peak counts when a phase comes again."""
        known = self._begin()
        yield
        if known:
            self.peaks[name] = max(self.peaks.get(name, 0), self._peak())

    def write(self, path: Path, stage: str) -> None:
        """Append the peaks of a stage to a file, and begin anew."""
        if self.peaks:
            append_objects(path, [{"stage": stage, "device": self.device.type, "peak_bytes": self.peaks}])
        self.peaks = {}

    def _begin(self) -> bool:
        if self.device.type == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats(self.device)
            return True
        try:
            reset_resident_peak()
        except OSError:  # not Linux, or a container that hides it: time is measured all the same
            return False
        return True

    def _peak(self) -> int:
        if self.device.type == "cuda":
            import torch

            return torch.cuda.max_memory_allocated(self.device)
        return status_bytes("VmHWM")
