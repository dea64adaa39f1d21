"""Disk level of the vision cache: one safetensors file per entry, in a folder that runs, ranks and restarts share.

A file gets its name only when it is whole and durable (temporary name, fsync, rename), and carries a CRC-32 of its
content; a damaged one is dropped, counted and computed again. The least recently used files go first (a hit renews the
modification time). There are no locks: two processes may write the same entry, and a file may vanish at any time.

Once the folder is there, the cache never ends a run. What cannot be read, written or deleted is a miss that is counted
and said once: a read-only or full disk, another user's files, a folder or a pipe in an entry's place.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import stat
import time
import zlib
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from veripo_fast.errors import ConfigError
from veripo_fast.run.atomic import atomic_write_bytes

log = logging.getLogger(__name__)
MAX_PENDING = 8
"""Entries that wait to be written, at most; a caller that brings more waits for the oldest."""
SLACK = 16
"""The folder is listed again after each 1/16 of its limit, and emptied to 15/16: P processes overshoot by P/16."""
STALE_SECONDS = 3600
"""A temporary file as old as this was left by a crash."""
_OURS = re.compile(r"[0-9a-f]{32}(-[0-9a-f]{16}\.tower|\.frames)\.safetensors")
_DAMAGE = (SafetensorError, ValueError, LookupError, TypeError, AttributeError, OverflowError, RuntimeError)
"""What reading strange content raises: RecursionError from nested JSON and torch's own errors are RuntimeErrors."""
Stored: TypeAlias = tuple[dict[str, torch.Tensor], Any]
"""Tensors and what JSON says of them."""
Parsed = TypeVar("Parsed")


