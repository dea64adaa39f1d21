"""The compiled ops on frames against their definition in torch, Hugging Face's processors, and swscale by PyAV.

Letters: T frames, H and W sides in pixels. On a CPU the op has to give the bits of the definition.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from veripo_kernels import (
    cpp,
    dispatch,
    frames_to_patches,
    frames_torch,
    planes_to_frames,
    planes_to_patches,
    resize_frames,
)

from bench.measure import peak_bytes
from bench.video.clips import make_clip
from tests.kernels.test_csrc import COMPILER, FLAGS, built, clones, library  # noqa: F401  library: a fixture that loads the op
from tests.support.paths import PYTHONPATH
from tests.video.test_patches import CLIP, GEOMETRY, SIZES, mean_levels, oracle  # noqa: F401  oracle: the processors' answers
from veripo_fast.video.contract import resized_size

QWEN: dict[str, Any] = {"mean": CLIP[0], "std": CLIP[1], "patch_size": 14, "merge_size": 2}
MATRICES = ["bt601", "bt709"]

pytestmark = COMPILER


def random_frames(count: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)


def laid_out(frames: torch.Tensor, layout: str) -> torch.Tensor:
    """The same frames in another memory: as decoders give them, and as a careless caller might."""
    count, _, height, width = frames.shape
    if layout == "planar":
        return frames.contiguous()
    if layout == "rgb":
        return frames.contiguous(memory_format=torch.channels_last)
    room = {"padded rgb": (count, height, width + 11, 3), "rgba": (count, height, width, 4),
            "padded planes": (count, 3, height + 3, width + 5), "every second": (count, 3, height, 2 * width),
            "transposed": (count, 3, width, height)}[layout]
    memory = torch.full(room, 77, dtype=torch.uint8)
    view = {"padded rgb": lambda: memory[:, :, :width].permute(0, 3, 1, 2),
            "rgba": lambda: memory[..., :3].permute(0, 3, 1, 2),
            "padded planes": lambda: memory[:, :, :height, :width],
            "every second": lambda: memory[..., ::2], "transposed": lambda: memory.mT}[layout]()
    view.copy_(frames)
    return view


def definition(frames: torch.Tensor, height: int, width: int, dtype: torch.dtype = torch.float32, **changes: Any
               ) -> torch.Tensor:
    values = {"temporal_patch_size": 2, **QWEN, **changes}
    return frames_torch.frames_to_patches(frames, height, width, dtype=dtype, **values)


# -- RGB against the definition --------------------------------------------------------------------------------------

LAYOUTS = ["planar", "rgb", "padded rgb", "rgba", "padded planes", "every second", "transposed"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("size", "to"), [
    ((90, 160), (28, 56)),    # shrinking, as a video does
    ((30, 40), (84, 112)),    # growing
    ((61, 173), (84, 56)),    # one of each; odd sides
    ((300, 7), (28, 28)),     # tall
    ((5, 401), (28, 28)),     # wide: windows longer than the row at its ends
    ((56, 84), (56, 84)),     # the size it has
    ((56, 31), (56, 84)),     # one side as it is
    ((1, 1), (28, 28)),
])
def test_equals_the_definition(layout: str, size: tuple[int, int], to: tuple[int, int]) -> None:
    frames = random_frames(3, *size)
    view = laid_out(frames, layout)
    resized = resize_frames(view, *to)
    assert resized.is_contiguous() and resized.dtype == torch.uint8
    expected = F.interpolate(frames, to, mode="bicubic", antialias=True)
    assert torch.equal(resized, expected)
    for dtype in (torch.float32, torch.bfloat16):
        patches = frames_to_patches(view, *to, dtype=dtype, **QWEN)
        assert patches.dtype == dtype
        assert torch.equal(patches, definition(frames, *to, dtype))


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (17, 31), (29, 33), (252, 447)])
def test_sides_that_are_no_multiple_of_a_vector(size: tuple[int, int]) -> None:
    frames = random_frames(1, 50, 70)
    assert torch.equal(resize_frames(frames, *size), frames_torch.resize_frames(frames, *size))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("to", [(1, 1), (2, 1), (28, 1), (1, 5)])
def test_the_definition_holds_where_torch_fails_on_planes(layout: str, to: tuple[int, int]) -> None:
    """Pillow is the judge: its weights have more bits, so a level may differ by two."""
    frames = random_frames(2, 40, 50)
    want = torch.stack([torch.from_numpy(np.array(Image.fromarray(frame.numpy()).resize(to[::-1], Image.BICUBIC)))
                        for frame in frames.permute(0, 2, 3, 1).contiguous()]).permute(0, 3, 1, 2)
    got = frames_torch.resize_frames(laid_out(frames, layout), *to)
    assert (got.int() - want.int()).abs().max() <= 2
    assert torch.equal(resize_frames(laid_out(frames, layout), *to), got)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 5), st.tuples(*[st.one_of(st.integers(1, 40), st.integers(1, 300))] * 4), st.booleans(),
       st.integers(0, 9), st.sampled_from(["noise", "black and white", "edge"]))
def test_any_size(count: int, sides: tuple[int, int, int, int], rgb: bool, seed: int, kind: str) -> None:
    frames = random_frames(count, *sides[:2], seed)
    if kind == "black and white":  # overshoots beyond 0 and 255
        frames = (frames > 127) * torch.tensor(255, dtype=torch.uint8)
    elif kind == "edge":
        frames = torch.full_like(frames, 255)
        frames[..., frames.shape[-1] // 2:] = 0
    view = laid_out(frames, "rgb" if rgb else "planar")
    assert torch.equal(resize_frames(view, *sides[2:]), frames_torch.resize_frames(frames, *sides[2:]))


@pytest.mark.parametrize(("size", "to"), [((1, 20_000), (1, 3)), ((20_000, 1), (3, 1)), ((2, 2), (3, 5000)),
                                          ((4000, 3000), (1, 1)), ((3, 1), (2000, 2000))])
def test_extreme_sizes(size: tuple[int, int], to: tuple[int, int]) -> None:
    frames = random_frames(1, *size)
    assert torch.equal(resize_frames(frames, *to), frames_torch.resize_frames(frames, *to))


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize(("patch_size", "merge_size", "temporal_patch_size"),
                         [(14, 2, 2), (16, 2, 2), (14, 1, 1), (8, 3, 3), (1, 1, 2), (33, 1, 2)])
def test_geometries(count: int, patch_size: int, merge_size: int, temporal_patch_size: int) -> None:
    frames, step = random_frames(count, 40, 50), patch_size * merge_size
    sizes = {"patch_size": patch_size, "merge_size": merge_size, "temporal_patch_size": temporal_patch_size}
    for height, width in ((step, 2 * step), (2 * step, step)):
        for dtype in (torch.float32, torch.bfloat16):
            patches = frames_to_patches(frames, height, width, dtype=dtype, **{**QWEN, **sizes})
            assert torch.equal(patches, definition(frames, height, width, dtype, **sizes))


def test_every_level_is_normalised_as_torch_does() -> None:
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, -1, -1)
    half_way = (0.5 / 255,) * 3, (1 / 255,) * 3  # 128.5, 129.5, ... lie in the middle between two bfloat16
    assert definition(levels, 16, 16, mean=half_way[0], std=half_way[1], patch_size=16, merge_size=1).max() == 254.5
    for mean, std in (CLIP, half_way, ((0.5,) * 3, (0.5,) * 3), ((0.1, 0.7, 0.33), (1 / 3, 1 / 7, 0.9))):
        values = {"mean": mean, "std": std, "patch_size": 16, "merge_size": 1}
        for dtype in (torch.float32, torch.bfloat16):
            assert torch.equal(frames_to_patches(levels, 16, 16, dtype=dtype, **values),
                               definition(levels, 16, 16, dtype, **values))


def test_where_each_value_goes() -> None:
    """By hand, without the definition: identity normalisation, numbered pixels."""
    frames = random_frames(4, 12, 24)
    mean, std = (0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255)
    patches = frames_to_patches(frames, 12, 24, mean=mean, std=std, patch_size=3, merge_size=2).round().int()
    for index, feature in ((0, 0), (1, 4), (2, 9), (7, 30), (37, 53), (63, 17)):
        time, token, inside = index // 32, index // 4 % 8, index % 4
        row, column = (token // 4 * 2 + inside // 2) * 3, (token % 4 * 2 + inside % 2) * 3
        channel, frame, y, x = feature // 18, feature // 9 % 2, feature // 3 % 3, feature % 3
        assert patches[index, feature] == frames[2 * time + frame, channel, row + y, column + x]


def test_frames_of_a_decoder(tmp_path: Path) -> None:
    """Views of FFmpeg's own pictures, whose rows are longer than the picture."""
    path = make_clip(tmp_path / "clip.mp4", frames=5, size=(102, 182))
    with av.open(str(path)) as container:
        pictures = [frame.reformat(format="rgb24") for frame in container.decode(video=0)]
    for picture in pictures:
        plane = picture.planes[0]
        assert plane.line_size > 3 * picture.width
        rows = torch.frombuffer(plane, dtype=torch.uint8).view(picture.height, plane.line_size)
        view = rows[:, :3 * picture.width].view(picture.height, picture.width, 3).permute(2, 0, 1)[None]
        dense = torch.from_numpy(picture.to_ndarray()).permute(2, 0, 1)[None]
        assert view.stride(2) == plane.line_size
        assert torch.equal(resize_frames(view, 56, 84), frames_torch.resize_frames(dense, 56, 84))
        assert torch.equal(frames_to_patches(view, 56, 84, **QWEN), definition(dense, 56, 84))


