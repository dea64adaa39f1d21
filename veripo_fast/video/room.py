"""Memory for frames and patches that is used again as soon as nobody holds it.

64 frames and their patches are 108 MB a video. Memory that a process touches for the first time costs more CPU time
than decoding does not need: as pages of 4 KiB 40 ms for the patches alone, on huge pages 16 ms, used again 9 ms; in a
virtual machine that gives free memory back to its host, several times as much.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Sequence

import numpy as np
import torch

MAX_BYTES = 512 << 20
"""Memory that waits to be used again."""
_WASTE = 1.5
"""A buffer may be so many times larger than what is asked for."""
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
        buffer = self._fitting(nbytes + _ALIGNED)
        if buffer is None:
            buffer = np.empty(nbytes + _ALIGNED, np.uint8)  # numpy asks for huge pages, torch does not
        start = -buffer.ctypes.data % _ALIGNED
        view = buffer[start:start + nbytes]
        weakref.finalize(view, self._give, buffer).atexit = False
        return torch.from_numpy(view).view(dtype).view(*shape)

    def _fitting(self, nbytes: int) -> np.ndarray | None:
        """The smallest free buffer that does; without one the oldest goes, so that sizes of the past do not stay."""
        with self._lock:
            fitting = [(buffer.nbytes, place) for place, buffer in enumerate(tuple(self._free))
                       if nbytes <= buffer.nbytes <= nbytes * _WASTE]
            if fitting:
                return self._free.pop(min(fitting)[1])
            del self._free[:1]
            return None

    def _give(self, buffer: np.ndarray) -> None:
        """Runs wherever the last tensor goes, inside of a garbage collection too, hence without the lock; buffers are
        only ever added at the end."""
        if self.free_bytes + buffer.nbytes <= self.max_bytes:
            self._free.append(buffer)


_ROOM = Room(MAX_BYTES)


def room(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """`Room.take` of the one that the process has."""
    return _ROOM.take(shape, dtype)
