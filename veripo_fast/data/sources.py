"""What the DATA of `veripo inspect` and `veripo precompute` names: data files, videos, archives, folders of both."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from veripo_fast.config.inputs import DataConfig
from veripo_fast.data.archives import VIDEO_SUFFIXES, is_archive
from veripo_fast.data.prompts import load_prompts, read_prompts
from veripo_fast.data.skipped import Skipped
from veripo_fast.data.webdataset import samples
from veripo_fast.errors import DataError, MediaError
from veripo_fast.types import Media, Prompt, Video

Item = TypeVar("Item")


@dataclass
class Sources:
    """DATA, before its data files are read."""

    media: list[Media] = field(default_factory=list)
    """Distinct media that are named alone, or stand in folders and archives."""
    files: list[str] = field(default_factory=list)
    """Data files, and archives that are named and hold records."""
    broken: list[Skipped] = field(default_factory=list)
    """Archives of folders that cannot be read, or not to their end."""
    other_files: int = 0
    """Files of the folders that are neither videos nor archives by name."""


def find_sources(data: Sequence[Path]) -> Sources:
    """Look through DATA in order. Of a folder, data files are not read, nor are the records of its archives.

    Raises:
        DataError: a path does not exist, or an archive that is named cannot be read.
    """
    sources = Sources()
    for path in data:
        try:
            is_folder = stat.S_ISDIR(path.stat().st_mode)
        except FileNotFoundError:
            raise DataError(f"{path} does not exist") from None
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
        for file in _inside(path, sources) if is_folder else [path]:
            if is_archive(str(file)):
                _add_archive(str(file), sources, named=file is path)
            elif file.suffix.lower() in VIDEO_SUFFIXES:
                sources.media.append(Video(str(file)))
            elif file is path:
                sources.files.append(str(file))
            else:
                sources.other_files += 1
    sources.media = list(dict.fromkeys(sources.media))
    return sources


def _inside(folder: Path, sources: Sources) -> list[Path]:
    """The files of a folder and the folders in it, sorted, hidden ones left out; a folder that may not be read is
    named among the broken."""
    def refused(error: OSError) -> None:
        sources.broken.append(Skipped(str(error.filename), str(error.filename),
                                      f"the folder {error.filename} cannot be read: {error.strerror or error}"))

    files: list[Path] = []
    for place, _, names in os.walk(folder, onerror=refused, followlinks=False):
        for file in (Path(place, name) for name in names if not name.startswith(".")):
            try:
                if stat.S_ISREG(file.stat().st_mode):
                    files.append(file)
            except FileNotFoundError:  # a link that leads nowhere
                continue
            except OSError as error:
                refused(error)
                break  # the others of this folder neither
    return sorted(files)


def read_listed_prompts(sources: Sources, config: DataConfig) -> tuple[list[Prompt], list[Skipped]]:
    """Prompts of the data files, and what was skipped.

    Raises:
        DataError: a data file is unreadable as a whole, or there is neither a usable record nor another medium.
    """
    if not sources.files:
        return [], []
    return (read_prompts if sources.media else load_prompts)(sources.files, config)


def check_some(found: Sequence[object], data: Sequence[Path]) -> None:
    """DataError when nothing was found."""
    if not found:
        raise DataError(f"{', '.join(map(str, data))} holds no video (a folder is searched for .tar archives and files "
                        f"that end in {', '.join(sorted(VIDEO_SUFFIXES))})")


def evenly(items: list[Item], limit: int | None) -> list[Item]:
    """At most `limit` items, evenly spread (None: all)."""
    count = len(items) if limit is None else min(limit, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def _add_archive(archive: str, sources: Sources, *, named: bool) -> None:
    try:
        found, problem = samples(archive)
    except MediaError as error:
        if named:
            raise DataError(str(error)) from error
        found, problem = [], str(error)
    as_data = named and any(sample.record for sample in found)
    if as_data:
        sources.files.append(archive)
    elif problem:
        sources.broken.append(Skipped(archive, archive, problem))
    sources.media += [medium for sample in found for medium in sample.media(archive)]
