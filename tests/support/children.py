"""Processes that tests start, and how long tests wait for anything: on a loaded machine longer, and not in vain."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.tied import tied

PATIENCE_SECONDS = 1800.0
"""What is not there by then will not come. The slowest process takes one minute on an idle machine; under a load of 25
on two cores everything takes twelve times as long."""


def run(*command: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """`subprocess.run` with its output as text; the process ends with this one."""
    return subprocess.run(tied(*command), **{"capture_output": True, "text": True, "timeout": PATIENCE_SECONDS,
                                             **options})


def start(*command: str | Path, **options: Any) -> subprocess.Popen[str]:
    """`subprocess.Popen` with pipes of text; the process ends with the thread that calls this."""
    return subprocess.Popen(tied(*command), **{"stdout": subprocess.PIPE, "text": True, **options})


def wait_until(condition: Callable[[], object], what: str) -> None:
    """Return when the condition holds; it is asked every 10 ms."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"waited {PATIENCE_SECONDS:.0f} s in vain for {what}"
        time.sleep(0.01)
