"""From the host to the engine's device: slices are rounded into one buffer while the other is on its way."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from veripo_kernels import copy_slices

_ALIGNMENT = 16
"""Bytes between the beginnings of slices in a buffer are a multiple of it."""


class Staging:
    """Two buffers on the host, page-locked where the device is a GPU, and two on the device."""

    def __init__(self, bucket_bytes: int, device: torch.device) -> None:
        """
        Args:
            bucket_bytes: most bytes of a bucket; a slice may add up to 16 of padding.
        """
        self.on_gpu = device.type == "cuda"
        self.size, self.device = bucket_bytes, device
        self._buffers: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._done = [torch.cuda.Event() for _ in range(2)] if self.on_gpu else []
        self._turn = 0

    def move(self, sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]
             ) -> tuple[torch.Tensor, torch.Tensor]:
        """`copy_slices` from the host to the device, on the current stream.

        Args:
            sources: [rows, columns] each, on the host. targets: the same shapes on the device.

        Returns:
            Checksums int64 []: of what was sent, on the host, and of what the targets hold, on the device.
        """
        starts, total = _places(targets)
        host, there = self._next(total)
        packed = [_carve(host, start, target) for start, target in zip(starts, targets, strict=True)]
        sent = copy_slices(sources, packed)[0]
        there[:total].copy_(host[:total], non_blocking=self.on_gpu)
        arrived = [_carve(there, start, target) for start, target in zip(starts, targets, strict=True)]
        held = copy_slices(arrived, targets)[1]
        if self.on_gpu:
            self._done[self._turn].record()
        return sent, held

    def _next(self, total: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The buffers whose turn it is, once nothing reads them any more."""
        self._turn = 1 - self._turn
        if self.on_gpu:
            self._done[self._turn].synchronize()
        if not self._buffers or len(self._buffers[0][0]) < total:
            self.size = max(self.size, total)
            self._buffers = [(torch.empty(self.size, dtype=torch.uint8, pin_memory=self.on_gpu),
                              torch.empty(self.size, dtype=torch.uint8, device=self.device)) for _ in range(2)]
        return self._buffers[self._turn]


def _places(targets: Sequence[torch.Tensor]) -> tuple[list[int], int]:
    """Where in a buffer each slice begins, and the bytes of all."""
    starts, end = [], 0
    for target in targets:
        starts.append(end)
        end += -(-target.numel() * target.element_size() // _ALIGNMENT) * _ALIGNMENT
    return starts, end


def _carve(buffer: torch.Tensor, start: int, like: torch.Tensor) -> torch.Tensor:
    """Room for a slice in a buffer, with rows next to each other."""
    return buffer[start:start + like.numel() * like.element_size()].view(like.dtype).view(like.shape)
