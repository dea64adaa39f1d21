"""Who sends what: against the full copy, over ranks that are simulated one after the other, and counted."""

from __future__ import annotations

import collections
import dataclasses
import itertools

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from tests.support import policies
from tests.support.engine_weights import Sizes, Weights, engine_weights, policy_weights
from tests.support.sharding import KINDS, held_by, ranges_of, sizes_for
from tests.weights.test_plan import geometry_of, shapes_of
from tests.weights.test_transfer import unequal
from veripo_fast.errors import ConfigError
from veripo_fast.weights.exchange import Held, copy_local, pack, repeat, unpack
from veripo_fast.weights.parts import Part, SliceCopy
from veripo_fast.weights.plan import plan
from veripo_fast.weights.reshard import Message, Traffic, reshard, traffic
from veripo_fast.weights.rounds import rounds_of

SETTINGS = list(itertools.product(policies.FAMILIES, (True, False), (True, False)))
"""Family, tied, whether the engine has the tower."""


class World:
    """Ranks of one process: what each holds, the messages, and engines full of zeros."""

    def __init__(self, sizes: Sizes, kind: str, size: int, tp: int, *, tower: bool = True, most: int = 500,
                 ranks_per_node: int = 8) -> None:
        self.size, self.tp, self.tower, self.most, self.sizes = size, tp, tower, most, sizes
        self.weights = policy_weights(sizes)
        self.shapes = shapes_of(self.weights)
        self.held: list[Held] = [held_by(kind, self.weights, size, rank) for rank in range(size)]
        self.expected = [self._expected(rank) for rank in range(tp)]
        plans = [plan(self.shapes, shapes_of(engine), geometry_of(sizes), tp=tp, rank=rank, tower=tower)
                 for rank, engine in enumerate(self.expected)]
        self.wanted = [plans[rank % tp] for rank in range(size)]
        self.ranges = [ranges_of(held) for held in self.held]
        self.messages = reshard(self.ranges, self.wanted, self.shapes, most=most, ranks_per_node=ranks_per_node)

    def _expected(self, rank: int) -> Weights:
        engine = engine_weights(self.weights, self.sizes, self.tp, rank)
        return {name: tensor.bfloat16() for name, tensor in engine.items()
                if self.tower or not name.startswith("visual.")}

    def deliver(self, rank: int) -> Weights:
        """What the engine of a rank holds after all messages to it."""
        engine = {name: torch.zeros_like(tensor) for name, tensor in self.expected[rank % self.tp].items()}
        pairs: dict[int, list[Message]] = collections.defaultdict(list)
        for message in self.messages:
            if message.receiver == rank:
                pairs[message.sender].append(message)
        for sender, messages in pairs.items():
            if sender == rank:
                sent, there = copy_local(messages, self.held[rank], engine)
            else:
                region = torch.empty(sum(message.source.numel for message in messages), dtype=torch.bfloat16)
                sent = pack(messages, self.held[sender], region)
                there = unpack(messages, region, engine)
            assert sent == there
        return engine

    def traffic(self, trainer_itemsize: int = 4) -> Traffic:
        return traffic(self.messages, self.ranges, self.shapes, itemsize=2,
                       trainer_itemsizes=dict.fromkeys(self.shapes, trainer_itemsize))


def check(world: World) -> None:
    """Every engine is the full copy, bit by bit; nothing goes twice to a rank, and nothing that it has."""
    for rank in range(world.size):
        assert unequal(world.deliver(rank), world.expected[rank % world.tp]) == []
    seen = {name: torch.zeros(world.size, tensor.numel(), dtype=torch.uint8) for name, tensor in world.weights.items()}
    for message in world.messages:
        if message.sender != message.receiver:
            source = message.source
            row = seen[source.name][message.receiver]
            row.as_strided(source.shape, (source.width, 1), row.storage_offset() + source.offset).add_(1)
    for name, counts in seen.items():
        for rank, held in enumerate(world.ranges):
            start, stop = held[name]
            assert counts[rank].max() <= 1 and not counts[rank, start:stop].any()


