"""Which part of numbered work is a rank's own, and what all ranks have together: collective but for `own_numbers`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

from veripo_fast.distributed.world import World

Item = TypeVar("Item")


def own_numbers(count: int, world: World, tensor_parallel: int = 1) -> list[int]:
    """Which of `count` numbered prompts this rank's engine samples."""
    return list(range(world.rank // tensor_parallel, count, world.size // tensor_parallel))


def of_engine(own: dict[int, Item], world: World, tensor_parallel: int) -> dict[int, Item]:
    """What all ranks that share an engine have: a decoder may have failed on one of them."""
    if tensor_parallel == 1:
        return own
    first = world.rank // tensor_parallel * tensor_parallel
    numbers = world.gather(set(own))[first:first + tensor_parallel]
    return {number: own[number] for number in sorted(set.intersection(*numbers))}


def gathered(own: Mapping[int, Item], world: World) -> dict[int, Item]:
    """What all ranks have by number, in the order of numbers."""
    everything: dict[int, Item] = {}
    for part in world.gather(dict(own)):
        everything |= part
    return dict(sorted(everything.items()))


def padded(batches: Sequence[Item], world: World) -> Iterator[Item | None]:
    """The micro-batches of this rank, then None as often as others still have one.

    Forward and backward passes of sharded weights wait for all ranks, so all make the same number.
    """
    for number in range(int(world.most(len(batches)))):
        yield batches[number] if number < len(batches) else None


def over_ranks(metrics: Mapping[str, float], world: World) -> dict[str, float]:
    """Metrics of all ranks: the largest of those that end in _max and of ratios (_over_), of others the sum."""
    if world.size == 1:
        return dict(metrics)
    values: dict[str, float] = {}
    for part in world.gather(dict(metrics)):
        for name, value in part.items():
            known = values.get(name, 0.0)
            values[name] = max(known, value) if name.endswith("_max") or "_over_" in name else known + value
    return values
