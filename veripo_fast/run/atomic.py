"""The one way a file is written: readers and crashes see the old content or the new one, never a part of it.

The content goes to a temporary file, is made durable, takes its name, and then the folder is made durable.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def atomic_open(path: Path) -> Iterator[BinaryIO]:
    """A file to write to; it gets its name when the block ends without an error. Raises OSError."""
    # ranks in containers share folders, and may have one process number
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}-{os.urandom(4).hex()}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """Write a whole file. Raises OSError."""
    with atomic_open(path) as file:
        file.write(data)


def atomic_write_text(path: Path, text: str) -> None:
    """Write a whole file as UTF-8. Raises OSError."""
    atomic_write_bytes(path, text.encode())


def sync(path: Path) -> None:
    """Make a file or a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
