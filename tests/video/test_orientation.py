"""A picture is shown as its display matrix says, in all eight ways that keep its sides straight.

The matrix is written into the track header of a real mp4, and the picture expected follows from the standard's formula,
pixel by pixel, not from the code under test.
"""

import struct
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.video import clips
from tests.support.children import PATIENCE_SECONDS
from veripo_fast.config.inputs import VideoConfig
from veripo_fast.errors import MediaError
from veripo_fast.types import Video
from veripo_fast.video.decode import decode
from veripo_fast.video.orientation import Orientation, read_matrix
from veripo_fast.video.probe import probe_video

torch.set_num_threads(1)
ONE = 1 << 16
MATRICES = {"upright": (1, 0, 0, 1), "hflip": (-1, 0, 0, 1), "vflip": (1, 0, 0, -1), "half turn": (-1, 0, 0, -1),
            "transposed": (0, 1, 1, 0), "clockwise": (0, 1, -1, 0), "counter-clockwise": (0, -1, 1, 0),
            "anti-transposed": (0, -1, -1, 0), "zeros": (0, 0, 0, 0), "no height": (1, 0, 0, 0)}
FOUR = VideoConfig(fps=None, num_frames=4, min_pixels=784, max_pixels=10**6)


def clip_with(path: Path, matrix: tuple[float, ...], codec: str = "libx264") -> Path:
    """A clip whose track header holds the matrix (a b c d)."""
    options = {} if codec == "libx264" else {"options": {"cpu-used": "8", "deadline": "realtime"}}
    clips.make_clip(path, frames=9, codec=codec, **options)
    data = bytearray(path.read_bytes())
    place = data.index(b"tkhd") + 4 + 40
    a, b, c, d = (round(value * ONE) for value in matrix)
    assert struct.unpack(">9i", data[place:place + 36])[0] == ONE
    data[place:place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    return path


def shown(stored: np.ndarray, matrix: tuple[int, ...]) -> np.ndarray:
    """[H, W, 3] by the formula: a stored pixel (p, q) goes to (ap + cq, bp + dq), and the picture to the origin."""
    a, b, c, d = matrix if matrix[1] or matrix[3] else (1, 0, 0, 1)
    q, p = np.mgrid[:stored.shape[0], :stored.shape[1]]
    x, y = a * p + c * q, b * p + d * q
    x, y = x - x.min(), y - y.min()
    picture = np.zeros((y.max() + 1, x.max() + 1, 3), stored.dtype)
    picture[y, x] = stored
    return picture


@pytest.mark.parametrize("decoder", ["auto", "pyav", "torchcodec", "dali"])
@pytest.mark.parametrize("codec", ["libx264", "libvpx-vp9"])
@pytest.mark.parametrize("name", MATRICES)
def test_a_picture_is_shown_as_its_matrix_says(tmp_path: Path, name: str, codec: str, decoder: str) -> None:
    contract = replace(FOUR, decoder=decoder)
    upright = clip_with(tmp_path / "plain.mp4", MATRICES["upright"], codec)
    plain = decode(Video(str(upright)), contract, 12, device="cpu")
    turned = decode(Video(str(clip_with(tmp_path / "turned.mp4", MATRICES[name], codec))), contract, 12, device="cpu")
    for before, after in zip(plain.pixels, turned.pixels, strict=True):
        expected = shown(before.permute(1, 2, 0).numpy(), MATRICES[name]).astype(int)
        assert tuple(after.shape[1:]) == expected.shape[:2]
        assert np.abs(after.permute(1, 2, 0).numpy() - expected).max() <= 3  # decoders convert colours apart by a level


@pytest.mark.parametrize(("name", "rotation", "mirrored"), [
    ("upright", 0, False), ("hflip", 0, True), ("vflip", 180, True), ("half turn", 180, False), ("zeros", 0, False),
    ("clockwise", -90, False), ("counter-clockwise", 90, False), ("transposed", -90, True),
    ("anti-transposed", 90, True)])
def test_inspect_names_turn_and_mirror(tmp_path: Path, name: str, rotation: int, mirrored: bool) -> None:
    path = clip_with(tmp_path / "clip.mp4", MATRICES[name])
    facts = probe_video(str(path), time.monotonic() + PATIENCE_SECONDS).facts
    assert (facts.rotation, facts.mirrored) == (rotation, mirrored)
    stored = np.arange(6).reshape(2, 3, 1).repeat(3, 2)
    turned = np.rot90(stored, rotation // 90)
    assert (shown(stored, MATRICES[name]) == (turned[:, ::-1] if mirrored else turned)).all()


@pytest.mark.parametrize("decoder", ["auto", "pyav", "torchcodec", "dali"])
@pytest.mark.parametrize("matrix", [(0.7071, 0.7071, -0.7071, 0.7071), (1, 0.3, 0, 1)])
def test_other_matrices_are_refused(tmp_path: Path, matrix: tuple[float, ...], decoder: str) -> None:
    path = clip_with(tmp_path / "skew.mp4", matrix, "libvpx-vp9")
    with pytest.raises(MediaError, match="only quarter turns"):
        decode(Video(str(path)), replace(FOUR, decoder=decoder), 12, device="cpu")


def test_rounded_matrices_count_as_what_they_are() -> None:
    assert read_matrix(np.array([3, 65530, 0, -65536, -2, 0, 0, 0, 1 << 30], np.int32).tobytes()) == Orientation(
        True, flip_columns=True)
