"""Whole groups -> ranks, so that all ranks take about as long. Pure: every rank computes the same deal.

The largest differencing method (Karmarkar and Karp 1982; of sets: Michiels, Korst and Aarts 2003) or greedy, whichever
is better, and then moves and swaps, which do most of it. Micro-batches are left out: a rank packs what it was dealt.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, insort
from collections.abc import Sequence
from operator import itemgetter
from typing import NamedTuple, TypeAlias

Deal: TypeAlias = list[list[int]]
"""Of each rank: the indices of its groups."""

LEAST_GAIN = 1e-4
"""Of the mean load: what an exchange must gain. Less of a step cannot be measured."""
STAY_SLACK = 5e-3
"""A deal that leaves groups where they are may load the fullest rank so much more than the best one."""


def deal(costs: Sequence[float], ranks: int, owners: Sequence[int] | None = None) -> Deal:
    """Share whole groups out so that the fullest rank has little more than the mean; never more than by greedy.

    No rank stays empty where there are enough groups.

    Args:
        costs: of each group, at least 0.
        owners: the rank that holds each group already. Groups stay where they are as far as balance allows, those
            that cost most before others.

    Raises:
        ValueError: a cost that is negative or not finite, fewer than one rank, an owner that is no rank.
    """
    _check(costs, ranks, owners)
    if not costs:
        return [[] for _ in range(ranks)]
    greedy = _greedy(costs, ranks, None)
    if owners is None:
        return _in_order(_best(costs, greedy))
    staying = _refined(costs, _greedy(costs, ranks, owners))
    filled = all(staying) or len(costs) < ranks
    most = _most(costs, staying) if filled else math.inf
    limit = _most(costs, greedy)
    floor = max(math.fsum(costs) / ranks, *costs)
    if most <= min(limit, floor * (1 + STAY_SLACK)):
        return _in_order(staying)
    best = _best(costs, greedy)
    stays = most <= min(limit, _most(costs, best) * (1 + STAY_SLACK))
    return _in_order(staying if stays else _settled(costs, best, owners))


def idle_share(costs: Sequence[float], dealt: Sequence[Sequence[int]]) -> list[float]:
    """Of each rank: the share of the step in which it waits for the fullest one."""
    loads = _loads(costs, dealt)
    most = max(loads)
    return [1 - load / most if most else 0.0 for load in loads]


def _check(costs: Sequence[float], ranks: int, owners: Sequence[int] | None) -> None:
    if ranks < 1:
        raise ValueError(f"ranks must be at least 1, got {ranks}")
    for index, cost in enumerate(costs):
        if not 0 <= cost < math.inf:
            raise ValueError(f"costs[{index}] must be finite and at least 0, got {cost}")
    if owners is not None and len(owners) != len(costs):
        raise ValueError(f"owners must name a rank for each of {len(costs)} groups, got {len(owners)}")
    for index, owner in enumerate(owners or ()):
        if not 0 <= owner < ranks:
            raise ValueError(f"owners[{index}] must be a rank below {ranks}, got {owner}")


def _loads(costs: Sequence[float], dealt: Sequence[Sequence[int]]) -> list[float]:
    return [math.fsum(costs[index] for index in part) for part in dealt]


def _most(costs: Sequence[float], dealt: Deal) -> float:
    return max(_loads(costs, dealt))


def _in_order(dealt: Deal) -> Deal:
    """The groups of each rank in the order of the prompts."""
    return [sorted(part) for part in dealt]


def _best(costs: Sequence[float], greedy: Deal) -> Deal:
    """The best deal that is known, whoever holds the groups."""
    return _refined(costs, min(_differenced(costs, len(greedy)), greedy, key=lambda dealt: _most(costs, dealt)))


def _descending(costs: Sequence[float]) -> list[int]:
    return sorted(range(len(costs)), key=lambda index: (-costs[index], index))


def _greedy(costs: Sequence[float], ranks: int, owners: Sequence[int] | None) -> Deal:
    """Largest group first to the emptiest rank; with owners, to its owner first, up to the mean."""
    dealt: Deal = [[] for _ in range(ranks)]
    loads = [0.0] * ranks
    mean = math.fsum(costs) / ranks * (1 + 1e-9)  # equal costs may add up to a little more
    rest = _descending(costs)
    if owners is not None:
        candidates, rest = rest, []
        for index in candidates:
            owner = owners[index]
            if dealt[owner] and loads[owner] + costs[index] > mean:
                rest.append(index)
                continue
            loads[owner] += costs[index]
            dealt[owner].append(index)
    emptiest = [(load, len(part), rank) for rank, (load, part) in enumerate(zip(loads, dealt, strict=True))]
    heapq.heapify(emptiest)
    for index in rest:
        load, count, rank = emptiest[0]
        dealt[rank].append(index)
        heapq.heapreplace(emptiest, (load + costs[index], count + 1, rank))
    return dealt


_Sums: TypeAlias = list[tuple[float, tuple[int, ...]]]
"""At most `ranks` sets of groups in descending order of their sums; those that are left out are empty."""


def _differenced(costs: Sequence[float], ranks: int) -> Deal:
    """Karmarkar and Karp: the two partial deals that differ most within are added, fullest to emptiest, until one is
    left. Empty sets are not stored: most additions then touch few sets."""
    def entry(number: int, sums: _Sums) -> tuple[float, int, _Sums]:
        return (sums[-1][0] if len(sums) == ranks else 0.0) - sums[0][0], number, sums

    heap = [entry(index, [(cost, (index,))]) for index, cost in enumerate(costs)]
    heapq.heapify(heap)
    for number in range(len(costs), 2 * len(costs) - 1):
        first = heapq.heappop(heap)[2]
        heapq.heapreplace(heap, entry(number, _added(first, heap[0][2], ranks)))
    dealt = [list(part) for _, part in heap[0][2]]
    return dealt + [[] for _ in range(ranks - len(dealt))]


def _added(first: _Sums, second: _Sums, ranks: int) -> _Sums:
    """The fullest set of one with the emptiest of the other, and so on."""
    alone = ranks - len(second)
    reverse = second[::-1]
    both = [(one[0] + other[0], one[1] + other[1]) for one, other in zip(first[alone:], reverse, strict=False)]
    return sorted(first[:alone] + both + reverse[max(len(first) - alone, 0):], key=itemgetter(0), reverse=True)


_Group: TypeAlias = tuple[float, int]
"""Cost and index; those of a rank are kept in ascending order."""


class _Exchange(NamedTuple):
    """The group that leaves the fullest rank, and the one that comes back for it."""

    given: _Group
    taken: _Group | None
    place: int
    """Of the other rank, in ascending order of load."""


def _refined(costs: Sequence[float], dealt: Deal) -> Deal:
    """Groups of the fullest rank are moved to others, or swapped, the emptiest first, until nothing is gained."""
    parts = [sorted((costs[index], index) for index in part) for part in dealt]
    order = sorted((load, rank) for rank, load in enumerate(_loads(costs, dealt)))
    mean = math.fsum(costs) / len(dealt)
    while (exchange := _first_exchange(parts, order, mean)) is not None:
        ranks = order.pop()[1], order.pop(exchange.place)[1]
        for group, source, target in ((exchange.given, *ranks), (exchange.taken, *ranks[::-1])):
            if group is not None:
                parts[source].remove(group)
                insort(parts[target], group)
        for rank in ranks:
            insort(order, (math.fsum(cost for cost, _ in parts[rank]), rank))
    return [[index for _, index in part] for part in parts]


def _first_exchange(parts: list[list[_Group]], order: list[tuple[float, int]], mean: float) -> _Exchange | None:
    """What the fullest rank, last of `order`, can exchange with the emptiest that helps; None: nothing helps."""
    most, fullest = order[-1]
    least = LEAST_GAIN * mean
    if most - mean <= least:
        return None
    for place, (load, rank) in enumerate(order):
        if most - load <= 2 * least:
            return None
        exchange = _exchange(parts[fullest], parts[rank], most - load, least)
        if exchange is not None:
            return _Exchange(*exchange, place)
    return None


def _exchange(heavy: list[_Group], light: list[_Group], gap: float, least: float
              ) -> tuple[_Group, _Group | None] | None:
    """The groups to exchange so that the fuller of two ranks, `gap` above the other, loses most; None: it would lose no
    more than `least`."""
    best: tuple[_Group, _Group | None] | None = None
    for given in heavy:
        place = bisect_left(light, (given[0] - gap / 2, -1))
        for taken in (None, *light[max(place - 1, 0):place + 1]):
            moved = given[0] - (taken[0] if taken else 0.0)
            if min(moved, gap - moved) > least:
                best, least = (given, taken), min(moved, gap - moved)
    return best


def _settled(costs: Sequence[float], dealt: Deal, owners: Sequence[int]) -> Deal:
    """The same sets on other ranks: first the set and rank that have most in common, as measured by cost."""
    common: dict[tuple[int, int], float] = {}
    for number, part in enumerate(dealt):
        for index in part:
            common[number, owners[index]] = common.get((number, owners[index]), 0.0) + costs[index]
    places: dict[int, int] = {}
    placed: set[int] = set()
    for number, rank in sorted(common, key=lambda pair: (-common[pair], pair)):
        if number not in placed and rank not in places:
            places[rank] = number
            placed.add(number)
    left = (number for number in range(len(dealt)) if number not in placed)
    return [dealt[places[rank] if rank in places else next(left)] for rank in range(len(dealt))]
