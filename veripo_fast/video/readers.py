"""The two decoders behind one shape: path + timeline + wanted frames -> RGB frames in order, a few at a time.

torchcodec seeks and decodes only the groups of pictures that hold wanted frames. PyAV reads from the start: slower by
the share of frames not wanted, but it gets through files that torchcodec refuses. Both apply the rotation that the file
asks for. Each yields chunks so that frames can be resized and dropped before the next ones are decoded: 64 frames of
1080p are 400 MB at once and 50 MB in chunks of 8.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import av
import numpy as np
import torch

from veripo_fast.video.timeline import Timeline, check_deadline, decoded_frames, open_video

CHUNK = 8


class RefusedError(Exception):
    """A decoder cannot give the frames asked for; the text says why."""


def read_torchcodec(decoder_class: Any, path: str, timeline: Timeline, wanted: Sequence[int],
                    deadline: float) -> Iterator[torch.Tensor]:
    """Chunks of uint8 [k, 3, H, W] (NHWC in memory), the frames at positions `wanted` of the timeline.

    Raises:
        RefusedError: torchcodec failed, or gave a frame of another time than the timeline has.
    """
    try:
        decoder = decoder_class(path, stream_index=timeline.stream_index, num_ffmpeg_threads=1, device="cpu",
                                seek_mode="exact")
        for start in range(0, len(wanted), CHUNK):
            check_deadline(path, deadline)
            positions = list(wanted[start:start + CHUNK])
            batch = decoder.get_frames_at(positions)
            expected = torch.tensor([timeline.seconds[position] for position in positions], dtype=torch.float64)
            if not torch.allclose(batch.pts_seconds.double(), expected, rtol=0.0, atol=1e-4):
                raise RefusedError("its frame times differ from the stream's")
            yield batch.data
    except (RuntimeError, ValueError, IndexError) as error:  # what torchcodec raises for a file it cannot decode
        raise RefusedError(_reason(error)) from error


def read_pyav(path: str, timeline: Timeline, wanted: Sequence[int], deadline: float) -> Iterator[torch.Tensor]:
    """As read_torchcodec, decoding every frame up to the last wanted one.

    Raises:
        RefusedError: a wanted frame does not come out of the decoder.
    """
    missing = {timeline.keys[position] for position in wanted}
    chunk: list[torch.Tensor] = []
    with open_video(path) as (container, stream):
        for number, frame in enumerate(decoded_frames(path, container, stream, deadline)):
            key = frame.pts if timeline.has_stamps else number
            if key not in missing:
                continue
            missing.remove(key)
            chunk.append(_upright(frame))
            if len(chunk) == CHUNK or not missing:
                yield torch.stack(chunk)
                chunk = []
            if not missing:
                return
    first = timeline.seconds[timeline.keys.index(min(missing))] - timeline.seconds[0]
    raise RefusedError(f"the frame at {first:.2f} s cannot be decoded")


def _upright(frame: av.VideoFrame) -> torch.Tensor:
    """uint8 [3, H, W] turned as a player would show it."""
    pixels = np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90)))
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _reason(error: Exception) -> str:
    """torchcodec's message without the source file and line that it starts with."""
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return first.split(".cpp:", 1)[-1].split(", ", 1)[-1].rstrip(".")


