"""Tensors that lie in host memory for a while: AdamW's state, while an engine needs the room on the GPU.

Their storage is emptied and filled again, so who holds a tensor holds it still: an optimizer's state, a DTensor. What
comes back is what went away, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.distributed.tensor import DTensor


class HostCopies:
    """Copies of tensors whose own storage is empty meanwhile; in pinned memory where they come from a GPU."""

    def __init__(self) -> None:
        self._away: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._free: dict[int, list[torch.Tensor]] = {}
        """Pinned buffers by size, which are slow to make; ordinary memory is given back."""

    def __bool__(self) -> bool:
        """Whether anything is away."""
        return bool(self._away)

    @torch.no_grad()
    def take(self, tensors: Iterable[torch.Tensor]) -> int:
        """Copy tensors and empty their storage, which each has for itself; returns the bytes.

        A copy that fails leaves the rest where it was.
        """
        moved = 0
        for tensor in tensors:
            own = _local(tensor)
            host = self._buffer(own)
            host.copy_(_bytes(own), non_blocking=True)
            if own.device.type == "cuda":
                torch.cuda.current_stream(own.device).synchronize()
            self._away.append((own, host))
            own.untyped_storage().resize_(0)
            moved += host.numel()
        return moved

    @torch.no_grad()
    def bring_back(self) -> int:
        """Fill the tensors again; returns the bytes. One that finds no room stays away, with all behind it."""
        moved = 0
        while self._away:
            own, host = self._away[-1]
            own.untyped_storage().resize_(host.numel())
            _bytes(own).copy_(host, non_blocking=True)
            if own.device.type == "cuda":
                torch.cuda.current_stream(own.device).synchronize()  # before the buffer is used again
                self._free.setdefault(host.numel(), []).append(host)
            self._away.pop()
            moved += host.numel()
        return moved

    def _buffer(self, own: torch.Tensor) -> torch.Tensor:
        size = own.untyped_storage().nbytes()
        if self._free.get(size):
            return self._free[size].pop()
        return torch.empty(size, dtype=torch.uint8, pin_memory=own.device.type == "cuda")


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """All bytes of a tensor's storage, uint8 [n]."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
