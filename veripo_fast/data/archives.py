"""Media inside plain tar archives (WebDataset shards), named by a path through the archive: `shard-000.tar/000123.mp4`.

Members are read where they lie and nothing is unpacked: an offset and a size are all that FFmpeg's `subfile` protocol
needs. The index of an archive is read once, kept until the archive changes, and shared by all threads.
"""

from __future__ import annotations

import re
import tarfile
import threading
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import BinaryIO, cast

from veripo_fast.errors import MediaError

VIDEO_SUFFIXES = frozenset({".3gp", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts",
                            ".ogv", ".ts", ".webm", ".wmv"})
"""Files and members that are taken for videos, whatever they hold."""
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
MAX_MEMBERS = 1 << 20
"""Members in the indexes that are kept, about 250 bytes each; the least recently used archives are forgotten."""
MOST_HEADER = 1 << 20
"""Bytes of an extended header: long names and attributes. A header may claim gigabytes, which would be read at once."""
_BLOCK = tarfile.BLOCKSIZE
_ARCHIVE = re.compile(r"\.(?:tar|tgz|tbz2?|txz|tzst|tar\.(?:gz|bz2|xz|zst|lz4))(?=/|$)", re.IGNORECASE)
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd",
               b"\x04\x22\x4d\x18": "lz4"}


@dataclass(frozen=True)
class Member:
    """Where a file lies inside an archive."""

    archive: str
    """Resolved path."""
    offset: int
    """Of its first byte, in bytes."""
    size: int
    """In bytes."""
    mtime_ns: int
    """Modification time of the archive, in nanoseconds."""

    def read(self, size: int | None = None) -> bytes:
        """Its content, or the first `size` bytes of it. Raises OSError, or MediaError where the archive was cut off."""
        wanted = self.size if size is None else min(size, self.size)
        with Path(self.archive).open("rb") as file:
            file.seek(self.offset)
            content = file.read(wanted)
        if len(content) < wanted:
            raise MediaError(f"{self.archive} has become shorter since its index was read")
        return content


@dataclass(frozen=True)
class Index:
    """What an archive holds."""

    places: dict[str, tuple[int, int]]
    """Name of a member -> offset and size in bytes; an offset of -1 marks links, folders and sparse files."""
    problem: str
    """Why reading stopped before the end, in one sentence; empty where it did not."""

    @cached_property
    def by_file_name(self) -> dict[str, str]:
        """File name -> the name of the only member that has it; empty where several have."""
        names: dict[str, str] = {}
        for name in self.places:
            short = PurePosixPath(name).name
            names[short] = "" if short in names else name
        return names


def is_archive(path: str) -> bool:
    """Whether a path ends like an archive, compressed ones included (which `read_index` refuses by name)."""
    return any(match.end() == len(path) for match in _ARCHIVE.finditer(path))


def archive_of(path: str) -> str:
    """The part of a path up to the first name that ends like an archive; empty where there is none."""
    match = _ARCHIVE.search(path)
    return path[:match.end()] if match else ""


def locate(path: str) -> Member | None:
    """Where the medium of a path lies inside an archive; None for a path that leads through none.

    Raises:
        MediaError: the archive cannot be read or does not hold the member as a regular file.
    """
    try:
        for match in _ARCHIVE.finditer(path):
            archive, name = Path(path[:match.end()]), _plain(path[match.end():])
            if name and archive.is_file():
                return _member(archive.resolve(), name, path)
    except OSError as error:
        raise MediaError(f"{path} cannot be read: {error.strerror or error}") from error
    return None


def ffmpeg_source(path: str) -> str:
    """What FFmpeg opens for a path: a `file:` URL, or for a member the URL of a part of its archive.

    A bare path would be a URL to FFmpeg where it has a colon: `http:/host/x.mp4` a download, `cam:1.mp4` an error.

    Raises:
        MediaError: as `locate`.
    """
    member = locate(path)
    if member is None:
        return f"file:{path}"
    return f"subfile,,start,{member.offset},end,{member.offset + member.size},,:file:{member.archive}"


def find_member(archive: str, name: str) -> str:
    """Path of the member that is named so, or that alone has this file name; empty when there is none.

    Raises:
        MediaError: as `read_index`.
    """
    found = member_of(read_index(Path(archive).resolve()), name)
    return f"{archive}/{found}" if found else ""


def member_of(index: Index, name: str) -> str:
    """The member that is named so, or that alone has this file name; empty when there is none."""
    wanted = _plain(name)
    return wanted if wanted in index.places else index.by_file_name.get(wanted, "")