# -- YUV -------------------------------------------------------------------------------------------------------------


def random_planes(count: int, height: int, width: int, nv12: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    chroma = random_frames(count, (height + 1) // 2, (width + 1) // 2, 1)
    uv = chroma[:, :2].permute(0, 2, 3, 1).contiguous()
    return random_frames(count, height, width)[:, 0], *((uv[..., 0], uv[..., 1]) if nv12 else chroma[:, :2].unbind(1))


@pytest.mark.parametrize("nv12", [False, True])
@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("full_range", [False, True])
@pytest.mark.parametrize("size", [(64, 96), (61, 95), (56, 84), (1, 1), (2, 301)])
def test_planes_equal_the_definition(nv12: bool, matrix: Any, full_range: bool, size: tuple[int, int]) -> None:
    planes = random_planes(3, *size, nv12)
    rgb = frames_torch.planes_to_rgb(*planes, frames_torch.yuv_matrix(matrix, full_range))
    colours: dict[str, Any] = {"matrix": matrix, "full_range": full_range}
    assert torch.equal(planes_to_frames(*planes, *size, **colours), rgb)
    resized = frames_torch.resize_frames(rgb, 56, 84)
    assert torch.equal(planes_to_frames(*planes, 56, 84, **colours), resized)
    for dtype in (torch.float32, torch.bfloat16):
        patches = planes_to_patches(*planes, 56, 84, dtype=dtype, **colours, **QWEN)
        assert torch.equal(patches, definition(resized, 56, 84, dtype))


def test_planes_of_any_strides() -> None:
    planes = random_planes(2, 40, 60, False)
    sparse = [torch.empty(*plane.shape[:2], 3 * plane.shape[2], dtype=torch.uint8)[..., ::3].copy_(plane)
              for plane in planes]
    assert torch.equal(planes_to_frames(*sparse, 28, 30, matrix="bt601"),
                       planes_to_frames(*planes, 28, 30, matrix="bt601"))


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("full_range", [False, True])
def test_matrices_by_hand(matrix: Any, full_range: bool) -> None:
    """RGB -> YCbCr in float64 by the standards' own equations, then back."""
    red, blue = {"bt601": (0.299, 0.114), "bt709": (0.2126, 0.0722)}[matrix]
    rgb = torch.randint(0, 256, (4, 3, 40, 40), generator=torch.Generator().manual_seed(5)).double() / 255
    rgb = rgb.repeat_interleave(2, 2).repeat_interleave(2, 3)  # one colour for each sample of chroma
    r, g, b = rgb.unbind(1)
    y = red * r + (1 - red - blue) * g + blue * b
    u, v = ((b - y) / (2 - 2 * blue))[:, ::2, ::2], ((r - y) / (2 - 2 * red))[:, ::2, ::2]
    scale, offset, chroma = (255, 0, 255) if full_range else (219, 16, 224)
    planes = [(y * scale + offset), (u * chroma + 128), (v * chroma + 128)]
    planes = [plane.round().clamp(0, 255).to(torch.uint8) for plane in planes]
    got = planes_to_frames(*planes, 80, 80, matrix=matrix, full_range=full_range)
    error = got.double() - rgb * 255
    assert error.abs().max() <= 4.5  # roundings of y, u, v, by up to 2.2 / 2 levels each, and two products cut off
    assert error.mean().abs() < 1.5


def decibels(got: torch.Tensor, want: torch.Tensor) -> float:
    error = (got.double() - want.double()).square().mean().item()
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("full_range", [False, True])
def test_planes_equal_swscale(tmp_path: Path, matrix: Any, full_range: bool) -> None:
    """A decoded clip, whose colours are pale, and noise, which has every colour and many beyond 0 and 255."""
    with av.open(str(make_clip(tmp_path / "clip.mp4", frames=6, size=(120, 208)))) as container:
        frames = list(container.decode(video=0))
    noise = torch.cat([plane.flatten() for plane in random_planes(1, 120, 208, False)]).view(180, 208)
    frames.append(av.VideoFrame.from_ndarray(noise.numpy(), format="yuv420p"))
    for frame in frames:
        y, u, v = (torch.frombuffer(plane, dtype=torch.uint8).view(1, plane.height, -1)[..., :plane.width]
                   for plane in frame.planes)
        picture = frame.reformat(format="rgb24", src_colorspace={"bt601": "itu601", "bt709": "itu709"}[matrix],
                                 src_color_range="JPEG" if full_range else "MPEG", dst_color_range="JPEG")
        want = torch.from_numpy(picture.to_ndarray()).permute(2, 0, 1)[None]
        got = planes_to_frames(y, u, v, 120, 208, matrix=matrix, full_range=full_range)
        assert (got.float() - want.float()).abs().mean() < 1
        assert decibels(got, want) >= 45
        if os.uname().machine == "x86_64":
            assert torch.equal(got, want)


# -- the processors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GEOMETRY)
@pytest.mark.parametrize("size", SIZES)
def test_equals_the_processor(oracle: dict[str, Any], name: str, size: tuple[int, int]) -> None:  # noqa: F811
    mean, std, patch_size, merge_size = GEOMETRY[name]
    case = f"{name}/{size[0]}x{size[1]}/resize"
    frames, (low, high) = oracle["cases"]["videos"][case], oracle["cases"]["bounds"]
    to = resized_size(*size, patch_size * merge_size, low, high)
    expected = oracle["videos"][case][0]
    for layout in ("planar", "rgb"):
        values = frames_to_patches(laid_out(frames, layout), *to, mean=mean, std=std, patch_size=patch_size,
                                   merge_size=merge_size)
        assert mean_levels(values - expected, std) < 0.05  # measured: 0; the bound of the project is 1
        spread = torch.tensor(std).repeat_interleave(values.shape[1] // 3) * 255
        assert decibels(values * spread, expected * spread) >= 60  # 45 is asked for


# -- without the op, other devices -------------------------------------------------------------------------------------


def test_without_the_op_the_results_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    frames, planes = random_frames(3, 61, 47), random_planes(3, 61, 47, True)
    calls = [lambda: resize_frames(frames, 28, 56), lambda: frames_to_patches(frames, 28, 56, **QWEN),
             lambda: frames_to_patches(frames, 28, 56, dtype=torch.bfloat16, **QWEN),
             lambda: planes_to_frames(*planes, 28, 56, matrix="bt709"),
             lambda: planes_to_patches(*planes, 28, 56, matrix="bt709", **QWEN)]
    compiled = [call() for call in calls]
    monkeypatch.setattr(dispatch, "missing", lambda implementation: "not here" if implementation == "cpp" else None)
    for name in ("resize_frames", "frames_to_patches", "planes_to_frames", "planes_to_patches"):
        monkeypatch.delattr(cpp, name)
    assert all(torch.equal(call(), result) for call, result in zip(calls, compiled, strict=True))


@pytest.mark.parametrize(("size", "to"), [((90, 160), (28, 56)), ((30, 40), (84, 112)), ((61, 173), (84, 56))])
def test_the_float_branch_is_within_a_level(size: tuple[int, int], to: tuple[int, int]) -> None:
    """What devices without a uint8 resize compute, here on the CPU."""
    frames = (random_frames(2, *size) > 127) * torch.tensor(255, dtype=torch.uint8)
    difference = frames_torch.resize_as_float(frames, *to).int() - resize_frames(frames, *to).int()
    assert difference.abs().max() <= 1


# -- memory and threads ------------------------------------------------------------------------------------------------


def test_memory_is_that_of_the_result() -> None:
    """The input has 88 MB; 4 MB are the weights, a few rows and what the allocator rounds up."""
    frames = laid_out(random_frames(32, 720, 1280), "rgb")
    size = 32 * 3 * 112 * 196
    for run, expected in ((lambda: resize_frames(frames, 112, 196), size),
                          (lambda: frames_to_patches(frames, 112, 196, dtype=torch.bfloat16, **QWEN), 2 * size),
                          (lambda: planes_to_frames(frames[:, 0], frames[:, 1, :360, :640], frames[:, 2, :360, :640],
                                                    112, 196, matrix="bt601"), size)):
        run()
        assert peak_bytes(run, torch.device("cpu")) < expected + (4 << 20)


def test_threads_change_no_bit() -> None:
    frames, planes, before = random_frames(7, 100, 150), random_planes(7, 100, 150, True), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append((resize_frames(frames, 50, 60), frames_to_patches(frames, 56, 84, **QWEN),
                            frames_to_patches(frames[..., :84, :140], 84, 140, **QWEN),
                            planes_to_patches(*planes, 56, 84, matrix="bt601", **QWEN)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


GUARDED = """
import ctypes, mmap, sys, torch
from veripo_kernels import planes_to_frames, resize_frames
page = mmap.PAGESIZE
for height, width in ((17, 40), (3, 641), (64, 7), (1, 1), (2, 2), (40, 31)):
    for last in range(3):
        size = 3 * height * width
        pages = -(-size // page)
        memory = mmap.mmap(-1, (pages + 1) * page)
        whole = torch.frombuffer(memory, dtype=torch.uint8)
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(whole.data_ptr() + pages * page), page, 0) == 0
        data = whole[pages * page - size:pages * page]  # the byte after the last cannot be read
        rgb = data.view(1, height, width, 3).permute(0, 3, 1, 2)
        for frames in (rgb, data.view(1, 3, height, width), rgb[:, :, -1:].expand(-1, -1, height, -1)):
            for size in ((5, 9), (300, 500), (height, width)):
                resize_frames(frames, *size)
        y = data[-height * width:].view(1, height, width)
        u = data[-((height + 1) // 2 * ((width + 1) // 2)):].view(1, (height + 1) // 2, (width + 1) // 2)
        planes_to_frames(y, u, u, 28, 28, matrix="bt601")
print("done")
"""


def test_nothing_after_the_last_pixel_is_read() -> None:
    result = subprocess.run([sys.executable, "-c", GUARDED], capture_output=True, text=True,
                            env={**os.environ, "PYTHONPATH": PYTHONPATH})
    assert result.stdout == "done\n", (result.returncode, result.stderr)


# -- into a given tensor -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["cpp", "torch"])
@pytest.mark.parametrize("size", [(20, 30), (28, 56)], ids=["filtered", "copied"])
def test_a_given_tensor_is_filled_and_nothing_beside_it(impl: str, size: tuple[int, int],
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("veripo_kernels.frames.choose", lambda *_: impl)
    frames = random_frames(3, *size)
    room = torch.full((5, 3, 28, 56), 7, dtype=torch.uint8)
    given = resize_frames(frames, 28, 56, out=room[1:4])
    assert given.data_ptr() == room[1].data_ptr()
    assert torch.equal(given, resize_frames(frames, 28, 56)) and bool((room[::4] == 7).all())
    for dtype in (torch.float32, torch.bfloat16):
        expected = frames_to_patches(frames, 28, 56, **QWEN, dtype=dtype)
        room = torch.full((len(expected) + 2, 1176), 7.0, dtype=dtype)
        given = frames_to_patches(frames, 28, 56, **QWEN, dtype=dtype, out=room[1:-1])
        assert given.data_ptr() == room[1].data_ptr()
        assert torch.equal(given, expected) and bool((room[[0, -1]] == 7).all())


@pytest.mark.parametrize("out", [torch.zeros(2, 3, 28, 57, dtype=torch.uint8), torch.zeros(2, 3, 28, 56),
                                 torch.zeros(1, 3, 28, 56, dtype=torch.uint8),
                                 torch.zeros(2, 3, 28, 56, dtype=torch.uint8, device="meta"),
                                 torch.zeros(2, 3, 56, 28, dtype=torch.uint8).transpose(2, 3)])
def test_a_given_tensor_that_does_not_fit_is_named(out: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"out must be contiguous torch.uint8 \[2, 3, 28, 56\] on cpu, got"):
        resize_frames(FRAMES, 28, 56, out=out)
    patches = torch.zeros(16, 1176, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"out must be contiguous torch.float32 \[8, 1176\] on cpu, got"):
        frames_to_patches(FRAMES, 28, 56, **QWEN, out=patches[::2])


# -- torch -------------------------------------------------------------------------------------------------------------


def test_opcheck() -> None:
    frames, planes = random_frames(3, 20, 30), random_planes(3, 20, 30, True)
    patches = [*CLIP, 14, 2, 2, torch.bfloat16]
    matrix = frames_torch.yuv_matrix("bt601", False)
    room = torch.empty(16, 1176, dtype=torch.bfloat16)
    for name, values in (("resize_frames", [frames, 28, 56]), ("frames_to_patches", [frames, 28, 56, *patches]),
                         ("resize_frames_out", [frames, torch.empty(3, 3, 28, 56, dtype=torch.uint8)]),
                         ("frames_to_patches_out", [frames, 28, 56, *patches[:-1], room]),
                         ("planes_to_frames", [*planes, 28, 56, matrix]),
                         ("planes_to_patches", [*planes, 28, 56, matrix, *patches])):
        torch.library.opcheck(getattr(torch.ops.veripo_cpp, name).default, values)


def test_compiles_into_one_graph() -> None:
    frames = random_frames(3, 20, 30)
    traced = torch.compile(lambda x: frames_to_patches(x, 28, 56, **QWEN) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(traced(frames), frames_to_patches(frames, 28, 56, **QWEN) * 2)


# -- the door ----------------------------------------------------------------------------------------------------------

FRAMES = torch.zeros(2, 3, 30, 40, dtype=torch.uint8)
SHARED = torch.zeros(3, 3, 56, 56, dtype=torch.uint8)
Y, UV = torch.zeros(2, 30, 41, dtype=torch.uint8), torch.zeros(2, 15, 21, dtype=torch.uint8)


@pytest.mark.parametrize(("changes", "words"), [
    ({"frames": FRAMES.float()}, "frames must be uint8 [T, 3, H, W] with T > 0, got torch.float32 [2, 3, 30, 40]"),
    ({"frames": FRAMES[0]}, "frames must be uint8 [T, 3, H, W] with T > 0, got torch.uint8 [3, 30, 40]"),
    ({"frames": FRAMES[:0]}, "frames must be uint8 [T, 3, H, W] with T > 0, got torch.uint8 [0, 3, 30, 40]"),
    ({"frames": FRAMES[:, :2]}, "frames must be uint8 [T, 3, H, W] with T > 0, got torch.uint8 [2, 2, 30, 40]"),
    ({"frames": FRAMES[:, :, :0]}, "frames must have 1 to 1048576 pixels, got 0 x 40"),
    ({"height": 0}, "height and width must have 1 to 1048576 pixels, got 0 x 56"),
    ({"width": -28}, "height and width must have 1 to 1048576 pixels, got 28 x -28"),
    ({"height": 1 << 21}, "height and width must have 1 to 1048576 pixels, got 2097152 x 56"),
    ({"width": 57}, "height and width must be multiples of 28 pixels, got 28 x 57"),
    ({"mean": (0.5,)}, "mean must have 3 numbers, got 1"),
    ({"std": (0.5,) * 4}, "std must have 3 numbers, got 4"),
    ({"std": (0.5, 0.0, 0.5)}, "std must not be 0, got (0.5, 0.0, 0.5)"),
    ({"patch_size": 0}, "patch_size must be 1 to 1048576, got 0"),
    ({"merge_size": -1}, "merge_size must be 1 to 1048576, got -1"),
    ({"temporal_patch_size": 0}, "temporal_patch_size must be 1 to 1048576, got 0"),
    ({"dtype": torch.float16}, "dtype must be torch.float32 or torch.bfloat16, got torch.float16"),
])
def test_wrong_frames_are_named(changes: dict[str, Any], words: str) -> None:
    arguments = {"frames": FRAMES, "height": 28, "width": 56, **QWEN, **changes}
    with pytest.raises(ValueError, match=re.escape(words)):
        frames_to_patches(**arguments)
    if changes.keys() <= {"frames", "height"}:
        with pytest.raises(ValueError, match=re.escape(words)):
            resize_frames(arguments["frames"], arguments["height"], arguments["width"])


@pytest.mark.parametrize(("changes", "words"), [
    ({"y": Y.int()}, "y must be uint8 [T, H, W] with T > 0, got torch.int32 [2, 30, 41]"),
    ({"y": Y[0]}, "y must be uint8 [T, H, W] with T > 0, got torch.uint8 [30, 41]"),
    ({"y": Y[:, :, :0]}, "y must have 1 to 1048576 pixels, got 30 x 0"),
    ({"u": UV[:, :, :20]}, "u must be uint8 [2, 15, 21], got torch.uint8 [2, 15, 20]"),
    ({"v": UV[:1]}, "v must be uint8 [2, 15, 21], got torch.uint8 [1, 15, 21]"),
    ({"v": UV.float()}, "v must be uint8 [2, 15, 21], got torch.float32 [2, 15, 21]"),
    ({"u": UV.to("meta")}, "u must be on cpu like y, got meta"),
    ({"matrix": "bt2020"}, "matrix must be 'bt601' or 'bt709', got 'bt2020'"),
    ({"height": 0}, "height and width must have 1 to 1048576 pixels, got 0 x 56"),
])
def test_wrong_planes_are_named(changes: dict[str, Any], words: str) -> None:
    arguments = {"y": Y, "u": UV, "v": UV, "height": 28, "width": 56, "matrix": "bt601", **changes}
    for call in (planes_to_frames, lambda **all_: planes_to_patches(**all_, **QWEN)):
        with pytest.raises(ValueError, match=re.escape(words)):
            call(**arguments)


@pytest.mark.parametrize(("name", "values", "words"), [
    ("resize_frames", [FRAMES.float(), 28, 56], "frames must be uint8 [T, 3, H, W] with T > 0"),
    ("resize_frames", [FRAMES, 0, 56], "height and width must be 1 to 1048576, got 0 x 56"),
    ("frames_to_patches", [FRAMES, 28, 55, *CLIP, 14, 2, 2, torch.float32], "multiples of 28, got 28 x 55"),
    ("frames_to_patches", [FRAMES, 28, 56, [0.5], CLIP[1], 14, 2, 2, torch.float32], "mean and std must have 3"),
    ("frames_to_patches", [FRAMES, 28, 56, *CLIP, 14, 0, 2, torch.float32], "must be positive"),
    ("frames_to_patches", [FRAMES, 28, 56, *CLIP, 14, 2, 2, torch.float16], "dtype must be float32 or bfloat16"),
    ("resize_frames_out", [FRAMES, torch.zeros(2, 3, 28, 56)], "out must be uint8 [T, 3, H, W]"),
    ("resize_frames_out", [FRAMES, torch.zeros(1, 3, 28, 56, dtype=torch.uint8)], "out must be contiguous [T, 3"),
    ("resize_frames_out", [FRAMES, torch.zeros(2, 3, 56, 28, dtype=torch.uint8).mT], "must be contiguous [T, 3, H, W]"),
    ("resize_frames_out", [SHARED[:2, :, :30, :40], SHARED[1:]], "out must not share memory with frames"),
    ("frames_to_patches_out", [FRAMES, 28, 56, *CLIP, 14, 2, 2, torch.zeros(7, 1176)], "must be contiguous [N, "),
    ("frames_to_patches_out", [FRAMES, 28, 56, *CLIP, 14, 2, 2, torch.zeros(8, 1176).int()], "dtype must be float32"),
    ("planes_to_frames", [Y, UV[:, :14], UV, 28, 56, [0] * 6], "half the rows and columns of y"),
    ("planes_to_frames", [Y, UV[:1], UV, 28, 56, [0] * 6], "with the same T > 0"),
    ("planes_to_frames", [Y, UV, UV, 28, 56, [0] * 5], "matrix must have 6 numbers, got 5"),
])
def test_the_op_itself_keeps_memory_safe(name: str, values: list[Any], words: str) -> None:
    with pytest.raises(RuntimeError, match=re.escape(words)):
        getattr(torch.ops.veripo_cpp, name)(*values)


# -- instruction sets --------------------------------------------------------------------------------------------------

LOOPS = {"deinterleave": 1, "double_up": 1, "down": 1, "interleave": 1, "normalise": 2, "to_rgb": 1}
"""Loops on frames, and of how many types each is."""


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the clones are of x86-64")
def test_every_loop_is_simd_code() -> None:
    """A loop that the compiler gives up on is several times slower, and no other test would see it."""
    binary = built("cpu") / "_cpp.so"
    bodies = [(isa, name, body) for isa, name, body in clones(binary) if name in LOOPS]
    assert sorted((isa, name) for isa, name, _ in bodies) == sorted(
        (isa, name) for isa in FLAGS for name in LOOPS for _ in range(LOOPS[name]))
    for isa, name, body in bodies:
        assert isa == "baseline" or len(re.findall("zmm|ymm" if isa == "avx512" else "ymm", body)) > 5, (isa, name)
    text = subprocess.run(["objdump", "-dC", "--no-show-raw-insn", binary], capture_output=True, text=True,
                          check=True).stdout
    products = re.findall(r"<[^\n]*veripo::frames::[^\n]*(simd<[34]>|down_avx2)\([^\n]*>:\n(.*?)\n\n", text, re.S)
    assert {name for name, _ in products} == {"simd<3>", "simd<4>", "down_avx2"}
    assert all("vpmaddwd" in body and "ymm" in body for _, body in products)
