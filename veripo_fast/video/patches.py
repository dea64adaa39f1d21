"""frames -> patches: what the vision tower of Qwen2.5-VL and Qwen3-VL reads, and the key it may be cached under.

Letters: T frames, N patches, p patch size, m merge size.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from veripo_kernels import frames_to_patches

from veripo_fast.config.inputs import VideoConfig
from veripo_fast.data.archives import locate
from veripo_fast.data.remote import local_medium
from veripo_fast.errors import MediaError
from veripo_fast.types import Image, Media, Video
from veripo_fast.video.decoders import GPU_DECODERS
from veripo_fast.video.pictures import pictures_of

SAMPLING_VERSION = 2
"""Raised whenever the same file under the same contract gives other pixels; part of every fingerprint."""
_CONTRACT_FIELDS = ("fps", "num_frames", "min_frames", "max_frames", "min_pixels", "max_pixels")


def patchify(
    frames: torch.Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    patch_size: int,
    merge_size: int,
    temporal_patch_size: int = 2,
    *,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalise frames and cut them into patches.

    The patches of one merged token (m x m of them) are neighbours in the output; the last frame is repeated until the
    count is a multiple of `temporal_patch_size`.

    Args:
        frames: uint8 [T, 3, H, W], H and W multiples of patch_size * merge_size.
        mean, std: per channel, of pixels scaled to [0, 1].
        out: where the patches are written, float32 or bfloat16; None: new memory, float32.

    Returns:
        pixel_values [N, 3 * temporal_patch_size * p * p] and grid_thw int64 [3] (time, height, width in patches before
        merging), N = their product.

    Raises:
        ValueError: another dtype or shape.
    """
    height, width = frames.shape[-2:]
    values = frames_to_patches(frames, height, width, mean=mean, std=std, patch_size=patch_size, merge_size=merge_size,
                               temporal_patch_size=temporal_patch_size, out=out,
                               dtype=torch.float32 if out is None else out.dtype)
    times = -(-len(frames) // temporal_patch_size)
    return values, torch.tensor([times, height // patch_size, width // patch_size], dtype=torch.int64)


def fingerprint(media: Media | Sequence[Media], contract: VideoConfig, **sizes: object) -> str:
    """Cache key of what the tower reads: 32 hexadecimal digits; equal keys mean equal pixels.

    A file is identified by its resolved path, size in bytes and modification time in nanoseconds, so that a hit costs
    one `stat` and no read; a copy elsewhere has another key. A member of a tar archive is its place in the archive and
    the archive's time; a folder or list of frames is all of its pictures. Part times, what a record asks for a medium,
    the fields of the contract that change pixels and `sizes` (patch and merge size, mean, std, whatever the caller's
    tower depends on) enter as well. CPU decoders give the same bits; a GPU decoder has keys of its own, under which
    files that it refuses have the CPU's pixels.

    Raises:
        MediaError: a file is missing or may not be read.
    """
    items = [media] if not isinstance(media, Sequence) else media
    state = {
        "version": SAMPLING_VERSION,
        "media": [_identity(item) for item in items],
        "contract": {name: getattr(contract, name) for name in _CONTRACT_FIELDS},
        "decoder": contract.decoder if contract.decoder in GPU_DECODERS else "cpu",
        "sizes": sizes,
    }
    return hashlib.blake2b(json.dumps(state, sort_keys=True, default=repr).encode(), digest_size=16).hexdigest()


def _identity(item: Media) -> list[object]:
    item = local_medium(item)
    part: list[object] = [item.start_seconds, item.end_seconds] if isinstance(item, Video) else []
    if item.sampling is not None:
        part.append(asdict(item.sampling))
    if isinstance(item, Video):
        part += [] if item.frame_fps is None else [item.frame_fps]
        if pictures := pictures_of(item):
            return ["pictures", *part, *(_identity(Image(picture)) for picture in pictures)]
    member = locate(item.path)
    if member is not None:
        return [type(item).__name__, member.archive, member.offset, member.size, member.mtime_ns, *part]
    try:
        path = Path(item.path).resolve(strict=True)
        status = path.stat()
    except OSError as error:
        raise MediaError(f"{item.path} cannot be read: {error.strerror or error}") from error
    return [type(item).__name__, str(path), status.st_size, status.st_mtime_ns, *part]
