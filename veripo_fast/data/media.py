"""The media of a record: where they are named, and what a record asks for each.

An entry is a path, a list of frames, or a mapping as in chat parts, qwen-vl-utils and `datasets`. A mapping is read
whole: a key in it that is not known is refused by name.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from veripo_fast.data.archives import IMAGE_SUFFIXES
from veripo_fast.data.keys import END_KEYS, MEDIA_KEYS, REFUSED_SAMPLING, SAMPLING_KEYS, START_KEYS, KeyPlan, Kind
from veripo_fast.data.records import RecordError, short
from veripo_fast.types import Image, Media, Message, Sampling, Video

Locate = Callable[[str | bytes], str]
"""Turns what a record says of a medium (a path, or the bytes themselves) into the path of a file."""
MEDIA_PARTS = ("video", "image", "video_url", "image_url")
KINDS: dict[str, Kind] = {"video": "video", "videos": "video", "image": "image", "images": "image"}
_IMAGES = tuple(IMAGE_SUFFIXES)
_CLOCK = re.compile(r"(?:(?:(\d+):)?(\d{1,2}):)?(\d+(?:\.\d*)?)\s*s?")


def declared_kind(row: dict[str, Any]) -> Kind | str | None:
    """What `data_type` says: video, image, text, or None where there is none.

    Raises:
        RecordError: it says something else.
    """
    declared = row.get("data_type")
    if not declared:
        return None
    kind = KINDS.get(declared, declared) if isinstance(declared, str) else None
    if kind not in ("video", "image", "text"):
        raise RecordError(f"data_type must be video, image or text, got {short(declared)}")
    return kind


def listed_media(row: dict[str, Any], plan: KeyPlan, locate: Locate) -> dict[Kind, list[Media]]:
    """Media named beside the question, by kind, in order; a file that two keys name counts once.

    Raises:
        RecordError: an entry cannot be understood.
    """
    media: dict[Kind, list[Media]] = {"video": [], "image": []}
    for key in plan.media_keys:
        value = row[key]
        if value == "" or value == []:
            continue
        kind = MEDIA_KEYS[key] or _kind_of_path(row)
        fresh = [medium(kind, entry, locate) for entry in _entries(key, value)]
        media[kind] = merged(media[kind], fresh) if media[kind] else fresh
    return media


def _entries(key: str, value: Any) -> list[Any]:
    if key == "frames":
        return [value]
    if not isinstance(value, list):
        return [value]
    frames = key == "video" and len(value) > 1 and all(is_picture(entry) for entry in value)
    return [value] if frames else value


def is_picture(value: Any) -> bool:
    """Whether a path ends like a picture's."""
    return isinstance(value, str) and value.lower().endswith(_IMAGES)


def merged(known: Sequence[Media], fresh: Sequence[Media]) -> list[Media]:
    """Both, each file once: the entry that says more of it (times, sampling) stands for both."""
    result = list(known)
    for item in fresh:
        same = [place for place, other in enumerate(known) if same_file(other, item)]
        if not same:
            result.append(item)
        elif not _says_more(result[same[0]]):
            result[same[0]] = item
        elif _says_more(item) and item != result[same[0]]:
            result.append(item)
    return result


def same_file(one: Media, other: Media) -> bool:
    return one.path == other.path or os.path.normpath(one.path) == os.path.normpath(other.path)


def _says_more(item: Media) -> bool:
    return item != type(item)(item.path)


def _kind_of_path(row: dict[str, Any]) -> Kind:
    declared = declared_kind(row)
    if declared == "video" or declared == "image":
        return "video" if declared == "video" else "image"
    if declared:
        raise RecordError(f"data_type is {declared}, and path names {short(row['path'])}")
    return "image" if is_picture(row["path"]) else "video"


