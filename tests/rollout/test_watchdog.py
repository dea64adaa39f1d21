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


STOPPED = """
import os, signal, subprocess, sys, time
from veripo_fast.rollout.watchdog import Watchdog

dog = Watchdog(2.0)
subprocess.Popen(["sh", "-c", f"sleep 1; kill -STOP {os.getpid()}; sleep 5; kill -CONT {os.getpid()}"])
with dog.watching():
    ends = time.monotonic() + 8
    while time.monotonic() < ends:
        time.sleep(0.2)
        if time.monotonic() < ends - 1.5:
            dog.progress()
print("alive", flush=True)
"""


def test_a_process_that_was_stopped_as_a_whole_goes_on() -> None:
    """Ctrl-Z, a suspended job: time passes, and the engine could do nothing."""
    done = run(sys.executable, "-c", STOPPED)
    assert done.returncode == 0 and done.stdout == "alive\n", done.stderr
