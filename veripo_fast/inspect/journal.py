"""What an inspection has found so far, one JSON line per medium, so that the next call goes on where this one stopped.

A line is found again by a key of all that decides it: the medium and its file's size and time, the options, the
policy's sizes and the versions of what decodes. The journal is removed when the result is written.
"""

from __future__ import annotations

import hashlib
import threading
from dataclasses import replace
from pathlib import Path

from veripo_fast.config.schema import Config
from veripo_fast.data.archives import locate
from veripo_fast.data.remote import local_medium
from veripo_fast.errors import MediaError
from veripo_fast.inspect.corpus import Finding, PolicySizes, Target
from veripo_fast.run.inputs import versions
from veripo_fast.run.jsonlines import append_objects, parse_object
from veripo_fast.types import Media, Video
from veripo_fast.video.pictures import pictures_of

NAME = "unfinished.jsonl"


class Journal:
    """The journal in a folder of results. It is used by several threads."""

    def __init__(self, folder: Path, config: Config, sizes: PolicySizes) -> None:
        self.path = folder / NAME
        self.written = 0
        """Lines of this process."""
        self._lock = threading.Lock()
        self._options = repr((replace(config.video, workers=1), config.data.max_prompt_tokens, sizes, versions()))
        self._places = self._read_places()

    def key(self, target: Target, thumbnails: bool) -> str:
        """What a finding is stored under; empty for a medium whose file cannot be seen."""
        state = _state(target.media)
        if state is None:
            return ""
        text = repr((self._options, target, thumbnails, state))
        return hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=16).hexdigest()

    def get(self, key: str) -> Finding | None:
        """The finding of an earlier call."""
        place = self._places.get(key)
        if place is None:
            return None
        with self.path.open("rb") as file:
            file.seek(place)
            line = parse_object(file.readline())
        return None if line is None else Finding(line["row"], tuple(line["thumbnails"]))

    def add(self, key: str, finding: Finding) -> None:
        """Write a finding; it has reached the operating system when this returns. Raises OSError."""
        if key:
            with self._lock:
                append_objects(self.path, [{"key": key, "row": finding.row, "thumbnails": finding.thumbnails}])
                self.written += 1

    def known(self) -> int:
        """How many findings the journal holds, those of other options included."""
        return len(self._places) + self.written

    def remove(self) -> None:
        """Forget everything: the result is written."""
        self.path.unlink(missing_ok=True)

    def _read_places(self) -> dict[str, int]:
        """Key -> where its line begins, in bytes. Rows stay on disk: a corpus may have a million."""
        places: dict[str, int] = {}
        if not self.path.is_file():
            return places
        with self.path.open("rb") as file:
            start = 0
            for line in file:
                entry = parse_object(line)
                if entry is not None and line.endswith(b"\n") and {"key", "row", "thumbnails"} <= entry.keys():
                    places[str(entry["key"])] = start
                start += len(line)
        return places


def _state(medium: Media) -> list[tuple[int, ...]] | None:
    """Size and time of modification of a medium's files, or its place in an archive; None when one cannot be seen."""
    try:
        medium = local_medium(medium)
        member = locate(medium.path)
        if member is not None:
            return [(member.size, member.mtime_ns, member.offset)]
        files = pictures_of(medium) if isinstance(medium, Video) else ()
        statuses = [Path(file).stat() for file in files or (medium.path,)]
    except (MediaError, OSError):
        return None
    return [(status.st_size, status.st_mtime_ns) for status in statuses]
