"""Data files and media behind hf:// and s3://, through fsspec: copied once into the user's cache, when they are needed.

A copy is kept by its address. Whoever replaces an object under its old name deletes the copy.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from veripo_fast.data.archives import archive_of
from veripo_fast.errors import DataError, MediaError
from veripo_fast.types import Media, Video

_REMOTE = re.compile(r"(?:hf|s3)://")
AnyMedium = TypeVar("AnyMedium", bound=Media)


def is_remote(path: str) -> bool:
    """Whether a path is the address of an object in a store."""
    return _REMOTE.match(path) is not None


def local_path(path: str) -> str:
    """The path itself; of an address, that of its copy. A member of an archive is a path into the archive's copy.

    Raises:
        MediaError: it cannot be copied.
    """
    if not is_remote(path):
        return path
    archive = archive_of(path)
    return _copied(archive) + path[len(archive):] if archive else _copied(path)


def local_files(files: Iterable[str]) -> dict[str, str]:
    """Data files as they are named -> where they, or their copies, lie. Raises DataError: one cannot be copied."""
    try:
        return {file: local_path(file) for file in files}
    except MediaError as error:
        raise DataError(f"data file {error}") from error


def local_medium(medium: AnyMedium) -> AnyMedium:
    """The medium with local paths. Raises MediaError."""
    if isinstance(medium, Video) and medium.frames and any(map(is_remote, medium.frames)):
        frames = tuple(local_path(frame) for frame in medium.frames)
        return replace(medium, path=frames[0], frames=frames)
    return replace(medium, path=local_path(medium.path)) if is_remote(medium.path) else medium


def _copied(address: str) -> str:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "veripo-fast" / "remote"
    folder = root / hashlib.blake2b(address.encode(), digest_size=16).hexdigest()
    path = folder / address.rpartition("/")[2]
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        _copy(address, path)
    return str(path)


def _copy(address: str, path: Path) -> None:
    """Under a name of its own until it is whole: threads and ranks may want the same object."""
    try:
        import fsspec
    except ImportError as error:
        raise MediaError(f"{address} is read through fsspec: pip install 'veripo-fast[remote]'") from error
    scheme, _, rest = address.partition("://")
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".tmp-")
    os.close(handle)
    try:
        fsspec.filesystem(scheme).get_file(rest, temporary)
        Path(temporary).replace(path)
    except ImportError as error:
        raise MediaError(f"{address} cannot be read: {error}; pip install 'veripo-fast[remote]'") from error
    except FileNotFoundError as error:
        raise MediaError(f"{address} does not exist") from error
    except (OSError, ValueError) as error:
        raise MediaError(f"{address} cannot be copied: {str(error).splitlines()[0] if str(error) else error!r}"
                         ) from error
    finally:
        Path(temporary).unlink(missing_ok=True)
