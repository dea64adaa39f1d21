r"""Comparing mathematics ($2\sqrt{3}$ and $\sqrt{12}$) with the math-verify library, in a process of its own.

math-verify stops a runaway expression ($9^{9^{9^{9}}}$) with SIGALRM, which works in the main thread only and takes the
signal away from the program around it. So one small worker process per trainer process runs the library, and a worker
that does not answer in time is killed and replaced: no answer that a policy writes can stop a run, in any thread.
Measured: 0.8 s to start the worker, once; about 1 to 100 ms per new comparison, 0 for a repeated one.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import re
import resource
import select
import signal
import subprocess
import sys
import threading
from functools import lru_cache

_LIBRARY_SECONDS = 3
_WORKER_SECONDS = 20.0
_START_SECONDS = 120.0
_LONGEST = 1000
_WORKER_BYTES = 4 * 2**30


def math_equal(answer: str, gold: str) -> bool:
    """Whether two mathematical expressions are the same; False when either cannot be read, or not in time.

    The answer must be one expression: of "3, 2" math-verify alone would take the last number.
    """
    answer, gold = math_text(answer), math_text(gold)
    if not answer or not gold or max(len(answer), len(gold)) > _LONGEST:
        return False
    return _ask(gold, answer)


def math_parses(text: str) -> bool:
    """Whether math-verify can read this expression."""
    text = math_text(text)
    return bool(text) and len(text) <= _LONGEST and _ask(text, None)


_SEGMENT = re.compile(r"\$\$?([^$]+)\$\$?|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_BOXED = re.compile(r"\\boxed\s*\{(.*)\}", re.DOTALL)
_SEVERAL = re.compile(r"\b(?:or|either|maybe)\b", re.IGNORECASE)


def math_text(text: str) -> str:
    """The one expression in a text, without `$` and `\\boxed`; empty when there is none or there are several."""
    segments = [next(part for part in match.groups() if part) for match in _SEGMENT.finditer(text)]
    if len(segments) > 1 or _SEVERAL.search(text):
        return ""
    text = (segments[0] if segments else text).strip()
    boxed = _BOXED.fullmatch(text.rstrip(" .,;"))
    return (boxed.group(1) if boxed else text).strip().rstrip(".,;").strip()


@lru_cache(maxsize=8192)
def _ask(gold: str, answer: str | None) -> bool:
    global _worker
    with _lock:
        if _worker is None or _worker.owner != os.getpid():
            _worker = _Worker()
        reply = _worker.ask(gold, answer)
        if reply is None:
            _worker.stop()
            _worker = None
        return bool(reply)


class _Worker:
    """The process that runs math-verify; it ends by itself when this one does: its standard input closes, and if nobody
    kills it over an endless expression, it has `_WORKER_SECONDS` of a processor for it."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self.process = subprocess.Popen([sys.executable, "-P", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=subprocess.DEVNULL, start_new_session=True)
        if self._line(_START_SECONDS) != b"ready\n":
            raise RuntimeError(f"the worker process of math-verify did not start; run {sys.executable} -P {__file__}")

    def ask(self, gold: str, answer: str | None) -> bool | None:
        """True or False, or None when the worker hangs or has died."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps([gold, answer]).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return None
        return {b"true\n": True, b"false\n": False}.get(self._line(_WORKER_SECONDS))

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


def _serve() -> None:
    """The worker: one JSON line [gold, answer or null] in, `true` or `false` out."""
    from math_verify import LatexExtractionConfig, parse, verify
    from math_verify.errors import TimeoutException

    def read(text: str) -> list[object]:
        return parse(f"${text}$", [LatexExtractionConfig()], fallback_mode="no_fallback",
                     parsing_timeout=_LIBRARY_SECONDS)

    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_AS, (_WORKER_BYTES, _WORKER_BYTES))
    print("ready", flush=True)
    for line in sys.stdin:
        gold, answer = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, _WORKER_SECONDS)  # ends it inside of C code too, which SIGALRM does not
        try:
            wanted = read(gold)
            equal = bool(wanted) and (answer is None or verify(wanted, read(answer), timeout_seconds=_LIBRARY_SECONDS))
        except (TimeoutException, RecursionError, MemoryError):
            equal = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        print("true" if equal else "false", flush=True)


if __name__ == "__main__":
    _serve()
