"""The source of the CUDA kernels on frames, compiled for the CPU and run thread by thread: the bits of the CPU's op.

That proves its index arithmetic, its filter and its roundings, and neither nvcc's code nor the launch on a GPU.
test_csrc.py compiles the same source with nvcc where that is. Letters: T frames, H and W sides in pixels.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from veripo_kernels import cpp, frames_torch

from tests.kernels.test_csrc import COMPILER, library  # noqa: F401  library: a fixture that loads the op
from tests.kernels.test_frames_to_patches import LAYOUTS, QWEN, laid_out, random_frames, random_planes
from tests.support.paths import REPOSITORY

SHIM = REPOSITORY / "tests" / "support" / "cuda_on_cpu"
SOURCE = REPOSITORY / "csrc" / "frames_to_patches.cu"
NAMESPACE = "veripo_cuda_on_cpu"
LAUNCH = re.compile(r"(\w+)<<<([^,]+), ([^,]+), [^>]*>>>\(([^;]*)\);")

pytestmark = COMPILER


def as_cpp() -> str:
    """The source with its launches as loops, and its ops registered on the CPU under another name."""
    declarations = re.search(r"^STABLE_TORCH_LIBRARY_FRAGMENT.*?^}", SOURCE.with_suffix(".cpp").read_text(),
                             re.MULTILINE | re.DOTALL)
    assert declarations is not None
    text, launches = LAUNCH.subn(r"cuda_on_cpu::launch(\2, \3, [&] { \1(\4); });", SOURCE.read_text())
    assert launches == SOURCE.read_text().count("<<<") == 2
    text, registrations = re.subn(r"\(veripo_cpp, CUDA,", "(veripo_cpp, CPU,", text)
    text, guards = re.subn("torch::stable::accelerator::DeviceGuard", "cuda_on_cpu::DeviceGuard", text)
    assert registrations == 1 and guards == 2
    return f"{text}\n{declarations[0]}\n".replace("veripo_cpp,", f"{NAMESPACE},")


@pytest.fixture(scope="module")
def ops() -> Any:
    """The ops of the CUDA source, on CPU tensors; built once for each content of the sources."""
    text, torch_folder = as_cpp(), Path(torch.__file__).parent
    content = b"".join(path.read_bytes() for path in [*sorted(SHIM.rglob("*.h")),
                                                      *sorted((REPOSITORY / "csrc").glob("*.h"))])
    digest = hashlib.sha256(content + text.encode() + torch.__version__.encode()).hexdigest()[:16]
    binary = REPOSITORY / "build" / f"test-cuda-on-cpu-{digest}.so"
    if not binary.exists():
        own = binary.with_suffix(f".{os.getpid()}")
        own.parent.mkdir(exist_ok=True)
        compiler = next(filter(shutil.which, ("c++", "g++", "clang++")))
        # without contraction: the kernel's only product that is added to is one of integers
        command = [compiler, "-std=c++20", "-O2", "-ffp-contract=off", "-DTORCH_TARGET_VERSION=0x020B000000000000",
                   "-fPIC", "-shared", "-fvisibility=hidden", f"-I{SHIM}", f"-I{REPOSITORY / 'csrc'}",
                   f"-isystem{torch_folder / 'include'}", "-x", "c++", "-", "-o", own, f"-L{torch_folder / 'lib'}",
                   "-ltorch_cpu"]
        done = subprocess.run(command, input=text, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr
        own.rename(binary)
    torch.ops.load_library(binary)
    here = getattr(torch.ops, NAMESPACE)
    return SimpleNamespace(**{name: getattr(here, name) for name in cpp.OPS if "frames" in name or "patches" in name})


SIZES = [((45, 80), (28, 56)), ((30, 40), (84, 56)), ((61, 87), (28, 84)), ((150, 7), (28, 28)), ((5, 201), (28, 28)),
         ((56, 84), (56, 84)), ((56, 31), (56, 28)), ((1, 1), (28, 28))]
"""Height and width before and after: shrinking, growing, one of each, long windows, and the size that it has."""
GEOMETRIES = [(14, 2, 2), (14, 1, 1), (8, 3, 3), (1, 1, 2)]
"""Sides of a patch, patches to a merged token and frames to a patch."""


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("size", "to"), SIZES)
def test_frames_of_any_strides(ops: Any, layout: str, size: tuple[int, int], to: tuple[int, int]) -> None:
    frames = random_frames(3, *size)
    view = laid_out(frames, layout)
    resized = ops.resize_frames(view, *to)
    assert torch.equal(resized, frames_torch.resize_frames(frames, *to))
    assert torch.equal(resized, torch.ops.veripo_cpp.resize_frames(view, *to))
    for dtype in (torch.float32, torch.bfloat16):
        arguments = (view, *to, *QWEN.values(), 2, dtype)
        assert torch.equal(ops.frames_to_patches(*arguments), torch.ops.veripo_cpp.frames_to_patches(*arguments))


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize(("patch", "merge", "temporal"), GEOMETRIES)
def test_geometries_and_nothing_written_beside_the_result(ops: Any, count: int, patch: int, merge: int, temporal: int
                                                          ) -> None:
    """Also counts of pixels that do not fill the last block, and frames repeated to fill the last time."""
    frames, step = random_frames(count, 20, 30), patch * merge
    for height, width in ((step, 2 * step), (2 * step, step)):
        for dtype in (torch.float32, torch.bfloat16):
            values = (height, width, QWEN["mean"], QWEN["std"], patch, merge, temporal)
            want = torch.ops.veripo_cpp.frames_to_patches(frames, *values, dtype)
            room = torch.full((want.numel() + 512,), 77.0, dtype=dtype)
            ops.frames_to_patches_out(frames, *values, room[256:-256].view(want.shape))
            assert torch.equal(room[256:-256].view(want.shape), want)
            assert (room[:256] == 77).all() and (room[-256:] == 77).all()
    room = torch.full((count * 3 * step * 2 * step + 512,), 77, dtype=torch.uint8)
    ops.resize_frames_out(frames, room[256:-256].view(count, 3, step, 2 * step))
    assert torch.equal(room[256:-256].view(count, 3, step, 2 * step),
                       torch.ops.veripo_cpp.resize_frames(frames, step, 2 * step))
    assert (room[:256] == 77).all() and (room[-256:] == 77).all()


@pytest.mark.parametrize("nv12", [False, True])
@pytest.mark.parametrize(("matrix", "full_range"), [("bt601", False), ("bt709", True)])
@pytest.mark.parametrize("size", [(40, 60), (41, 59), (56, 84), (1, 1), (2, 101)])
def test_planes(ops: Any, nv12: bool, matrix: Any, full_range: bool, size: tuple[int, int]) -> None:
    planes, numbers = random_planes(3, *size, nv12), frames_torch.yuv_matrix(matrix, full_range)
    for to in (size, (56, 84)):
        got = ops.planes_to_frames(*planes, *to, numbers)
        assert torch.equal(got, torch.ops.veripo_cpp.planes_to_frames(*planes, *to, numbers))
        assert torch.equal(got, frames_torch.resize_frames(frames_torch.planes_to_rgb(*planes, numbers), *to))
    for dtype in (torch.float32, torch.bfloat16):
        arguments = (*planes, 56, 84, numbers, *QWEN.values(), 2, dtype)
        assert torch.equal(ops.planes_to_patches(*arguments), torch.ops.veripo_cpp.planes_to_patches(*arguments))


def test_levels_beyond_black_and_white_are_clamped(ops: Any) -> None:
    frames = (random_frames(2, 31, 47) > 127) * torch.tensor(255, dtype=torch.uint8)
    for to in ((90, 120), (9, 11)):
        assert torch.equal(ops.resize_frames(frames, *to), frames_torch.resize_frames(frames, *to))
