"""Moves the slices of a plan into the engine: rounded to its dtype, bucket by bucket, and read back for a checksum.

A slice whose two ends are the same memory (`alias.py`) is left out, and so is a frozen parameter after the first time.
On a GPU the copies run on a stream of their own, one launch a bucket, and the host waits once, at the end. Parameters
that a trainer has moved to the host come through two buffers in turn (`staging.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from veripo_kernels import copy_slices

from veripo_fast.errors import TrainingError
from veripo_fast.weights.parts import Part, SliceCopy
from veripo_fast.weights.staging import Staging

Views: TypeAlias = tuple[torch.Tensor, torch.Tensor]
"""Both ends of a copy, [rows, columns]."""

Checksums: TypeAlias = tuple[torch.Tensor, torch.Tensor]
"""int64 [] each: of what was sent, and of what the engine holds."""

BUCKET_BYTES = 64 << 20
"""One call of `copy_slices`, which costs 50 us on a CPU, and what a checksum that differs points at."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """A copy that fits into a bucket, as views of flat memory: `size` is [rows, columns], offsets count elements."""

    source: str
    target: str
    size: tuple[int, int]
    source_strides: tuple[int, int]
    target_strides: tuple[int, int]
    source_offset: int
    target_offset: int
    bytes: int
    """In the engine."""

    @classmethod
    def of(cls, copy: SliceCopy, itemsize: int) -> _Piece:
        """One row where both ends allow it."""
        source, target = copy.source, copy.target
        size, strides = target.shape, ((source.width, 1), (target.width, 1))
        if source.contiguous and target.contiguous:
            size, strides = (1, target.numel), ((target.numel, 1), (target.numel, 1))
        return cls(source.name, target.name, size, *strides, source.offset, target.offset, target.numel * itemsize)


class Transfer:
    """The copies of a plan between the parameters of a policy and those of an engine."""

    def __init__(self, copies: Sequence[SliceCopy], sources: Mapping[str, torch.Tensor],
                 targets: Mapping[str, torch.Tensor], *, bucket_bytes: int = BUCKET_BYTES) -> None:
        """
        Args:
            copies: from `plan`.
            sources, targets: what its names mean; contiguous. `.data` of a parameter may be another tensor by the time
                of `send`.
            bucket_bytes: most bytes of a bucket as the engine has them.

        Raises:
            ValueError: a parameter that is not contiguous, by name.
        """
        self.sources, self.targets, self.bucket_bytes = sources, targets, bucket_bytes
        self.pieces = tuple(piece for copy in copies for piece in self._cut(copy))
        self._check_contiguous(self.pieces)
        device = next((targets[piece.target].device for piece in self.pieces), torch.device("cpu"))
        self._sent: set[str] = set()
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._staging: Staging | None = None

    @torch.no_grad()
    def send(self, *, everything: bool = False) -> int:
        """Move what may have changed since the last time, or everything: an engine that slept has lost its weights.

        Returns:
            Bytes written.

        Raises:
            TrainingError: the engine does not hold what was sent; names the bucket.
            ValueError: a parameter that is no longer contiguous, by name.
        """
        due = self._due(everything)
        self._check_contiguous(due)
        buckets = list(self._buckets(due))
        if self._stream is None:
            for bucket in buckets:
                _compare(bucket, self._move(bucket))
        else:
            self._send_on(self._stream, buckets)
        self._sent = {name for name, tensor in self.sources.items() if not tensor.requires_grad}
        return sum(piece.bytes for piece in due)

    def due_bytes(self, *, everything: bool = False) -> int:
        """Bytes that `send` would write."""
        return sum(piece.bytes for piece in self._due(everything))

    def _due(self, everything: bool) -> list[_Piece]:
        return [piece for piece in self.pieces
                if (everything or piece.source not in self._sent) and not self._shared(piece)]

    def _send_on(self, stream: torch.cuda.Stream, buckets: Sequence[Sequence[_Piece]]) -> None:
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.cuda.stream(stream):
            sums = [self._move(bucket) for bucket in buckets]
        torch.cuda.current_stream(stream.device).wait_stream(stream)
        for bucket, pair in zip(buckets, sums, strict=True):
            _compare(bucket, pair)

    def _move(self, bucket: Sequence[_Piece]) -> Checksums:
        sources, targets = zip(*map(self.views, bucket), strict=True)
        if sources[0].device == targets[0].device:
            sums = copy_slices(sources, targets)
            return sums[0], sums[1]
        if self._staging is None:
            self._staging = Staging(self.bucket_bytes, targets[0].device)
        return self._staging.move(sources, targets)

    def _buckets(self, pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
        """Pieces in order, as many as fit into a bucket, all from one device."""
        bucket: list[_Piece] = []
        room = self.bucket_bytes
        for piece in pieces:
            if bucket and (piece.bytes > room or self._device(piece) != self._device(bucket[0])):
                yield bucket
                bucket, room = [], self.bucket_bytes
            bucket.append(piece)
            room -= piece.bytes
        if bucket:
            yield bucket

    def _cut(self, copy: SliceCopy) -> Iterator[_Piece]:
        """The copy in pieces of whole rows that fit into a bucket each."""
        rows, columns = copy.target.shape
        itemsize = self.targets[copy.target.name].element_size()
        step = max(1, self.bucket_bytes // (columns * itemsize))
        for first in range(0, rows, step):
            last = min(first + step, rows)
            yield _Piece.of(SliceCopy(_rows(copy.source, first, last), _rows(copy.target, first, last)), itemsize)

    def views(self, piece: _Piece) -> Views:
        """Both ends of a piece, as they lie in memory now."""
        source, target = self.sources[piece.source].detach(), self.targets[piece.target].detach()
        return (source.as_strided(piece.size, piece.source_strides, source.storage_offset() + piece.source_offset),
                target.as_strided(piece.size, piece.target_strides, target.storage_offset() + piece.target_offset))

    def _shared(self, piece: _Piece) -> bool:
        source, target = self.sources[piece.source], self.targets[piece.target]
        return (source.data_ptr() + piece.source_offset * source.element_size()
                == target.data_ptr() + piece.target_offset * target.element_size() and source.device == target.device)

    def _device(self, piece: _Piece) -> torch.device:
        return self.sources[piece.source].device

    def _check_contiguous(self, pieces: Iterable[_Piece]) -> None:
        for piece in pieces:
            if not self.sources[piece.source].is_contiguous() or not self.targets[piece.target].is_contiguous():
                raise ValueError(f"{piece.source} and the engine's {piece.target} must be contiguous, got strides "
                                 f"{self.sources[piece.source].stride()} and {self.targets[piece.target].stride()}")


def _rows(part: Part, first: int, last: int) -> Part:
    return Part(part.name, (part.rows[0] + first, part.rows[0] + last), part.columns, part.width)


def _compare(bucket: Sequence[_Piece], sums: Checksums) -> None:
    sent, held = (int(value) for value in sums)
    if sent != held:
        raise TrainingError(f"the engine does not hold the weights that were sent: in the bucket from "
                            f"{bucket[0].target} to {bucket[-1].target} the checksum is {held}, not {sent}")
