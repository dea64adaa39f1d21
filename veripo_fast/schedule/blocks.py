"""Which completions of a packed group are attended together, where SDPA attends them (model/shared_prefix.py).

A block has one mask over the prompt and its own tokens. Every further block costs a call and a copy of the prompt's
keys and values; every completion that joins one adds pairs that the mask hides.
"""

from __future__ import annotations

from collections.abc import Sequence

MAX_MASK_ELEMENTS = 1 << 25
"""Most elements of a block's boolean mask (32 MiB)."""
CALL_PAIRS, COPY_PAIRS = 2500, 3
"""What a further block costs, in masked (query, key) pairs: a call, and for each prompt token the copy of its keys and
values. Fitted to forward and backward on a CPU (bench/bench_blocks.py): 8 heads, 2 key heads, head size 64."""


def blocks_of(prompt: int, completions: Sequence[int]) -> list[list[int]]:
    """Lengths of completions, in order, cut into blocks; those that hold no token are left out.

    A completion of R tokens that joins a block of m adds 2 m R hidden pairs. It joins while these cost less than a
    block of its own, and while the mask is not too large.
    """
    blocks: list[list[int]] = []
    tokens = 0
    for length in completions:
        alone = (2 * tokens * length > CALL_PAIRS + COPY_PAIRS * prompt
                 or (tokens + length) * (prompt + tokens + length) > MAX_MASK_ELEMENTS)
        if not blocks or (tokens and alone):
            blocks.append([])
            tokens = 0
        blocks[-1].append(length)
        tokens += length
    return [block for block in blocks if sum(block)]
