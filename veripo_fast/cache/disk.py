"""Disk level of the vision cache: one safetensors file per entry, in a folder that runs, ranks and restarts share.

A file gets its name only when it is whole and durable (temporary name, fsync, rename), and carries a CRC-32 of its
content; a damaged one is dropped, counted and computed again. The least recently used files go first (a hit renews the
modification time). There are no locks: two processes may write the same entry, and a file may vanish at any time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import time
import zlib
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from veripo_fast.errors import ConfigError
from veripo_fast.model.tower import Tower, VisionFeatures
from veripo_fast.run.checkpoint import atomic_write_bytes
from veripo_fast.types import MediaInputs

log = logging.getLogger(__name__)
MAX_PENDING = 8
"""Entries that wait to be written, at most; a caller that brings more waits for the oldest."""
SLACK = 16
"""The folder is listed again after each 1/16 of its limit, and emptied to 15/16: P processes overshoot by P/16."""
STALE_SECONDS = 3600
"""A temporary file as old as this was left by a crash."""
_OURS = re.compile(r"[0-9a-f]{32}(-[0-9a-f]{16}\.tower|\.frames)\.safetensors")
Kind: TypeAlias = Literal["image", "video"]
Stored: TypeAlias = tuple[dict[str, torch.Tensor], Any]
"""Tensors and what JSON says of them."""


@dataclass(frozen=True)
class DecodedMedia:
    """All images and videos of one prompt, decoded and resized, in the order they appear in the text."""

    frames: list[tuple[Kind, torch.Tensor, torch.Tensor]]
    """Per medium its kind, pixels uint8 [T, 3, H, W], and times float64 [T] in seconds."""
    key: str
    """Content fingerprint of the media under the sampling contract."""
    from_disk: bool = False
    """Whether they were read from the cache and not decoded."""

    @property
    def nbytes(self) -> int:
        return sum(pixels.nbytes for _, pixels, _ in self.frames)


class VisionStore:
    """A folder of entries, at most `max_bytes` of them; entries are read at once and written behind by one thread.

    Raises:
        ConfigError: the folder cannot be made.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self.damaged = self.evicted = self.failed_writes = self.too_large = self.written_bytes = 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cache.folder {folder} cannot be made: {error.strerror}") from error
        self._bytes = self._unlisted = 0
        self._pending: deque[Future[None]] = deque()
        self._evict()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="veripo-store")

    def close(self) -> None:
        """Finish what waits to be written."""
        self._writer.shutdown(wait=True)
        while self._pending:
            self._pending.popleft().result()

    def read(self, name: str) -> Stored | None:
        """The entry, in memory of its own; None when there is none (or none any more)."""
        path = self._path(name)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        try:
            tensors = {key: value.clone() for key, value in load(data).items()}  # clone: aligned, whatever the header
            header = json.loads(data[8:8 + int.from_bytes(data[:8], "little")])["__metadata__"]
            if int(header["crc32"]) != _crc32(tensors, header["about"]):
                raise ValueError("its content has changed since it was written")
        except (SafetensorError, ValueError, KeyError) as error:
            self.damaged += 1
            log.warning("the cache entry %s is damaged (%s) and will be made again", path, error)
            path.unlink(missing_ok=True)
            return None
        self._touch(path)
        return tensors, json.loads(header["about"])

    def renew(self, name: str) -> int | None:
        """Bytes of the entry, which counts as used from now on, without reading it; None when there is none."""
        path = self._path(name)
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            return None
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
        if len(data) > self.max_bytes or path.exists():
            return
        try:
            atomic_write_bytes(path, data)
        except OSError as error:  # a full disk costs time, not the run
            self.failed_writes += 1
            if self.failed_writes == 1:
                log.warning("cannot write to the vision cache %s: %s; the run goes on without", self.folder, error)
            return
        self.written_bytes += len(data)
        self._bytes += len(data)
        self._unlisted += len(data)
        if self._bytes > self.max_bytes or self._unlisted > self.max_bytes // SLACK:
            self._evict()

    def _evict(self) -> None:
        """List the folder; drop what crashes left, and the oldest entries when there are too many bytes."""
        entries: list[tuple[int, int, Path]] = []
        for path in self.folder.iterdir():
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            if _OURS.fullmatch(path.name):
                entries.append((status.st_mtime_ns, status.st_size, path))
            elif path.name.startswith(".tmp-") and time.time() - status.st_mtime > STALE_SECONDS:
                path.unlink(missing_ok=True)
        self._bytes, self._unlisted = sum(size for _, size, _ in entries), 0
        if self._bytes <= self.max_bytes:
            return
        for _, size, path in sorted(entries):
            path.unlink(missing_ok=True)
            self.evicted += 1
            self._bytes -= size
            if self._bytes <= self.max_bytes - self.max_bytes // SLACK:
                return

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def _touch(self, path: Path) -> None:
        try:
            os.utime(path)
        except (FileNotFoundError, PermissionError):  # evicted meanwhile, or a cache that another user fills
            return


