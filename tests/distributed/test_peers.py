"""The threads that watch the other ranks."""

from __future__ import annotations

import threading
import time

import pytest

from veripo_fast.distributed import peers
from veripo_fast.distributed.peers import Peers


class SlowStore:
    """A store of one rank, whose answers take a while."""

    def __init__(self) -> None:
        self.asked = threading.Event()

    def clone(self) -> SlowStore:
        return self

    def set(self, name: str, value: str) -> None:
        if threading.current_thread() is not threading.main_thread():
            self.asked.set()
            time.sleep(0.3)

    def check(self, names: list[str]) -> bool:
        return False

    def multi_get(self, names: list[str]) -> list[bytes]:
        return []


@pytest.mark.parametrize("parted", [False, True])
def test_they_have_ended_behind_the_block(parted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is still in a call of c10d while Python ends aborts the process: exit code -6 behind a run that is done.
    """
    monkeypatch.setattr(peers, "BEAT_SECONDS", 0.01)
    store = SlowStore()
    watched = Peers(store, 0, 2)
    with watched:
        assert store.asked.wait(10)
        if parted:
            watched.part()
    assert not any(thread.is_alive() for thread in watched._threads)
