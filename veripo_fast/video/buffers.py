"""Memory for frames and patches that is used again as soon as nobody holds it.

64 frames and their patches are 108 MB a video, and memory that a process touches for the first time costs CPU time: for
the patches alone 40 ms as pages of 4 KiB, 16 ms on huge pages, 9 ms used again. In a virtual machine that gives free
memory back to its host it costs several times as much.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Sequence

import numpy as np
import torch

MAX_BYTES = 256 << 20
"""Memory of the process that waits to be used again, at most."""
SMALL_BYTES = 1 << 20
"""Less is left to the allocator of the system, which is quick with it."""
_WASTE = 1.25
"""A buffer may be so many times larger than what is asked for; bounds on what is decoded ahead do not count that."""
_ALIGNED = 64
"""Bytes: as torch aligns its own. Matrix products may round differently elsewhere, and then from run to run."""


class Room:
    """Buffers that were used and are free, the oldest first; any thread may take one.

    Nothing is given back by hand: a buffer returns when the last tensor on it is gone.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._free: list[np.ndarray] = []
        self._lock = threading.Lock()

    @property
    def free_bytes(self) -> int:
        return sum(buffer.nbytes for buffer in tuple(self._free))

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A contiguous tensor in host memory, aligned as torch's are, whose content is arbitrary."""
        nbytes = math.prod(shape) * torch.empty((), dtype=dtype).element_size()
        if nbytes < SMALL_BYTES:
            return torch.empty(*shape, dtype=dtype)
        buffer = self._fitting(nbytes + _ALIGNED)
        if buffer is None:
            buffer = np.empty(nbytes + _ALIGNED, np.uint8)  # numpy asks for huge pages, torch does not
        start = -buffer.ctypes.data % _ALIGNED
        view = buffer[start:start + nbytes]
        weakref.finalize(view, self._give, buffer).atexit = False
        return torch.from_numpy(view).view(dtype).view(*shape)

    def _fitting(self, nbytes: int) -> np.ndarray | None:
        """The smallest free buffer that does; without one, the oldest make room for the new one's return."""
        with self._lock:
            fitting = [(buffer.nbytes, place) for place, buffer in enumerate(tuple(self._free))
                       if nbytes <= buffer.nbytes <= nbytes * _WASTE]
            if fitting:
                return self._free.pop(min(fitting)[1])
            while self._free and self.free_bytes + nbytes > self.max_bytes:
                del self._free[0]
            return None

    def _give(self, buffer: np.ndarray) -> None:
        """Runs wherever the last tensor goes, inside of a garbage collection too: without the lock, and therefore it
        only ever adds at the end."""
        if self.free_bytes + buffer.nbytes <= self.max_bytes:
            self._free.append(buffer)


_ROOM = Room(MAX_BYTES)


def room(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """`Room.take` of the one that the process has."""
    return _ROOM.take(shape, dtype)
