"""The whole hand-over of weights from a policy that many ranks share to the engines that they share.

Ranks of a process group have one GPU each, on which the trainer holds its part of the policy and an engine its share.
`tp` neighbours form an engine. Every method is called by all ranks together.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from veripo_fast.errors import ConfigError, TrainingError
from veripo_fast.text import memory
from veripo_fast.weights.alias import Aliasing, sorted_out
from veripo_fast.weights.exchange import Exchange, Held
from veripo_fast.weights.layouts import Geometry, stored
from veripo_fast.weights.parts import Range, Shape, SliceCopy
from veripo_fast.weights.pattern import PatternHeld, pattern
from veripo_fast.weights.plan import by_source, plan
from veripo_fast.weights.reshard import Message, Traffic, reshard, traffic
from veripo_fast.weights.rounds import rounds_of
from veripo_fast.weights.sync import Named, Reload, SyncReport, plain_copy_seconds_per_byte
from veripo_fast.weights.transfer import BUCKET_BYTES

_MESSAGES_PER_BUCKET = 8
"""A bucket holds at least so many messages: the smaller they are, the less of it stays empty."""


@dataclass(frozen=True)
class ShardedReport(SyncReport):
    """What one hand-over wrote on this rank, and what it moved between all of them. Printed, it is one line."""

    between_ranks: int
    """Bytes that all ranks together received, in the engine's dtype."""
    full_gather: int
    """Bytes that they would have received, in the trainer's dtype, to have the same parameters whole."""

    def __str__(self) -> str:
        return (f"{super().__str__()}; {memory(self.between_ranks)} between the ranks, where whole parameters would be "
                f"{memory(self.full_gather)}")


@dataclass(frozen=True)
class _Ours:
    """What a rank tells the others. `common` has to be equal on all of them."""

    ranges: dict[str, Range]
    itemsizes: dict[str, int]
    targets: dict[str, Shape]
    common: dict[str, object]


