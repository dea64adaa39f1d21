"""Frames that are a picture file each, as a list or a folder -> the frames that the contract takes of them.

They are taken as a video of `frame_fps` pictures per second, so times, parts and sampling mean what they mean for one.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import torch
from veripo_kernels import resize_frames

from veripo_fast.config.inputs import VideoConfig
from veripo_fast.data.archives import IMAGE_SUFFIXES
from veripo_fast.errors import MediaError
from veripo_fast.types import Frames, Video
from veripo_fast.video.buffers import room
from veripo_fast.video.contract import frame_indices, resized_size, window
from veripo_fast.video.deadline import check_deadline

FRAME_FPS = 2.0
"""Pictures per second where nothing says it, as in qwen-vl-utils."""
_NUMBER = re.compile(r"(\d+)")


def pictures_of(video: Video) -> tuple[str, ...]:
    """The picture files of a video that is a list or a folder of them, in order; empty for a video file.

    A folder is sorted as people count: 2.jpg before 10.jpg.

    Raises:
        MediaError: the folder may not be read or holds no picture.
    """
    if video.frames:
        return video.frames
    folder = Path(video.path)
    try:
        if not folder.is_dir():
            return ()
        names = [file.name for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES
                 and not file.name.startswith(".")]
    except OSError as error:
        raise MediaError(f"{video.path} cannot be read: {error.strerror or error}") from error
    if not names:
        raise MediaError(f"{video.path} is a directory without a picture, neither a video nor a folder of frames")
    return tuple(str(folder / name) for name in sorted(names, key=_counted))


def _counted(name: str) -> list[tuple[int, str]]:
    return [(int(part[:300]), part) if part.isdecimal() else (-1, part) for part in _NUMBER.split(name)]


def wanted_pictures(video: Video, count: int, contract: VideoConfig) -> tuple[range, list[int], list[float]]:
    """The part of a video, positions of its wanted pictures, and the times of all.

    Raises:
        MediaError: the part holds no picture.
    """
    fps = video.frame_fps or FRAME_FPS
    seconds = [number / fps for number in range(count)]
    part = window(seconds, video.start_seconds, video.end_seconds)
    if not part:
        raise MediaError(f"{video.path} has no frame from {video.start_seconds or 0:g} s on: its {count} pictures last "
                         f"{count / fps:.2f} s at {fps:g} per second")
    return part, [part.start + index for index in frame_indices(seconds[part.start:part.stop], contract)], seconds


def decode_pictures(video: Video, pictures: tuple[str, ...], contract: VideoConfig, factor: int,
                    load: Callable[[str], torch.Tensor], deadline: float) -> Frames:
    """The pictures that the contract takes, one after the other.

    Args:
        load: a path -> uint8 [1, 3, H, W].

    Raises:
        MediaError: one of them cannot be read, or has another size than the first.
    """
    part, wanted, seconds = wanted_pictures(video, len(pictures), contract)
    pixels: torch.Tensor | None = None
    stored = (0, 0)
    for place, position in enumerate(wanted):
        check_deadline(pictures[position], deadline)
        picture = load(pictures[position])
        if pixels is None:
            stored = (picture.shape[2], picture.shape[3])
            try:
                size = resized_size(*stored, factor, contract.min_pixels, contract.max_pixels)
            except ValueError as error:
                raise MediaError(f"{pictures[position]} cannot be resized: {error}") from error
            pixels = room((len(wanted), 3, *size), torch.uint8)
        elif (picture.shape[2], picture.shape[3]) != stored:
            raise MediaError(f"{pictures[position]} is {picture.shape[3]}x{picture.shape[2]}, and the frames before it "
                             f"are {stored[1]}x{stored[0]}")
        resize_frames(picture, *size, out=pixels[place:place + 1])
    assert pixels is not None
    times = [seconds[position] - seconds[part.start] for position in wanted]
    return Frames(pixels, torch.tensor(times, dtype=torch.float64), tuple(wanted), "pillow")
