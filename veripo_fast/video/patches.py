"""frames -> patches: what the vision tower of Qwen2.5-VL and Qwen3-VL reads, and the key it may be cached under.

Letters: T frames, N patches, p patch size, m merge size, C = 3 channels. This is the plain-torch definition; a fused
kernel must agree with it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from veripo_fast.config import VideoConfig
from veripo_fast.errors import MediaError
from veripo_fast.types import Media, Video

SAMPLING_VERSION = 1
"""Raised whenever the same file under the same contract gives other pixels; part of every fingerprint."""
_CONTRACT_FIELDS = ("fps", "num_frames", "min_frames", "max_frames", "min_pixels", "max_pixels")


def patchify(
    frames: torch.Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    patch_size: int,
    merge_size: int,
    temporal_patch_size: int = 2,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalise frames and cut them into patches.

    The patches of one merged token (m x m of them) are neighbours in the output; the last frame is repeated until the
    count is a multiple of `temporal_patch_size`.

    Args:
        frames: uint8 [T, 3, H, W], H and W multiples of patch_size * merge_size.
        mean, std: per channel, of pixels scaled to [0, 1].

    Returns:
        pixel_values float32 [N, 3 * temporal_patch_size * p * p] and grid_thw int64 [3] (time, height, width in
        patches before merging), N = their product.

    Raises:
        ValueError: another dtype or shape.
    """
    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[1] != 3 or len(frames) == 0:
        raise ValueError(f"frames must be uint8 [T, 3, H, W] with T > 0, got {frames.dtype} {list(frames.shape)}")
    factor = patch_size * merge_size
    if frames.shape[2] % factor or frames.shape[3] % factor:
        raise ValueError(f"frame sides must be multiples of {factor} pixels, got {list(frames.shape[2:])}")
    missing = -len(frames) % temporal_patch_size
    if missing:
        frames = torch.cat([frames, frames[-1:].expand(missing, -1, -1, -1)])
    times = len(frames) // temporal_patch_size
    height, width = frames.shape[2] // patch_size, frames.shape[3] // patch_size
    scale = torch.tensor(std, device=frames.device).mul(255).view(1, 3, 1, 1)
    shift = torch.tensor(mean, device=frames.device).mul(255).view(1, 3, 1, 1)
    values = (frames.float() - shift) / scale
    values = values.view(times, temporal_patch_size, 3, height // merge_size, merge_size, patch_size,
                         width // merge_size, merge_size, patch_size)
    values = values.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    grid = torch.tensor([times, height, width], dtype=torch.int64)
    return values.reshape(times * height * width, 3 * temporal_patch_size * patch_size**2), grid


def fingerprint(media: Media | Sequence[Media], contract: VideoConfig, **sizes: object) -> str:
    """Cache key of what the tower reads: 32 hexadecimal digits; equal keys mean equal pixels.

    A file is identified by its resolved path, size in bytes and modification time in nanoseconds, so that a hit costs
    one `stat` and no read; a copy elsewhere has another key. Part times, the fields of the contract that change pixels
    and `sizes` (patch and merge size, mean, std, whatever the caller's tower depends on) enter as well.

    Raises:
        MediaError: a file is missing or may not be read.
    """
    items = [media] if not isinstance(media, Sequence) else media
    state = {
        "version": SAMPLING_VERSION,
        "media": [_identity(item) for item in items],
        "contract": {name: getattr(contract, name) for name in _CONTRACT_FIELDS},
        "sizes": sizes,
    }
    return hashlib.blake2b(json.dumps(state, sort_keys=True, default=repr).encode(), digest_size=16).hexdigest()


def _identity(item: Media) -> list[object]:
    try:
        path = Path(item.path).resolve(strict=True)
        status = path.stat()
    except OSError as error:
        raise MediaError(f"{item.path} cannot be read: {error.strerror or error}") from error
    part: list[object] = [item.start_seconds, item.end_seconds] if isinstance(item, Video) else []
    return [type(item).__name__, str(path), status.st_size, status.st_mtime_ns, *part]
