"""Where the media of an encoded prompt lie, as an engine that takes rendered prompts needs to know it. No vLLM here.

Such an engine gets token ids whose pads are already expanded, and per medium: which tokens it stands for, its grid, and
the tower's output or its pixels. Nothing is tokenised, resampled or decoded a second time.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from veripo_fast.model.encoding import PromptEncoder
from veripo_fast.model.positions import seconds_per_grid
from veripo_fast.types import EncodedPrompt, LoadedPrompt

Vision = Literal["output", "pixels"]
"""What an engine gets of a medium: the tower's output, or pixels that its own tower reads."""


@dataclass(frozen=True)
class MediumInput:
    """One image or video of a prompt."""

    kind: Literal["image", "video"]
    first: int
    """Index of the first token that belongs to it."""
    is_pad: torch.Tensor
    """bool [tokens from first to last]: which of them stand for merged patches."""
    grid_thw: torch.Tensor
    """int64 [3]."""
    values: torch.Tensor
    """Tower output [tokens, D * (1 + deepstack levels)], levels side by side, or pixel values [N, features]."""
    vision: Vision
    """What the values are."""
    seconds_per_grid: float | None
    """Qwen2.5-VL videos: spacing of their temporal grids."""
    key: str
    """Equal keys mean equal values, whatever the prompt."""


def media_of(encoder: PromptEncoder, item: LoadedPrompt, vision: Vision) -> list[MediumInput]:
    """The media of a prompt in the order of its text."""
    media = item.encoded.media
    if media is None:
        return []
    merged = encoder.vision.merge_size ** 2
    counts = media.grid_thw.prod(-1) // merged
    if vision == "output":
        assert item.features is not None, "media without the tower's output"
        values = torch.cat([item.features.embeddings, *item.features.deepstack], 1).split(counts.tolist())
    else:
        assert media.pixel_values is not None, "media were stripped of their pixels"
        values = media.pixel_values.split((counts * merged).tolist())
    found: list[MediumInput] = []
    next_pad = dict.fromkeys(encoder.pad_ids, 0)
    for index, kind in enumerate(media.kinds):
        pads = (item.encoded.token_ids == encoder.pad_ids[kind]).nonzero()[:, 0]
        own = pads[next_pad[kind]:next_pad[kind] + int(counts[index])]
        next_pad[kind] += len(own)
        first, last = int(own[0]), int(own[-1])
        if kind == "video" and encoder.family.video_time == "stamps":
            first -= 1  # vLLM looks for the vision_start of every frame from here on
        timed = kind == "video" and encoder.family.video_time == "positions"
        found.append(MediumInput(
            kind, first, item.encoded.token_ids[first:last + 1] == encoder.pad_ids[kind], media.grid_thw[index],
            values[index], vision, seconds_per_grid(media.grid_seconds[index]) if timed else None,
            f"{media.key}/{index}/{vision}"))
    return found


class PositionTable:
    """M-RoPE positions of the prompts that an engine completes, found again by their tokens and media.

    Two prompts may have the same tokens and other positions (a wide and a high video, another frame rate), so the keys
    of the media count too.
    """

    def __init__(self) -> None:
        self._prompts: dict[bytes, EncodedPrompt] = {}
        self._lengths: set[int] = set()

    def add(self, prompt: EncodedPrompt, media_keys: list[str]) -> None:
        """Remember a prompt."""
        ids = prompt.token_ids.numpy()
        self._prompts[_digest(ids, media_keys)] = prompt
        self._lengths.add(len(ids))

    def clear(self) -> None:
        """Forget all prompts."""
        self._prompts.clear()
        self._lengths.clear()

    def find(self, token_ids: list[int], media_keys: list[str]) -> tuple[torch.Tensor, int] | None:
        """int64 [3, tokens] positions of a prompt and what was written after it, and what is added to the index of a
        later token to get its position; None for an unknown prompt."""
        ids = np.asarray(token_ids, dtype=np.int64)
        for length in sorted((size for size in self._lengths if size <= len(ids)), reverse=True):
            prompt = self._prompts.get(_digest(ids[:length], media_keys))
            if prompt is not None:
                written = torch.arange(len(ids) - length) + prompt.next_position
                positions = torch.cat([prompt.positions, written.expand(3, -1)], 1)
                return positions, prompt.next_position - length
        return None


def _digest(ids: np.ndarray, media_keys: list[str]) -> bytes:
    return hashlib.blake2b(ids.tobytes() + "\n".join(media_keys).encode(), digest_size=16).digest()
