"""Small real video files for tests: every frame carries its own index as a bar code that survives coding and resizing.

The frame is cut into 12 x 2 tiles: the upper row is the index (black 0, white 1, most significant bit left), the lower
row its complement, so that brightness carries no information and a grey or garbage frame reads as -1. Encoded with
PyAV (libx264 unless said otherwise); sizes are in pixels, times in seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from av.stream import Disposition

BITS = 12
TIME_BASE = Fraction(1, 90000)


def frame_pixels(index: int, height: int, width: int) -> np.ndarray:
    """uint8 [height, width, 3]: the bar code of `index`, with a colour that changes slowly."""
    column = np.minimum(np.arange(width) * BITS // width, BITS - 1)
    bit = (index >> (BITS - 1 - column)) & 1
    upper = np.arange(height)[:, None] < height // 2
    luma = np.where(upper, bit[None, :], 1 - bit[None, :]) * 190 + 30
    tint = np.array([0, (index * 7) % 30, (index * 13) % 30])
    return (luma[:, :, None] + tint[None, None, :]).astype(np.uint8)


def read_index(frame: torch.Tensor) -> int:
    """The index shown by one frame, uint8 [3, H, W]; -1 when the picture is not a bar code."""
    grey = frame.float().mean(0)
    height, width = grey.shape
    index = 0
    for column in range(BITS):
        x = int((column + 0.5) * width / BITS)
        upper, lower = grey[height // 4, x].item(), grey[height * 3 // 4, x].item()
        if abs(upper - lower) < 60:
            return -1
        index = index * 2 + int(upper > lower)
    return index


def read_indices(pixels: torch.Tensor) -> list[int]:
    """Indices shown by uint8 [T, 3, H, W]."""
    return [read_index(frame) for frame in pixels]


def make_clip(
    path: Path,
    *,
    frames: int = 60,
    fps: float = 30.0,
    size: tuple[int, int] = (108, 192),
    codec: str = "libx264",
    options: dict[str, str] | None = None,
    times: Sequence[float] | None = None,
    rotation: int = 0,
    pixel_format: str = "yuv420p",
    audio: bool = False,
    faststart: bool = True,
) -> Path:
    """Write a clip of height x width `size`. `times`: presentation time of each frame (variable frame rate).

    `rotation`: degrees that a player turns the picture by, counter-clockwise, written as a display matrix.
    `faststart`: put the index of an mp4 in front, as files made for downloading have it.
    """
    moments = list(times) if times is not None else [index / fps for index in range(frames)]
    height, width = size
    muxer = {"movflags": "faststart"} if faststart and path.suffix in {".mp4", ".mov"} else {}
    with av.open(str(path), "w", options=muxer) as container:
        rate = Fraction(fps).limit_denominator(1001)
        stream = container.add_stream(codec, rate=rate, options=options if options is not None else closed_gop())
        stream.width, stream.height, stream.pix_fmt = width, height, pixel_format
        stream.codec_context.time_base = TIME_BASE
        stream.time_base = TIME_BASE
        stream.codec_context.thread_count = 1
        if rotation:
            stream.set_display_rotation(rotation)
        sound = container.add_stream("aac", rate=16000, layout="mono") if audio else None
        for index, moment in enumerate(moments):
            frame = av.VideoFrame.from_ndarray(frame_pixels(index, height, width), format="rgb24")
            frame.pts, frame.time_base = round(moment / TIME_BASE), TIME_BASE
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if sound is not None:
            _silence(container, sound)
    return path


def closed_gop(gop: int = 12) -> dict[str, str]:
    return {"preset": "ultrafast", "x264-params": f"keyint={gop}:min-keyint={gop}:scenecut=0:bframes=2:open-gop=0"}


def open_gop(gop: int = 12) -> dict[str, str]:
    """B-frame pyramid and leading pictures that reference the GOP before: where decord returns wrong frames."""
    return {"preset": "veryfast",
            "x264-params": f"keyint={gop}:min-keyint={gop}:scenecut=0:bframes=4:b-pyramid=normal:open-gop=1"}


def make_audio(path: Path) -> Path:
    """A file with sound only."""
    with av.open(str(path), "w") as container:
        _silence(container, container.add_stream("aac", rate=16000, layout="mono"))
    return path


def make_audio_with_cover(path: Path) -> Path:
    """A file with sound and a cover picture, which is a video stream to FFmpeg."""
    with av.open(str(path), "w", format="mp4") as container:
        cover = container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 64, 64, "yuvj420p"
        cover.disposition = Disposition.attached_pic
        sound = container.add_stream("aac", rate=16000, layout="mono")
        frame = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
        frame.pts = 0
        container.mux(cover.encode(frame))
        container.mux(cover.encode())
        _silence(container, sound)
    return path


def cut_without_recoding(source: Path, path: Path, packets: range, start_seconds: float) -> Path:
    """Copy some packets so that `start_seconds` becomes time 0: frames before it stay in the file, hidden by an edit
    list, as cutting with `-c copy` leaves them."""
    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for number, packet in enumerate(old.demux(video=0)):
            if packet.size and number in packets:
                shift = round(start_seconds / packet.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, stream
                new.mux(packet)
    return path


def _silence(container: av.container.OutputContainer, stream: av.AudioStream) -> None:
    for number in range(20):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 16000, number * 1024
        container.mux(stream.encode(frame))
    container.mux(stream.encode())


def truncated(source: Path, path: Path, share: float) -> Path:
    """The first `share` of the bytes of a clip whose index stands at the front (as in a download that broke off)."""
    data = source.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path
