"""Small real video files: every frame carries its own index as a bar code that survives coding and resizing.

The frame is cut into 12 x 2 tiles: the upper row is the index (black 0, white 1, most significant bit left), the lower
row its complement, so that brightness carries no information and a grey or garbage frame reads as -1. Encoded with
PyAV (libx264 unless said otherwise); sizes are in pixels, times in seconds. `make_clip_set` makes the files that
decoders are judged by; what each shows is known from how it was made.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from av.stream import Disposition
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc

BITS, LONG_BITS = 12, 16
TIME_BASE = Fraction(1, 90000)
COLOURS = ((200, 30, 30), (30, 180, 40), (40, 50, 210), (210, 200, 30), (190, 40, 190), (30, 190, 200))
"""RGB of the saturated squares in the middle of a colour clip, from left to right."""
os.environ.setdefault("SVT_LOG", "1")  # the AV1 encoder writes 20 lines about itself otherwise


def frame_pixels(index: int, height: int, width: int, bits: int = BITS) -> np.ndarray:
    """uint8 [height, width, 3]: the bar code of `index`, with a colour that changes slowly."""
    column = np.minimum(np.arange(width) * bits // width, bits - 1)
    bit = (index >> (bits - 1 - column)) & 1
    upper = np.arange(height)[:, None] < height // 2
    luma = np.where(upper, bit[None, :], 1 - bit[None, :]) * 190 + 30
    tint = np.array([0, (index * 7) % 30, (index * 13) % 30])
    return (luma[:, :, None] + tint[None, None, :]).astype(np.uint8)


def read_index(frame: torch.Tensor, bits: int = BITS) -> int:
    """The index shown by one frame, uint8 [3, H, W]; -1 when the picture is not a bar code."""
    grey = frame.float().mean(0)
    height, width = grey.shape
    index = 0
    for column in range(bits):
        x = int((column + 0.5) * width / bits)
        upper, lower = grey[height // 4, x].item(), grey[height * 3 // 4, x].item()
        if abs(upper - lower) < 60:
            return -1
        index = index * 2 + int(upper > lower)
    return index


def read_indices(pixels: torch.Tensor, bits: int = BITS) -> list[int]:
    """Indices shown by uint8 [T, 3, H, W]."""
    return [read_index(frame, bits) for frame in pixels]


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
    bits: int = BITS,
    fade: bool = False,
    time_base: Fraction = TIME_BASE,
) -> Path:
    """Write a clip of height x width `size`. `times`: presentation time of each frame (variable frame rate).

    `rotation`: degrees that a player turns the picture by, counter-clockwise, written as a display matrix.
    `faststart`: put the index of an mp4 in front, as files made for downloading have it.
    `fade`: brightness falls and rises by 40 % every 48 frames, which an encoder follows with weighted prediction.
    """
    moments = list(times) if times is not None else [index / fps for index in range(frames)]
    height, width = size
    muxer = {"movflags": "faststart"} if faststart and path.suffix in {".mp4", ".mov"} else {}
    with usual_priority(), av.open(str(path), "w", options=muxer) as container:
        rate = Fraction(fps).limit_denominator(1001)
        stream = container.add_stream(codec, rate=rate, options=options if options is not None else closed_gop())
        stream.width, stream.height, stream.pix_fmt = width, height, pixel_format
        stream.codec_context.time_base = time_base
        stream.time_base = time_base
        stream.codec_context.thread_count = 1
        if rotation:
            stream.set_display_rotation(rotation)
        sound = container.add_stream("aac", rate=16000, layout="mono") if audio else None
        for index, moment in enumerate(moments):
            light = 0.6 + 0.4 * abs(index % 48 - 24) / 24 if fade else 1.0
            pixels = frame_pixels(index, height, width, bits)
            frame = av.VideoFrame.from_ndarray((pixels * light).astype(np.uint8) if fade else pixels, format="rgb24")
            frame.pts, frame.time_base = round(moment / time_base), time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if sound is not None:
            _silence(container, sound)
    return path


@contextmanager
def usual_priority() -> Iterator[None]:
    """Undo what SVT-AV1 does where it may: it makes the thread that calls it SCHED_FIFO 99, above everything else on
    the machine, and threads and processes started later inherit that."""
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, parameters)


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


# -- the set ----------------------------------------------------------------------------------------------------------

X265 = "log-level=none:pools=1:frame-threads=1"
VPX = {"auto-alt-ref": "1", "lag-in-frames": "25", "deadline": "realtime", "cpu-used": "6", "g": "60", "b": "100k"}
"""With one pass and this speed libvpx writes hidden frames only where it has a bit rate; VP8 writes none."""
VARIABLE = np.cumsum([0.0] + [(0.01, 0.033, 0.1, 0.5)[i * 7 % 4 if i % 3 else 0] for i in range(239)]).tolist()
HALF_HOUR = 54_000
PLAIN: dict[str, tuple[str, dict]] = {
    "h264-closed.mp4": ("closed groups of 12", {"options": closed_gop()}),
    "h264-open.mp4": ("open groups of 12 with a B-frame pyramid", {"options": open_gop()}),
    "h264-long.mp4": ("groups of 250", {"frames": 600, "options": {
        "preset": "veryfast", "x264-params": "keyint=250:min-keyint=250:scenecut=0"}}),
    "h264-no-b.mp4": ("no B frames", {"options": {"preset": "veryfast", "x264-params": "keyint=60:bframes=0"}}),
    "h264-weighted.mp4": ("weighted prediction from 8 references, brightness fading", {"fade": True, "options": {
        "preset": "fast", "x264-params": "keyint=60:ref=8:weightp=2:weightb=1:bframes=3"}}),
    "h264-10-bit.mp4": ("10 bits a sample (High 10)", {"pixel_format": "yuv420p10le", "options": open_gop()}),
    "h264-444.mp4": ("no chroma subsampling", {"pixel_format": "yuv444p"}),
    "h264-odd.mp4": ("odd height and width", {"pixel_format": "yuv444p", "size": (107, 191)}),
    "hevc.mp4": ("x265 defaults: open groups of up to 250", {"frames": 600, "codec": "libx265", "options": {
        "x265-params": X265}}),
    "hevc-open.mp4": ("open groups of 24", {"codec": "libx265", "options": {
        "preset": "superfast", "x265-params": f"{X265}:keyint=24:min-keyint=24:scenecut=0:bframes=4"}}),
    "hevc-layers.mp4": ("three temporal layers", {"codec": "libx265", "options": {
        "preset": "superfast", "x265-params": f"{X265}:temporal-layers=3:b-adapt=0:bframes=3:keyint=48"}}),
    "hevc-10-bit.mp4": ("10 bits a sample (Main 10)", {"codec": "libx265", "pixel_format": "yuv420p10le", "options": {
        "preset": "superfast", "x265-params": f"{X265}:keyint=48"}}),
    "av1.mp4": ("hidden frames and groups of 60", {"codec": "libsvtav1", "options": {
        "preset": "11", "svtav1-params": "lp=1:keyint=60"}}),
    "vp9.webm": ("hidden alternative references", {"codec": "libvpx-vp9", "options": VPX}),
    "vp9-odd.webm": ("odd height and width with halved chroma", {
        "codec": "libvpx-vp9", "options": VPX, "size": (107, 191)}),
    "vp8.webm": ("VP8 in groups of 60", {"codec": "libvpx", "options": VPX}),
    "mpeg4.avi": ("MPEG-4 part 2 in AVI, which keeps no presentation times", {
        "codec": "mpeg4", "options": {"g": "24"}, "time_base": Fraction(1, 30)}),
    "mpeg4-b.avi": ("the same with B frames", {
        "codec": "mpeg4", "options": {"g": "24", "bf": "2"}, "time_base": Fraction(1, 30)}),
    "mpeg4-b.mkv": ("the same in Matroska, which keeps times", {
        "codec": "mpeg4", "options": {"g": "24", "bf": "2"}, "time_base": Fraction(1, 30)}),
    "h264-refresh.mkv": ("intra refresh: packets called key frames that refer to others", {"options": {
        "preset": "veryfast", "x264-params": "intra-refresh=1:keyint=30:bframes=0"}}),
    "variable-rate.mp4": ("intervals from 10 ms to 0.5 s, open groups", {"options": open_gop(), "times": VARIABLE}),
    "matroska.mkv": ("times rounded to milliseconds, with sound", {"options": open_gop(), "audio": True}),
    "late-start.mp4": ("first frame at 5 s", {"times": [5 + index / 30 for index in range(240)]}),
    "turned.mp4": ("shown turned by a quarter", {"rotation": 90}),
    "stream.ts": ("MPEG transport stream", {}),
}
"""Name -> why it is there, what it takes to make it (240 frames at 30 a second unless said)."""


@dataclass(frozen=True)
class Clip:
    """A file of the set and what a player shows of it."""

    path: Path
    frames: tuple[int, ...]
    """The indices that the bar codes show, in presentation order."""
    times: tuple[float, ...] | None
    """Seconds of each frame from the first; None where the container keeps none. Matroska rounds to milliseconds."""
    why: str
    """What makes it worth a test."""
    bits: int = BITS
    rotation: int = 0
    """Degrees, counter-clockwise, by which the picture with the bar code is turned when shown."""

    def read(self, pixels: torch.Tensor) -> list[int]:
        """Indices that upright frames show, uint8 [T, 3, H, W]; -1 where there is no bar code."""
        return read_indices(torch.rot90(pixels, -self.rotation // 90, (2, 3)), self.bits)


def make_clip_set(folder: Path, names: Iterable[str] | None = None) -> dict[str, Clip]:
    """The clips named, or all, each in `folder`; the half-hour one takes as long as the others together (10 s)."""
    return {name: _plain(folder, name) if name in PLAIN else MADE[name](folder / name)
            for name in names or (*PLAIN, *MADE)}


def _plain(folder: Path, name: str) -> Clip:
    why, arguments = PLAIN[name]
    moments = arguments.get("times", [index / 30 for index in range(arguments.get("frames", 240))])
    make_clip(folder / name, **({"frames": 240} | arguments))
    times = None if name.endswith(".avi") else tuple(moment - moments[0] for moment in moments)
    return Clip(folder / name, tuple(range(len(moments))), times, why, rotation=arguments.get("rotation", 0))


def _cut(path: Path) -> Clip:
    """Copied from a key frame on, with an edit list that starts the video six frames later."""
    whole = make_clip(path.with_name("whole.mp4"), frames=240, options=open_gop(24))
    with av.open(str(whole)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    first = next(number for number, packet in enumerate(packets)
                 if packet.is_keyframe and packet.pts * packet.time_base >= Fraction(72, 30))
    cut_without_recoding(whole, path, range(first, len(packets)), 78 / 30)
    whole.unlink()
    return Clip(path, tuple(range(78, 240)), tuple(index / 30 for index in range(162)),
                "cut without recoding: an edit list hides frames")


def _torn_stream(path: Path) -> Clip:
    """A transport stream whose beginning is lost: frames are decodable from the next key frame on."""
    whole = make_clip(path.with_name("whole.ts"), frames=240)
    data = whole.read_bytes()
    cut = len(data) // 3 // 188 * 188 + 188
    with av.open(str(whole)) as container:
        keys = [(packet.pos, packet.pts) for packet in container.demux(video=0) if packet.size and packet.is_keyframe]
    first = next(pts for position, pts in keys if position is not None and position >= cut)
    shown = range(round((first - keys[0][1]) / 3000), 240)  # 90,000 ticks a second, 30 frames
    path.write_bytes(data[:188 * 3] + data[cut:])  # the tables stay
    whole.unlink()
    return Clip(path, tuple(shown), tuple(index / 30 for index in range(len(shown))), "starts in the middle of a group")


def _half_hour(path: Path) -> Clip:
    make_clip(path, frames=HALF_HOUR, size=(36, 64), bits=LONG_BITS, options={
        "preset": "ultrafast", "x264-params": "keyint=60:min-keyint=60:scenecut=0:bframes=2:open-gop=1"})
    return Clip(path, tuple(range(HALF_HOUR)), tuple(index / 30 for index in range(HALF_HOUR)),
                "half an hour, open groups of 60", LONG_BITS)


def _colours(path: Path) -> Clip:
    """720p in BT.709 with COLOURS across the middle, whose file says so or says nothing."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"preset": "ultrafast", "crf": "10"})
        stream.width, stream.height, stream.pix_fmt = 1280, 720, "yuv420p"
        if "untagged" not in path.name:
            context = stream.codec_context
            context.colorspace, context.color_primaries = Colorspace.ITU709, ColorPrimaries.BT709
            context.color_trc, context.color_range = ColorTrc.BT709, ColorRange.MPEG
        for index in range(8):
            pixels = frame_pixels(index, 720, 1280)
            pixels[300:420] = np.repeat(np.array(COLOURS, np.uint8), -(-1280 // len(COLOURS)), axis=0)[:1280]
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(
                format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG)
            frame.pts, frame.time_base = index, Fraction(1, 30)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    why = "720p in BT.709 that does not say so" if "untagged" in path.name else "720p in BT.709 that says so"
    return Clip(path, tuple(range(8)), tuple(index / 30 for index in range(8)), why)


def read_colours(frame: torch.Tensor) -> torch.Tensor:
    """RGB [6, 3] of the squares of a colour clip (see COLOURS), from one frame uint8 [3, H, W]."""
    height, width = frame.shape[1:]
    columns = [int((number + 0.5) * width / len(COLOURS)) for number in range(len(COLOURS))]
    return torch.stack([frame[:, height // 2 - 1:height // 2 + 2, x - 2:x + 3].float().mean((1, 2)) for x in columns])


MADE: dict[str, Callable[[Path], Clip]] = {
    "edit-list.mp4": _cut, "torn-stream.ts": _torn_stream, "untagged.mp4": _colours, "tagged.mp4": _colours,
    "half-hour.mp4": _half_hour}


def damaged(folder: Path, clips: dict[str, Clip]) -> dict[str, Clip]:
    """Bad copies of h264-closed.mp4 of a set; `frames` are those that the header promises, none without a header."""
    good = clips["h264-closed.mp4"]
    data = good.path.read_bytes()
    media = data.index(b"mdat") + 4
    hole = media + (len(data) - media) // 3
    flipped, dice = bytearray(data), random.Random(0)
    for place in dice.sample(range(media, len(data)), 200):
        flipped[place] ^= dice.randrange(1, 256)
    kinds: dict[str, tuple[str, bytes, bool]] = {
        "truncated.mp4": ("the last 40 % are missing", data[:len(data) * 6 // 10], True),
        "hole.mp4": ("20 kB of zeros in the media data", data[:hole] + bytes(20_000) + data[hole + 20_000:], True),
        "flipped.mp4": ("200 bytes changed in the media data", bytes(flipped), True),
        "no-moov.mp4": ("the index is missing", data[:data.index(b"moov") - 4] + data[media - 8:], False),
        "page.mp4": ("a web page", b"<!DOCTYPE html><html><body>404 Not Found</body></html>", False),
        "empty.mp4": ("no bytes", b"", False),
    }
    made = {}
    for name, (why, content, header) in kinds.items():
        (folder / name).write_bytes(content)
        made[name] = Clip(folder / name, good.frames if header else (), good.times if header else None, why)
    return made
