"""Watches the other ranks: one that fails, dies or loses its machine ends the run on all of them, with a sentence.

Each rank beats into the store where the ranks met, and a thread looks at the beats of the others: a collective that
waits for a lost rank cannot be taken back, so the process ends there. A second thread watches whether the store answers
at all. The first rank that claims the failure speaks, the others end in silence. The last checkpoint is whole.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, Self

from veripo_fast.errors import EXIT_USER, Interrupted, PeerFailed, TrainingError

EXIT_LOST = 75
"""EX_TEMPFAIL of sysexits.h: try again, as after train.max_hours."""
BEAT_SECONDS = 1.0
SILENT_SECONDS = 20.0
"""A rank whose beat stands still for so long is lost; a suspended job stands still as a whole."""
GRACE_SECONDS = 5.0
"""How long a rank whose exchange broke waits to hear why, and a failed one for the others to hear of it."""
_FAILED, _CLAIMS = "veripo/failed", "veripo/claims"


class Peers:
    """A context manager around everything that ranks do together.

    Args:
        store: torch.distributed's, where the ranks met.
    """

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.doing = "starting"
        """What the sentence says that was going on."""
        self.begun = False
        """Whether there is a run to resume."""
        self._store = store.clone()  # a store waits under a lock, and the threads must not
        self._ended = threading.Event()
        self._ending = threading.Lock()
        self._first: bool | None = None
        """Whether this rank was the first to claim the failure; None before it has tried."""
        self._answered = time.monotonic()
        """When the store did, last."""
        self._beats: dict[int, bytes] = {}
        self._changed = dict.fromkeys((other for other in range(size) if other != rank), self._answered)
        """When the beat of each other rank did, last."""
        self._threads = [threading.Thread(target=work, name="veripo-peers", daemon=True)
                         for work in (self._beat, self._watch_store)]

    def __enter__(self) -> Self:
        self._store.set(f"veripo/beat/{self.rank}", "0")
        for thread in self._threads:
            thread.start()
        return self

    @property
    def parted(self) -> bool:
        """Whether this rank watches the others no more."""
        return self._ended.is_set()

    def part(self) -> None:
        """From here on this rank needs no other one, and all of them know."""
        self._ended.set()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        try:
            if error is not None and not isinstance(error, PeerFailed) and not self._ended.is_set():
                _let_finish()
                self._explain(error)
        finally:
            self._ended.set()
            for thread in self._threads:  # one that comes back from the store while Python ends would abort the process
                thread.join(GRACE_SECONDS)

    def _explain(self, error: BaseException) -> None:
        """Let one rank say what ended all; returns where that is this one, and `error` says it."""
        code = error.exit_code if isinstance(error, Interrupted) else EXIT_USER
        broken = _is_broken_exchange(error)
        if broken and (culprit := self._failed()):
            self._claim()
            raise PeerFailed(culprit, code) from error
        lost = f"there is no sign of life from rank {', '.join(silent)} any more" if (silent := self._silent()) else ""
        if not self._claim():
            raise PeerFailed("another rank failed too", code) from error
        self._tell(f"rank {self.rank} failed")
        if broken:
            raise TrainingError(f"{lost or 'another rank was lost'}, while this one was {self.doing} "
                                f"({_short(error)}); {self._remedy()}") from error

    def _failed(self) -> str:
        """Which rank said that it failed; waits a moment for it, because its connections may break first."""
        deadline = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < deadline and not self._silent():
            try:
                if self._store.check([_FAILED]):
                    return str(self._store.get(_FAILED), "utf-8")
            except RuntimeError:
                return ""
            time.sleep(0.1)
        return ""

    def _silent(self) -> list[str]:
        """The ranks whose hearts have stopped, as far as is known."""
        return [str(rank) for rank, changed in self._changed.items() if self._answered - changed > GRACE_SECONDS / 2]

    def _remedy(self) -> str:
        return "--resume goes on from the last whole checkpoint" if self.begun else "start it again as before"

    def _claim(self) -> bool:
        """Whether this rank is the first to end, and so speaks for all."""
        if self._first is None:
            try:
                self._first = int(self._store.add(_CLAIMS, 1)) == 1
            except RuntimeError:  # the machine with the store is gone
                self._first = True
        return self._first

    def _tell(self, sentence: str) -> None:
        """Tell the others, and stay until those that live have heard it: the store may end with this process."""
        deadline = time.monotonic() + GRACE_SECONDS
        with suppress(RuntimeError):
            self._store.set(_FAILED, sentence)
            while time.monotonic() < deadline and self._store.add(_CLAIMS, 0) < self.size - len(self._silent()):
                time.sleep(0.05)

    # -- in threads ---------------------------------------------------------------------------------------------------

    def _beat(self) -> None:
        seen = self._answered
        number = 0
        while not self._ended.wait(BEAT_SECONDS):
            now = time.monotonic()
            if now - seen > SILENT_SECONDS / 2:  # this process stood still: what it sees of the others is old
                self._changed = dict.fromkeys(self._changed, now)
            seen = now
            number += 1
            try:
                self._store.set(f"veripo/beat/{self.rank}", str(number))
                if self._first is None and self._store.check([_FAILED]):
                    self._end("")
                self._look()
            except RuntimeError:  # of c10d: the store does not answer
                self._end("the rank that holds the store, or its machine, is gone")
                return
            self._answered = time.monotonic()
            for rank, changed in self._changed.items():
                if rank in self._beats and now - changed > SILENT_SECONDS:
                    self._end(f"rank {rank} has been silent for {SILENT_SECONDS:.0f} seconds")

    def _look(self) -> None:
        """Read the beats of the others."""
        names = {f"veripo/beat/{rank}": rank for rank in self._changed}
        there = [name for name in names if self._store.check([name])]
        now = time.monotonic()
        for name, beat in zip(there, self._store.multi_get(there), strict=True):
            rank = names[name]
            if self._beats.get(rank) != beat:
                self._beats[rank], self._changed[rank] = beat, now

    def _watch_store(self) -> None:
        """A store whose process is stopped keeps whoever asks it waiting."""
        seen = self._answered
        while not self._ended.wait(BEAT_SECONDS):
            now = time.monotonic()
            if now - seen > SILENT_SECONDS / 2:
                self._answered = now
            seen = now
            if now - self._answered > SILENT_SECONDS:
                self._end(f"the rank that holds the store, or its machine, has been silent for {SILENT_SECONDS:.0f} "
                          "seconds", store=False)

    def _end(self, reason: str, store: bool = True) -> None:
        """End this process, unless its main thread does meanwhile.

        Args:
            reason: empty where another rank says it.
            store: whether the store answers.
        """
        with self._ending:
            if self._ended.wait(GRACE_SECONDS):
                return
            if (not store or self._claim()) and reason:
                prefix = f"rank {self.rank}: " if self.rank else ""  # as the command line has it
                print(f"\nveripo: error: {prefix}{reason}, while this one was {self.doing}; {self._remedy()}",
                      file=sys.stderr, flush=True)  # on a line of its own, which a progress bar is not
            os._exit(EXIT_LOST)


@contextmanager
def limited(seconds: float, sentence: str) -> Iterator[None]:
    """A block that waits for others and should end by itself in time; where it does not, the process is ended."""
    def end() -> None:
        print(f"veripo: error: {sentence}", file=sys.stderr, flush=True)
        os._exit(EXIT_USER)

    timer = threading.Timer(seconds + GRACE_SECONDS, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _let_finish() -> None:
    """Ignore what a launcher sends to the ranks that are left once one has failed, so that they can say why."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _short(error: BaseException) -> str:
    """What went wrong, without gloo's line number before it and its advice behind it."""
    line = str(error).splitlines()[0]
    return re.sub(r"^\[\S+\] ", "", line).partition(". ")[0][:200]


def _is_broken_exchange(error: BaseException) -> bool:
    """Whether an exchange between ranks failed: c10d raises RuntimeErrors of its own, some without a class."""
    from torch.distributed import DistError

    words = ("gloo", "NCCL", "Connection closed by peer", "ProcessGroup", "Timed out waiting", "store")
    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and any(w in str(error) for w in words))