def _member(archive: Path, name: str, path: str) -> Member:
    index = read_index(archive)
    place = index.places.get(name)
    if place is None:
        raise MediaError(f"{path} does not exist: {index.problem or f'{archive} has no such member'}")
    offset, size = place
    if offset < 0:
        raise MediaError(f"{path} is no regular file (a link, a folder or a sparse file inside its archive)")
    return Member(str(archive), offset, size, archive.stat().st_mtime_ns)


def _plain(name: str) -> str:
    """Without `./`, `//` and slashes at the ends, as archives and paths are made with and without."""
    return "/".join(part for part in name.split("/") if part not in ("", "."))


# -- indexes ----------------------------------------------------------------------------------------------------------

_LOCK = threading.Lock()
_INDEXES: OrderedDict[tuple[str, int, int], Future[Index]] = OrderedDict()


def read_index(archive: Path) -> Index:
    """The index of an archive as it is now, from memory when it was read before.

    Raises:
        MediaError: it cannot be read or is no plain tar; one that is cut off or damaged later is read up to there.
    """
    try:
        status = archive.stat()
        return _kept_index(archive, (str(archive), status.st_mtime_ns, status.st_size))
    except OSError as error:
        raise MediaError(f"{archive} cannot be read: {error.strerror or error}") from error


def _kept_index(archive: Path, key: tuple[str, int, int]) -> Index:
    """Read by the first thread that asks; the others wait for it."""
    with _LOCK:
        known = _INDEXES.get(key)
        future: Future[Index] = known or Future()
        _INDEXES[key] = future
        _INDEXES.move_to_end(key)
    if known is None:
        try:
            with archive.open("rb") as file:
                future.set_result(_read(file, archive, key[2]))
        except BaseException as error:  # handed to the threads that wait
            with _LOCK:
                _INDEXES.pop(key, None)
            future.set_exception(error)
        _forget()
    return future.result()


def _forget() -> None:
    """Drop the least recently used indexes until the rest fits, the newest stays."""
    with _LOCK:
        sizes = {key: len(future.result().places) for key, future in _INDEXES.items() if future.done()}
        total = sum(sizes.values())
        for key, size in list(sizes.items())[:-1]:
            if total <= MAX_MEMBERS:
                return
            del _INDEXES[key]
            total -= size


def _read(file: BinaryIO, archive: Path, size: int) -> Index:
    """All members in one pass over the headers; contents are not touched."""
    head = file.read(_BLOCK)
    for magic, kind in _COMPRESSED.items():
        if head.startswith(magic):
            raise MediaError(f"{archive} is compressed ({kind}), and media are read in place: make it a plain tar")
    if not head:
        raise MediaError(f"{archive} is empty (0 bytes)")
    file.seek(0)
    places: dict[str, tuple[int, int]] = {}
    last = ""
    try:
        with tarfile.open(fileobj=cast(BinaryIO, _Headers(file)), mode="r:") as tar:
            for info in _infos(tar):
                last, end = info.name, info.offset_data + info.size
                regular = info.isreg() and not info.issparse()
                if end < info.offset_data:  # a negative size, which would lead back to this header for ever
                    return Index(places, f"{archive} is damaged at its member {last}")
                if regular and end > size:
                    return Index(places, f"{archive} is truncated: it ends inside its member {last}")
                if name := _plain(last):
                    places[name] = (info.offset_data, info.size) if regular else (-1, 0)
            file.seek(tar.offset)
            block = file.read(_BLOCK)
    except (tarfile.TarError, ValueError, OverflowError) as error:
        if not places:
            raise MediaError(f"{archive} is not a tar archive ({error})") from error
        return Index(places, f"{archive} is truncated or damaged after its member {last} ({error})")
    if len(block) < _BLOCK:
        return Index(places, f"{archive} is truncated: it has no end mark after its member {last}")
    return Index(places, f"{archive} is damaged after its member {last}" if any(block) else "")


class _Headers:
    """The file as `tarfile` reads its headers; it asks for a long name as a whole, however long the header says."""

    def __init__(self, file: BinaryIO) -> None:
        self.seek, self.tell, self._read = file.seek, file.tell, file.read

    def read(self, size: int) -> bytes:
        if size > MOST_HEADER:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._read(size)


def _infos(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Members one by one; `tarfile` would keep them all, a kilobyte each."""
    while (info := tar.next()) is not None:
        tar.members.clear()  # type: ignore[attr-defined]  # typeshed lacks it
        yield info
