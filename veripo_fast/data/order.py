"""The order in which prompts are used: shuffled, without end, and known from one integer."""

from __future__ import annotations

import hashlib
from functools import lru_cache


class PromptOrder:
    """A shuffled order without end, shared by all ranks, in which an integer says how far one is.

    `position` counts the prompts that all ranks together have taken. Epoch e is a permutation that depends on (seed, e)
    alone, so every prompt comes once per epoch over all ranks, and a run may be resumed with another number of ranks.
    """

    def __init__(self, num_prompts: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        if num_prompts < 1:
            raise ValueError(f"num_prompts must be at least 1, got {num_prompts}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, {world_size}), got {rank}")
        self.num_prompts, self.seed, self.rank, self.world_size = num_prompts, seed, rank, world_size

    def take(self, position: int, count: int) -> tuple[list[int], int]:
        """The next `count` prompt indices of this rank, and the position after all ranks have taken as many."""
        first = position + self.rank * count
        indices = []
        for slot in range(first, first + count):
            epoch, offset = divmod(slot, self.num_prompts)
            indices.append(_permutation(self.num_prompts, self.seed, epoch)[offset])
        return indices, position + self.world_size * count


@lru_cache(maxsize=4)
def _permutation(count: int, seed: int, epoch: int) -> tuple[int, ...]:
    """Sorted by a hash, so that it depends on no library's random generator."""
    def key(index: int) -> bytes:
        return hashlib.blake2b(f"{seed}/{epoch}/{index}".encode(), digest_size=16).digest()

    return tuple(sorted(range(count), key=key))


def steps_of(count: int, size: int, epochs: int, most: int | None, seed: int) -> list[list[int]]:
    """Numbers below `count` of every step: each epoch takes all of them once, in an order of its own.

    Args:
        size: of a step; the last one of an epoch may be short.
        most: steps in all; None: all epochs.
    """
    steps: list[list[int]] = []
    for epoch in range(epochs):
        order = _permutation(count, seed, epoch)
        steps += [list(order[start:start + size]) for start in range(0, count, size)]
        if most is not None and len(steps) >= most:
            break
    return steps[:most]
