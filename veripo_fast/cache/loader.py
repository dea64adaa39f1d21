"""Tower output per video, once while the tower is frozen; and the loader that turns prompts into what the policy reads.

Levels, nearest first: GPU, host memory (pinned where there is a GPU), disk (cache/disk.py); below them decoded frames
on disk, then the video itself. While the tower trains only frames are kept: its output is another one after every step.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from veripo_fast.cache.disk import VisionStore
from veripo_fast.cache.entries import (
    DecodedMedia,
    EntryShape,
    read_frames,
    read_tower,
    tower_version,
    write_frames,
    write_tower,
)
from veripo_fast.cache.memory import Entry, VisionCache
from veripo_fast.cache.prefetch import MediaSlots
from veripo_fast.config.inputs import CacheConfig, VideoConfig
from veripo_fast.errors import DataError, MediaError
from veripo_fast.model import encoding
from veripo_fast.model.tower import Tower
from veripo_fast.schedule.timeline import FOR_MEDIA, span
from veripo_fast.types import LoadedPrompt, Media, MediaInputs, Prompt, VisionFeatures
from veripo_fast.video.contract import most_pixels
from veripo_fast.video.decode import check_decoder, fallbacks

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class VideoWork:
    """What loading has cost so far; counts are of files (videos and images)."""

    wait_seconds: float = 0.0
    """Wall time in which the caller stood still for video: files looked up, read, decoded and cut into patches."""
    video_decodes: int = 0
    tower_runs: int = 0
    """Files that went through the tower; updates of a tower that trains run it again and are not counted here."""
    cache_hits: int = 0
    """Files that were not decoded because a level had their tower output or their frames."""
    decoder_fallbacks: int = 0
    """Times that a decoder refused a file and the next one was tried."""

    def __sub__(self, other: VideoWork) -> VideoWork:
        return VideoWork(*(now - before for now, before in zip(astuple(self), astuple(other), strict=True)))


class PromptLoader:
    """Decodes, encodes and runs the tower for prompts, on worker threads, skipping what cannot be read.

    A bad medium or an over-long prompt is reported once through `on_skip(prompt, reason)`, never replaced by another.
    """

    def __init__(self, tower: Tower, contract: VideoConfig, max_prompt_tokens: int,
                 on_skip: Callable[[Prompt, str], None], cache: CacheConfig | None = None) -> None:
        check_decoder(contract, tower.device)
        self.config = cache or CacheConfig()
        self.tower = tower
        self.contract = contract
        self.max_prompt_tokens = max_prompt_tokens
        self.on_skip = on_skip
        self.cache = VisionCache(self.config.host_bytes)
        self.gpu_cache = VisionCache(self.config.gpu_bytes if tower.device.type == "cuda" else 0)
        self.work = VideoWork()
        self._refused = sum(fallbacks().values())
        self.bad: dict[Prompt, str] = {}
        """Why; by prompt, not by its id: training and evaluation files number their records alike."""
        self.store = VisionStore(Path(self.config.folder), self.config.disk_bytes) if self.config.folder else None
        self._version = tower_version(tower) if self.store and tower.frozen_vision else ""
        self._slots: MediaSlots[Entry | DecodedMedia] = MediaSlots(
            contract, self._fetch, max_bytes=self.config.prefetch_bytes, most_bytes=self._most_bytes,
            nbytes=lambda found: found.nbytes if isinstance(found, DecodedMedia) else found[1].nbytes)

    @property
    def cached_bytes(self) -> int:
        """Tower output that is kept on the tower's device: in host memory where that is a CPU."""
        return (self.cache if self.tower.device.type == "cpu" else self.gpu_cache).bytes

    def close(self) -> None:
        """Stop the decoding threads, and finish writing to the disk."""
        self._slots.close()
        if self.store is not None:
            self.store.close()

    @property
    def held_bytes(self) -> int:
        """Bytes of media that are fetched ahead."""
        return self._slots.held_bytes

    def prefetch(self, prompts: Sequence[Prompt]) -> None:
        """Fetch the media of the prompts that `load` will be asked for next, while the caller goes on."""
        wanted = {prompt.media: prompt for prompt in prompts if prompt.media and prompt not in self.bad}
        self._slots.ahead(dict(list(wanted.items())[:self.config.prefetch_prompts]))

    @torch.no_grad()
    def load(self, prompts: Sequence[Prompt]) -> list[LoadedPrompt]:
        """Load prompts in order, leaving out the bad ones; prompts with the same media share one decode."""
        wanted = [prompt for prompt in prompts if prompt not in self.bad]
        started = time.perf_counter()
        with span(FOR_MEDIA):
            results = self._slots.take({prompt.media: prompt for prompt in wanted if prompt.media})
        self._count(wait_seconds=time.perf_counter() - started)
        decoded = {media: found for media, found in results.items() if isinstance(found, DecodedMedia)}
        entries = {media: self._on_device(found) for media, found in results.items() if isinstance(found, tuple)}
        fresh = [len(found.frames) for found in decoded.values() if not found.from_disk]
        files = sum(len(media) for media, found in results.items() if not isinstance(found, MediaError))
        refused = sum(fallbacks().values())
        self._count(video_decodes=sum(fresh), cache_hits=files - sum(fresh), decoder_fallbacks=refused - self._refused)
        self._refused = refused
        self._keep_frames(decoded)
        entries |= self._run_tower(decoded)
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

    def load_some(self, batch: Sequence[Prompt], numbers: Sequence[int]) -> dict[int, LoadedPrompt]:
        """Load the prompts at some places of a batch, by place, leaving out the bad ones."""
        loaded = self.load([batch[number] for number in numbers])
        return dict(zip([number for number in numbers if batch[number] not in self.bad], loaded, strict=True))

    def load_one(self, prompt: Prompt) -> LoadedPrompt:
        """Load a prompt. Raises MediaError when it is a bad one."""
        for loaded in self.load([prompt]):
            return loaded
        raise MediaError(f"{prompt.prompt_id}: {self.bad[prompt]}")

    def frames_of(self, prompt: Prompt) -> list[tuple[Literal["image", "video"], torch.Tensor, torch.Tensor]]:
        """Decode the media of a prompt anew, see `encoding.decode_frames`. Raises MediaError."""
        frames = encoding.decode_frames(prompt.media, self.contract, self.tower.encoder.vision.factor,
                                        str(self.tower.device))
        self._count(video_decodes=len(frames))
        return frames

    def tower_output(self, frames: list[tuple[Literal["image", "video"], torch.Tensor, torch.Tensor]], key: str
                     ) -> Entry:
        """The tower's output of frames under a name of their own; nothing keeps it."""
        return self._tower_output(self._patches(DecodedMedia(frames, key)))

    # -- on worker threads --------------------------------------------------------------------------------------

    def _fetch(self, prompt: Prompt) -> Entry | DecodedMedia:
        """The tower's output from the nearest level that has it, or frames."""
        key = self.tower.encoder.media_key(prompt, self.contract)
        if self.tower.frozen_vision:
            entry = (self.gpu_cache.get(key) if self.gpu_cache.max_bytes else None) or self.cache.get(key)
            if entry is not None:
                return entry
        if self.store is not None:
            shape = EntryShape.of(self.tower, prompt.media)
            entry = read_tower(self.store, self._version, key, shape) if self.tower.frozen_vision else None
            if entry is not None:
                return self._keep_in_host(*entry)
            decoded = read_frames(self.store, key, shape)
            if decoded is not None:
                return decoded
        factor, device = self.tower.encoder.vision.factor, str(self.tower.device)
        with span("decode"):
            return DecodedMedia(encoding.decode_frames(prompt.media, self.contract, factor, device), key)

    def _most_bytes(self, prompt: Prompt) -> int:
        """Bound on the frames that the contract takes of a prompt's media."""
        return 3 * most_pixels(prompt.media, self.contract)

    # -- on the caller's thread -----------------------------------------------------------------------------------

    def _run_tower(self, decoded: Mapping[tuple[Media, ...], DecodedMedia]) -> dict[tuple[Media, ...], Entry]:
        """Tower outputs of frames; kept while the tower is frozen.

        The media of one prompt are one call: a matrix product of another size may round differently (AVX-512 and GPUs
        do), and what is kept under the name of a video must not depend on which others were loaded with it.
        """
        entries: dict[tuple[Media, ...], Entry] = {}
        running: Entry | None = None
        for name, item in decoded.items():
            media = self._patches(item)
            if running is not None:
                self._keep(*running)  # waits for a GPU, so the next patches are made before
            entries[name] = entry = self._tower_output(media)
            running = entry if self.tower.frozen_vision else None
            del media  # the next patches go into its memory
        if running is not None:
            self._keep(*running)
        return entries

    def _patches(self, decoded: DecodedMedia) -> MediaInputs:
        started = time.perf_counter()
        media = self.tower.encoder.media_inputs(decoded.frames, decoded.key, self.tower.patch_dtype)
        self._count(wait_seconds=time.perf_counter() - started)
        return media

    def _tower_output(self, media: MediaInputs) -> Entry:
        features = self.tower.vision_features(media)
        self._count(tower_runs=len(media.kinds))
        return replace(media, pixel_values=None) if self.tower.frozen_vision else media, features

    def _keep(self, media: MediaInputs, features: VisionFeatures) -> None:
        """Put a new output into every level."""
        self.gpu_cache.put(media, features)
        if self.store is not None or features.nbytes <= self.cache.max_bytes:
            _, host = self._keep_in_host(media, features)
            if self.store is not None:
                write_tower(self.store, self._version, media, host)

    def _keep_in_host(self, media: MediaInputs, features: VisionFeatures) -> Entry:
        """The entry in host memory, as the host level keeps it if it has room for it."""
        host = features
        if self.tower.device.type == "cuda":
            host = _each(features, _pinned if features.nbytes <= self.cache.max_bytes else torch.Tensor.cpu)
        self.cache.put(media, host)
        return media, host

    def _on_device(self, entry: Entry) -> Entry:
        media, features = entry
        if features.embeddings.device == self.tower.device:
            return entry
        features = _each(features, lambda level: level.to(self.tower.device, non_blocking=True))
        self.gpu_cache.put(media, features)
        return media, features

    def _keep_frames(self, decoded: Mapping[tuple[Media, ...], DecodedMedia]) -> None:
        if self.store is not None and (self.config.frames or not self.tower.frozen_vision):
            for item in decoded.values():
                if not item.from_disk:
                    write_frames(self.store, item)

    def _encode(self, prompt: Prompt, entry: Entry | None) -> LoadedPrompt:
        media, features = entry or (None, None)
        encoded = self.tower.encoder.encode(prompt, media)
        tokens = len(encoded.token_ids)
        if tokens > self.max_prompt_tokens:
            raise DataError(f"the prompt has {tokens} tokens, more than data.max_prompt_tokens "
                            f"{self.max_prompt_tokens}; lower video.max_frames or video.max_pixels, or raise the limit")
        return LoadedPrompt(prompt, encoded, features)

    def _skip(self, prompt: Prompt, reason: str) -> None:
        self.bad[prompt] = reason
        log.warning("skipped %s: %s", prompt.prompt_id, reason)
        self.on_skip(prompt, reason)

    def _count(self, **more: float) -> None:
        self.work = replace(self.work, **{name: getattr(self.work, name) + value for name, value in more.items()})


def _each(features: VisionFeatures, change: Callable[[torch.Tensor], torch.Tensor]) -> VisionFeatures:
    return VisionFeatures(change(features.embeddings), tuple(change(level) for level in features.deepstack))


def _pinned(level: torch.Tensor) -> torch.Tensor:
    """A copy in page-locked host memory, from which the GPU reads without the CPU waiting."""
    return torch.empty(level.shape, dtype=level.dtype, pin_memory=True).copy_(level)
