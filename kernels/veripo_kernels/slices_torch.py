"""Copies of slices with their checksums in plain torch: the definition, and what runs where nothing is compiled."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def copy_slices(sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> torch.Tensor:
    """`slices.copy_slices`, unchecked."""
    sums = torch.zeros(2, dtype=torch.int64, device=targets[0].device)
    for source, target in zip(sources, targets, strict=True):
        rounded = source.to(target.dtype)
        target.copy_(rounded)
        sums += torch.stack([_sum_of_words(rounded), _sum_of_words(target)])
    return sums


def _sum_of_words(values: torch.Tensor) -> torch.Tensor:
    """int64 []: sum of the words of 16 bits that make up the values, each 0 to 65535."""
    words = values.contiguous().view(torch.int16)
    return words.sum(dtype=torch.int64) + 65536 * (words < 0).sum()
