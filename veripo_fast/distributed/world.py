"""The ranks of a run, one process per device as torchrun starts them; one process alone is a world of its own.

Whatever ranks say to each other that is not a gradient or a weight goes through `World`, over the CPU. Its methods are
collective, `doing`, `part` and `move` excepted: every rank has to call them, in the same order.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, TypeVar, cast

from veripo_fast.distributed.peers import Peers, limited
from veripo_fast.errors import ConfigError, PeerFailed, UserError

Value = TypeVar("Value")
MEET_SECONDS = 300.0
"""How long ranks wait for each other when they start; a rank that died before it came is missed then."""


@dataclass
class Watch:
    """Who wants to know how long a rank waits for others."""

    around: Callable[[], AbstractContextManager[None]] | None = None
    """Makes the block that every exchange of several ranks runs in."""

    def exchange(self) -> AbstractContextManager[None]:
        """The block of one exchange."""
        return nullcontext() if self.around is None else self.around()


@dataclass(frozen=True)
class World:
    """Ranks 0 to `size` - 1."""

    rank: int = 0
    size: int = 1
    peers: Peers | None = None
    """Watches the other ranks; None in a world of one."""
    group: Any = None
    """torch.distributed's group; None: the one of all ranks."""
    watch: Watch = field(default_factory=Watch, compare=False)

    @property
    def main(self) -> bool:
        """Whether this rank owns the run folder and speaks for all."""
        return self.rank == 0

    def doing(self, what: str) -> None:
        """Note what this rank does, for the sentence that ends it when another one is lost."""
        if self.peers is not None:
            self.peers.doing = what

    def begun(self) -> None:
        """Note that the run has begun, once all ranks have got this far. Collective."""
        self.barrier()
        if self.peers is not None:
            self.peers.begun = True

    def part(self) -> None:
        """Stop watching the others: all ranks know that they end here, and each does so alone."""
        if self.peers is not None:
            self.peers.part()

    def leave(self) -> None:
        """Part once all have come so far: the store may end with the first rank that leaves. Collective."""
        if self.peers is not None and not self.peers.parted:
            self.barrier()
            self.part()

    def apart(self) -> World:
        """The same ranks in a group of its own, for a thread that talks to its likes beside the main one."""
        if self.size == 1:
            return self
        import torch.distributed as dist

        return replace(self, group=dist.new_group(backend="gloo"))

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.gather(None)

    def gather(self, value: Value) -> list[Value]:
        """The value of every rank, on every rank; anything that can be pickled."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        with self.watch.exchange():
            dist.all_gather_object(values, value, group=self.group)
        return values

    def broadcast(self, value: Value) -> Value:
        """Rank 0's value."""
        if self.size == 1:
            return value
        import torch.distributed as dist

        values = [value]
        with self.watch.exchange():
            dist.broadcast_object_list(values, src=0, group=self.group)
        return values[0]

    def move(self, value: Value | None, source: int, target: int) -> Value | None:
        """Hand a value from rank to rank; the target gets it, all others None. Only these two need to call it."""
        if source == target or self.rank not in (source, target):
            return None
        import torch.distributed as dist

        values: list[Any] = [value]
        with self.watch.exchange():
            if self.rank == source:
                dist.send_object_list(values, dst=target)
                return None
            dist.recv_object_list(values, src=source)
        return values[0]

    def total(self, values: Sequence[float]) -> list[float]:
        """Each number summed over the ranks, in float64: the same bits on every rank."""
        if self.size == 1:
            return list(values)
        return [sum(column) for column in zip(*self.gather(list(values)), strict=True)]

    def most(self, value: float) -> float:
        """The largest of the ranks' numbers."""
        return max(self.gather(value))

    def agreed(self, work: Callable[[], Value]) -> Value:
        """Do something on every rank that any of them may be unable to do.

        Raises:
            UserError: of the first rank that failed, there; PeerFailed on all others, which stay silent.
        """
        failure: UserError | None = None
        try:
            value = work()
        except UserError as error:
            if self.size == 1:
                raise
            failure = error
        failed = [rank for rank, bad in enumerate(self.gather(failure is not None)) if bad]
        if failed:
            self.part()
        if failure is not None and failed[0] == self.rank:
            raise failure
        if failed:
            raise PeerFailed(f"rank {failed[0]} failed")
        return value

    def on_main(self, work: Callable[[], Value]) -> Value:
        """Do something on rank 0, and give its result to all. Raises as `agreed`."""
        value = self.agreed(lambda: work() if self.main else None)
        return cast(Value, self.broadcast(value))

    def same(self, what: str, digest: str, remedy: str) -> None:
        """Compare what has to be equal on all ranks.

        Raises:
            ConfigError: it is not; names the ranks, on the first of them.
        """
        digests = self.gather(digest)
        others = [str(rank) for rank, other in enumerate(digests) if other != digests[0]]
        if others:
            plural = "s" if len(others) > 1 else ""
            self.agreed(lambda: self._complain(f"rank{plural} {', '.join(others)} started with {what} other than rank "
                                               f"0's; {remedy}"))

    def _complain(self, sentence: str) -> None:
        if self.main:
            raise ConfigError(sentence)


