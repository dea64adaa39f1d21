"""Moves the slices of a plan into the engine: rounded to its dtype, bucket by bucket, and read back for a checksum.

A slice whose two ends are the same memory (`alias.py`) is left out, and so is a frozen parameter after the first time.
On a GPU the copies run on a stream of their own, one launch a bucket, and the host waits once, at the end. Parameters
that a trainer has moved to the host come through two buffers in turn (`staging.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias

import torch
from veripo_kernels import copy_slices

from veripo_fast.errors import TrainingError
from veripo_fast.weights.layouts import Part, SliceCopy
from veripo_fast.weights.staging import Staging

Views: TypeAlias = tuple[torch.Tensor, torch.Tensor]
"""Both ends of a copy, [rows, columns]."""

Checksums: TypeAlias = tuple[torch.Tensor, torch.Tensor]
"""int64 [] each: of what was sent, and of what the engine holds."""

BUCKET_BYTES = 64 << 20
"""One call of `copy_slices`, which costs 50 us on a CPU, and what a checksum that differs points at."""


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
        _check_contiguous(copies, sources, targets)
        self.sources, self.targets = sources, targets
        device = next((targets[copy.target.name].device for copy in copies), torch.device("cpu"))
        self.bucket_bytes = bucket_bytes
        self.copies = tuple(piece for copy in copies for piece in self._cut(copy))
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
        """
        due = self._due(everything)
        buckets = list(self._buckets(due))
        if self._stream is None:
            for bucket in buckets:
                _compare(bucket, self._move(bucket))
        else:
            self._send_on(self._stream, buckets)
        self._sent = {name for name, tensor in self.sources.items() if not tensor.requires_grad}
        return sum(map(self._bytes, due))

    def due_bytes(self, *, everything: bool = False) -> int:
        """Bytes that `send` would write."""
        return sum(map(self._bytes, self._due(everything)))

    def _due(self, everything: bool) -> list[SliceCopy]:
        wanted = [copy for copy in self.copies if everything or copy.source.name not in self._sent]
        return [copy for copy in wanted if not self._shared(copy)]

    def _send_on(self, stream: torch.cuda.Stream, buckets: Sequence[Sequence[SliceCopy]]) -> None:
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.cuda.stream(stream):
            sums = [self._move(bucket) for bucket in buckets]
        torch.cuda.current_stream(stream.device).wait_stream(stream)
        for bucket, pair in zip(buckets, sums, strict=True):
            _compare(bucket, pair)

    def _move(self, bucket: Sequence[SliceCopy]) -> Checksums:
        sources, targets = zip(*map(self._views, bucket), strict=True)
        if sources[0].device == targets[0].device:
            sums = copy_slices(sources, targets)
            return sums[0], sums[1]
        if self._staging is None:
            self._staging = Staging(self.bucket_bytes, targets[0].device)
        return self._staging.move(sources, targets)

    def _buckets(self, copies: Iterable[SliceCopy]) -> Iterator[list[SliceCopy]]:
        """Copies in order, as many as fit into a bucket, all from one device."""
        bucket: list[SliceCopy] = []
        room = self.bucket_bytes
        for copy in copies:
            if bucket and (self._bytes(copy) > room or self._device(copy) != self._device(bucket[0])):
                yield bucket
                bucket, room = [], self.bucket_bytes
            bucket.append(copy)
            room -= self._bytes(copy)
        if bucket:
            yield bucket

    def _cut(self, copy: SliceCopy) -> Iterator[SliceCopy]:
        """The copy in pieces of whole rows that fit into a bucket each."""
        rows, columns = copy.target.shape
        row_bytes = columns * self.targets[copy.target.name].element_size()
        step = max(1, self.bucket_bytes // row_bytes)
        for first in range(0, rows, step):
            last = min(first + step, rows)
            yield SliceCopy(_rows(copy.source, first, last), _rows(copy.target, first, last))

    def _views(self, copy: SliceCopy) -> Views:
        flat = copy.source.contiguous and copy.target.contiguous
        return (_view(self.sources[copy.source.name], copy.source, flat),
                _view(self.targets[copy.target.name], copy.target, flat))

    def _shared(self, copy: SliceCopy) -> bool:
        source, target = self._views(copy)
        return source.data_ptr() == target.data_ptr() and source.device == target.device

    def _bytes(self, copy: SliceCopy) -> int:
        return copy.target.numel * self.targets[copy.target.name].element_size()

    def _device(self, copy: SliceCopy) -> torch.device:
        return self.sources[copy.source.name].device


def _check_contiguous(copies: Sequence[SliceCopy], sources: Mapping[str, torch.Tensor],
                      targets: Mapping[str, torch.Tensor]) -> None:
    for copy in copies:
        for owner, part, tensors in (("the policy's", copy.source, sources), ("the engine's", copy.target, targets)):
            if not tensors[part.name].is_contiguous():
                raise ValueError(f"{owner} {part.name} must be contiguous, got strides {tensors[part.name].stride()}")


def _rows(part: Part, first: int, last: int) -> Part:
    return Part(part.name, (part.rows[0] + first, part.rows[0] + last), part.columns, part.width)


def _view(tensor: torch.Tensor, part: Part, flat: bool) -> torch.Tensor:
    """The part as [rows, columns], or as one row where both ends allow it."""
    size, stride = ((1, part.numel), (part.numel, 1)) if flat else (part.shape, (part.width, 1))
    return tensor.detach().as_strided(size, stride, tensor.storage_offset() + part.offset)


def _compare(bucket: Sequence[SliceCopy], sums: Checksums) -> None:
    sent, held = (int(value) for value in sums)
    if sent != held:
        raise TrainingError(f"the engine does not hold the weights that were sent: in the bucket from "
                            f"{bucket[0].target.name} to {bucket[-1].target.name} the checksum is {held}, not {sent}")
