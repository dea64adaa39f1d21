"""Policies that ranks share, made by hand with torch's `chunk`: what each rank holds, and sizes that can be split."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from tests.support.engine_weights import Sizes, Weights
from veripo_fast.weights.exchange import Held
from veripo_fast.weights.parts import Range

KINDS = ("rows", "flat", "whole", "tower_whole", "two_nodes")
"""FSDP2; ZeRO-3; ZeRO-1 and 2; FSDP2 around a tower that every rank has; FSDP2 in each half of the ranks."""


def sizes_for(tp: int, family: str = "qwen3_vl", tied: bool = False) -> Sizes:
    """A small model that `tp` ranks can share; its rows are odd, so that no partition falls on the edges of another."""
    return Sizes(family, tied, layers=1, heads=2 * tp, kv_heads=tp if tp % 2 else max(1, tp // 2), head_dim=6,
                 hidden=15, intermediate=5 * tp, vocabulary=64 * tp - 21, depth=1, tower_heads=tp, tower_hidden=2 * tp,
                 tower_intermediate=3 * tp)


def held_by(kind: str, weights: Weights, size: int, rank: int) -> dict[str, tuple[int, torch.Tensor]]:
    """Name -> (where it begins, elements) of one of the `KINDS`."""
    held = {}
    for name, tensor in weights.items():
        whole = kind == "whole" or (kind == "tower_whole" and ".visual." in name)
        if whole:
            held[name] = 0, tensor.reshape(-1)
        elif kind == "flat":
            held[name] = _chunk(tensor.reshape(-1), size, rank)
        elif kind == "two_nodes" and size % 2 == 0:
            held[name] = _chunk(tensor, size // 2, rank % (size // 2))
        else:
            held[name] = _chunk(tensor, size, rank)
    return held


def _chunk(tensor: torch.Tensor, size: int, rank: int) -> tuple[int, torch.Tensor]:
    """A share of dimension 0; late ranks may have nothing."""
    chunks = tensor.chunk(size, 0)
    begin = sum(chunk.numel() for chunk in chunks[:rank])
    own = chunks[rank] if rank < len(chunks) else tensor[:0]
    return begin, own.reshape(-1).clone()


def ranges_of(held: Held) -> Mapping[str, Range]:
    return {name: (begin, begin + len(elements)) for name, (begin, elements) in held.items()}
