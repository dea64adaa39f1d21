"""Mixing weights: how much of an epoch comes from each `data_source`, whatever number of prompts each has."""

from __future__ import annotations

import hashlib
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import lru_cache
from math import isfinite

from veripo_fast.recipes.samplers import permutation
from veripo_fast.types import Prompt

_LOG = logging.getLogger(__name__)


def mixed(prompts: Sequence[Prompt], epoch: int, seed: int, weights: Mapping[str, float], length: int | None = None
          ) -> Sequence[int]:
    """Prompts of several sources by weight, spread evenly over the epoch.

    A source is walked through in an order of its own that goes on from epoch to epoch, so none of its prompts comes
    again before all of them have come. Any run of consecutive prompts holds the shares to within about a prompt of each
    source.

    Args:
        weights: data_source -> weight; their sum does not matter. Every source of the prompts is named; 0 leaves it
            out.
        length: prompts of an epoch; None: as many as there are.

    Raises:
        ValueError: a source has no weight, a weight has no prompts or is no finite number of at least 0, or no weight
            is above 0.
    """
    members = _members(prompts, weights)
    size = len(prompts) if length is None else length
    if size < 1:
        raise ValueError(f"length must be at least 1, got {size}")
    placed = []
    shares = _shares({source: weights[source] for source in members}, size)
    if starved := [source for source, count in shares.items() if not count]:
        _say_starved(_named(starved), size)
    for source, count in shares.items():
        for slot in range(count):
            lap, place = divmod(epoch * count + slot, len(members[source]))
            number = members[source][permutation(len(members[source]), seed, lap)[place]]
            placed.append(((slot + _unit(seed, epoch, source, slot)) / count, source, number))
    return [number for _, _, number in sorted(placed)]


@lru_cache
def _say_starved(names: str, size: int) -> None:
    """Once for all epochs, which are alike."""
    _LOG.warning("sampler mixed: the weight of %s is too small for an epoch of %d prompts, so none of its prompts is "
                 "ever taken; raise the weight, or length", names, size)


def _members(prompts: Sequence[Prompt], weights: Mapping[str, float]) -> dict[str, list[int]]:
    """Numbers of the prompts of every source with a weight above 0, in the order of the names."""
    if not isinstance(weights, Mapping):
        raise ValueError(f"weights must be NAME: NUMBER for every data_source, got {weights!r}")
    found: dict[str, list[int]] = defaultdict(list)
    for number, prompt in enumerate(prompts):
        found[prompt.data_source].append(number)
    for source, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not (isfinite(weight) and weight >= 0):
            raise ValueError(f"the weight of {source} must be a number of at least 0, got {weight!r}")
        if source not in found:
            raise ValueError(f"no prompt has the data_source {source!r}; there are {_named(found)}")
    if missing := sorted(set(found) - set(weights)):
        raise ValueError(f"weights leave out {_named(missing)}; a weight of 0 leaves its prompts out")
    if not any(weights.values()):
        raise ValueError("no weight is above 0")
    return {source: found[source] for source in sorted(found) if weights[source] > 0}


def _named(sources: Mapping[str, object] | Sequence[str]) -> str:
    names = sorted(source or "'' (records without a data_source)" for source in sources)
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _shares(weights: Mapping[str, float], size: int) -> dict[str, int]:
    """Whole numbers in proportion to the weights, `size` in all, by the method of largest remainders."""
    total = sum(weights.values())
    exact = {source: size * weight / total for source, weight in weights.items()}
    shares = {source: int(value) for source, value in exact.items()}
    by_remainder = sorted(exact, key=lambda source: (shares[source] - exact[source], source))
    for source in by_remainder[:size - sum(shares.values())]:
        shares[source] += 1
    return shares


def _unit(seed: int, epoch: int, source: str, slot: int) -> float:
    """A number in [0, 1) that depends on no library's random generator."""
    digest = hashlib.blake2b(f"{seed}/{epoch}/{source}/{slot}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2 ** 64
