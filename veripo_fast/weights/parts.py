"""Rows and columns of parameters, which a plan is made of.

Slices are rows and columns of a parameter seen as a matrix, mostly [shape[0], the rest]. What a sharded trainer holds
of a parameter is one too: rows of it (FSDP2), or, of a flat partition (ZeRO), whole rows between two pieces of a row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

Shape: TypeAlias = tuple[int, ...]
Range: TypeAlias = tuple[int, int]
"""First index, and the one after the last."""


@dataclass(frozen=True)
class Part:
    """Rows and columns of a parameter."""

    name: str
    rows: Range
    columns: Range
    width: int
    """Columns of the whole parameter; 1 for a vector."""

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows[1] - self.rows[0], self.columns[1] - self.columns[0]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def offset(self) -> int:
        """Elements of the flattened parameter before the first of the part."""
        return self.rows[0] * self.width + self.columns[0]

    @property
    def contiguous(self) -> bool:
        return self.shape[1] == self.width or self.shape[0] == 1

    def overlaps(self, other: Part) -> bool:
        """Whether both name an element of one parameter."""
        return self.name == other.name and meet(self.rows, other.rows) and meet(self.columns, other.columns)


@dataclass(frozen=True)
class SliceCopy:
    """A part of a parameter of the policy, and the part of equal shape of an engine parameter that it fills."""

    source: Part
    target: Part


def matrix(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a parameter: its first dimension and all others, [n, 1] of a vector."""
    return shape[0], math.prod(shape[1:])


def fits(shape: Shape, size: tuple[int, int]) -> bool:
    """Whether a parameter is a matrix of this size, cut behind any of its dimensions."""
    return any((math.prod(shape[:cut]), math.prod(shape[cut:])) == size for cut in range(1, len(shape) + 1))


def length(span: Range) -> int:
    return span[1] - span[0]


def meet(one: Range, other: Range) -> bool:
    return one[0] < other[1] and other[0] < one[1]


def times(span: Range, count: int) -> Range:
    return span[0] * count, span[1] * count


def joined(pieces: list[tuple[Range, Range, int]]) -> list[tuple[Range, Range, int]]:
    """Pieces whose rows follow each other in the policy as one; in the engine they do anyway."""
    longest = pieces[:1]
    for rows, columns, at in pieces[1:]:
        (first, last), _, before = longest[-1]
        if last == rows[0]:
            longest[-1] = (first, rows[1]), columns, before
        else:
            longest.append((rows, columns, at))
    return longest
