"""Runs of several ranks: forks of one warm process that meet at a free port of this machine."""

from __future__ import annotations

import re
import signal
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file

from tests.support import runs
from tests.support.forks import Ended, Job, forks
from tests.support.run_compare import records, written
from veripo_fast.run.folder import RunDir
from veripo_fast.run.metrics import read_records

QUICK = {"veripo_fast.distributed.peers:SILENT_SECONDS": 4.0, "veripo_fast.distributed.peers:GRACE_SECONDS": 2.0,
         "veripo_fast.distributed.peers:BEAT_SECONDS": 0.25}
"""Constants of a rank that soon gives others up. Load makes a rank slow, so they are no smaller."""

ROUNDED = {"loss", "parity_max", "idle_share", "ratio_max"}
"""Metrics that are sums of what cancels, or depend on who did what."""

DIFFERENCES = {"margin", "chosen_drift"}
"""Metrics that are differences of log-probs, so their rounding is that of the log-probs."""


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
    folder: Path | str = ""
    constants: Mapping[str, Any] = field(default_factory=dict)
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
                        str(rank.folder), QUICK | dict(constants or {}) | dict(rank.constants)))
    return forks().run_together(jobs)


def said(ended: Ended) -> list[str]:
    """What a rank says in our name, behind a progress bar too; what torchrun or gloo say is not ours."""
    return re.findall("veripo: .*", ended.output)


def codes(ended: Sequence[Ended]) -> list[int]:
    """How each rank ended."""
    return [one.code for one in ended]


@cache
def whole(size: int) -> Path:
    """The run folder of `runs.config`, trained without a fault."""
    with runs.made_once(f"whole-{size}") as (path, new):
        if new:
            path.mkdir()
            ended = train(size, written(runs.config(path / "run"), path))
            assert codes(ended) == [0] * size, ended
    return path / "run"


def train(size: int, config: Path, *arguments: object, **options: Any) -> list[Ended]:
    """`veripo train` on ranks, on one as a process alone."""
    if size == 1:
        return [forks().run("train", "--config", config, *arguments)]
    return run(size, "train", "--config", config, *arguments, **options)


def assert_close(run_folder: Path, other_folder: Path) -> None:
    """The same run up to rounding: equal tokens, rewards and evaluations, metrics to 1e-4, weights to 1e-6 on average.

    AdamW divides a gradient by its own size. So a weight whose gradient is rounding moves by a part of the learning
    rate, 1e-3 in `runs.config`: single weights are allowed half of it (2.1e-4 was seen, and means of 2e-8).
    """
    one, other = RunDir(run_folder), RunDir(other_folder)
    ours, theirs = records(one.metrics), records(other.metrics)
    assert len(ours) == len(theirs)
    for row, expected in zip(ours, theirs, strict=True):
        tied = abs(expected.get("margin", 1.0)) < 1e-6  # policy and reference are one: which pair is right is rounding
        for name in expected.keys() - ROUNDED - ({"preference_accuracy"} if tied else set()):
            value = expected[name]
            if isinstance(value, float):
                value = pytest.approx(value, rel=1e-4, abs=1e-5 if name in DIFFERENCES else 1e-6)
            assert row[name] == value, name
    scores = [[{name: value for name, value in row.items() if name != "seconds"} for row in read_records(run.evals)]
              for run in (one, other)]
    assert scores[0] == scores[1]
    for path in sorted((other.root / "rollouts").rglob("*.parquet")):
        columns = [pq.read_table(run.root / path.relative_to(other.root)).to_pydict() for run in (one, other)]
        for name in columns[0].keys() - {"rollout_logprobs"}:
            assert columns[0][name] == columns[1][name], (path, name)
    ends = [load_file(run.checkpoints / (run.checkpoints / "latest").read_text().strip() / "model.safetensors")
            for run in (one, other)]
    assert ends[0].keys() == ends[1].keys()
    apart = [(ends[0][name] - ends[1][name]).abs() for name in ends[0]]
    assert max(float(values.max()) for values in apart) < 5e-4
    assert max(float(values.mean()) for values in apart) < 1e-6
