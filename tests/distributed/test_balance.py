"""The dealer against brute force and greedy."""

import itertools
import math
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from veripo_fast.distributed.balance import deal, idle_share

COSTS = st.lists(st.floats(0, 1e18) | st.integers(1, 5).map(float), max_size=7)
RANKS = st.integers(1, 4)


def most(costs, dealt):
    return max(math.fsum(costs[index] for index in part) for part in dealt)


def optimum(costs, ranks):
    """The least that the fullest rank can carry, by trying every deal."""
    return min(most(costs, [[i for i, rank in enumerate(choice) if rank == own] for own in range(ranks)])
               for choice in itertools.product(range(ranks), repeat=len(costs)))


def greedy(costs, ranks):
    """What the fullest rank carries when each group, largest first, goes to the emptiest."""
    loads = [0.0] * ranks
    for cost in sorted(costs, reverse=True):
        loads[loads.index(min(loads))] += cost
    return max(loads)


def lognormal(count, seed, spread=0.7):
    return (torch.randn(count, generator=torch.Generator().manual_seed(seed)) * spread).exp().tolist()


def moved(costs, dealt, owners):
    """Share of the cost that lies on another rank than its owner."""
    return sum(costs[index] for rank, part in enumerate(dealt) for index in part if owners[index] != rank) / sum(costs)


@settings(deadline=None, max_examples=150)
@given(COSTS, RANKS, st.randoms(use_true_random=False), st.booleans())
def test_every_group_once_and_close_to_the_optimum(costs, ranks, random, owned):
    owners = [random.randrange(ranks) for _ in costs] if owned else None
    dealt = deal(costs, ranks, owners)
    assert len(dealt) == ranks
    assert sorted(index for part in dealt for index in part) == list(range(len(costs)))
    best = optimum(costs, ranks)
    assert most(costs, dealt) <= greedy(costs, ranks) * (1 + 1e-9)
    assert most(costs, dealt) <= best * (4 / 3 - 1 / (3 * ranks)) * (1 + 1e-9)
    if len(costs) >= ranks and all(costs):
        assert all(dealt)


def test_small_deals_are_near_the_optimum():
    over = [most(costs, deal(costs, 3)) / optimum(costs, 3) - 1 for costs in (lognormal(8, seed) for seed in range(40))]
    assert sum(excess < 1e-9 for excess in over) > 20
    assert sum(over) / len(over) < 0.02


def test_differencing_beats_greedy_where_it_must():
    costs = [8.0, 7.0, 6.0, 5.0, 4.0]  # the textbook case: greedy 17, differencing 16, optimum 15
    assert greedy(costs, 2) == 17
    assert most(costs, deal(costs, 2)) == 15


@pytest.mark.parametrize("ranks", [8, 64])
@pytest.mark.parametrize("owned", [False, True])
def test_many_groups_leave_little_idle(ranks, owned):
    costs = lognormal(ranks * 8, seed=ranks, spread=0.5)
    assert max(costs) < sum(costs) / ranks
    idle = idle_share(costs, deal(costs, ranks, [i // 8 for i in range(ranks * 8)] if owned else None))
    assert sum(idle) / ranks < 0.01


@pytest.mark.parametrize("owned", [False, True])
@pytest.mark.parametrize(("each", "seconds"), [(8, 2), (4, 10)])  # with few groups each, exchanges are hard to find
def test_deal_of_a_thousand_ranks_takes_seconds_at_most(each, seconds, owned):
    costs = [10 + value for value in lognormal(1024 * each, seed=0)]
    owners = [i // each for i in range(1024 * each)] if owned else None
    started = time.process_time()
    deal(costs, 1024, owners)
    assert time.process_time() - started < seconds


def test_deal_does_not_depend_on_hashes(python):
    code = ("import random; from veripo_fast.distributed.balance import deal; draw = random.Random(0)\n"
            "costs = [draw.choice((1.0, 2.0, draw.random())) for _ in range(200)]\n"
            "print(deal(costs, 16), deal(costs, 16, [draw.randrange(16) for _ in costs]))")
    outputs = {python("-c", code, check=True).stdout for _ in range(3)}  # hashes of texts differ between processes
    assert len(outputs) == 1 and outputs.pop().strip()


@given(st.integers(1, 6), st.integers(1, 5), st.floats(0.1, 1e15), st.randoms(use_true_random=False))
def test_equal_costs_stay_with_their_owners(ranks, each, cost, random):
    owners = [rank for rank in range(ranks) for _ in range(each)]
    random.shuffle(owners)
    assert deal([cost] * len(owners), ranks, owners) == [
        [i for i, owner in enumerate(owners) if owner == rank] for rank in range(ranks)]


def test_owners_cost_no_balance_and_save_moves():
    costs, owners = lognormal(512, seed=3), [i // 8 for i in range(512)]
    free, owned = deal(costs, 64), deal(costs, 64, owners)
    assert most(costs, owned) <= most(costs, free) * 1.005
    assert moved(costs, owned, owners) < 0.5 < 0.9 < moved(costs, free, owners)


def test_sets_go_where_most_of_them_lies():
    costs, owners = [10.0, 1.0, 9.0, 2.0], [1, 1, 1, 0]  # one owner holds nearly all: its largest group stays
    dealt = deal(costs, 2, owners)
    assert most(costs, dealt) == 11 and moved(costs, dealt, owners) <= 0.5


def test_fewer_groups_than_ranks():
    assert deal([], 3) == [[], [], []] and deal([], 2, []) == [[], []]
    assert sorted(deal([1.0, 2.0], 4), reverse=True) == [[1], [0], [], []]
    assert deal([1.0, 2.0], 4, [3, 3])[3] and deal([0.0], 1) == [[0]]


def test_idle_share():
    assert idle_share([1.0, 2.0, 1.0], [[1], [0], [2], []]) == [0.0, 0.5, 0.5, 1.0]
    assert idle_share([], [[], []]) == [0.0, 0.0] == idle_share([0.0], [[0], []])


@pytest.mark.parametrize(("arguments", "message"), [
    (([1.0], 0), "ranks must be at least 1, got 0"),
    (([1.0, -1.0], 2), r"costs\[1\] must be finite and at least 0, got -1.0"),
    (([math.nan], 2), r"costs\[0\] must be finite"), (([math.inf], 2), r"costs\[0\] must be finite"),
    (([1.0], 2, []), "a rank for each of 1 groups, got 0"), (([1.0], 2, [2]), r"owners\[0\] must be a rank below 2"),
])
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        deal(*arguments)
