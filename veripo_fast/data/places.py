"""Where the media of a data file lie: what a record says of a medium -> the path of a file, without looking it up.

A look at the file system for each of a million records takes minutes on a network mount, so a file that is not there is
found when it is loaded. `missing` looks.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import re
from pathlib import Path
from urllib.parse import unquote

from veripo_fast.config.inputs import DataConfig
from veripo_fast.data.archives import Index, is_archive, locate, member_of, read_index
from veripo_fast.data.records import RecordError, short
from veripo_fast.data.remote import is_remote, local_path
from veripo_fast.errors import MediaError
from veripo_fast.run.atomic import atomic_write_bytes
from veripo_fast.types import Media, Video

_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_DATA_URL = re.compile(r"data:(?:video|image)/[\w.+-]+;base64,", re.IGNORECASE)
_BASE64_HEADS = ("/9j/", "iVBORw0KGgo", "UklGR", "R0lGOD", "AAAA")
"""What JPEG, PNG, WebP, GIF and MP4 begin with in base64."""
_SHORTEST_BASE64 = 256
"""Characters; a shorter text is a path."""


class MediaPlaces:
    """Media of one data file: relative paths start at `data.media_root` or its folder; in an archive, first inside."""

    def __init__(self, file: str, config: DataConfig) -> None:
        base = config.media_root or os.path.dirname(file)  # noqa: PTH120  - pathlib takes 5 us for each record
        self._base = "" if base in ("", ".") else (base if is_remote(base) else str(Path(base))).rstrip("/") + "/"
        self._root = (self._base if is_remote(base) else str(Path(base or ".").resolve())) if config.confine else ""
        self._archive = file if is_archive(file) else ""
        self._index: Index | None = read_index(Path(local_path(file)).resolve()) if self._archive else None

    def __call__(self, source: str | bytes) -> str:
        """The path of a medium; embedded bytes are kept in the user's cache by content.

        Raises:
            RecordError: it is neither a path nor the bytes of a medium.
        """
        if isinstance(source, bytes):
            return cached(source)
        if "\0" in source or "\n" in source[:_SHORTEST_BASE64]:
            raise RecordError(f"names a file whose path holds a line break or a zero byte: {short(source)}")
        if ":" in source:
            if match := _DATA_URL.match(source):
                return cached(_decoded(source[match.end():]))
            if is_remote(source):
                return self._confined(source)
            source = _local(source)
        elif len(source) >= _SHORTEST_BASE64 and source.startswith(_BASE64_HEADS) and not source.startswith("/9j/../"):
            return cached(_decoded(source))
        if self._index is not None and (name := member_of(self._index, source)):
            return f"{self._archive}/{name}"
        while source[:2] == "./":
            source = source[2:]
        if not source.startswith("/"):
            source = self._base + source
        if is_remote(self._base) and source.startswith(self._base):
            return self._confined(source)
        clean = "//" not in source and "/./" not in source
        return self._confined(source if clean else str(Path(source)))

    def _confined(self, path: str) -> str:
        """The path, unless data.confine is set and it leads out of the data root, by a link or otherwise."""
        if not self._root:
            return path
        if is_remote(path) or is_remote(self._root):
            inside = path.startswith(self._root) and "/../" not in path
        else:
            inside = Path(os.path.realpath(path)).is_relative_to(self._root)
        if not inside:
            raise RecordError(f"media file {path} lies outside of {self._root}, and data.confine keeps media inside",
                              path)
        return path


def _local(source: str) -> str:
    """The path of a file:// address; RecordError for any other."""
    if source[:7].lower() == "file://":
        path = source[7:].removeprefix("localhost") if source[7:].startswith("localhost/") else source[7:]
        return path if "%" not in path or os.path.exists(path) else unquote(path)  # noqa: PTH110
    if _SCHEME.match(source) or source[:5].lower() == "data:":
        raise RecordError("media must be local files, not URLs", source[:200])
    return source


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RecordError(f"holds a medium in base64 that cannot be read: {error}") from error


def cached(content: bytes) -> str:
    """The path of a file in the user's cache that holds the content."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "veripo-fast" / "media"
    path = root / hashlib.blake2b(content, digest_size=16).hexdigest()
    try:
        if not path.exists():
            root.mkdir(parents=True, exist_ok=True)
            atomic_write_bytes(path, content)
    except OSError as error:
        raise RecordError(f"embeds a medium, and {root} cannot be written ({error.strerror}): let XDG_CACHE_HOME name "
                          "another folder") from error
    return str(path)


def missing(medium: Media) -> tuple[str, str] | None:
    """(path, reason) of the first file of a medium that is not there; None where all are."""
    for path in (medium.frames if isinstance(medium, Video) else ()) or (medium.path,):
        if is_remote(path):
            continue  # a request for each; it is named when it is loaded
        try:
            if locate(path) is None and not Path(path).exists():
                return path, f"media file {path} does not exist"
        except MediaError as error:
            return path, str(error)
        except OSError as error:
            return path, f"media file {path:.300} cannot be read: {error.strerror or error}"
    return None
