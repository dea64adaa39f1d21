"""Frames per second of NVDEC (torchcodec), DALI and the CPU decoders, 1 and 8 videos in flight: a part of gpu_check.

Every frame carries a bar code, so a frame that is not the one asked for is counted, and the pixels are compared with
those of the CPU's decoder. Clips are textured, tagged as BT.709, in closed groups of pictures, made here and thrown
away. On a CPU device the same code runs on VP9, the codec that DALI decodes there.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
import torch.nn.functional as F
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc

from bench.measure import clock_of, digits, paired, wall_clock
from bench.video import clips
from veripo_fast.video import dali
from veripo_fast.video.ffmpeg import torchcodec_decoder
from veripo_fast.video.readers import CHUNK, RefusedError, read_pyav, read_torchcodec
from veripo_fast.video.timeline import Timeline, scan_packets

PSNR_LIMIT = 33.0
"""dB between a GPU decoder's RGB and PyAV's: BT.601 in place of BT.709 is below, other chroma interpolation above."""
RESIZE_LIMIT = 45.0
"""dB between filtering in float32 and in integers."""
SECONDS = 120.0
"""Deadline of one video."""
ON_CPU = ("pyav", "torchcodec")
OPTIONS = {
    "libx264": {"preset": "veryfast", "x264-params": "keyint={gop}:min-keyint={gop}:scenecut=0:open-gop=0"},
    "libx265": {"preset": "superfast",
                "x265-params": "log-level=none:keyint={gop}:min-keyint={gop}:scenecut=0:open-gop=0"},
    "libvpx-vp9": {"cpu-used": "8", "deadline": "realtime", "g": "{gop}"},
}


@dataclass(frozen=True)
class Sizes:
    """What is decoded."""

    pictures: tuple[tuple[int, int], ...] = ((720, 1280), (1080, 1920))
    """Height, width in pixels."""
    codecs: tuple[str, ...] = ("libx264", "libx265")
    frames: int = 120
    gop: int = 40
    wanted: int = 32
    in_flight: tuple[int, ...] = (1, 8)
    rounds: int = 2
    resized: tuple[int, int] = (252, 448)


TINY = Sizes(pictures=((96, 160),), codecs=("libvpx-vp9",), frames=24, gop=8, wanted=6, in_flight=(1, 2), rounds=2,
             resized=(56, 84))
Way = Callable[[str, Timeline, Sequence[int], float], Iterator[torch.Tensor]]


# -- rows -------------------------------------------------------------------------------------------------------------


def rows(device: torch.device, sizes: Sizes) -> Iterator[dict[str, Any]]:
    """One row per picture size, codec and number of videos in flight, and one per size about the resize.

    `value` is the best decoder's speed on the device over the best one's on the CPU.
    """
    ways, absent = decoders(device)
    with tempfile.TemporaryDirectory(prefix="veripo-video-") as folder:
        for picture in sizes.pictures:
            for path in made(Path(folder), picture, sizes):
                yield from decode_rows(str(path), device, ways, absent, picture, sizes)
            yield resize_row(device, picture, sizes)


def decoders(device: torch.device) -> tuple[dict[str, Way], dict[str, str]]:
    """The decoders that are here, and why the others are not."""
    ways: dict[str, Way] = {"pyav": read_pyav}
    absent: dict[str, str] = {}
    decoder_class = torchcodec_decoder()
    if decoder_class is None:
        absent["torchcodec"] = "cannot be loaded"
    else:
        ways["torchcodec"] = partial(read_torchcodec, decoder_class)
        if device.type == "cuda":
            ways["nvdec"] = lambda *arguments: read_torchcodec(decoder_class, *arguments, device=str(device))
    reason = dali.missing(device)
    if reason is None:
        ways["dali"] = lambda *arguments: dali.read_dali(*arguments, device)
    else:
        absent["dali"] = reason
    return ways, absent


def decode_rows(path: str, device: torch.device, ways: dict[str, Way], absent: dict[str, str],
                picture: tuple[int, int], sizes: Sizes) -> Iterator[dict[str, Any]]:
    timeline = scan_packets(path, time.monotonic() + SECONDS)
    wanted = np.linspace(0, sizes.frames - 1, sizes.wanted).round().astype(int).tolist()
    truth = frames_of(read_pyav, path, timeline, wanted)
    usable, wrong, decibel, refused = {}, {}, {}, dict(absent)
    for name, way in ways.items():
        try:
            got = frames_of(way, path, timeline, wanted)
        except RefusedError as refusal:
            refused[name] = str(refusal)
            continue
        wrong[name] = sum(seen != index for seen, index in zip(clips.read_indices(got), wanted, strict=True))
        decibel[name] = psnr(got, truth)
        usable[name] = way
    expected = {"nvdec", "dali"} if device.type == "cuda" else {"dali"}
    for count in sizes.in_flight:
        with ThreadPoolExecutor(count) as threads:
            runs = {name: partial(together, threads, count, way, path, timeline, wanted, device)
                    for name, way in usable.items()}
            seconds = paired(runs, sizes.rounds, wall_clock, warmups=1)
            load = {name: digits(cpu_seconds(run) / count / len(wanted)) for name, run in runs.items()}
        speed = {name: digits(count * len(wanted) / statistics.median(values)) for name, values in seconds.items()}
        best = {kind: max((speed[name] for name in speed if (name in ON_CPU) == kind), default=0.0)
                for kind in (True, False)}
        yield {
            "row": f"decode {timeline.stream.codec} {picture[0]} lines, {count} in flight", "height": picture[0],
            "width": picture[1], "codec": timeline.stream.codec, "frames": sizes.frames, "gop": sizes.gop,
            "kbit_per_second": Path(path).stat().st_size * 8 * 30 // sizes.frames // 1000, "wanted": len(wanted),
            "in_flight": count, "seconds": seconds, "frames_per_second": speed, "cpu_seconds_per_frame": load,
            "wrong_frames": wrong, "psnr": decibel, "psnr_limit": PSNR_LIMIT, "not_timed": refused,
            "device_bytes": device_bytes(device), "value": digits(best[False] / best[True]),
            "passed": expected <= usable.keys() and not any(wrong.values()) and min(decibel.values()) >= PSNR_LIMIT}


def resize_row(device: torch.device, picture: tuple[int, int], sizes: Sizes) -> dict[str, Any]:
    """A chunk of frames to the size that a policy sees: on the device in float32, and on a core in integers."""
    texture = torch.from_numpy(np.stack(list(pictures(picture, CHUNK)))).permute(0, 3, 1, 2)
    there = texture.to(device)
    seconds = {"device": paired({"device": partial(resized_in_float, there, sizes.resized)}, sizes.rounds,
                                clock_of(device), warmups=1)["device"],
               "cpu": paired({"cpu": partial(resized_in_integers, texture, sizes.resized)}, sizes.rounds, wall_clock,
                             warmups=1)["cpu"]}
    median = {name: statistics.median(values) for name, values in seconds.items()}
    close = psnr(resized_in_float(there, sizes.resized).cpu(), resized_in_integers(texture, sizes.resized))
    return {"row": f"resize of {CHUNK} frames of {picture[0]} lines", "height": picture[0], "width": picture[1],
            "resized": sizes.resized, "seconds": seconds, "psnr": close, "psnr_limit": RESIZE_LIMIT,
            "frames_per_second": {name: digits(CHUNK / value) for name, value in median.items()},
            "value": digits(median["cpu"] / median["device"]), "passed": close >= RESIZE_LIMIT}


# -- what is measured -------------------------------------------------------------------------------------------------


def frames_of(way: Way, path: str, timeline: Timeline, wanted: Sequence[int]) -> torch.Tensor:
    """uint8 [T, 3, H, W] in host memory."""
    return torch.cat([chunk.cpu().clone() for chunk in way(path, timeline, wanted, time.monotonic() + SECONDS)])


def together(threads: ThreadPoolExecutor, count: int, way: Way, path: str, timeline: Timeline, wanted: Sequence[int],
             device: torch.device) -> None:
    """Decode `count` videos at once; frames are dropped where they were decoded."""

    def one(_: int) -> int:
        done = sum(len(chunk) for chunk in way(path, timeline, wanted, time.monotonic() + SECONDS))
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
        return done

    assert all(done == len(wanted) for done in threads.map(one, range(count)))


def cpu_seconds(run: Callable[[], None]) -> float:
    """CPU time of a call, of all threads."""
    before = time.process_time()
    run()
    return time.process_time() - before


def resized_in_float(frames: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """uint8 [T, 3, h, w]: CUDA has no antialiased bicubic filter on uint8."""
    resized = F.interpolate(frames.float(), size, mode="bicubic", antialias=True)
    return resized.round_().clamp_(0, 255).byte()


def resized_in_integers(frames: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return F.interpolate(frames, size, mode="bicubic", antialias=True)


def psnr(got: torch.Tensor, want: torch.Tensor) -> float:
    """dB over all frames; 99 where they are equal."""
    error = float((got.float() - want.float()).square().mean())
    return digits(10 * float(np.log10(255 ** 2 / error))) if error else 99.0


def device_bytes(device: torch.device) -> int | None:
    """Memory of the GPU that is in use by all, decoders included, which torch does not count; None on a CPU."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return total - free


