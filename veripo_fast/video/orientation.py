"""How a player shows a picture that a file stores turned or mirrored: its display matrix, read as a whole.

The matrix [a b u; c d v; x y w] (ISO/IEC 14496-12 6.2.2) takes a stored pixel (p, q) to (ap + cq + x, bp + dq + y).
FFmpeg's angle of it is that of a turn; it calls a mirrored picture a turned or an upright one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from av.sidedata.sidedata import Type
from av.video.frame import VideoFrame

_TOLERANCE = 0.01
"""Share of the larger entry that the smaller one of a row may have: 16.16 numbers and writers round."""


@dataclass(frozen=True)
class Orientation:
    """One of eight: rows and columns swapped first, then the order of each reversed."""

    swap: bool = False
    flip_rows: bool = False
    flip_columns: bool = False

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """[..., H, W] as a player shows it; not copied where it stands upright."""
        shown = pixels.transpose(-2, -1) if self.swap else pixels
        dims = [dim for dim, flips in ((-2, self.flip_rows), (-1, self.flip_columns)) if flips]
        return shown.flip(dims) if dims else shown

    @property
    def mirrored(self) -> bool:
        """Whether text in it would read backwards without it."""
        return self.swap ^ self.flip_rows ^ self.flip_columns

    @property
    def rotation(self) -> int:
        """Degrees counter-clockwise in (-180, 180]; of a mirrored picture, before left and right are exchanged."""
        if self.swap:
            return -90 if self.flip_columns ^ self.mirrored else 90
        return 180 if self.flip_rows else 0


UPRIGHT = Orientation()


def orientation_of(frame: VideoFrame) -> Orientation | None:
    """How a decoded frame is to be shown; None where its matrix skews it or turns it by no quarter."""
    data: Any = frame.side_data  # its type stubs take it for a dictionary of text
    matrix = data.get(Type.DISPLAYMATRIX)
    return UPRIGHT if matrix is None else read_matrix(bytes(matrix))


def read_matrix(data: bytes) -> Orientation | None:
    """Of nine 32-bit integers in the machine's order. One that leaves the picture no width or no height (all
    zeros) says nothing, and players show it upright."""
    a, b, _, c, d = (float(value) for value in np.frombuffer(data, np.int32, count=5))
    if (a == c == 0) or (b == d == 0):
        return UPRIGHT
    straight, crossed = min(abs(a), abs(d)), min(abs(b), abs(c))
    swap = crossed > straight
    rest = max(abs(a), abs(d)) if swap else max(abs(b), abs(c))
    if rest > _TOLERANCE * max(crossed, straight) or max(crossed, straight) == 0:
        return None
    if swap:
        return Orientation(True, flip_rows=b < 0, flip_columns=c < 0)
    return Orientation(False, flip_rows=d < 0, flip_columns=a < 0)
