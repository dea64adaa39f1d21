"""What a cache entry holds: a frozen tower's output, or decoded frames; and under which names."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

from veripo_fast.cache.disk import VisionStore, raw_bytes
from veripo_fast.model.tower import Tower
from veripo_fast.types import MediaInputs, VisionFeatures

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


def read_tower(store: VisionStore, version: str, key: str) -> tuple[MediaInputs, VisionFeatures] | None:
    """Media without pixels, and the output of the tower of this version."""
    found = store.read(tower_name(key, version))
    if found is None:
        return None
    tensors, about = found
    levels = tuple(tensors[f"deepstack.{number}"] for number in range(len(tensors) - 2))
    seconds = tuple(tuple(times) for times in about["grid_seconds"])
    return (MediaInputs(None, tensors["grid_thw"], tuple(about["kinds"]), seconds, key),
            VisionFeatures(tensors["embeddings"], levels))


def write_frames(store: VisionStore, decoded: DecodedMedia) -> None:
    """Keep decoded frames."""
    tensors: dict[str, torch.Tensor] = {}
    for number, (_, pixels, seconds) in enumerate(decoded.frames):
        tensors |= {f"pixels.{number}": pixels, f"seconds.{number}": seconds}
    store.write_later(frames_name(decoded.key), tensors, [kind for kind, _, _ in decoded.frames])


def read_frames(store: VisionStore, key: str) -> DecodedMedia | None:
    """Frames that were decoded before."""
    found = store.read(frames_name(key))
    if found is None:
        return None
    tensors = found[0]
    kinds: list[Kind] = found[1]
    return DecodedMedia([(kind, tensors[f"pixels.{number}"], tensors[f"seconds.{number}"])
                         for number, kind in enumerate(kinds)], key, from_disk=True)
