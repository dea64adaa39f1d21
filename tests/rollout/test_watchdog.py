"""The watchdog ends a process without progress, and only that."""

from __future__ import annotations

import sys

from tests.support.children import run

CODE = """
import sys, time
from veripo_fast.rollout.watchdog import Watchdog

dog = Watchdog(1.0)
with dog.watching():
    for _ in range(8):
        time.sleep(0.25)
        dog.progress()
print("slow but alive", flush=True)
time.sleep(1.5)
print("nobody waits", flush=True)
with dog.watching():
    time.sleep(60)
"""


def test_only_a_hang_ends_the_process() -> None:
    done = run(sys.executable, "-c", CODE)
    assert done.returncode == 75
    assert done.stdout.split("\n")[:2] == ["slow but alive", "nobody waits"]
    assert "finished nothing for 1 seconds (rollout.stall_seconds)" in done.stderr and "line 14" in done.stderr
