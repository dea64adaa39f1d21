"""Tower output per video, once while the tower is frozen; and the loader that turns prompts into what the policy reads.

Level one only: host memory, least recently used first out. Disk and pinned levels belong here too.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeAlias

import torch

from veripo_fast.config import VideoConfig
from veripo_fast.errors import DataError, MediaError
from veripo_fast.model import Policy, VisionFeatures
from veripo_fast.packing import micro_batches
from veripo_fast.rollout import LoadedPrompt
from veripo_fast.types import Media, MediaInputs, Prompt
from veripo_fast.video.pool import MediaPool

log = logging.getLogger(__name__)
MAX_CACHE_BYTES = 4 << 30
MAX_PATCHES = 1 << 16
"""Patches per call of the tower; a larger video still runs, alone."""
Entry: TypeAlias = tuple[MediaInputs, VisionFeatures | None]
"""Media with pixels and no tower output yet, or without pixels and with it (or both, while the tower trains)."""


class VisionCache:
    """Media key -> (media without pixels, tower output), bounded by bytes."""

    def __init__(self, max_bytes: int = MAX_CACHE_BYTES) -> None:
        self.max_bytes = max_bytes
        self.bytes = self.hits = self.misses = 0
        self._entries: OrderedDict[str, tuple[MediaInputs, VisionFeatures]] = OrderedDict()

    def get(self, key: str) -> tuple[MediaInputs, VisionFeatures] | None:
        entry = self._entries.get(key)
        if entry is None:
            self.misses += 1
            return None
        self.hits += 1
        self._entries.move_to_end(key)
        return entry

    def put(self, media: MediaInputs, features: VisionFeatures) -> None:
        """Keep the tower's output; `media` without its pixels."""
        if media.key in self._entries or features.nbytes > self.max_bytes:
            return
        self._entries[media.key] = (media, features)
        self.bytes += features.nbytes
        while self.bytes > self.max_bytes:
            _, (_, oldest) = self._entries.popitem(last=False)
            self.bytes -= oldest.nbytes


class PromptLoader:
    """Decodes, encodes and runs the tower for prompts, on worker threads, skipping what cannot be read.

    A bad medium or an over-long prompt is reported once through `on_skip(prompt, reason)`, never replaced by another.
    """

    def __init__(self, policy: Policy, contract: VideoConfig, max_prompt_tokens: int,
                 on_skip: Callable[[Prompt, str], None]) -> None:
        self.policy = policy
        self.contract = contract
        self.max_prompt_tokens = max_prompt_tokens
        self.on_skip = on_skip
        self.cache = VisionCache()
        self.bad: set[Prompt] = set()
        """By prompt, not by its id: training and evaluation files number their records alike."""
        self._pool = MediaPool(contract)

    def close(self) -> None:
        """Stop the decoding threads."""
        self._pool.close()

    @torch.no_grad()
    def load(self, prompts: Sequence[Prompt]) -> list[LoadedPrompt]:
        """Load prompts in order, leaving out the bad ones; prompts with the same media share one decode."""
        wanted = [prompt for prompt in prompts if prompt not in self.bad]
        distinct = {prompt.media: prompt for prompt in wanted if prompt.media}
        results = dict(zip(distinct, self._pool.map(self._media, distinct.values()), strict=True))
        entries = {key: entry for key, entry in results.items() if not isinstance(entry, MediaError)}
        self._run_tower(entries)
        loaded = []
        for prompt in wanted:
            result = results.get(prompt.media)
            try:
                if isinstance(result, MediaError):
                    raise result
                loaded.append(self._encode(prompt, entries.get(prompt.media)))
            except (MediaError, DataError) as error:
                self._skip(prompt, str(error))
        return loaded

    def _media(self, prompt: Prompt) -> Entry:
        """Runs on a worker thread: cached tower output, or pixels."""
        if self.policy.frozen_vision:
            entry = self.cache.get(self.policy.encoder.media_key(prompt, self.contract))
            if entry is not None:
                return entry
        media = self.policy.encoder.load_media(prompt, self.contract)
        assert media is not None
        return media, None

    def _run_tower(self, entries: dict[tuple[Media, ...], Entry]) -> None:
        """Fill in the missing tower outputs, several videos per call, and cache them while the tower is frozen."""
        new = [(key, media) for key, (media, features) in entries.items() if features is None]
        for run in micro_batches([int(media.grid_thw.prod(-1).sum()) for _, media in new], MAX_PATCHES):
            outputs = self.policy.vision_features_of([new[i][1] for i in run])
            for i, features in zip(run, outputs, strict=True):
                key, media = new[i]
                if self.policy.frozen_vision:
                    media = replace(media, pixel_values=None)
                    features = VisionFeatures(features.embeddings.clone(), tuple(d.clone() for d in features.deepstack))
                    self.cache.put(media, features)
                entries[key] = media, features

    def _encode(self, prompt: Prompt, entry: Entry | None) -> LoadedPrompt:
        media, features = entry or (None, None)
        encoded = self.policy.encoder.encode(prompt, media)
        tokens = len(encoded.token_ids)
        if tokens > self.max_prompt_tokens:
            raise DataError(f"the prompt has {tokens} tokens, more than data.max_prompt_tokens "
                            f"{self.max_prompt_tokens}; lower video.max_frames or video.max_pixels, or raise the limit")
        return LoadedPrompt(prompt, encoded, features)

    def _skip(self, prompt: Prompt, reason: str) -> None:
        self.bad.add(prompt)
        log.warning("skipped %s: %s", prompt.prompt_id, reason)
        self.on_skip(prompt, reason)
