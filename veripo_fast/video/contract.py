"""The sampling contract as pure functions: which frames of a video, and how large.

Times are seconds, T is the number of source frames. Nothing here opens a file, so policy, engine and evaluation can
ask the same question and must get the same answer.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import asdict, replace

from veripo_fast.config.inputs import VideoConfig
from veripo_fast.types import Media, Video

TEMPORAL_PATCH = 2
"""Qwen towers read frames in pairs; an odd count is filled by repeating the last frame (see patches.patchify)."""
MAX_ASPECT_RATIO = 200
_TIE = 1e-3
"""Share of a frame interval below which two times count as equal: more than rounding of time stamps in float64."""


def contract_of(medium: Media, contract: VideoConfig) -> VideoConfig:
    """The contract with what the record asks for this medium in its place, as qwen-vl-utils has it.

    Where a bound that the record gives contradicts one of the contract, max_frames wins over min_frames, and the
    record's bound of pixels moves the other one. Bounds of frames also hold a `num_frames` of the contract.
    """
    if medium.sampling is None:
        return contract
    asked = {name: value for name, value in asdict(medium.sampling).items() if value is not None}
    if "fps" in asked:
        asked["num_frames"] = None
    elif "num_frames" in asked:
        asked["fps"] = None
    elif contract.num_frames is not None:
        least = max(contract.num_frames, asked.get("min_frames", 1))
        asked["num_frames"] = min(least, asked.get("max_frames", least))
    most = asked.get("max_frames", contract.max_frames)
    asked["max_frames"], asked["min_frames"] = most, min(asked.get("min_frames", contract.min_frames), most)
    if asked.get("min_pixels", 0) > asked.get("max_pixels", contract.max_pixels):
        asked["max_pixels"] = int(asked["min_pixels"] * 1.05)
    asked["min_pixels"] = min(asked.get("min_pixels", contract.min_pixels),
                              asked.get("max_pixels", contract.max_pixels))
    return replace(contract, **asked)


def most_frames(medium: Media, contract: VideoConfig) -> int:
    """The most frames that are taken of a medium, rounded up to the pairs that the tower reads."""
    contract = contract_of(medium, contract)
    count = (contract.num_frames or contract.max_frames) if isinstance(medium, Video) else 1
    return -(-count // TEMPORAL_PATCH) * TEMPORAL_PATCH


def most_pixels(media: Sequence[Media], contract: VideoConfig) -> int:
    """Bound on the pixels of all frames that are taken of some media."""
    return sum(most_frames(medium, contract) * contract_of(medium, contract).max_pixels for medium in media)


def frame_count(available: int, duration_seconds: float, contract: VideoConfig) -> int:
    """How many of `available` frames are taken from a video of this duration.

    `num_frames`: that many, or all where the video has fewer. `fps`: duration * fps rounded down to an even number,
    then held within min_frames and max_frames and at most `available`; the count is even wherever those bounds allow.

    Raises:
        ValueError: no frame is available.
    """
    if available < 1:
        raise ValueError(f"available must be at least 1, got {available}")
    if contract.num_frames is not None:
        return min(contract.num_frames, available)
    assert contract.fps is not None
    pairs = math.floor(duration_seconds * contract.fps / TEMPORAL_PATCH + 1e-6)
    most = min(contract.max_frames, available)
    count = min(max(pairs * TEMPORAL_PATCH, contract.min_frames), most)
    if count % TEMPORAL_PATCH and count > contract.min_frames:
        return count - 1
    if count % TEMPORAL_PATCH and count < most:
        return count + 1
    return count


def frame_indices(pts_seconds: Sequence[float], contract: VideoConfig) -> tuple[int, ...]:
    """Which frames are taken, as positions in `pts_seconds` (presentation times in ascending order).

    Times are spread evenly from the first to the last frame, both included, and the nearest frame to each is taken
    (the earlier one of two equally near). With a constant frame rate this is linspace(0, T - 1, count) rounded; with a
    variable one it is even in time. No frame is taken twice: where a frame stays on screen for long, its later claims
    pass on to the next frames.
    """
    total = len(pts_seconds)
    if total == 0:
        raise ValueError("pts_seconds must hold at least one time")
    count = frame_count(total, duration_seconds(pts_seconds), contract)
    span = pts_seconds[-1] - pts_seconds[0]
    tie = _TIE * span / max(total - 1, 1)
    wanted = [pts_seconds[0] + span * i / max(count - 1, 1) for i in range(count)]
    return _distinct([_nearest(pts_seconds, time, tie) for time in wanted], total)


def duration_seconds(pts_seconds: Sequence[float]) -> float:
    """Time from the first frame to the end of the last, taking the last to stay for the mean interval."""
    total = len(pts_seconds)
    return (pts_seconds[-1] - pts_seconds[0]) * total / (total - 1) if total > 1 else 0.0


def window(pts_seconds: Sequence[float], start_seconds: float | None, end_seconds: float | None) -> range:
    """Positions of the frames on screen at some time in [start, end), seconds from the first frame.

    Empty when the part lies behind the last frame or start is not before end.
    """
    first, stop = 0, len(pts_seconds)
    tie = _TIE * duration_seconds(pts_seconds) / max(stop, 1)
    if start_seconds is not None:
        if not start_seconds >= 0 or 0 < start_seconds >= duration_seconds(pts_seconds):  # NaN is no time
            return range(0)
        first = max(bisect_right(pts_seconds, pts_seconds[0] + start_seconds + tie) - 1, 0)
    if end_seconds is not None:
        if not end_seconds > (start_seconds or 0.0):
            return range(0)
        stop = bisect_left(pts_seconds, pts_seconds[0] + end_seconds - tie)
    return range(first, max(stop, first + 1))


def resized_size(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """(height, width) in pixels that the policy sees: multiples of `factor` (patch * merge), aspect ratio kept as well
    as that allows, area within [min_pixels, max_pixels] unless a side is already down to one factor.

    Raises:
        ValueError: sides below 1, or one side more than 200 times the other.
    """
    if min(height, width) < 1 or factor < 1:
        raise ValueError(f"height, width and factor must be at least 1, got {height}, {width}, {factor}")
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise ValueError(f"{width}x{height} is more than {MAX_ASPECT_RATIO} times as long as it is wide")
    upscale = max(factor / min(height, width), 1.0)
    height, width = int(height * upscale), int(width * upscale)
    new_height, new_width = (round(side / factor) * factor for side in (height, width))
    if new_height * new_width > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        new_height, new_width = (max(math.floor(side / shrink / factor), 1) * factor for side in (height, width))
    elif new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        new_height, new_width = (math.ceil(side * grow / factor) * factor for side in (height, width))
    return new_height, new_width


def _nearest(times: Sequence[float], time: float, tie: float) -> int:
    after = min(bisect_left(times, time), len(times) - 1)
    if after == 0:
        return 0
    return after - 1 if time - times[after - 1] <= times[after] - time + tie else after


def _distinct(indices: list[int], total: int) -> tuple[int, ...]:
    """The nearest strictly increasing sequence within [0, total): push up from the left, then down from the right."""
    for i in range(1, len(indices)):
        indices[i] = max(indices[i], indices[i - 1] + 1)
    for i in reversed(range(len(indices))):
        indices[i] = min(indices[i], total - len(indices) + i)
    return tuple(indices)