def tower_version(tower: Tower) -> str:
    """16 hexadecimal digits that change with any bit of the tower's weights, their type, or the kind of device.

    Every byte is hashed rather than a sample: one changed weight gives another output, and it happens once per process
    (a tower of 0.7 billion bfloat16 weights is 1.3 GB, about a second of SHA-256 on one core).
    """
    digest = hashlib.sha256(tower.device.type.encode())
    for name, value in sorted(tower.visual.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
        digest.update(_raw(value.detach().cpu()))
    return digest.hexdigest()[:16]


def tower_name(key: str, version: str) -> str:
    """Entry of the output of the tower of this version for the media of `key`."""
    return f"{key}-{version}.tower"


def frames_name(key: str) -> str:
    """Entry of the decoded frames of the media of `key`."""
    return f"{key}.frames"


def write_tower(store: VisionStore, version: str, media: MediaInputs, features: VisionFeatures) -> None:
    """Keep a tower's output, which lies on the CPU."""
    levels = {f"deepstack.{number}": level for number, level in enumerate(features.deepstack)}
    store.write_later(tower_name(media.key, version),
                      {"grid_thw": media.grid_thw, "embeddings": features.embeddings, **levels},
                      {"kinds": media.kinds, "grid_seconds": media.grid_seconds})


def read_tower(store: VisionStore, version: str, key: str) -> tuple[MediaInputs, VisionFeatures] | None:
    """Media without pixels, and the output of the tower of this version."""
    found = store.read(tower_name(key, version))
    if found is None:
        return None
    tensors, about = found
    levels = tuple(tensors[f"deepstack.{number}"] for number in range(len(tensors) - 2))
    seconds = tuple(tuple(times) for times in about["grid_seconds"])
    return (MediaInputs(None, tensors["grid_thw"], tuple(about["kinds"]), seconds, key),
            VisionFeatures(tensors["embeddings"], levels))


def write_frames(store: VisionStore, decoded: DecodedMedia) -> None:
    """Keep decoded frames."""
    tensors: dict[str, torch.Tensor] = {}
    for number, (_, pixels, seconds) in enumerate(decoded.frames):
        tensors |= {f"pixels.{number}": pixels, f"seconds.{number}": seconds}
    store.write_later(frames_name(decoded.key), tensors, [kind for kind, _, _ in decoded.frames])


def read_frames(store: VisionStore, key: str) -> DecodedMedia | None:
    """Frames that were decoded before."""
    found = store.read(frames_name(key))
    if found is None:
        return None
    tensors = found[0]
    kinds: list[Kind] = found[1]
    return DecodedMedia([(kind, tensors[f"pixels.{number}"], tensors[f"seconds.{number}"])
                         for number, kind in enumerate(kinds)], key, from_disk=True)


def _crc32(tensors: Mapping[str, torch.Tensor], about: str) -> int:
    value = zlib.crc32(about.encode())
    for name in sorted(tensors):
        value = zlib.crc32(name.encode(), value)
        value = zlib.crc32(_raw(tensors[name]), value)
    return value


def _raw(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor on the CPU."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data
