"""frames -> resized frames -> patches in plain torch: the definition of `veripo_kernels.frames`.

Letters: T frames, H and W sides in pixels, N patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F

YuvMatrix = Literal["bt601", "bt709"]

_LUMA_SHARES: dict[YuvMatrix, tuple[float, float]] = {"bt601": (0.299, 0.114), "bt709": (0.2126, 0.0722)}
"""Shares of red and blue in luma: ITU-R BT.601-7, sec. 2.5.1, and BT.709-6, sec. 3.2."""


def resize_frames(frames: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Antialiased bicubic in integers, as Hugging Face's processors resize uint8 tensors.

    torch is given rows of RGB pixels. On planes torch 2.13 fails: at 1 x 1 pixels with an assertion, and without AVX2
    (ATEN_CPU_CAPABILITY=default) at any width of 1 by repeating the first row.
    """
    if (height, width) == tuple(frames.shape[2:]):
        return frames.contiguous()
    if frames.device.type == "cpu":
        rgb = frames.contiguous(memory_format=torch.channels_last)
        return F.interpolate(rgb, (height, width), mode="bicubic", antialias=True).contiguous()
    return resize_as_float(frames, height, width).contiguous()


def resize_as_float(frames: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """For devices on which torch resizes no uint8: rounded and clamped after each direction, as the integers are."""
    for size in ((frames.shape[2], width), (height, width)):
        resized = F.interpolate(frames.float(), size, mode="bicubic", antialias=True)
        frames = resized.round_().clamp_(0, 255).to(torch.uint8)
    return frames


def frames_to_patches(frames: torch.Tensor, height: int, width: int, *, mean: Sequence[float], std: Sequence[float],
                      patch_size: int, merge_size: int, temporal_patch_size: int, dtype: torch.dtype) -> torch.Tensor:
    """(level - 255 mean) / (255 std) in float32, in the order [time, rows and columns of merged tokens, m, m | channel,
    frame, p, p]; the last frame is repeated to fill the last time."""
    frames = resize_frames(frames, height, width)
    frames = torch.cat([frames, frames[-1:].expand(-len(frames) % temporal_patch_size, -1, -1, -1)])
    shift, scale = (torch.tensor(values, device=frames.device).float().mul(255).view(1, 3, 1, 1)
                    for values in (mean, std))
    values = (frames.float() - shift) / scale
    step = patch_size * merge_size
    values = values.view(-1, temporal_patch_size, 3, height // step, merge_size, patch_size, width // step, merge_size,
                         patch_size)
    features = 3 * temporal_patch_size * patch_size**2
    return values.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(-1, features).to(dtype)


def yuv_matrix(matrix: YuvMatrix, full_range: bool) -> list[int]:
    """Integers for `planes_to_rgb`: the level of black, then 2^13 times what y, v (in red), u and v (in green) and u
    (in blue) are multiplied by."""
    red, blue = _LUMA_SHARES[matrix]
    luma, chroma = (1.0, 1.0) if full_range else (255 / 219, 255 / 224)
    from_v, from_u = 2 * (1 - red) * chroma, 2 * (1 - blue) * chroma
    green = 1 - red - blue
    factors = (luma, from_v, -from_u * blue / green, -from_v * red / green, from_u)
    return [0 if full_range else 16, *(round(factor * 2**13) for factor in factors)]


def planes_to_rgb(y: torch.Tensor, u: torch.Tensor, v: torch.Tensor, matrix: Sequence[int]) -> torch.Tensor:
    """uint8 [T, 3, H, W] of y [T, H, W] and u, v [T, ceil(H / 2), ceil(W / 2)].

    The bits of swscale on x86, which PyAV and torchcodec convert with and by which policies were trained: a chroma
    sample colours its 2 x 2 pixels, and every product is cut off, not rounded (a level or so darker than exact).
    """
    black, luma, red_v, green_u, green_v, blue_u = matrix
    height, width = y.shape[1:]
    u, v = (plane.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, :height, :width].int() - 128 for plane in (u, v))
    grey = (y.int() - black) * luma >> 13
    colours = [grey + (red_v * v >> 13), grey + (green_u * u >> 13) + (green_v * v >> 13), grey + (blue_u * u >> 13)]
    return torch.stack(colours, 1).clamp(0, 255).to(torch.uint8)
