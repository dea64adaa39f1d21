"""The decoders behind one shape: path + timeline + wanted frames -> RGB frames in order, a few at a time.

Each decodes only the groups of pictures that hold wanted frames, applies the rotation that the file asks for, and
yields chunks, so that frames can be resized and dropped before the next ones are decoded: 64 frames of 1080p are 400 MB
at once and 50 MB in chunks of 8.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import av
import torch
from av.video.reformatter import Colorspace, VideoReformatter

from veripo_fast.data.archives import ffmpeg_source
from veripo_fast.errors import MediaError
from veripo_fast.video.deadline import check_deadline
from veripo_fast.video.decoders import untagged_hd
from veripo_fast.video.orientation import Orientation, orientation_of
from veripo_fast.video.packets import KeptPackets, decoded_frames, open_video
from veripo_fast.video.timeline import Timeline

CHUNK = 8


class RefusedError(Exception):
    """A decoder cannot give the frames asked for; the text says why."""


class LostFrameError(RefusedError):
    """A frame does not come out of FFmpeg although its packet is there: the file is damaged, or its times lie."""


def read_torchcodec(decoder_class: Any, path: str, timeline: Timeline, wanted: Sequence[int],
                    deadline: float, device: str = "cpu") -> Iterator[torch.Tensor]:
    """Chunks of uint8 [k, 3, H, W] on `device` (NHWC in memory), the frames at positions `wanted` of the timeline.

    On `cuda` NVDEC decodes.

    Raises:
        RefusedError: torchcodec failed, gave a frame of another time than the timeline has, or fell back to the CPU.
    """
    try:
        decoder = decoder_class(ffmpeg_source(path), stream_index=timeline.stream.index, num_ffmpeg_threads=1,
                                device=device, seek_mode="exact")
        if decoder.metadata.rotation is not None:  # there is a matrix, and torchcodec reads an angle from it
            orientation = first_orientation(path, deadline)
            if orientation.mirrored or abs(orientation.rotation) != abs(round(decoder.metadata.rotation)):
                raise RefusedError("it is shown mirrored, and torchcodec only turns")
        for start in range(0, len(wanted), CHUNK):
            check_deadline(path, deadline)
            positions = list(wanted[start:start + CHUNK])
            batch = decoder.get_frames_at(positions)
            expected = torch.tensor([timeline.seconds[position] for position in positions], dtype=torch.float64)
            if not torch.allclose(batch.pts_seconds.double(), expected, rtol=0.0, atol=1e-4):
                raise RefusedError("its frame times differ from the stream's")
            if device != "cpu" and decoder.cpu_fallback:
                raise RefusedError(f"NVDEC does not take it ({decoder.cpu_fallback})")
            yield batch.data
    except (RuntimeError, ValueError, IndexError) as error:  # what torchcodec raises for a file it cannot decode
        raise RefusedError(_reason(error)) from error


def read_pyav(path: str, timeline: Timeline, wanted: Sequence[int], deadline: float, *,
              sequential: bool = False, kept: KeptPackets | None = None) -> Iterator[torch.Tensor]:
    """Chunks of one frame, uint8 [1, 3, H, W]; a chunk is a view that is valid until the next one is asked for.

    Packets of other groups of pictures, and those that no wanted frame refers to, are not decoded; `sequential` decodes
    every frame from the start. `kept` is the open file, where its packets have been read already. An HD file without
    colour tags is BT.709, a smaller one BT.601.

    Raises:
        LostFrameError: a wanted frame does not come out of the decoder.
        RefusedError: its colours cannot be converted.
    """
    missing = {timeline.keys[position] for position in wanted}
    runs, left_out = (None, frozenset()) if sequential else (timeline.runs(wanted), timeline.left_out(wanted))
    colours = {"src_colorspace": Colorspace.ITU709} if untagged_hd(timeline.stream) else {}
    reformatter = VideoReformatter()  # keeps the tables of the conversion from frame to frame
    with open_video(path) if kept is None else nullcontext(kept[:2]) as (container, stream):
        frames = decoded_frames(path, container, stream, deadline, runs, left_out, kept and kept.packets)
        for number, frame in enumerate(frames):
            key = frame.pts if timeline.has_stamps else number
            if key not in missing:
                continue
            missing.remove(key)
            try:
                shown = reformatter.reformat(frame, format="rgb24", threads=1, **colours)
            except av.FFmpegError as error:  # swscale knows fewer colour matrices than codecs can name
                raise RefusedError(f"swscale does not convert its colour matrix {timeline.stream.matrix}") from error
            yield _orientation(frame, path)(_pixels(shown))
            if not missing:
                return
    raise _lost(timeline, missing)


def check_frames(path: str, timeline: Timeline, wanted: Sequence[int], deadline: float) -> None:
    """Decode what `read_pyav` would, and show nothing: torchcodec does not hand on what FFmpeg says of each frame.

    Raises:
        LostFrameError: a wanted frame is damaged, so torchcodec would show what FFmpeg made up.
    """
    missing = {timeline.keys[position] for position in wanted}
    with open_video(path) as (container, stream):
        runs, left_out = timeline.runs(wanted), timeline.left_out(wanted)
        for frame in decoded_frames(path, container, stream, deadline, runs, left_out):
            missing.discard(frame.pts)
            if not missing:
                return
    raise _lost(timeline, missing)


def _lost(timeline: Timeline, missing: set[int]) -> LostFrameError:
    first = timeline.seconds[timeline.keys.index(min(missing))] - timeline.seconds[0]
    return LostFrameError(f"the frame at {first:.2f} s cannot be decoded")


def first_orientation(path: str, deadline: float) -> Orientation:
    """How the first frame that can be decoded is to be shown. FFmpeg tells it with a decoded frame."""
    with open_video(path) as (container, stream):
        frame = next(decoded_frames(path, container, stream, deadline), None)
        if frame is None:
            raise RefusedError("its first frame cannot be decoded")
        return _orientation(frame, path)


def _orientation(frame: av.VideoFrame, path: str) -> Orientation:
    orientation = orientation_of(frame)
    if orientation is None:
        raise MediaError(f"{path} is to be shown turned by {frame.rotation} degrees, skewed or scaled; "
                         "only quarter turns and mirrored pictures can be used: encode it again")
    return orientation


def _pixels(frame: av.VideoFrame) -> torch.Tensor:
    """uint8 [1, 3, H, W] of an rgb24 frame as it is stored; not copied."""
    plane = frame.planes[0]
    return torch.frombuffer(plane, dtype=torch.uint8).as_strided(
        (1, 3, frame.height, frame.width), (plane.buffer_size, 1, plane.line_size, 3))


def _reason(error: Exception) -> str:
    """torchcodec's message without the source file and line that it starts with."""
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return first.split(".cpp:", 1)[-1].split(", ", 1)[-1].rstrip(".")
