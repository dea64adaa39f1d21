"""`pytest bench --benchmark-only` against a stored run: a planted slow-down fails and is named, nothing else is.

Two sessions of pytest on a loaded machine may differ by more than the planted factor, so a pair of them that shows
something else is measured again. A comparison that never fails, or always, is not helped by that.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import pytest

from bench.kernels.peers import PEERS
from tests.support.children import run
from tests.support.paths import PYTHONPATH, REPOSITORY

pytest.importorskip("pytest_benchmark")

SLOWED = "gather_logprobs-16x1x9496-veripo"
PLUGIN = """
import time
from dataclasses import replace
from bench.kernels import peers

def slower(run):
    def wrapped(case):
        started = time.perf_counter()
        result = run(case)
        end = started + 1.5 * (time.perf_counter() - started)
        while time.perf_counter() < end:
            pass
        return result
    return wrapped

ways = peers.PEERS["gather_logprobs"]
ways[peers.OURS] = replace(ways[peers.OURS], run=slower(ways[peers.OURS].run))
"""
"""Takes 1.5 times as long for the same result."""
ATTEMPTS = 6


def bench(storage: Path, *arguments: str, folder: Path | None = None) -> tuple[int, str]:
    """Exit code and output of a session that times `gather_logprobs` by us and by plain torch."""
    path = os.pathsep.join([PYTHONPATH, *([str(folder)] if folder else [])])
    outer = os.environ.get("PYTHONPATH")
    environment = {key: value for key, value in os.environ.items()
                   if key != "TRITON_INTERPRET" and not key.startswith("PYTEST_")}
    done = run(sys.executable, "-m", "pytest", "bench", "-p", "no:cacheprovider", "-p", "no:xdist", "--benchmark-only",
               "--divisor=16", "-k", "gather_logprobs-16 and (veripo or naive)", f"--benchmark-storage={storage}",
               "--benchmark-max-time=0.5", "--benchmark-min-rounds=50", *arguments, cwd=REPOSITORY,
               env={**environment, "PYTHONPATH": os.pathsep.join(filter(None, [path, outer]))})
    return done.returncode, done.stdout + done.stderr


def regressions(output: str) -> list[str]:
    return re.findall(r"test_op\[([^\]]+)\] \(\S+\) - Field 'min' has failed", output)


def test_a_planted_slow_down_fails_and_is_named(tmp_path):
    (tmp_path / "slowed.py").write_text(PLUGIN)
    seen = []
    for attempt in range(ATTEMPTS):
        storage = tmp_path / str(attempt)
        code, output = bench(storage, "--benchmark-save=before")
        assert code == 0 and "2 passed" in output, output
        stored, = storage.glob("*/0001_before.json")
        code, output = bench(storage, "--benchmark-compare", "--benchmark-compare-fail=min:25%", "-p", "slowed",
                             folder=tmp_path)
        seen.append((code, regressions(output)))
        assert ("Performance has regressed" in output) is bool(seen[-1][1]) is (code != 0), output
        if seen[-1][1] == [SLOWED]:
            break
    else:
        pytest.fail(f"no comparison named {SLOWED} alone: {seen}")
    times = {row["extra_info"]["peer"]: row for row in json.loads(stored.read_text())["benchmarks"]}
    assert set(times) == {"veripo", "naive torch"}
    assert {row["group"] for row in times.values()} == {"gather_logprobs T=16 D=1 V=9496"}
    assert all({"op", "peer_version", "dtype", "device", "versions", "commit"} <= row["extra_info"].keys()
               for row in times.values())


def test_every_op_and_peer_of_the_bench_is_there():
    """One table of cases: what `veripo bench kernels` compares is what is collected, by name."""
    path = os.pathsep.join(filter(None, [PYTHONPATH, os.environ.get("PYTHONPATH")]))
    done = run(sys.executable, "-m", "pytest", "bench", "--collect-only", "-q", "-o", "addopts=",
               "-p", "no:cacheprovider", cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, done.stdout + done.stderr
    collected = re.findall(r"test_speed\.py::test_op\[(\w+)-[\dx]+-([^\]]+)\]", done.stdout)
    assert set(collected) == {(op, peer) for op, ways in PEERS.items() for peer in ways}
