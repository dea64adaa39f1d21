"""Watches the other ranks: one that fails, dies or loses its machine ends the run on all of them, with a sentence.

Each rank beats into the store where the ranks met. A thread looks at the beats of the others: a collective that waits
for a lost rank cannot be taken back, so the process ends there. The last checkpoint is whole.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from types import TracebackType
from typing import Any, Self

from veripo_fast.errors import Interrupted, PeerFailed, TrainingError

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
        self._store = store.clone()  # a store waits under a lock, and the thread must not
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="veripo-peers", daemon=True)

    def __enter__(self) -> Self:
        self._store.set(f"veripo/beat/{self.rank}", "0")
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join(timeout=GRACE_SECONDS)
        if error is None or isinstance(error, (PeerFailed, Interrupted)):
            return
        broken = _is_broken_exchange(error)
        if broken and (culprit := self._failed()):
            raise PeerFailed(culprit) from error
        if not self._is_first():
            raise PeerFailed("another rank failed too") from error
        if broken:
            first = str(error).splitlines()[0][:200]
            raise TrainingError(f"another rank was lost while this one was {self.doing} ({first}); the last checkpoint "
                                "is whole, and --resume goes on from it") from error

    def _is_first(self) -> bool:
        """Whether no other rank has failed before; if so tell them, and they end in silence."""
        try:
            first = self._store.add(_CLAIMS, 1) == 1
            if first:
                self._store.set(_FAILED, f"rank {self.rank} failed")
        except RuntimeError:  # the machine with the store is gone
            return True
        return first

    def _failed(self) -> str:
        """Which rank said that it failed; waits a moment for it."""
        deadline = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < deadline:
            try:
                if self._store.check([_FAILED]):
                    return str(self._store.get(_FAILED), "utf-8")
            except RuntimeError:
                return ""
            time.sleep(0.1)
        return ""

    # -- in the thread ------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        names = [f"veripo/beat/{rank}" for rank in range(self.size) if rank != self.rank]
        beats: dict[str, bytes] = {}
        changed = dict.fromkeys(names, time.monotonic())
        seen = time.monotonic()
        number = 0
        while not self._ended.wait(BEAT_SECONDS):
            now = time.monotonic()
            if now - seen > SILENT_SECONDS / 2:  # this process stood still: what it sees of the others is old
                changed = dict.fromkeys(names, now)
            seen = now
            number += 1
            try:
                self._store.set(f"veripo/beat/{self.rank}", str(number))
                if self._store.check([_FAILED]):
                    self._end(str(self._store.get(_FAILED), "utf-8"), quiet=True)
                there = [name for name in names if self._store.check([name])]
                for name, beat in zip(there, self._store.multi_get(there), strict=True):
                    if beats.get(name) != beat:
                        beats[name], changed[name] = beat, now
            except RuntimeError:  # of c10d: the store does not answer
                self._end("the rank that holds the store, or its machine, is gone")
            for name in names:
                if name in beats and now - changed[name] > SILENT_SECONDS:
                    self._end(f"rank {name.rsplit('/')[-1]} has been silent for {SILENT_SECONDS:.0f} seconds")

    def _end(self, reason: str, quiet: bool = False) -> None:
        if self._ended.is_set() or self._ended.wait(GRACE_SECONDS):  # the main thread heard of it, and ends properly
            return
        if not quiet:
            print(f"veripo: rank {self.rank}: {reason}, while this one was {self.doing}. The process ends; the last "
                  "checkpoint is whole, and --resume goes on from it", file=sys.stderr, flush=True)
        os._exit(EXIT_LOST)


def _is_broken_exchange(error: BaseException) -> bool:
    """Whether an exchange between ranks failed: c10d raises RuntimeErrors of its own, some without a class."""
    from torch.distributed import DistError

    words = ("gloo", "NCCL", "Connection closed by peer", "ProcessGroup", "Timed out waiting", "store")
    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and any(w in str(error) for w in words))