ONE = World()
"""A process alone."""


_joined: list[World] = []
"""The world of this process while it is in a block of `joined`."""


def started_by_torchrun() -> bool:
    """Whether the environment names several ranks."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


@contextmanager
def joined(timeout_seconds: float, device: str = "auto") -> Iterator[World]:
    """The world that torchrun (or `deepspeed`, or Slurm with its variables) has set up; ended with the outermost block.

    Args:
        timeout_seconds: an exchange that takes longer has lost a rank.
        device: of the configuration; on a GPU each rank takes the one of its local number.

    Raises:
        ConfigError: the variables are incomplete, there are fewer GPUs than ranks, or the ranks cannot meet.
    """
    if _joined or not started_by_torchrun():
        yield _joined[-1] if _joined else ONE
        return
    import torch
    import torch.distributed as dist

    rank, size, local_rank = (_number(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if not rank < size:
        raise ConfigError(f"RANK is {rank}, and there are {size} ranks (WORLD_SIZE), numbered from 0")
    gpu = device != "cpu" and torch.cuda.is_available()
    if gpu:
        count = torch.cuda.device_count()
        if local_rank >= count:
            raise ConfigError(f"rank {rank} is number {local_rank} on its machine, which has {count} GPUs; start as "
                              "many processes as there are GPUs (torchrun --nproc-per-node)")
        torch.cuda.set_device(local_rank)
    patience = min(MEET_SECONDS, timeout_seconds)
    where = (f"rank {rank} of {size} could not meet the others at {os.environ.get('MASTER_ADDR', '?')}:"
             f"{os.environ.get('MASTER_PORT', '?')}")
    try:
        with limited(patience, f"{where} within {patience:g} seconds: whoever listens there does not answer"):
            store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=patience)))
            dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", store=store, rank=rank, world_size=size,
                                    timeout=timedelta(seconds=timeout_seconds))
    except (dist.DistError, ValueError, OSError) as error:
        raise ConfigError(f"{where}: {str(error).splitlines()[0]}") from error
    store.set_timeout(timedelta(seconds=timeout_seconds))
    peers = Peers(store, rank, size)
    try:
        with peers:
            world = World(rank, size, peers)
            _joined.append(world)
            yield world
            world.leave()
    finally:
        _joined.clear()
        dist.destroy_process_group()


def _number(name: str) -> int:
    text = os.environ.get(name, "")
    if not text.isdigit():
        raise ConfigError(f"WORLD_SIZE is set, as torchrun does, but {name} is {text!r}; start with torchrun, or set "
                          "RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT")
    return int(text)
