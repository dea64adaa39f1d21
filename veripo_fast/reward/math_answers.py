r"""Comparing mathematics ($2\sqrt{3}$ and $\sqrt{12}$) with the math-verify library, in a process of its own.

math-verify stops a runaway expression ($9^{9^{9^{9}}}$) with SIGALRM, which works in the main thread only and takes the
signal away from the program around it. So one small worker process per trainer process runs the library, and a worker
that does not answer in time is killed and replaced: no answer that a policy writes can stop a run, in any thread.
Measured: 0.8 s to start the worker, once; about 1 to 100 ms per new comparison, 0 for a repeated one.
`math_budget` bounds what the answers of one batch may cost together.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from veripo_fast.reward.math_text import math_text

_LOG = logging.getLogger(__name__)
_WORKER = Path(__file__).with_name("math_worker.py")
_WORKER_SECONDS = 20.0
_START_SECONDS = 120.0


def math_equal(answer: str, gold: str) -> bool:
    """Whether two mathematical expressions are the same; False when either cannot be read, or not in time.

    The answer must be one expression: of "3, 2" math-verify alone would take the last number.
    """
    answer, gold = math_text(answer), math_text(gold)
    return bool(answer) and bool(gold) and _ask(gold, answer)


def math_parses(text: str) -> bool:
    """Whether math-verify can read this expression."""
    text = math_text(text)
    return bool(text) and _ask(text, None)


@dataclass
class MathBudget:
    """Seconds that the comparisons of one batch may take together, and how many were refused for want of time."""

    seconds: float
    spent_seconds: float = 0.0
    refused: int = 0

    @property
    def left_seconds(self) -> float:
        return max(0.0, self.seconds - self.spent_seconds)


_budget: ContextVar[MathBudget | None] = ContextVar("math_budget", default=None)


@contextmanager
def math_budget(seconds: float) -> Iterator[MathBudget]:
    """Bound the comparisons within: one that finds no time left, or runs out of it, counts as not equal.

    Only waiting for the library is counted. What was refused is said once, when the batch ends, and not remembered.
    """
    budget = MathBudget(seconds)
    token = _budget.set(budget)
    try:
        yield budget
    finally:
        _budget.reset(token)
        if budget.refused:
            _LOG.warning("%d mathematical answers count as not equal: comparing took longer than "
                         "reward.math_seconds_per_batch, %g s", budget.refused, seconds)


class _OutOfTime(Exception):
    """Raised through the cache, so that an answer that found no time is compared again in the next batch."""


def _ask(gold: str, answer: str | None) -> bool:
    try:
        return _known(gold, answer)
    except _OutOfTime:
        return False


@lru_cache(maxsize=8192)
def _known(gold: str, answer: str | None) -> bool:
    budget = _budget.get()
    started = time.monotonic()
    if budget is not None and not budget.left_seconds:
        budget.refused += 1
        raise _OutOfTime
    seconds = _WORKER_SECONDS if budget is None else min(_WORKER_SECONDS, budget.left_seconds)
    reply = _reply(gold, answer, seconds)
    if budget is not None:
        budget.spent_seconds += time.monotonic() - started
        if reply is None and not budget.left_seconds:
            budget.refused += 1
            raise _OutOfTime
    return bool(reply)


def _reply(gold: str, answer: str | None, seconds: float) -> bool | None:
    global _worker
    with _lock:
        if _worker is None or _worker.owner != os.getpid():
            _worker = _Worker()
        reply = _worker.ask(gold, answer, seconds)
        if reply is None:
            _worker.stop()
            _worker = None
        return reply


class _Worker:
    """The process that runs math-verify; it ends by itself when this one does: its standard input closes, and if nobody
    kills it over an endless expression, it has `_WORKER_SECONDS` of a processor for it."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self.process = subprocess.Popen([sys.executable, "-P", str(_WORKER)], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)
        if self._line(_START_SECONDS) != b"ready\n":
            raise RuntimeError(f"the worker process of math-verify did not start; run {sys.executable} -P {_WORKER}")

    def ask(self, gold: str, answer: str | None, seconds: float) -> bool | None:
        """True or False, or None when the worker hangs or has died."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps([gold, answer]).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return None
        return {b"true\n": True, b"false\n": False}.get(self._line(seconds))

    def _line(self, seconds: float) -> bytes:
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], seconds)
        return self.process.stdout.readline() if ready else b""

    def stop(self) -> None:
        if self.owner == os.getpid():
            self.process.kill()
            self.process.communicate()


_lock = threading.Lock()
_worker: _Worker | None = None


@atexit.register
def _stop_worker() -> None:
    if _worker is not None:
        _worker.stop()
