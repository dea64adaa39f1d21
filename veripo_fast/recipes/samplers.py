"""The samplers that are shipped. Each gives the numbers of the prompts of an epoch, in the order of their use.

A sampler is a pure function: the same prompts, epoch and seed give the same order, on every rank and after a resume.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache

from veripo_fast.types import Prompt


def shuffled(prompts: Sequence[Prompt], epoch: int, seed: int) -> Sequence[int]:
    """Every prompt once, in another order in each epoch."""
    return permutation(len(prompts), seed, epoch)


def sequential(prompts: Sequence[Prompt], epoch: int, seed: int) -> Sequence[int]:
    """Every prompt once, in the order of the files, as for data that are sorted by difficulty."""
    return range(len(prompts))


@lru_cache(maxsize=4)
def permutation(count: int, seed: int, epoch: int) -> tuple[int, ...]:
    """Sorted by a hash, so that it depends on no library's random generator."""
    def key(index: int) -> bytes:
        return hashlib.blake2b(f"{seed}/{epoch}/{index}".encode(), digest_size=16).digest()

    return tuple(sorted(range(count), key=key))