class ShardedSync:
    """Keeps the engines of all ranks equal to the policy; see `WeightSync` for one rank that has all of it."""

    def __init__(self, shapes: Mapping[str, Shape], held: Callable[[], Held], engine: Named, geometry: Geometry, *,
                 trained: Collection[str], tower: bool = True, tp: int = 1, ranks_per_node: int | None = None,
                 bucket_bytes: int = BUCKET_BYTES) -> None:
        """
        Args:
            shapes: of the policy's whole parameters, by Hugging Face name; the same on every rank, as all other
                arguments but `held` and `engine`.
            held: gives what this rank holds now; asked again in each sync, because memory may move. Which elements
                they are stays as it is.
            engine: `named_parameters()` of the engine on this rank.
            trained: names of the parameters that change; others are sent once.
            tower: whether the engine has the vision tower.
            tp: ranks that form an engine. ranks_per_node: None where all are on one node.
            bucket_bytes: most that a rank sends, and that it receives, at a time.

        Raises:
            ConfigError: the plan does not fill the engines, no rank holds what one wants, or ranks were given
                different things; on every rank.
        """
        self.shapes, self.held, self.targets, self.trained = dict(shapes), held, dict(engine), frozenset(trained)
        self.rank, size, self.geometry = dist.get_rank(), dist.get_world_size(), geometry
        if size % tp:
            raise ConfigError(f"{size} ranks cannot form engines of {tp} tensor-parallel ranks each")
        common = {"shapes": self.shapes, "trained names": sorted(trained), "geometry": geometry, "tower": tower,
                  "tensor-parallel size": tp, "ranks per node": ranks_per_node, "bucket size": bucket_bytes,
                  "dtypes of the engine": {name: str(tensor.dtype) for name, tensor in self.targets.items()}}
        everyone = _everyone(self._ours(common))
        wanted = [plan(self.shapes, ours.targets, geometry, tp=tp, rank=rank % tp, tower=tower)
                  for rank, ours in enumerate(everyone)]
        self.copies = wanted[self.rank]
        self.device = _device(self.copies, self.targets)
        self.dtypes = {copy.source.name: self.targets[copy.target.name].dtype for copies in wanted for copy in copies}
        most = max(1, bucket_bytes // max((dtype.itemsize for dtype in self.dtypes.values()), default=1))
        messages = reshard([ours.ranges for ours in everyone], wanted, self.shapes,
                           most=max(1, most // _MESSAGES_PER_BUCKET), ranks_per_node=ranks_per_node or size)
        changing = [message for message in messages if message.source.name in self.trained]
        self._ranges = {name: span for name, span in everyone[self.rank].ranges.items() if name in self.dtypes}
        self._everything, self._changing = (self._exchanges(part, most, size) for part in (messages, changing))
        self.traffic, self.changing_traffic = (self._traffic(part, everyone) for part in (messages, changing))
        self.version: int | None = None
        self._plain_seconds_per_byte = 0.0

    def start(self, version: int) -> tuple[Aliasing, ShardedReport]:
        """The first hand-over. Nothing is a view: a shard is no part of an engine that is contiguous."""
        self._plain_seconds_per_byte = plain_copy_seconds_per_byte(_written(self._everything),
                                                                   self.targets[self.copies[0].target.name])
        return sorted_out(self.copies, self.shapes), self.sync(version, everything=True)

    def sync(self, version: int, *, everything: bool = False) -> ShardedReport:
        """Hand over the weights of a policy version. The engine's caches are the caller's to reset.

        Args:
            everything: also what did not change, for an engine whose weights were freed; the same on every rank.

        Raises:
            TrainingError: an engine does not hold what was sent; on every rank.
        """
        everything = everything or self.version is None
        exchanges = self._everything if everything else self._changing
        counted = self.traffic if everything else self.changing_traffic
        started = time.perf_counter()
        for exchange in exchanges:
            exchange.send(self.held())
        seconds = time.perf_counter() - started
        self.version = version
        written = _written(exchanges)
        plain = written * self._plain_seconds_per_byte
        return ShardedReport(version, written, seconds, seconds / plain if plain else None,
                             sum(counted.received), sum(counted.gathered))

    @torch.no_grad()
    def self_test(self, reload: Reload) -> None:
        """Send a pattern by the plan, then give it to the engine's own loader, and compare every element's bits.

        The loader gets whole parameters, one at a time. The engine's weights are as before when it ends, however it
        ends. Host memory: a copy of them.

        Raises:
            TrainingError: an engine does not hold the pattern after one of the two, or the loader has moved a parameter
                to other memory; names the parameter, on every rank.
        """
        places = {name: tensor.data_ptr() for name, tensor in self.targets.items()}
        before = {name: tensor.detach().to("cpu", copy=True) for name, tensor in self.targets.items()}
        try:
            for exchange in self._everything:
                exchange.send(PatternHeld(self._ranges, self.dtypes, self.device))
            _agree(self._difference("the plan"))
            reload((name, stored(name, self._pattern(name), self.geometry.family)) for name in by_source(self.copies))
            _agree(self._moved(places) or self._difference("the engine's reload"))
        finally:
            for name, values in before.items():
                self.targets[name].copy_(values)

    # -- the plan -----------------------------------------------------------------------------------------------------

    def _ours(self, common: dict[str, object]) -> _Ours:
        held = self.held()
        ranges = {name: (start, start + elements.numel()) for name, (start, elements) in held.items()}
        return _Ours(ranges, {name: elements.element_size() for name, (_, elements) in held.items()},
                     {name: tuple(tensor.shape) for name, tensor in self.targets.items()}, common)

    def _exchanges(self, messages: Sequence[Message], most: int, size: int) -> list[Exchange]:
        """One for each dtype that the engine has, in an order that is the same on all ranks."""
        exchanges = []
        for dtype, own in self._by_dtype(messages).items():
            rounds = rounds_of(own, self.rank, size=size, most=most)
            exchanges.append(Exchange(rounds, self.targets, dtype=dtype, device=self.device))
        return exchanges

    def _by_dtype(self, messages: Sequence[Message]) -> dict[torch.dtype, list[Message]]:
        """The messages to parameters of each dtype, some of which may be none."""
        parts: dict[torch.dtype, list[Message]] = {dtype: [] for dtype in sorted(set(self.dtypes.values()), key=str)}
        for message in messages:
            parts[self.dtypes[message.source.name]].append(message)
        return parts

    def _traffic(self, messages: Sequence[Message], everyone: Sequence[_Ours]) -> Traffic:
        itemsizes: dict[str, int] = {}
        for ours in everyone:
            itemsizes |= ours.itemsizes
        counted = [traffic(own, [ours.ranges for ours in everyone], self.shapes, itemsize=dtype.itemsize,
                           trainer_itemsizes=itemsizes) for dtype, own in self._by_dtype(messages).items()]
        return Traffic(*(tuple(map(sum, zip(*parts, strict=True))) for parts in (
            [part.sent for part in counted], [part.received for part in counted],
            [part.gathered for part in counted])))

    # -- the self-test ------------------------------------------------------------------------------------------------

    def _pattern(self, name: str) -> torch.Tensor:
        shape = self.shapes[name]
        return pattern(name, 0, torch.Size(shape).numel(), self.dtypes[name], self.device).view(shape)

    def _moved(self, places: Mapping[str, int]) -> str:
        for copy in self.copies:
            if self.targets[copy.target.name].data_ptr() != places[copy.target.name]:
                return f"the engine's reload has moved {copy.target.name} to other memory, where no sync reaches"
        return ""

    def _difference(self, writer: str) -> str:
        """What is wrong where an engine parameter is not the pattern, in its bits; empty where all are."""
        for name, own in by_source(self.copies).items():
            whole = self._pattern(name).view(-1)
            for copy in own:
                source, target = copy.source, copy.target
                expected = whole.as_strided(source.shape, (source.width, 1), source.offset)
                tensor = self.targets[target.name].detach()
                found = tensor.as_strided(target.shape, (target.width, 1), tensor.storage_offset() + target.offset)
                if not torch.equal(found.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8)):
                    return f"{target.name}: {writer} writes other weights than those of {name}"
        return ""


def _device(copies: Sequence[SliceCopy], targets: Mapping[str, torch.Tensor]) -> torch.device:
    """The one device of what is written."""
    devices = {targets[copy.target.name].device for copy in copies}
    if len(devices) != 1:
        raise ConfigError(f"the engine's parameters must be on one device, got {', '.join(sorted(map(str, devices)))}")
    return devices.pop()


def _written(exchanges: Sequence[Exchange]) -> int:
    """Bytes that they write on this rank."""
    return sum(exchange.written_bytes for exchange in exchanges)


def _everyone(ours: _Ours) -> list[_Ours]:
    """What every rank has to say.

    Raises:
        ConfigError: they disagree about what has to be equal.
    """
    everyone: list[_Ours] = [ours] * dist.get_world_size()
    dist.all_gather_object(everyone, ours)
    for rank, other in enumerate(everyone):
        for what, value in other.common.items():
            if value != everyone[0].common[what]:
                raise ConfigError(f"rank {rank} was given other {what} than rank 0")
    return everyone


def _agree(fault: str) -> None:
    """Raise on all ranks when one has found a fault."""
    faults = [""] * dist.get_world_size()
    dist.all_gather_object(faults, fault)
    for rank, text in enumerate(faults):
        if text:
            raise TrainingError(f"rank {rank}: {text}")
