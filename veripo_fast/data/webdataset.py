"""Samples of a WebDataset archive: the members that share a key, KEY.json beside KEY.mp4."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from veripo_fast.data.archives import IMAGE_SUFFIXES, VIDEO_SUFFIXES, read_index
from veripo_fast.types import Image, Media, Video


@dataclass
class Sample:
    """Members of one key: the name up to the first dot of its last part."""

    key: str
    record: str | None = None
    """Name of the member KEY.json."""
    videos: list[str] = field(default_factory=list)
    """Names of members, in the order of the archive."""
    images: list[str] = field(default_factory=list)

    def media(self, archive: str) -> list[Media]:
        """The videos; the images where there is no video, beside which they are thumbnails."""
        return [Video(f"{archive}/{name}") for name in self.videos] or [
            Image(f"{archive}/{name}") for name in self.images]


def samples(archive: str) -> tuple[list[Sample], str]:
    """Samples in the order of the archive, and why it could not be read to its end, or an empty string.

    Hidden files and members of other kinds do not count.

    Raises:
        MediaError: as `read_index`.
    """
    found: dict[str, Sample] = {}
    index = read_index(Path(archive).resolve())
    for name, (offset, _) in index.places.items():
        file_name = PurePosixPath(name)
        key = str(file_name.with_name(file_name.name.partition(".")[0])) if file_name.name[0] != "." else ""
        if not key or offset < 0:
            continue
        sample = found.setdefault(key, Sample(key))
        suffix = file_name.suffix.lower()
        if name.lower() == f"{key.lower()}.json":
            sample.record = name
        elif suffix in VIDEO_SUFFIXES:
            sample.videos.append(name)
        elif suffix in IMAGE_SUFFIXES:
            sample.images.append(name)
    return [sample for sample in found.values() if sample.record or sample.videos or sample.images], index.problem
