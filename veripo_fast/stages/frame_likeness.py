"""How like the frames of its prompt the reasoning of a completion is, for rewards (VideoRFT, arXiv 2505.12434)."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping

import torch

from veripo_fast.cache.loader import PromptLoader
from veripo_fast.model.vision_text import VisionText
from veripo_fast.reward.spans import Parsed, parse_group
from veripo_fast.types import LoadedPrompt, RolloutGroup

KEPT_BYTES = 1 << 28
"""Embeddings of frames that are kept, in host memory: 3,640 videos of 16 frames for a space of 1,152 dimensions."""
_FULL_STOP = re.compile(r"[.!?]\s+|[。！？]\s*")


class FrameLikeness:
    """Tells completions the cosine of their reasoning with each frame that the policy saw.

    Frames are decoded once more where their embeddings are not kept.
    """

    def __init__(self, model: VisionText, loader: PromptLoader) -> None:
        self.model, self.loader = model, loader
        self._frames: OrderedDict[str, torch.Tensor] = OrderedDict()
        self._bytes = 0

    def tell(self, loaded: Mapping[int, LoadedPrompt], groups: Mapping[int, RolloutGroup]) -> None:
        """Fill in `frame_likeness` of groups that have no reward yet; prompts without media have none.

        Args:
            loaded, groups: of this rank, by number.

        Raises:
            MediaError: a file cannot be decoded any more.
        """
        wanted = [number for number, group in groups.items() if loaded[number].encoded.media is not None
                  and any(row.reward is None for row in group.completions)]
        if not wanted:
            return
        with self.model.on_device():
            for number in wanted:
                group = groups[number]
                texts = [described(row.text, parsed) for row, parsed in zip(
                    group.completions, parse_group(group), strict=True)]
                cosines = self.model.of_texts(texts) @ self._frames_of(loaded[number]).T
                for row, own in zip(group.completions, cosines.tolist(), strict=True):
                    row.frame_likeness = own

    def _frames_of(self, item: LoadedPrompt) -> torch.Tensor:
        """float32 [T, E] of the frames of all media in the order of the text."""
        assert item.encoded.media is not None
        key = item.encoded.media.key
        known = self._frames.get(key)
        if known is None:
            known = torch.cat([self.model.of_frames(pixels) for _, pixels, _ in self.loader.frames_of(item.prompt)])
            self._frames[key] = known
            self._bytes += known.nbytes
            while self._bytes > KEPT_BYTES and len(self._frames) > 1:
                self._bytes -= self._frames.popitem(last=False)[1].nbytes
        self._frames.move_to_end(key)
        return known


def described(text: str, parsed: Parsed) -> str:
    """What a reasoning says behind its first sentence, which repeats the question (VideoRFT): the description of what
    is seen. All of it where it is one sentence, and the whole completion where there is no reasoning."""
    if parsed.think is None:
        return text
    rest = _FULL_STOP.split(parsed.think, maxsplit=1)
    return rest[1] if len(rest) > 1 and rest[1].strip() else parsed.think
