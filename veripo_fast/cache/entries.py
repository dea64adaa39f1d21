"""What a cache entry holds: a frozen tower's output, or decoded frames; and under which names.

A checksum says that an entry is as it was written, not that it fits: one of another shape, or with NaN, is damaged.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

from veripo_fast.cache.disk import Stored, VisionStore, raw_bytes
from veripo_fast.model.tower import Tower
from veripo_fast.types import Media, MediaInputs, Video, VisionFeatures

Kind: TypeAlias = Literal["image", "video"]


@dataclass(frozen=True)
class DecodedMedia:
    """All images and videos of one prompt, decoded and resized, in the order they appear in the text."""

    frames: list[tuple[Kind, torch.Tensor, torch.Tensor]]
    """Per medium its kind, pixels uint8 [T, 3, H, W], and times float64 [T] in seconds."""
    key: str
    """Content fingerprint of the media under the sampling contract."""
    from_disk: bool = False
    """Whether they were read from the cache and not decoded."""

    @property
    def nbytes(self) -> int:
        return sum(pixels.nbytes for _, pixels, _ in self.frames)


@dataclass(frozen=True)
class EntryShape:
    """What the entries of a prompt's media must look like, whoever wrote them."""

    kinds: tuple[Kind, ...]
    factor: int
    """Frame sides are multiples of this, in pixels."""
    merge_size: int
    width: int
    """D, numbers in an embedding."""
    levels: int
    """Deepstack levels."""
    dtype: torch.dtype
    """Of the embeddings."""

    @classmethod
    def of(cls, tower: Tower, media: Sequence[Media]) -> EntryShape:
        """What `tower` makes of the media of one prompt."""
        vision = tower.encoder.config.vision_config
        return cls(tuple("video" if isinstance(medium, Video) else "image" for medium in media),
                   tower.encoder.vision.factor, tower.encoder.vision.merge_size, vision.out_hidden_size,
                   len(getattr(vision, "deepstack_visual_indexes", ())), tower.patch_dtype)

    def check_tower(self, media: MediaInputs, features: VisionFeatures) -> None:
        """Raises ValueError."""
        _require(media.kinds == self.kinds, "it is of other media")
        grids = media.grid_thw
        _require(grids.dtype == torch.int64 and grids.shape == (len(self.kinds), 3), "its grids are of another shape")
        tokens = 0
        for (frames, height, width), seconds in zip(grids.tolist(), media.grid_seconds, strict=True):
            _require(min(frames, height, width) > 0 and height % self.merge_size == width % self.merge_size == 0,
                     "its grids are of another shape")
            _require(len(seconds) == frames and all(map(math.isfinite, seconds)), "its times do not fit its grids")
            tokens += frames * height * width // self.merge_size ** 2
        _require(len(features.deepstack) == self.levels, "it has another number of levels")
        for level in (features.embeddings, *features.deepstack):
            _require(level.shape == (tokens, self.width) and level.dtype == self.dtype, "its embeddings do not fit")
            _require(bool(level.isfinite().all()), "it holds NaN or an infinity")

    def check_frames(self, decoded: DecodedMedia) -> None:
        """Raises ValueError."""
        _require(tuple(kind for kind, _, _ in decoded.frames) == self.kinds, "it is of other media")
        for _, pixels, seconds in decoded.frames:
            _require(pixels.dtype == torch.uint8 and pixels.ndim == 4 and pixels.shape[1] == 3 and pixels.numel() > 0
                     and pixels.shape[2] % self.factor == pixels.shape[3] % self.factor == 0,
                     "its frames are of another shape")
            _require(seconds.dtype == torch.float64 and seconds.shape == (len(pixels),)
                     and bool(seconds.isfinite().all()), "its times do not fit its frames")


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)


def tower_version(tower: Tower) -> str:
    """16 hexadecimal digits that change with any bit of the tower's weights, their type, or the kind of device.

    Every byte is hashed rather than a sample: one changed weight gives another output, and it happens once per process
    (a tower of 0.7 billion bfloat16 weights is 1.3 GB, about a second of SHA-256 on one core).
    """
    digest = hashlib.sha256(tower.device.type.encode())
    for name, value in sorted(tower.visual.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
        digest.update(raw_bytes(value.detach().cpu()))
    return digest.hexdigest()[:16]


def tower_name(key: str, version: str) -> str:
    """Entry of the output of the tower of this version for the media of `key`."""
    return f"{key}-{version}.tower"


def frames_name(key: str) -> str:
    """Entry of the decoded frames of the media of `key`."""
    return f"{key}.frames"


def write_tower(store: VisionStore, version: str, media: MediaInputs, features: VisionFeatures) -> None:
    """Keep a tower's output, which lies on the CPU."""
    levels = {f"deepstack.{number}": level for number, level in enumerate(features.deepstack)}
    store.write_later(tower_name(media.key, version),
                      {"grid_thw": media.grid_thw, "embeddings": features.embeddings, **levels},
                      {"kinds": media.kinds, "grid_seconds": media.grid_seconds})


def read_tower(store: VisionStore, version: str, key: str,
               shape: EntryShape | None = None) -> tuple[MediaInputs, VisionFeatures] | None:
    """Media without pixels, and the output of the tower of this version; None when there is none that fits `shape`."""

    def parse(stored: Stored) -> tuple[MediaInputs, VisionFeatures]:
        tensors, about = stored
        levels = tuple(tensors[f"deepstack.{number}"] for number in range(len(tensors) - 2))
        seconds = tuple(tuple(times) for times in about["grid_seconds"])
        media = MediaInputs(None, tensors["grid_thw"], tuple(about["kinds"]), seconds, key)
        features = VisionFeatures(tensors["embeddings"], levels)
        if shape is not None:
            shape.check_tower(media, features)
        return media, features

    return store.read_as(tower_name(key, version), parse)


def write_frames(store: VisionStore, decoded: DecodedMedia) -> None:
    """Keep decoded frames."""
    tensors: dict[str, torch.Tensor] = {}
    for number, (_, pixels, seconds) in enumerate(decoded.frames):
        tensors |= {f"pixels.{number}": pixels, f"seconds.{number}": seconds}
    store.write_later(frames_name(decoded.key), tensors, [kind for kind, _, _ in decoded.frames])


def read_frames(store: VisionStore, key: str, shape: EntryShape | None = None) -> DecodedMedia | None:
    """Frames that were decoded before; None when there are none that fit `shape`."""

    def parse(stored: Stored) -> DecodedMedia:
        tensors = stored[0]
        kinds: list[Kind] = stored[1]
        decoded = DecodedMedia([(kind, tensors[f"pixels.{number}"], tensors[f"seconds.{number}"])
                                for number, kind in enumerate(kinds)], key, from_disk=True)
        if shape is not None:
            shape.check_frames(decoded)
        return decoded

    return store.read_as(frames_name(key), parse)
