"""Decoded frames -> resized frames, or the patches that the vision tower of Qwen2.5-VL and Qwen3-VL reads.

One pass of the compiled op (csrc/) where it is built: nothing of the size of the input is made. Elsewhere plain torch
(`frames_torch.py`), which defines it and gives the same bits on a CPU. RGB frames may have any strides, so that a view
of a decoder's picture with padded rows needs no copy; so may the planes of a YUV picture.

Letters: T frames, H and W sides in pixels, N patches, p patch size, m merge size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from veripo_kernels import cpp, frames_torch
from veripo_kernels.dispatch import choose
from veripo_kernels.frames_torch import YuvMatrix

__all__ = ["YuvMatrix", "frames_to_patches", "planes_to_frames", "planes_to_patches", "resize_frames"]

_MOST_PIXELS = 1 << 20
"""A side may have that many."""


def resize_frames(frames: torch.Tensor, height: int, width: int, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """Resize frames: antialiased bicubic in integers, as Hugging Face's processors resize uint8 tensors.

    Args:
        frames: uint8 [T, 3, H, W] of any strides; fastest with rows of RGB pixels (a permuted [T, H, W, 3]) or planes.
        out: where the result is written instead of into new memory; shares none with `frames`.

    Returns:
        uint8 [T, 3, height, width], contiguous: on a CPU the bits of F.interpolate(mode="bicubic", antialias=True) on
        rows of RGB pixels (`frames_torch.resize_frames` says why not on planes).

    Raises:
        ValueError: another dtype or shape; names the argument.
    """
    _check_frames(frames)
    _check_size(height, width)
    if out is not None:
        _check_out(out, frames, [len(frames), 3, height, width], torch.uint8)
    if choose("resize_frames", "auto", frames.device) == "cpp":
        return cpp.resize_frames(frames, height, width, out)
    resized = frames_torch.resize_frames(frames, height, width)
    return resized if out is None else out.copy_(resized)


def frames_to_patches(frames: torch.Tensor, height: int, width: int, *, mean: Sequence[float], std: Sequence[float],
                      patch_size: int, merge_size: int, temporal_patch_size: int = 2,
                      dtype: torch.dtype = torch.float32, out: torch.Tensor | None = None) -> torch.Tensor:
    """Resize frames (`resize_frames`; not at all where they have the size), normalise them and cut them into patches.

    The patches of one merged token (m x m of them) are neighbours in the output; the last frame is repeated until the
    count is a multiple of `temporal_patch_size`.

    Args:
        frames: uint8 [T, 3, H, W], as for `resize_frames`.
        height, width: multiples of p * m.
        mean, std: per channel, of pixels scaled to [0, 1].
        dtype: float32, or bfloat16, which is float32 rounded to nearest even.
        out: where the result is written instead of into new memory; of that dtype, shares none with `frames`. On a CPU
            the first touch of new memory can cost more than all the work, so give the memory of a result that is done
            with.

    Returns:
        [N, 3 * temporal_patch_size * p * p], N = ceil(T / temporal_patch_size) * (height / p) * (width / p).

    Raises:
        ValueError: another dtype or shape, or sides that are no such multiples; names the argument.
    """
    _check_frames(frames)
    _check_patches(height, width, mean, std, patch_size, merge_size, temporal_patch_size, dtype)
    if out is not None:
        times = -(-len(frames) // temporal_patch_size)
        _check_out(out, frames, [times * (height // patch_size) * (width // patch_size),
                                 3 * temporal_patch_size * patch_size**2], dtype)
    if choose("frames_to_patches", "auto", frames.device) == "cpp":
        return cpp.frames_to_patches(frames, height, width, mean, std, patch_size, merge_size, temporal_patch_size,
                                     dtype, out)
    made = frames_torch.frames_to_patches(frames, height, width, mean=mean, std=std, patch_size=patch_size,
                                          merge_size=merge_size, temporal_patch_size=temporal_patch_size, dtype=dtype)
    return made if out is None else out.copy_(made)


def planes_to_frames(y: torch.Tensor, u: torch.Tensor, v: torch.Tensor, height: int, width: int, *, matrix: YuvMatrix,
                     full_range: bool = False) -> torch.Tensor:
    """`resize_frames` of the RGB that the planes of a 4:2:0 picture show; each chroma sample colours 2 x 2 pixels.

    Args:
        y: uint8 [T, H, W]. u, v: uint8 [T, ceil(H / 2), ceil(W / 2)]; of NV12 the two halves of the interleaved plane,
            uv[..., 0] and uv[..., 1].
        matrix: colour space of the stream, bt601 (standard definition) or bt709.
        full_range: luma of 0 to 255 (JPEG) instead of 16 to 235.

    Raises:
        ValueError: another dtype, shape or colour space; names the argument.
    """
    coefficients = _check_planes(y, u, v, matrix, full_range)
    _check_size(height, width)
    if choose("planes_to_frames", "auto", y.device) == "cpp":
        return cpp.planes_to_frames(y, u, v, height, width, coefficients)
    return frames_torch.resize_frames(frames_torch.planes_to_rgb(y, u, v, coefficients), height, width)


def planes_to_patches(y: torch.Tensor, u: torch.Tensor, v: torch.Tensor, height: int, width: int, *, matrix: YuvMatrix,
                      full_range: bool = False, mean: Sequence[float], std: Sequence[float], patch_size: int,
                      merge_size: int, temporal_patch_size: int = 2, dtype: torch.dtype = torch.float32
                      ) -> torch.Tensor:
    """`frames_to_patches` of the RGB that planes show; arguments as there and in `planes_to_frames`."""
    coefficients = _check_planes(y, u, v, matrix, full_range)
    _check_patches(height, width, mean, std, patch_size, merge_size, temporal_patch_size, dtype)
    if choose("planes_to_patches", "auto", y.device) == "cpp":
        return cpp.planes_to_patches(y, u, v, height, width, coefficients, mean, std, patch_size, merge_size,
                                     temporal_patch_size, dtype)
    rgb = frames_torch.planes_to_rgb(y, u, v, coefficients)
    return frames_torch.frames_to_patches(rgb, height, width, mean=mean, std=std, patch_size=patch_size,
                                          merge_size=merge_size, temporal_patch_size=temporal_patch_size, dtype=dtype)


def _check_frames(frames: torch.Tensor) -> None:
    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[1] != 3 or len(frames) == 0:
        raise ValueError(f"frames must be uint8 [T, 3, H, W] with T > 0, got {frames.dtype} {list(frames.shape)}")
    _check_sides("frames", *frames.shape[2:])


def _check_out(out: torch.Tensor, frames: torch.Tensor, shape: list[int], dtype: torch.dtype) -> None:
    if out.dtype != dtype or list(out.shape) != shape or not out.is_contiguous() or out.device != frames.device:
        raise ValueError(f"out must be contiguous {dtype} {shape} on {frames.device}, got {out.dtype} "
                         f"{list(out.shape)} on {out.device}{'' if out.is_contiguous() else ', not contiguous'}")


def _check_planes(y: torch.Tensor, u: torch.Tensor, v: torch.Tensor, matrix: YuvMatrix, full_range: bool) -> list[int]:
    if y.dtype != torch.uint8 or y.ndim != 3 or len(y) == 0:
        raise ValueError(f"y must be uint8 [T, H, W] with T > 0, got {y.dtype} {list(y.shape)}")
    _check_sides("y", *y.shape[1:])
    expected = [len(y), (y.shape[1] + 1) // 2, (y.shape[2] + 1) // 2]
    for name, plane in (("u", u), ("v", v)):
        if plane.dtype != torch.uint8 or list(plane.shape) != expected:
            raise ValueError(f"{name} must be uint8 {expected}, got {plane.dtype} {list(plane.shape)}")
        if plane.device != y.device:
            raise ValueError(f"{name} must be on {y.device} like y, got {plane.device}")
    if matrix not in ("bt601", "bt709"):
        raise ValueError(f"matrix must be 'bt601' or 'bt709', got {matrix!r}")
    return frames_torch.yuv_matrix(matrix, full_range)


def _check_size(height: int, width: int) -> None:
    _check_sides("height and width", height, width)


def _check_sides(name: str, height: int, width: int) -> None:
    if not (0 < height <= _MOST_PIXELS and 0 < width <= _MOST_PIXELS):
        raise ValueError(f"{name} must have 1 to {_MOST_PIXELS} pixels, got {height} x {width}")


def _check_patches(height: int, width: int, mean: Sequence[float], std: Sequence[float], patch_size: int,
                   merge_size: int, temporal_patch_size: int, dtype: torch.dtype) -> None:
    for name, size in (("patch_size", patch_size), ("merge_size", merge_size),
                       ("temporal_patch_size", temporal_patch_size)):
        if not 0 < size <= _MOST_PIXELS:
            raise ValueError(f"{name} must be 1 to {_MOST_PIXELS}, got {size}")
    _check_size(height, width)
    factor = patch_size * merge_size
    if height % factor or width % factor:
        raise ValueError(f"height and width must be multiples of {factor} pixels, got {height} x {width}")
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != 3:
            raise ValueError(f"{name} must have 3 numbers, got {len(values)}")
    if 0 in std:
        raise ValueError(f"std must not be 0, got {tuple(std)}")
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"dtype must be torch.float32 or torch.bfloat16, got {dtype}")
