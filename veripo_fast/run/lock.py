"""One process works in a run folder at a time: a requeued job must not write beside the one that is still alive.

The file `.lock` is held by flock, which the kernel gives back when its owner dies, however it dies. On another host of
a shared file system flock may not be seen, so the owner also touches the file every few seconds. A file that was not
touched for a while belongs to nobody.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from veripo_fast.errors import ConfigError

NAME = ".lock"
BEAT_SECONDS = 15.0
"""How often a living owner touches the file."""
DEAD_SECONDS = 120.0
"""An owner on another host that was silent for so long is taken for dead."""


class RunLock:
    """A context manager that holds a run folder.

    Raises:
        ConfigError: another process holds it; names host and process.
    """

    def __init__(self, root: Path) -> None:
        self.path = root / NAME
        self._ended = threading.Event()
        self._beat = threading.Thread(target=self._touch, name="veripo-lock", daemon=True)

    def __enter__(self) -> RunLock:
        self.file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            self._take()
        except BaseException:
            os.close(self.file)
            raise
        self._beat.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._beat.join()
        os.ftruncate(self.file, 0)
        os.close(self.file)

    def _take(self) -> None:
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(self._refusal(self._owner())) from error
        owner = self._owner()
        if owner and owner.get("host") != socket.gethostname() and self._silent_seconds() < DEAD_SECONDS:
            raise ConfigError(self._refusal(owner))
        text = json.dumps({"host": socket.gethostname(), "pid": os.getpid(),
                           "since": time.strftime("%Y-%m-%d %H:%M:%S")})
        os.ftruncate(self.file, 0)
        os.pwrite(self.file, text.encode(), 0)

    def _owner(self) -> dict[str, Any]:
        """What the file says of its owner; empty when nobody wrote it or the last owner left it properly."""
        try:
            owner = json.loads(os.pread(self.file, 4096, 0))
        except ValueError:
            return {}
        return owner if isinstance(owner, dict) else {}

    def _silent_seconds(self) -> float:
        """Since the owner touched the file, by the clock of the file system: that of another host may differ."""
        before = os.fstat(self.file).st_mtime
        probe = self.path.with_name(f".tmp-lock-{os.getpid()}")
        try:
            probe.touch()
            return probe.stat().st_mtime - before
        finally:
            probe.unlink(missing_ok=True)

    def _refusal(self, owner: dict[str, Any]) -> str:
        return (f"folder {self.path.parent} is in use by process {owner.get('pid', '?')} on "
                f"{owner.get('host', 'an unknown host')} since {owner.get('since', '?')}; wait for it or stop it. "
                f"If that host is gone, try again in {DEAD_SECONDS:.0f} seconds")

    def _touch(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            with suppress(FileNotFoundError):  # a run that could not begin removes its folder
                os.utime(self.path)
