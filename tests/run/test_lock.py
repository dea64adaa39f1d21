"""The lock on a run folder, with real processes: alive, killed, on another host."""

import json
import os
import signal
import socket
import time
from pathlib import Path

import pytest

from tests.support.children import PATIENCE_SECONDS, start
from veripo_fast.errors import ConfigError
from veripo_fast.run import lock
from veripo_fast.run.lock import RunLock

HOLD = """
import sys, time
from pathlib import Path
from veripo_fast.run.lock import RunLock
with RunLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of tmp_path."""
    import sys

    from tests.support.paths import PYTHONPATH

    process = start(sys.executable, "-c", HOLD, tmp_path, str(PATIENCE_SECONDS),
                    env={**os.environ, "PYTHONPATH": PYTHONPATH})
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_living_owner_is_named(tmp_path: Path, holder) -> None:
    words = rf"in use by process {holder.pid} on {socket.gethostname()} since \d{{4}}-.*; wait for it or stop it"
    with pytest.raises(ConfigError, match=words), RunLock(tmp_path):
        pass


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_dead_owner_holds_nothing(tmp_path: Path, holder, number: int) -> None:
    holder.send_signal(number)
    holder.wait()
    assert json.loads((tmp_path / lock.NAME).read_text())["pid"] == holder.pid
    with RunLock(tmp_path):
        assert json.loads((tmp_path / lock.NAME).read_text())["pid"] == os.getpid()
    assert (tmp_path / lock.NAME).read_text() == ""


def other_host(folder: Path, silent_seconds: float) -> None:
    path = folder / lock.NAME
    path.write_text(json.dumps({"host": "node7", "pid": 12, "since": "2026-01-01 10:00:00"}))
    os.utime(path, (time.time() - silent_seconds,) * 2)


def test_an_owner_on_another_host_that_gives_a_sign_of_life(tmp_path: Path) -> None:
    other_host(tmp_path, lock.DEAD_SECONDS / 2)
    with pytest.raises(ConfigError, match="in use by process 12 on node7 since 2026-01-01 10:00:00"), RunLock(tmp_path):
        pass


def test_an_owner_on_another_host_that_fell_silent(tmp_path: Path) -> None:
    other_host(tmp_path, lock.DEAD_SECONDS + 5)
    with RunLock(tmp_path):
        assert json.loads((tmp_path / lock.NAME).read_text())["host"] == socket.gethostname()


def test_the_owner_gives_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.05)
    path = tmp_path / lock.NAME
    with RunLock(tmp_path):
        os.utime(path, (1, 1))
        until = time.monotonic() + PATIENCE_SECONDS
        while path.stat().st_mtime < 100 and time.monotonic() < until:
            time.sleep(0.02)
        assert path.stat().st_mtime > 100


@pytest.mark.parametrize("content", ["", "{", "[]", "nonsense"])
def test_what_a_crash_left_is_no_owner(tmp_path: Path, content: str) -> None:
    (tmp_path / lock.NAME).write_text(content)
    with RunLock(tmp_path):
        pass
