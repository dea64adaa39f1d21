"""One temporary folder for all processes of a test session, gone when it ends.

pytest's own folders (`tmp_path`) stay where they are: it keeps the last three for who looks into a failure. So does
what torch compiles, which would be compiled again in every session.
"""

from __future__ import annotations

import atexit
import fcntl
import getpass
import os
import shutil
import tempfile
from pathlib import Path

MARK = "VERIPO_TESTS_TMP"
"""Environment variable that tells the processes of a session, xdist's workers included, that the folder is there."""
_PREFIX, _LOCK = "veripo-tests-", ".lock"


def claim() -> None:
    """Make the folder of this session the temporary folder, and remove those of sessions that were killed."""
    if MARK in os.environ:
        return
    usual = Path(tempfile.gettempdir())
    for left in usual.glob(f"{_PREFIX}*"):
        _remove_unless_held(left)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=usual))
    lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)  # for as long as this process lives
    folder.chmod(0o1777)  # some tests are somebody else for a moment
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(usual))
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(usual / f"torchinductor_{getpass.getuser()}"))
    os.environ |= {MARK: str(folder), "TMPDIR": str(folder)}
    tempfile.tempdir = None  # else what was asked for above is remembered
    atexit.register(_end, folder, os.getpid())


def _end(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # not a fork
        shutil.rmtree(folder, ignore_errors=True)


def _remove_unless_held(folder: Path) -> None:
    try:
        lock = os.open(folder / _LOCK, os.O_RDWR)
    except OSError:  # another user's, or one that is being made
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    except BlockingIOError:
        pass
    finally:
        os.close(lock)
