"""Runs of several ranks: forks of one warm process that meet at a free port of this machine."""

from __future__ import annotations

import signal
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.support.forks import Ended, Job, forks

QUICK = {"veripo_fast.distributed.peers:SILENT_SECONDS": 4.0, "veripo_fast.distributed.peers:GRACE_SECONDS": 2.0,
         "veripo_fast.distributed.peers:BEAT_SECONDS": 0.25}
"""Constants of a rank that soon gives others up. Load makes a rank slow, so they are no smaller."""


@dataclass
class Fault:
    """A signal for one rank, at a moment (`forks.Job.at`) or so many seconds after the start."""

    rank: int
    at: str = ""
    send: int = signal.SIGKILL
    after: float | None = None


@dataclass
class Rank:
    """What is different about one rank."""

    arguments: Sequence[object] | None = None
    """Instead of those of all."""
    environment: Mapping[str, str] = field(default_factory=dict)
    without: str = ""
    """A variable that it has not."""
    limits: Mapping[str, int] = field(default_factory=dict)


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def run(size: int, *arguments: object, faults: Sequence[Fault] = (), ranks: Mapping[int, Rank] | None = None,
        constants: Mapping[str, Any] | None = None) -> list[Ended]:
    """Run a command of `veripo` on ranks until all are gone.

    Args:
        faults: at most one per rank.
        ranks: what is different about some.
        constants: `module:NAME` -> value.
    """
    port = free_port()
    by_rank = {fault.rank: fault for fault in faults}
    jobs = []
    for number in range(size):
        rank = (ranks or {}).get(number, Rank())
        fault = by_rank.get(number, Fault(number))
        environment = {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(size),
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **rank.environment}
        environment.pop(rank.without, None)
        own = arguments if rank.arguments is None else rank.arguments
        jobs.append(Job(list(map(str, own)), fault.at, fault.send, fault.after, dict(rank.limits), environment,
                        dict(QUICK if constants is None else constants)))
    return forks().run_together(jobs)


def said(ended: Ended) -> list[str]:
    """The lines of a rank that are ours; progress bars and what torchrun or gloo say are not."""
    return [line for line in ended.output.replace("\r", "\n").splitlines() if line.startswith("veripo: ")]


def codes(ended: Sequence[Ended]) -> list[int]:
    """How each rank ended."""
    return [one.code for one in ended]
