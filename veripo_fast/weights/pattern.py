"""Values that depend on a parameter's name and the place of an element alone: every rank can make any part of any
parameter, so that ranks can check each other without ever having a whole model."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping

import torch

_AT_ONCE = 1 << 22
"""Elements made in one go, of which each takes 8 bytes meanwhile."""


def pattern(name: str, start: int, stop: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[stop - start] of the values of a parameter, between -1/32 and 1/32."""
    values = torch.empty(stop - start, dtype=dtype, device=device)
    seed = zlib.crc32(name.encode())
    for first in range(start, stop, _AT_ONCE):
        last = min(first + _AT_ONCE, stop)
        values[first - start:last - start] = _mixed(torch.arange(first, last, device=device).add_(seed))
    return values


def _mixed(numbers: torch.Tensor) -> torch.Tensor:
    """float32 [n]: a hash of each number (Wellons' lowbias32) as a multiple of 2^-20, which float32 holds exactly."""
    bits = numbers & 0xFFFFFFFF
    for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
        bits = (bits ^ (bits >> shift)) * factor & 0xFFFFFFFF
    return ((bits ^ (bits >> 15)) & 0xFFFF).sub_(0x8000).float().mul_(2.0 ** -20)


class PatternHeld(Mapping[str, tuple[int, torch.Tensor]]):
    """What a rank would hold if the policy's values were the pattern's; made when it is asked for, one at a time."""

    def __init__(self, ranges: Mapping[str, tuple[int, int]], dtypes: Mapping[str, torch.dtype], device: torch.device
                 ) -> None:
        self.ranges, self.dtypes, self.device = ranges, dtypes, device
        self._last: tuple[str, tuple[int, torch.Tensor]] | None = None

    def __getitem__(self, name: str) -> tuple[int, torch.Tensor]:
        if self._last is None or self._last[0] != name:
            start, stop = self.ranges[name]
            self._last = name, (start, pattern(name, start, stop, self.dtypes[name], self.device))
        return self._last[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self.ranges)

    def __len__(self) -> int:
        return len(self.ranges)