@pytest.mark.parametrize("tp", range(1, 9))
@pytest.mark.parametrize("data", range(1, 9))
def test_every_engine_is_the_full_copy(data: int, tp: int) -> None:
    """Replicas x tensor-parallel size; family, tied head and tower take turns, and beyond 16 ranks FSDP2 and ZeRO-3."""
    for number, kind in enumerate(KINDS if data * tp <= 16 else [KINDS[(data + tp) % 2]]):
        family, tied, tower = SETTINGS[(data + 3 * tp + 5 * number) % len(SETTINGS)]
        check(World(sizes_for(tp, family, tied), kind, data * tp, tp, tower=tower))


@pytest.mark.parametrize(("family", "tied", "tower"), SETTINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_all_families_tied_or_not_with_a_tower_or_without(kind: str, family: str, tied: bool, tower: bool) -> None:
    for data, tp in ((2, 1), (2, 2), (1, 3), (2, 4)):
        check(World(sizes_for(tp, family, tied), kind, data * tp, tp, tower=tower))


@pytest.mark.parametrize("most", [1, 7, 10_000])
@pytest.mark.parametrize("kind", ["rows", "flat"])
def test_messages_of_any_size(kind: str, most: int) -> None:
    """Of one element, of pieces of a row, of whole parameters."""
    world = World(dataclasses.replace(sizes_for(2), vocabulary=40, tower_hidden=4), kind, 4, 2, most=most)
    assert max(message.source.numel for message in world.messages) <= most
    check(world)


# -- rounds -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("data", "tp"), [(1, 1), (8, 1), (2, 4), (1, 8), (3, 2)])
@pytest.mark.parametrize("kind", KINDS)
def test_both_ends_of_a_round_agree_and_buffers_are_bounded(kind: str, data: int, tp: int) -> None:
    world = World(sizes_for(tp), kind, data * tp, tp, most=125)
    ranks = [rounds_of(world.messages, rank, size=world.size, most=1000) for rank in range(world.size)]
    assert len({len(rounds) for rounds in ranks}) == 1
    count = 0
    for parts in zip(*ranks, strict=True):
        for rank, part in enumerate(parts):
            for peer, messages in part.outgoing.items():
                assert parts[peer].incoming[rank] == messages
            assert sum(len(part.outgoing) for part in parts) == sum(len(part.incoming) for part in parts)
            for side in (part.outgoing, part.incoming):
                assert sum(message.source.numel for own in side.values() for message in own) <= 1000
            count += len(part.arriving)
    assert count == len(world.messages)


def test_rounds_are_nearly_full() -> None:
    """At most an eighth more of them than the busiest rank needs, and one."""
    world = World(sizes_for(4), "rows", 8, 4, most=32)
    busiest = max(*world.traffic().sent, *world.traffic().received) / 2
    assert len(rounds_of(world.messages, 0, size=8, most=256)) <= 1.125 * busiest / 256 + 1


# -- what is counted --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("family", policies.FAMILIES)
@pytest.mark.parametrize("kind", ["rows", "flat"])
def test_eight_ranks_to_engines_of_four_move_a_third_of_the_full_gather(kind: str, family: str) -> None:
    """Whatever the trainer's dtype: 0.14 of it in float32, 0.28 in bfloat16."""
    sizes = dataclasses.replace(sizes_for(4, family), hidden=64, intermediate=160, heads=8, kv_heads=4, head_dim=8,
                                vocabulary=1000, layers=2)
    world = World(sizes, kind, 8, 4, tower=False)
    count = sum(tensor.numel() for name, tensor in world.weights.items() if ".visual." not in name)
    assert sum(world.traffic().gathered) == 4 * 7 * count  # each rank receives the seven eighths that it lacks
    assert 0.1 < world.traffic(4).ratio < 1 / 6 and 0.2 < world.traffic(2).ratio < 1 / 3


def test_what_every_rank_has_moves_nowhere() -> None:
    counted = World(sizes_for(4), "whole", 8, 4).traffic()
    assert sum(counted.sent) == sum(counted.received) == sum(counted.gathered) == 0 and counted.ratio is None


def test_nothing_leaves_a_node_that_has_everything() -> None:
    world = World(sizes_for(2), "two_nodes", 8, 2, ranks_per_node=4)
    assert {message.sender // 4 == message.receiver // 4 for message in world.messages} == {True}


def test_holders_share_the_load() -> None:
    """Two ranks of eight have everything: each sends half, to engines of one rank."""
    shapes = {"w": (1000, 3)}
    holdings = [{"w": (0, 3000)} if rank < 2 else {} for rank in range(8)]
    copies = [SliceCopy(Part("w", (0, 1000), (0, 3), 3), Part("t", (0, 1000), (0, 3), 3))]
    messages = reshard(holdings, [copies] * 8, shapes, most=90, ranks_per_node=8)
    sent = traffic(messages, holdings, shapes, itemsize=2, trainer_itemsizes={"w": 4}).sent
    assert sum(sent) == 6 * 6000 and max(sent) - min(sent[:2]) <= 180 and sent[2:] == (0,) * 6


# -- what no engine of today asks for ---------------------------------------------------------------------------------

@st.composite
def overlapping(draw) -> tuple[list[SliceCopy], int, int]:
    """Copies of rectangles that may share elements, rows and columns of the source."""
    rows, width = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    copies, top = [], 0
    for _ in range(draw(st.integers(0, 4))):
        first, left = draw(st.integers(0, rows - 1)), draw(st.integers(0, width - 1))
        last, right = draw(st.integers(first + 1, rows)), draw(st.integers(left + 1, width))
        source = Part("w", (first, last), (left, right), width)
        copies.append(SliceCopy(source, Part("t", (top, top + last - first), (0, right - left), width)))
        top += last - first
    return copies, rows, width


@hypothesis.settings(deadline=None, max_examples=200)
@hypothesis.given(overlapping(), st.integers(1, 5), st.integers(1, 20))
def test_what_an_engine_has_twice_is_sent_once(case: tuple[list[SliceCopy], int, int], size: int, most: int) -> None:
    copies, rows, width = case
    whole = torch.arange(1.0, rows * width + 1)
    held = [held_by("flat", {"w": whole}, size, rank) for rank in range(size)]
    messages = reshard([ranges_of(part) for part in held], [copies] + [[]] * (size - 1), {"w": (rows, width)},
                       most=most, ranks_per_node=1)
    expected = {"t": torch.zeros(40, width)}
    for copy in copies:
        part, shape = copy.target, copy.source.shape
        expected["t"].as_strided(shape, (width, 1), part.offset).copy_(
            whole.as_strided(shape, (width, 1), copy.source.offset))
    engine, seen = {"t": torch.zeros(40, width)}, []
    for message in messages:
        region = torch.empty(message.source.numel)
        pack([message], held[message.sender], region)
        seen += region.tolist()
        unpack([message], region, engine)
        repeat([message], engine)
    assert torch.equal(engine["t"], expected["t"]) and len(seen) == len(set(seen))


# -- what is refused --------------------------------------------------------------------------------------------------

def refused(changes: list[dict]) -> str:
    """What is said when two ranks hold rows of a parameter of 4 x 3 elements, but for some changes."""
    copies = [SliceCopy(Part("w", (1, 4), (0, 2), 3), Part("t", (0, 3), (0, 2), 2))]
    holdings = [{"w": (0, 6)} | changes[0], {"w": (6, 12)} | changes[1]]
    with pytest.raises(ConfigError) as caught:
        reshard(holdings, [copies, []], {"w": (4, 3)}, most=100, ranks_per_node=8)
    return str(caught.value)


@pytest.mark.parametrize(("changes", "sentence"), [
    ([{}, {"w": (7, 12)}], "w: the ranks hold 5 of the 6 elements that rank 0's engine has of its rows 1 to 4"),
    ([{}, {"w": (6, 6)}], "w: the ranks hold 2 of the 6 elements that rank 0's engine has of its rows 1 to 4"),
    ([{}, {"w": (6, 13)}],
     "rank 1 holds the elements 6 to 13 of w, which has 12; padding has to be left out"),
    ([{"v": (0, 1)}, {}], "rank 0 holds elements of v, which is no parameter of the policy"),
])
def test_what_is_said(changes: list[dict], sentence: str) -> None:
    assert refused(changes) == sentence