# -- clips ------------------------------------------------------------------------------------------------------------


def made(folder: Path, picture: tuple[int, int], sizes: Sizes) -> list[Path]:
    """The same pictures in every codec."""
    paths = [folder / f"{codec}-{picture[0]}.{'webm' if 'vpx' in codec else 'mp4'}" for codec in sizes.codecs]
    outputs = [av.open(str(path), "w") for path in paths]
    streams = [_stream(output, codec, picture, sizes.gop) for output, codec in zip(outputs, sizes.codecs, strict=True)]
    for number, pixels in enumerate(pictures(picture, sizes.frames)):
        for output, stream in zip(outputs, streams, strict=True):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(
                format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG)
            frame.pts, frame.time_base = number, Fraction(1, 30)
            output.mux(stream.encode(frame))
    for output, stream in zip(outputs, streams, strict=True):
        output.mux(stream.encode())
        output.close()
    return paths


def pictures(picture: tuple[int, int], frames: int) -> Iterator[np.ndarray]:
    """uint8 [H, W, 3]: the bar code of each index under smooth texture that moves and noise that does not repeat."""
    height, width = picture
    dice = np.random.default_rng(0)
    coarse = torch.from_numpy(dice.uniform(-14, 14, (1, 1, height // 12, width // 12)).astype(np.float32))
    texture = F.interpolate(coarse, (height, width), mode="bicubic")[0].permute(1, 2, 0).numpy().astype(np.int16)
    noise = dice.normal(0, 2, (8, height, width, 1)).astype(np.int16)
    rows, columns = np.arange(height)[:, None] * 2 // height, np.arange(width) * clips.BITS // width
    for index in range(frames):
        code = clips.frame_pixels(index, 2, clips.BITS)[rows, columns]
        moved = np.roll(texture, (index * 2, index * 3), (0, 1))
        yield (code + (moved + noise[index % 8])).clip(0, 255).astype(np.uint8)


def _stream(output: Any, codec: str, picture: tuple[int, int], gop: int) -> Any:
    options = {key: value.format(gop=gop) for key, value in OPTIONS[codec].items()}
    stream = output.add_stream(codec, rate=30, options=options)
    stream.height, stream.width, stream.pix_fmt = *picture, "yuv420p"
    context = stream.codec_context
    context.time_base = stream.time_base = Fraction(1, 30)
    context.colorspace, context.color_primaries = Colorspace.ITU709, ColorPrimaries.BT709
    context.color_trc, context.color_range = ColorTrc.BT709, ColorRange.MPEG
    return stream
