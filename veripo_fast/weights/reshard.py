"""Who sends which elements of a sharded policy to whom: pure, from ranges and shapes alone.

A rank holds a flat range of a parameter: rows (FSDP2), a piece of the flattened parameter (ZeRO-3), or all of it
(ZeRO-1 and 2, what is replicated). Its engine wants the slices of a plan. A slice is cut where the holder changes: into
pieces of a row and whole rows. No element goes twice to one rank, and none that the rank has itself.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from veripo_fast.errors import ConfigError
from veripo_fast.weights.parts import Part, Range, Shape, SliceCopy, length, matrix
from veripo_fast.weights.plan import by_source

Holdings: TypeAlias = Mapping[str, Range]
"""Name -> the elements of the flattened parameter that a rank holds; an empty range, or no name, for nothing."""


@dataclass(frozen=True, slots=True)
class Message:
    """A rectangle of a parameter on its way to the engine of a rank; it stays where sender and receiver are one."""

    sender: int
    receiver: int
    source: Part
    targets: tuple[Part, ...]
    """Of the receiver's engine, each in the shape of `source`: several where the engine has the elements twice."""

    @property
    def elements(self) -> Range:
        """From the first to the last element, in the flattened parameter."""
        rows, columns = self.source.shape
        return self.source.offset, self.source.offset + (rows - 1) * self.source.width + columns


@dataclass(frozen=True)
class _Segment:
    """Elements of a parameter that the same ranks hold."""

    span: Range
    holders: tuple[int, ...]


def reshard(holdings: Sequence[Holdings], wanted: Sequence[Sequence[SliceCopy]], shapes: Mapping[str, Shape], *,
            most: int, ranks_per_node: int) -> list[Message]:
    """The messages that fill the engine of every rank, parameter by parameter.

    Of several holders the receiver itself is taken, else one on its node, else any; of equals the one that sends least.

    Args:
        holdings: of each rank. wanted: the copies of each rank, from `plan`. shapes: of the whole parameters.
        most: elements of a message. ranks_per_node: neighbours, from rank 0 on.

    Raises:
        ConfigError: a rank holds what there is not, or an engine wants what no rank holds; names the elements.
    """
    _check_holdings(holdings, shapes)
    each = [by_source(copies) for copies in wanted]
    loads = [0] * len(holdings)
    messages: list[Message] = []
    for name in shapes:
        segments = _segments(name, holdings)
        for receiver, copies in enumerate(each):
            for source, targets in _once(copies.get(name, ())).items():
                pieces = list(_pieces(source, segments, most))
                _check_covered(source, [piece for piece, _ in pieces], receiver)
                for piece, holders in pieces:
                    sender = _choose(holders, receiver, loads, ranks_per_node)
                    loads[sender] += piece.numel if sender != receiver else 0
                    ends = tuple(_moved(target, piece, source) for target in targets)
                    messages.append(Message(sender, receiver, piece, ends))
    return messages


@dataclass(frozen=True)
class Traffic:
    """Bytes between ranks, of each rank."""

    sent: tuple[int, ...]
    received: tuple[int, ...]
    gathered: tuple[int, ...]
    """What each would receive, in the trainer's dtype, of all parameters in the messages to have them whole."""

    @property
    def ratio(self) -> float | None:
        """Bytes received over those of the full gather; None where every rank has everything."""
        return sum(self.received) / sum(self.gathered) if sum(self.gathered) else None


def traffic(messages: Sequence[Message], holdings: Sequence[Holdings], shapes: Mapping[str, Shape], *, itemsize: int,
            trainer_itemsizes: Mapping[str, int]) -> Traffic:
    """What the messages cost.

    Args:
        itemsize: bytes of an element in the engine, and on the way. trainer_itemsizes: name -> bytes in the trainer.
    """
    sent, received = [0] * len(holdings), [0] * len(holdings)
    for message in messages:
        if message.sender != message.receiver:
            sent[message.sender] += message.source.numel * itemsize
            received[message.receiver] += message.source.numel * itemsize
    names = {message.source.name for message in messages}
    gathered = [sum((_count(shapes[name]) - length(held.get(name, (0, 0)))) * trainer_itemsizes[name] for name in names)
                for held in holdings]
    return Traffic(tuple(sent), tuple(received), tuple(gathered))


# -- who has what -----------------------------------------------------------------------------------------------------

def _segments(name: str, holdings: Sequence[Holdings]) -> list[_Segment]:
    """The elements of a parameter in order, cut where the holders change; what nobody holds is left out."""
    ranges: dict[Range, list[int]] = {}
    for rank, held in enumerate(holdings):
        if length(held.get(name, (0, 0))):
            ranges.setdefault(held[name], []).append(rank)
    edges = sorted({edge for span in ranges for edge in span})
    segments = []
    for span in itertools.pairwise(edges):
        around = [ranks for held, ranks in ranges.items() if held[0] <= span[0] and span[1] <= held[1]]
        if around:
            segments.append(_Segment(span, tuple(sorted(itertools.chain(*around)))))
    return segments


