"""The process that runs math-verify for math_answers.py. It is run as a file and imports nothing of this package."""

from __future__ import annotations

import json
import logging
import resource
import signal
import sys

_LIBRARY_SECONDS = 3
WORKER_SECONDS = 20.0
_WORKER_BYTES = 4 * 2**30


def serve() -> None:
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
        signal.setitimer(signal.ITIMER_PROF, WORKER_SECONDS)  # ends it inside of C code too, which SIGALRM does not
        try:
            wanted = read(gold)
            equal = bool(wanted) and (answer is None or verify(wanted, read(answer), timeout_seconds=_LIBRARY_SECONDS,
                                                            allow_set_relation_comp=True))
        except (TimeoutException, RecursionError, MemoryError):
            equal = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        print("true" if equal else "false", flush=True)


if __name__ == "__main__":
    serve()