def with_times(row: dict[str, Any], beside: Sequence[str], messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The messages, their only video with the times that stand beside it.

    Raises:
        RecordError: something else stands beside it, there is not one video, or it has times of its own.
    """
    for key in beside:
        if key not in START_KEYS + END_KEYS:
            raise RecordError(f"holds {key} beside its media: put it into the entry of one, as in videos: "
                              f"[{{video: .., {key}: ..}}], or list {key} in data.ignore_keys")
    videos = [part for message in messages for part in message.parts if isinstance(part, Video)]
    if len(videos) != 1:
        raise RecordError(f"holds {beside[0]} beside {len(videos)} videos: put it into the entry of one of them")
    if videos[0].start_seconds is not None or videos[0].end_seconds is not None:
        raise RecordError(f"holds {beside[0]} beside a video that has times of its own")
    start, end = _times(row)
    timed = replace(videos[0], start_seconds=start, end_seconds=end)
    return tuple(Message(message.role, tuple(timed if isinstance(part, Video) else part for part in message.parts))
                 for message in messages)


# -- one entry --------------------------------------------------------------------------------------------------------


def medium(kind: Kind, value: Any, locate: Locate) -> Media:
    """From a path, a list of frames, or a mapping.

    Raises:
        RecordError: it cannot be understood, or holds a key that is not read.
    """
    if isinstance(value, str | bytes):
        return Video(locate(value)) if kind == "video" else Image(locate(value))
    if isinstance(value, dict):
        return _of_mapping(kind, value, locate)
    if kind == "video" and isinstance(value, list):
        return _of_frames(value, locate)
    raise RecordError(f"a {kind} must be the path of a file, got {short(value)}")


def _of_frames(frames: list[Any], locate: Locate) -> Video:
    if not frames or not all(isinstance(frame, str | bytes) and frame for frame in frames):
        raise RecordError(f"a video must be the path of a file or a list of pictures, got {short(frames)}")
    paths = tuple([locate(frame) for frame in frames])
    return Video(paths[0], frames=paths)


def _of_mapping(kind: Kind, entry: dict[str, Any], locate: Locate) -> Media:
    given = {key: value for key, value in entry.items() if value is not None}
    source = _source(kind, given)
    sampling = _sampling(kind, given)
    if kind == "image":
        if not isinstance(source, str | bytes):
            raise RecordError(f"an image must be the path of a file, got {short(entry)}")
        return Image(locate(source), sampling)
    start, end = _times(given)
    if isinstance(source, list):
        video = _of_frames(source, locate)
    elif isinstance(source, str | bytes):
        video = Video(locate(source))
    else:
        raise RecordError(f"a video must be the path of a file, got {short(entry)}")
    frame_fps = _number("sample_fps", given["sample_fps"]) if "sample_fps" in given else None
    return replace(video, start_seconds=start, end_seconds=end, sampling=sampling, frame_fps=frame_fps)


def _source(kind: Kind, given: dict[str, Any]) -> Any:
    """What names the medium; `path` beside `bytes` is only its name."""
    names = ("bytes", kind, f"{kind}_url", f"{kind}_path", "url", "path")
    read = {*names, "type", "text", "sample_fps", *SAMPLING_KEYS, *(() if kind == "image" else START_KEYS + END_KEYS)}
    for key in given:
        if key in REFUSED_SAMPLING:
            raise RecordError(f"asks for {key} of a {kind}, which is not read: use min_pixels and max_pixels, or list "
                              f"{key} in data.ignore_keys")
        if key not in read:
            raise RecordError(f"holds the key {key!r} in the entry of a {kind}, which is not read: write one of "
                              f"{', '.join((*names, *START_KEYS, *END_KEYS, *SAMPLING_KEYS))}, or list {key} in "
                              "data.ignore_keys")
    sources = [given[key].get("url") if isinstance(given[key], dict) else given[key]
               for key in names if given.get(key)]
    if not sources:
        raise RecordError(f"a {kind} must be the path of a file, got {short(given)}")
    if not isinstance(sources[0], bytes) and "bytes" not in given and any(other != sources[0] for other in sources):
        raise RecordError(f"the entry of a {kind} names two files: {short(sources[0])} and {short(sources[1])}")
    return sources[0]


def _sampling(kind: Kind, given: dict[str, Any]) -> Sampling | None:
    asked = {key: _number(key, given[key]) for key in SAMPLING_KEYS if key in given}
    if not asked:
        return None
    counts = {key: value for key, value in asked.items() if key != "fps"}
    for key, value in counts.items():
        if value != int(value):
            raise RecordError(f"{key} must be a whole number, got {short(given[key])}")
    if kind == "image" and (wrong := next((key for key in asked if not key.endswith("_pixels")), None)):
        raise RecordError(f"asks for {wrong} of an image")
    if len({"fps", "nframes", "num_frames"} & set(asked)) > 1:
        raise RecordError("asks for a video by fps and by a number of frames: one of them decides")
    if "nframes" in counts:  # even, as qwen-vl-utils rounds it
        counts["num_frames"] = max(round(counts.pop("nframes") / 2) * 2, 2)
    if "num_frames" in counts and (bound := next((key for key in ("min_frames", "max_frames") if key in asked), None)):
        raise RecordError(f"asks for {bound} beside a number of frames, where it has no effect")
    for name in ("frames", "pixels"):
        if f"min_{name}" in counts and counts[f"min_{name}"] > counts.get(f"max_{name}", math.inf):
            raise RecordError(f"asks for min_{name} {counts[f'min_{name}']:g}, above its max_{name} "
                              f"{counts[f'max_{name}']:g}")
    return Sampling(fps=asked.get("fps"), **{key: int(value) for key, value in counts.items()})


def _number(key: str, value: Any) -> float:
    """A finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise RecordError(f"{key} must be a number above 0, got {short(value)}")
    return float(value)


def _times(given: dict[str, Any]) -> tuple[float | None, float | None]:
    start, end = (_one_time(given, keys) for keys in (START_KEYS, END_KEYS))
    if end is not None and end <= (start or 0.0):
        raise RecordError(f"asks for a part of a video from {start or 0:g} s to {end:g} s, which is empty")
    return start, end


def _one_time(given: dict[str, Any], keys: tuple[str, ...]) -> float | None:
    times = {key: _seconds(key, given[key]) for key in keys if given.get(key) is not None}
    if len(set(times.values())) > 1:
        raise RecordError(f"holds {' and '.join(times)} with different times")
    return next(iter(times.values()), None)


def _seconds(key: str, value: Any) -> float:
    """Seconds as a number, or as a text: `2.5`, `2.5s`, `01:30`, `00:01:30.5`."""
    if isinstance(value, str) and (clock := _CLOCK.fullmatch(value.strip())):
        hours, minutes, seconds = (float(part or 0) for part in clock.groups())
        value = hours * 3600 + minutes * 60 + seconds
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise RecordError(f"{key} must be seconds from 0 on, or a time like 00:01:30, got {short(value)}")
    return float(value)
