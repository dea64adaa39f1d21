"""Copies of slices and their checksum in plain torch: the definition, and what runs where nothing is compiled."""

from __future__ import annotations

from collections.abc import Sequence

import torch

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def copy_slices(sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> torch.Tensor:
    """`slices.copy_slices`, unchecked."""
    total = torch.zeros((), dtype=torch.int64, device=targets[0].device)
    for source, target in zip(sources, targets, strict=True):
        rounded = source.detach().to(target.dtype)
        target.detach().copy_(rounded)
        total += _sum_of_bits(rounded)
    return total


def checksum(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """`slices.checksum`, unchecked."""
    total = torch.zeros((), dtype=torch.int64, device=tensors[0].device)
    for tensor in tensors:
        total += _sum_of_bits(tensor.detach())
    return total


def _sum_of_bits(values: torch.Tensor) -> torch.Tensor:
    return values.view(_BITS[values.element_size()]).sum(dtype=torch.int64)
