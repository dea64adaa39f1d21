"""What is free where a container has a limit, and what a phase held."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support import children
from tests.support.paths import PYTHONPATH
from veripo_fast.run.memory import free_bytes, free_host_bytes

GIB = 1 << 30
V1, V2 = "3:cpu,cpuacct:/\n4:memory:{}\n0::/\n", "0::{}\n"


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """/proc with 8 GiB available, and an empty /sys/fs/cgroup."""
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text(f"MemTotal: 16777216 kB\nMemAvailable: {8 * GIB // 1024} kB\n")
    return tmp_path


def group(machine: Path, place: str, *, version: int, limit: int | None, used: int, idle: int = 0) -> None:
    folder = machine / "cgroup" / ("memory" if version == 1 else "") / place
    folder.mkdir(parents=True, exist_ok=True)
    limit_name, used_name, idle_name = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        2: ("memory.max", "memory.current", "inactive_file")}[version]
    unlimited = "max" if version == 2 else str((1 << 63) - 4096)
    (folder / limit_name).write_text(f"{unlimited if limit is None else limit}\n")
    (folder / used_name).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 1\n{idle_name} {idle}\n")


def free(machine: Path, membership: str | None) -> int:
    if membership is not None:
        (machine / "proc" / "self" / "cgroup").write_text(membership)
    return free_host_bytes(machine / "proc", machine / "cgroup")


def test_without_groups_it_is_what_the_system_has(machine: Path) -> None:
    assert free(machine, None) == free(machine, V2.format("/user.slice")) == 8 * GIB


@pytest.mark.parametrize(("version", "membership"), [(1, V1), (2, V2)])
def test_a_limit_less_what_is_used_counts_and_idle_cache_does_not(
        machine: Path, version: int, membership: str) -> None:
    group(machine, "job", version=version, limit=4 * GIB, used=3 * GIB, idle=GIB // 2)
    assert free(machine, membership.format("/job")) == GIB + GIB // 2


@pytest.mark.parametrize(("version", "membership"), [(1, V1), (2, V2)])
def test_the_tightest_of_the_groups_around_counts(machine: Path, version: int, membership: str) -> None:
    group(machine, "pod/container", version=version, limit=None, used=GIB)
    group(machine, "pod", version=version, limit=2 * GIB, used=GIB)
    assert free(machine, membership.format("/pod/container")) == GIB


@pytest.mark.parametrize(("version", "membership"), [(1, V1), (2, V2)])
def test_a_container_that_sees_its_own_group_as_the_root(machine: Path, version: int, membership: str) -> None:
    """Docker: /proc/self/cgroup names the path on the host, and the tree begins at the container."""
    group(machine, "", version=version, limit=3 * GIB, used=GIB)
    assert free(machine, membership.format("/docker/0123abc")) == 2 * GIB


def test_a_full_group_has_nothing_left(machine: Path) -> None:
    group(machine, "job", version=2, limit=GIB, used=2 * GIB)
    assert free(machine, V2.format("/job")) == 0


def test_here() -> None:
    assert 0 < free_bytes(torch.device("cpu")) <= 1 << 50


FREED = """
import torch
from veripo_fast.run.memory import HighWater

def hold(mib):
    blocks = [torch.ones(1 << 18) for _ in range(mib)]
    assert len(blocks) == mib

high_water = HighWater(torch.device("cpu"))
for name, mib in (("small", 1), ("large", 200), ("small", 1)):
    with high_water.phase(name):
        hold(mib)
    print(high_water.latest[name], high_water.peaks[name])
"""


def test_a_phase_is_not_charged_with_what_was_freed_before_it() -> None:
    """Blocks below 32 MiB stay with glibc when they are freed, until they are given back. In a process of its own: what
    other tests have freed would be used again."""
    done = children.run(sys.executable, "-c", FREED, env={**os.environ, "PYTHONPATH": PYTHONPATH})
    assert done.returncode == 0, done.stderr
    (before, _), (large, _), (after, peak) = (map(int, line.split()) for line in done.stdout.splitlines())
    assert large > before + (190 << 20)
    assert after < before + (40 << 20)
    assert peak >= after


HELD = """
import sys
from veripo_fast.run.memory import Resident, status_bytes
resident = Resident(int(sys.argv[1]))
resident.look()
before = status_bytes("VmRSS")
blocks = [bytearray(100_000) for _ in range(2000)]  # too small for a mapping of their own
last = blocks[-1]  # in use, above what is freed
if sys.argv[2] == "seen":
    resident.look()
blocks.clear()
resident.look()
print(status_bytes("VmRSS") - before)
"""


@pytest.mark.parametrize(("most", "when", "least_left", "most_left"), [
    (GIB, "unseen", 150_000_000, 250_000_000), (64 << 20, "unseen", -5_000_000, 20_000_000),
    (64 << 20, "seen", 150_000_000, 250_000_000)])
def test_freed_memory_goes_back_once_more_is_resident_than_was_in_use(most: int, when: str, least_left: int,
                                                                      most_left: int) -> None:
    """Of 200 MB, in a process whose heap has no room yet."""
    done = subprocess.run([sys.executable, "-c", HELD, str(most), when], env={**os.environ, "PYTHONPATH": PYTHONPATH},
                          capture_output=True, text=True, check=True)
    assert least_left <= int(done.stdout) <= most_left