def _choose(holders: Sequence[int], receiver: int, loads: Sequence[int], ranks_per_node: int) -> int:
    if receiver in holders:
        return receiver
    near = [holder for holder in holders if holder // ranks_per_node == receiver // ranks_per_node]
    return min(near or holders, key=lambda holder: loads[holder])


# -- rectangles -------------------------------------------------------------------------------------------------------

def _once(copies: Sequence[SliceCopy]) -> dict[Part, list[Part]]:
    """Parts of a parameter that share no element -> where each goes; cut at the edges of all copies."""
    row_edges = sorted({edge for copy in copies for edge in copy.source.rows})
    column_edges = sorted({edge for copy in copies for edge in copy.source.columns})
    ends: dict[Part, list[Part]] = {}
    for copy in copies:
        for rows in _between(copy.source.rows, row_edges):
            for columns in _between(copy.source.columns, column_edges):
                source = Part(copy.source.name, rows, columns, copy.source.width)
                ends.setdefault(source, []).append(_moved(copy.target, source, copy.source))
    return ends


def _between(span: Range, edges: Sequence[int]) -> Iterator[Range]:
    """The span cut at the edges, which are sorted and hold both of its ends."""
    inside = [edge for edge in edges if span[0] <= edge <= span[1]]
    return itertools.pairwise(inside)


def _moved(target: Part, piece: Part, source: Part) -> Part:
    """Where a piece of a source goes, whose whole goes to the target."""
    row = target.rows[0] + piece.rows[0] - source.rows[0]
    column = target.columns[0] + piece.columns[0] - source.columns[0]
    rows, columns = piece.shape
    return Part(target.name, (row, row + rows), (column, column + columns), target.width)


def _pieces(source: Part, segments: Sequence[_Segment], most: int) -> Iterator[tuple[Part, tuple[int, ...]]]:
    """The source in the order of its elements, cut where the holders change and into pieces of at most `most`."""
    end = (source.rows[1] - 1) * source.width + source.columns[1]
    first = bisect.bisect_right(segments, source.offset, key=lambda segment: segment.span[1])
    for segment in segments[first:]:
        if segment.span[0] >= end:
            return
        for rectangle in _rectangles(segment.span, source.width):
            common = _common(source, *rectangle)
            if common is not None:
                yield from ((piece, segment.holders) for piece in _cut(common, most))


def _rectangles(span: Range, width: int) -> Iterator[tuple[Range, Range]]:
    """(rows, columns) of a flat range: the end of a row, whole rows, the beginning of a row."""
    (first, begin), (last, end) = divmod(span[0], width), divmod(span[1], width)
    if first == last:
        yield (first, first + 1), (begin, end)
        return
    if begin:
        yield (first, first + 1), (begin, width)
        first += 1
    if first < last:
        yield (first, last), (0, width)
    if end:
        yield (last, last + 1), (0, end)


def _common(part: Part, rows: Range, columns: Range) -> Part | None:
    rows = max(rows[0], part.rows[0]), min(rows[1], part.rows[1])
    columns = max(columns[0], part.columns[0]), min(columns[1], part.columns[1])
    return Part(part.name, rows, columns, part.width) if length(rows) > 0 and length(columns) > 0 else None


def _cut(part: Part, most: int) -> Iterator[Part]:
    """Whole rows of the part as far as they fit, else pieces of a row."""
    columns = part.shape[1]
    high, wide = max(1, most // columns), min(columns, most)
    for row in range(part.rows[0], part.rows[1], high):
        for column in range(part.columns[0], part.columns[1], wide):
            yield Part(part.name, (row, min(row + high, part.rows[1])), (column, min(column + wide, part.columns[1])),
                       part.width)


# -- verification -----------------------------------------------------------------------------------------------------

def _check_holdings(holdings: Sequence[Holdings], shapes: Mapping[str, Shape]) -> None:
    for rank, held in enumerate(holdings):
        for name, (start, stop) in held.items():
            if name not in shapes:
                raise ConfigError(f"rank {rank} holds elements of {name}, which is no parameter of the policy")
            if not 0 <= start <= stop <= _count(shapes[name]):
                raise ConfigError(f"rank {rank} holds the elements {start:,} to {stop:,} of {name}, which has "
                                  f"{_count(shapes[name]):,}; padding has to be left out")


def _check_covered(source: Part, pieces: Sequence[Part], receiver: int) -> None:
    """Every element of the source is in one piece: pieces are in order and apart, and as many elements as it has."""
    end = source.offset
    for piece in pieces:
        if piece.offset < end:
            raise ConfigError(f"element {piece.offset:,} of {source.name} would be written twice on rank {receiver}")
        end = piece.offset + (piece.shape[0] - 1) * piece.width + piece.shape[1]
    found = sum(piece.numel for piece in pieces)
    if found != source.numel:
        raise ConfigError(f"{source.name}: the ranks hold {found:,} of the {source.numel:,} elements that rank "
                          f"{receiver}'s engine has of its rows {source.rows[0]:,} to {source.rows[1]:,}")


def _count(shape: Shape) -> int:
    rows, columns = matrix(shape)
    return rows * columns
