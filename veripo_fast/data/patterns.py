"""Media of records that name only an id: `data.media_patterns` says where the files lie, as `{dataset}/{scene}.mp4`.

Suites are published so: VSI-Bench names a scene, Video-MME an id of YouTube, TempCompass a number. Nothing is guessed
from such keys: without a pattern a record of this kind is refused, never read as text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from veripo_fast.data.archives import IMAGE_SUFFIXES
from veripo_fast.data.keys import MEDIA_KEYS
from veripo_fast.data.records import RecordError, short

_FIELD = re.compile(r"\{([^{}]+)\}")
_IMAGES = tuple(IMAGE_SUFFIXES)


def pattern_keys(patterns: Sequence[str]) -> set[str]:
    """The keys of a record that the patterns read."""
    return {key for pattern in patterns for key in _FIELD.findall(pattern)}


def with_patterns(row: dict[str, Any], patterns: Sequence[str]) -> dict[str, Any]:
    """The record with the media that the patterns name, in their order, in place of what its own media keys say.

    A pattern is left out of a record in which one of its keys has no value, as a record may have no second medium.

    Raises:
        RecordError: the record lacks a key of a pattern, or its value is no part of a path.
    """
    paths = [path for pattern in patterns if (path := _filled(pattern, row)) is not None]
    media = {"videos": [path for path in paths if not path.lower().endswith(_IMAGES)],
             "images": [path for path in paths if path.lower().endswith(_IMAGES)]}
    return {key: value for key, value in row.items() if key not in MEDIA_KEYS} | {
        key: value for key, value in media.items() if value}


def _filled(pattern: str, row: dict[str, Any]) -> str | None:
    values: dict[str, str] = {}
    for key in _FIELD.findall(pattern):
        if key not in row:
            raise RecordError(f"lacks the key {key!r}, which data.media_patterns names in {pattern!r}")
        value = row[key]
        if value is None or value == "":
            return None
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise RecordError(f"holds {short(value)} under {key!r}, which data.media_patterns makes a path of")
        values[key] = str(value)
    return _FIELD.sub(lambda match: values[match[1]], pattern)
