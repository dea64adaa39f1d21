"""Whole groups -> ranks, so that all ranks take about as long. Pure: every rank computes the same deal.

The largest differencing method (Karmarkar and Karp 1982; of sets: Michiels, Korst and Aarts 2003) or greedy, whichever
is better, and then moves and swaps, which do most of it. Micro-batches are left out: a rank packs what it was dealt.
"""

from __future__ import annotations

import heapq
import math
from bisect import insort
from collections.abc import Sequence
from operator import itemgetter
from typing import NamedTuple, TypeAlias

import numpy as np

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


def _refined(costs: Sequence[float], dealt: Deal) -> Deal:
    """Groups of the fullest rank are moved to others, or swapped, the emptiest first, until nothing is gained."""
    parts = [sorted(part, key=lambda index: (costs[index], index)) for part in dealt]
    loads = _loads(costs, dealt)
    order = sorted((load, rank) for rank, load in enumerate(loads))
    mean = math.fsum(costs) / len(dealt)
    table = _Table(costs, parts)
    while (exchange := _first_exchange(table, parts, order, mean)) is not None:
        fullest, other = order.pop()[1], order.pop(exchange.place)[1]
        given, taken = parts[fullest].pop(exchange.given), None
        if exchange.taken is not None:
            taken = parts[other].pop(exchange.taken)
            insort(parts[fullest], taken, key=lambda index: (costs[index], index))
        insort(parts[other], given, key=lambda index: (costs[index], index))
        for rank in (fullest, other):
            table.set(rank, parts[rank])
            insort(order, (math.fsum(costs[index] for index in parts[rank]), rank))
    return parts


class _Exchange(NamedTuple):
    """Places in the ascending order of their rank: of the group that leaves the fullest rank, and of the one that comes
    back for it."""

    given: int
    taken: int | None
    place: int
    """Of the other rank, in ascending order of load."""


class _Table:
    """Costs of the groups of every rank, float64 [ranks, 1 + most groups]: nothing first, then ascending, then inf."""

    def __init__(self, costs: Sequence[float], parts: Deal) -> None:
        self.costs = np.array(costs, np.float64)
        self.rows = np.full((len(parts), 2 + max(map(len, parts))), np.inf)
        for rank, part in enumerate(parts):
            self.set(rank, part)

    def set(self, rank: int, part: Sequence[int]) -> None:
        """The groups that a rank has now."""
        if 1 + len(part) > self.rows.shape[1]:
            self.rows = np.pad(self.rows, ((0, 0), (0, len(part))), constant_values=np.inf)
        self.rows[rank] = np.inf
        self.rows[rank, 0] = 0.0
        self.rows[rank, 1:1 + len(part)] = self.costs[list(part)]


_AT_ONCE = 1 << 18
"""Exchanges that are weighed together."""


def _first_exchange(table: _Table, parts: Deal, order: list[tuple[float, int]], mean: float) -> _Exchange | None:
    """What the fullest rank, last of `order`, can exchange with the emptiest that helps; None: nothing helps.

    With that rank the exchange is taken after which the fuller of the two has least.
    """
    most, fullest = order[-1]
    least = LEAST_GAIN * mean
    if most - mean <= least:
        return None
    heavy = table.costs[parts[fullest]]
    size, largest = 1, max(_AT_ONCE // (len(heavy) * table.rows.shape[1]), 1)
    start = 0
    while start < len(order) - 1:
        others = order[start:min(start + size, len(order) - 1)]
        gaps = most - np.array([load for load, _ in others])
        moved = heavy[:, None] - table.rows[[rank for _, rank in others], None, :]
        gains = np.minimum(moved, gaps[:, None, None] - moved).reshape(len(others), -1)
        helping = (gains.max(1) > least).nonzero()[0]
        if len(helping):
            first = int(helping[0])
            given, taken = divmod(int(gains[first].argmax()), table.rows.shape[1])
            return _Exchange(given, taken - 1 if taken else None, start + first)
        if gaps[-1] <= 2 * least:
            return None
        start, size = start + len(others), min(4 * size, largest)
    return None


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
