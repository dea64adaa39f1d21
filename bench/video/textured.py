"""Clips to measure decoding on: a textured picture that pans, objects that move over it, scene cuts, mild noise.

Encoded with libx264 (preset medium, groups of 60) and kept in a folder, because 60 seconds of 720p take a
minute to make. Tagged as BT.709, so that no decoder has to guess. Sizes in pixels, times in seconds.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from PIL import Image

CONTENT = 1
"""Raised whenever the pictures change; part of the file names."""
OPTIONS = {"preset": "medium", "x264-params": "keyint=60"}
SCENE_SECONDS = 10


@dataclass(frozen=True)
class Size:
    """A clip of the bench; the height is a multiple of 4, the width of 2."""

    height: int
    width: int
    seconds: int = 60
    fps: int = 30
    noise: float = 3.5
    """Standard deviation of the luma noise, in levels. It decides the bit rate, and so what decoding costs: 720p comes
    out at 2 Mbit/s, as video sites serve it, and without noise at half of that."""
    crf: int = 23
    """Quality that libx264 keeps; 26 without noise gives 0.7 Mbit/s at 720p."""

    @property
    def name(self) -> str:
        return f"{self.height}p" + (" clean" if not self.noise else "") + (f" crf {self.crf}" if self.crf != 23 else "")


def textured(size: Size, folder: Path) -> Path:
    """The clip, made when it is not in the folder yet."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / (f"textured-{CONTENT}-{size.height}x{size.width}-{size.seconds}s-{size.fps}-{size.noise}"
                     f"-{size.crf}.mp4")
    if not path.is_file():
        unfinished = path.with_name(f".{os.getpid()}-{path.name}")
        _encode(size, unfinished)
        unfinished.rename(path)
    return path


def described(path: Path, size: Size) -> dict[str, Any]:
    """As entries of a result line."""
    with av.open(str(path)) as container:
        keys = sum(packet.is_keyframe for packet in container.demux(video=0) if packet.size)
    return {"clip": size.name, **asdict(size), "codec": f"libx264 preset medium crf {size.crf} keyint 60",
            "keyframes": keys, "kbit_per_second": round(path.stat().st_size * 8 / size.seconds / 1000)}


def _encode(size: Size, path: Path) -> None:
    dice = np.random.default_rng(0)
    noise = dice.normal(0, size.noise, (16, size.height, size.width)).round().astype(np.int16)
    canvas: list[np.ndarray] = []
    with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=size.fps, options={**OPTIONS, "crf": str(size.crf)})
        stream.width, stream.height, stream.pix_fmt = size.width, size.height, "yuv420p"
        context = stream.codec_context
        context.thread_count = 2
        context.colorspace, context.color_primaries = Colorspace.ITU709, ColorPrimaries.BT709
        context.color_trc, context.color_range = ColorTrc.BT709, ColorRange.MPEG
        for index in range(size.seconds * size.fps):
            if index % (SCENE_SECONDS * size.fps) == 0:
                canvas = _canvas(size, dice)
            planes = _picture(size, canvas, index / size.fps)
            planes[:size.height] = np.clip(planes[:size.height] + noise[index % 16], 16, 235).astype(np.uint8)
            frame = av.VideoFrame.from_ndarray(planes, format="yuv420p")
            frame.pts, frame.time_base = index, Fraction(1, size.fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _canvas(size: Size, dice: np.random.Generator) -> list[np.ndarray]:
    """Luma and two chroma planes, uint8, half as large again as a frame: four octaves of smooth noise."""
    planes = []
    for part, floor in ((1, 16), (2, 64), (2, 64)):
        height, width = size.height * 3 // 2 // part // 2 * 2, size.width * 3 // 2 // part // 2 * 2
        total = np.zeros((height, width), np.float32)
        for cells, weight in ((6, 0.5), (24, 0.25), (96, 0.15), (300, 0.1)):
            coarse = Image.fromarray(dice.integers(0, 256, (cells * 9 // 16 + 2, cells), dtype=np.uint8))
            total += weight * np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.float32)
        planes.append((floor + total / 255 * (235 - floor if part == 1 else 128)).astype(np.uint8))
    return planes


def _picture(size: Size, canvas: list[np.ndarray], seconds: float) -> np.ndarray:
    """uint8 [H * 3 / 2, W]: planar YUV 4:2:0, the canvas seen through a window that moves, and two bright objects."""
    half = (size.height // 2, size.width // 2)
    down = int((1 + np.sin(seconds * 0.7)) * (half[0] // 4 - 1))
    right = int((1 + np.cos(seconds * 0.5)) * (half[1] // 4 - 1))
    luma = canvas[0][2 * down:2 * down + size.height, 2 * right:2 * right + size.width].copy()
    for number in range(2):
        top = int((0.4 + 0.35 * np.sin(seconds * (1.3 + number))) * size.height)
        left = int((0.4 + 0.35 * np.cos(seconds * (1.7 - number))) * size.width)
        luma[top:top + size.height // 8, left:left + size.width // 10] = 60 + 120 * number
    chroma = [plane[down:down + half[0], right:right + half[1]].reshape(-1, size.width) for plane in canvas[1:]]
    return np.concatenate([luma, *chroma])
