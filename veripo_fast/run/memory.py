"""Memory as the system tells it: what is free, what a process holds, and the most that it held during a phase.

On a GPU a phase's peak is that of torch's allocator, on a CPU that of resident memory. glibc keeps freed blocks, and
they count as resident: 450 MB behind an update of 30 M parameters. So a phase gives them back before it is measured,
which takes 50 ms then and under 5 ms otherwise; results do not change.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, cast

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


class _HeapInfo(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _fields_ = tuple((name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"))


@cache
def _heap_info() -> Callable[[], _HeapInfo] | None:
    """`mallinfo2` of glibc 2.33 and later; None of another C library."""
    with suppress(AttributeError):
        function = ctypes.CDLL(None).mallinfo2
        function.restype, function.argtypes = _HeapInfo, ()
        return cast("Callable[[], _HeapInfo]", function)
    return None


class Resident:
    """What a process holds, watched often: freed memory goes back once so much more is resident than was ever in use.

    Freed blocks that the next pass will use again stay, as long as the process held as much before. Where the C library
    does not tell what is in use, nothing goes back.

    Args:
        most: bytes.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._base = sys.maxsize  # resident beside the heap's blocks in use, at its least
        self._highest = 0  # in use, at its most

    def look(self, coming: int = 0) -> None:
        """Takes 50 microseconds, and where memory goes back about 0.2 s for each GB that is used again later.

        Args:
            coming: bytes of a block that is made next, too large to be made of freed ones.
        """
        info = _heap_info()
        if info is None:
            return
        with suppress(OSError):  # not Linux
            used = self._see(info)
            if used + coming > self._highest + self.most:
                return_freed_memory()
                self._see(info)

    def _see(self, info: Callable[[], _HeapInfo]) -> int:
        """What is resident, less what is resident beside the heap."""
        heap = info()
        in_use, resident = heap.uordblks + heap.hblkhd, status_bytes("VmRSS")
        self._base = min(self._base, resident - in_use)
        self._highest = max(self._highest, in_use)
        return resident - self._base


def return_all_freed_memory(device: torch.device) -> None:
    """Give back what was just dropped, cycles too, and of a GPU what its allocator keeps."""
    gc.collect()
    if device.type == "cuda":
        import torch

        torch.cuda.empty_cache()
    return_freed_memory()


# -- what is free -----------------------------------------------------------------------------------------------------


def free_bytes(device: torch.device) -> int:
    """Memory that can still be allocated on a device; of a CPU what its container leaves, where that is less."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    return free_host_bytes()


def total_bytes(device: torch.device) -> int:
    """All memory of a GPU; 0 for a CPU."""
    if device.type != "cuda":
        return 0
    import torch

    return int(torch.cuda.mem_get_info(device)[1])


def free_host_bytes(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """MemAvailable, or what the limits of this process's control groups leave. Raises OSError where Linux is not."""
    sizes = dict(line.split(":") for line in (proc / "meminfo").read_text().splitlines() if ":" in line)
    return max(min([int(sizes["MemAvailable"].split()[0]) * 1024, *_left_in_groups(proc, cgroups)]), 0)


def _left_in_groups(proc: Path, cgroups: Path) -> list[int]:
    """Bytes below the limit of each control group around this process, of version 2 and of version 1.

    A container often sees its own group as the root of the tree, under a path that it cannot see; so the root counts
    too. What a group holds as cache of files that are not in use can be had, and is not counted as taken.
    """
    left = []
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            names, root = ("memory.max", "memory.current", "inactive_file"), cgroups
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            root = cgroups / "memory"
        else:
            continue
        folder = root / path.lstrip("/")
        for place in (folder, *folder.parents):
            if place.is_relative_to(root) and (room := _room(place, *names)) is not None:
                left.append(room)
    return left


def _room(group: Path, limit: str, usage: str, idle: str) -> int | None:
    """Limit less usage of one control group; None where it has no limit."""
    try:
        most = (group / limit).read_text().strip()
        if most == "max":
            return None
        used = int((group / usage).read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    return int(most) - used + int(stat.get(idle, 0))


# -- peaks of phases --------------------------------------------------------------------------------------------------


class HighWater:
    """Peak bytes per phase: allocated ones on a GPU, resident ones on a CPU; nothing where neither can be read."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.peaks: dict[str, int] = {}
        """Of each phase since the last `write`."""
        self.latest: dict[str, int] = {}
        """Of each phase when it last ran."""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure a block; the larger peak counts when a phase comes again."""
        known = self._begin()
        yield
        if known:
            self.latest[name] = self._peak()
            self.peaks[name] = max(self.peaks.get(name, 0), self.latest[name])

    def write(self, path: Path, stage: str, only: str = "", **noted: object) -> None:
        """Append the peaks of a stage to a file, with what else is noted, and begin anew.

        Args:
            only: the phase that is written; empty: all.
        """
        peaks = {name: peak for name, peak in self.peaks.items() if only in ("", name)}
        if peaks:
            append_objects(path, [{"stage": stage, "device": self.device.type, "peak_bytes": peaks, **noted}])
        self.peaks = {name: peak for name, peak in self.peaks.items() if name not in peaks}

    def _begin(self) -> bool:
        if self.device.type == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats(self.device)
            return True
        try:
            return_freed_memory()
            reset_resident_peak()
        except OSError:  # not Linux, or a container that hides it: time is measured all the same
            return False
        return True

    def _peak(self) -> int:
        if self.device.type == "cuda":
            import torch

            return torch.cuda.max_memory_allocated(self.device)
        return status_bytes("VmHWM")