class VisionStore:
    """A folder of entries, at most `max_bytes` of them; entries are read at once and written behind by one thread.

    Raises:
        ConfigError: the folder cannot be made.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self.damaged = self.unreadable = self.evicted = self.failed_writes = self.too_large = self.written_bytes = 0
        self._full = False
        """Whether old entries cannot be deleted: nothing is written from then on, so that the bound holds."""
        self._unusable: set[str] = set()
        """Names that are taken by something that cannot be used; writing them replaces it."""
        self._said: set[str] = set()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cache.folder {folder} cannot be made: {error.strerror}") from error
        self._bytes = self._unlisted = 0
        self._pending: deque[Future[None]] = deque()
        self._evict()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="veripo-store")

    def close(self) -> None:
        """Finish what waits to be written, and say how much could not be used."""
        self._writer.shutdown(wait=True)
        while self._pending:
            self._pending.popleft().result()
        if self.damaged + self.unreadable + self.failed_writes > 1:
            log.info("the vision cache %s: %d damaged and %d unreadable entries were made again, %d could not be "
                     "written", self.folder, self.damaged, self.unreadable, self.failed_writes)

    def read(self, name: str) -> Stored | None:
        """The entry, in memory of its own; None when there is none (or none any more)."""
        return self.read_as(name, lambda stored: stored)

    def read_as(self, name: str, parse: Callable[[Stored], Parsed]) -> Parsed | None:
        """What `parse` makes of the entry; one that it refuses, with ValueError or by stumbling, is damaged."""
        path = self._path(name)
        try:
            data = self._content(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            self.unreadable += 1
            self._unusable.add(name)
            self._say("read", "the cache entry %s cannot be read (%s) and will be made again", path, error.strerror)
            return None
        try:
            tensors = {key: value.clone() for key, value in load(data).items()}  # clone: aligned, whatever the header
            header = json.loads(data[8:8 + int.from_bytes(data[:8], "little")])["__metadata__"]
            if int(header["crc32"]) != _crc32(tensors, header["about"]):
                raise ValueError("its content has changed since it was written")
            parsed = parse((tensors, json.loads(header["about"])))
        except _DAMAGE as error:
            self.damaged += 1
            self._unusable.add(name)
            self._say("damage", "the cache entry %s is damaged (%s) and will be made again", path, error)
            self._delete(path)
            return None
        self._touch(path)
        return parsed

    def renew(self, name: str) -> int | None:
        """Bytes of the entry, which counts as used from now on, without reading it; None when there is none."""
        path = self._path(name)
        size = _file_bytes(path)
        if size is not None:
            self._touch(path)
        return size

    def write_later(self, name: str, tensors: Mapping[str, torch.Tensor], about: object) -> None:
        """Have the entry written; `tensors` lie on the CPU and must not change. Call it from one thread."""
        while self._pending and (self._pending[0].done() or len(self._pending) >= MAX_PENDING):
            self._pending.popleft().result()
        self._pending.append(self._writer.submit(self._write, name, dict(tensors), json.dumps(about)))

    def _write(self, name: str, tensors: dict[str, torch.Tensor], about: str) -> None:
        path = self._path(name)
        data = save({key: value.contiguous() for key, value in tensors.items()},
                    {"about": about, "crc32": str(_crc32(tensors, about))})
        self.too_large += len(data) > self.max_bytes
        if len(data) > self.max_bytes or (name not in self._unusable and _file_bytes(path) is not None):
            return
        try:
            if self._full:
                raise OSError(errno.ENOSPC, "it is full, and its old entries cannot be deleted")
            atomic_write_bytes(path, data)
        except OSError as error:  # a full disk costs time, not the run
            self.failed_writes += 1
            self._say("write", "cannot write to the vision cache %s: %s; the run goes on without", self.folder, error)
            return
        self._unusable.discard(name)
        self.written_bytes += len(data)
        self._bytes += len(data)
        self._unlisted += len(data)
        if self._bytes > self.max_bytes or self._unlisted > self.max_bytes // SLACK:
            self._evict()

    def _evict(self) -> None:
        """List the folder; drop what crashes left, and the oldest entries when there are too many bytes."""
        entries: list[tuple[int, int, Path]] = []
        try:
            listed = list(self.folder.iterdir())
        except OSError as error:  # without a list there is no bound
            self._full = True
            self._say("list", "the vision cache %s cannot be listed (%s): nothing is added to it", self.folder,
                      error.strerror)
            return
        for path in listed:
            try:
                status = path.stat()
            except OSError:
                continue
            if not stat.S_ISREG(status.st_mode):
                continue
            if _OURS.fullmatch(path.name):
                entries.append((status.st_mtime_ns, status.st_size, path))
            elif path.name.startswith(".tmp-") and time.time() - status.st_mtime > STALE_SECONDS:
                self._delete(path)
        self._bytes, self._unlisted = sum(size for _, size, _ in entries), 0
        if self._bytes <= self.max_bytes:
            return
        for _, size, path in sorted(entries):
            if not self._delete(path):
                continue
            self.evicted += 1
            self._bytes -= size
            if self._bytes <= self.max_bytes - self.max_bytes // SLACK:
                return
        self._full = True

    def _content(self, path: Path) -> bytes:
        """Raises OSError, also for what is no file: a pipe would be waited for, a device never ends."""
        with open(path, "rb", buffering=0, opener=_open_at_once) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.EINVAL, "it is no regular file")
            if status.st_size > self.max_bytes:
                raise OSError(errno.EFBIG, "it is larger than cache.disk_bytes")
            return file.readall()

    def _delete(self, path: Path) -> bool:
        """Whether the file is gone."""
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            self._say("delete", "the file %s in the vision cache cannot be deleted: %s", path, error.strerror)
            return False
        return True

    def _say(self, kind: str, message: str, *values: object) -> None:
        """Warn once of each kind; `close` says how often."""
        if kind not in self._said:
            self._said.add(kind)
            log.warning(message, *values)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def _touch(self, path: Path) -> None:
        try:
            os.utime(path)
        except OSError:  # evicted meanwhile, read-only, or a cache that another user fills
            return


def _file_bytes(path: Path) -> int | None:
    """Size of a regular file; None when there is none to be seen."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def _crc32(tensors: Mapping[str, torch.Tensor], about: str) -> int:
    value = zlib.crc32(about.encode())
    for name in sorted(tensors):
        value = zlib.crc32(name.encode(), value)
        value = zlib.crc32(raw_bytes(tensors[name]), value)
    return value


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor on the CPU."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data
