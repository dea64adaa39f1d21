"""`veripo precompute DATA`: fill the disk level of the vision cache ahead of training.

Entries are keyed and made by the functions that training uses, so a run afterwards decodes nothing. What is there is
not decoded again; entries appear whole, one by one, so a run killed anywhere goes on where it stopped.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from veripo_fast.cache.disk import SLACK, VisionStore
from veripo_fast.cache.entries import DecodedMedia, frames_name, tower_name, tower_version, write_frames
from veripo_fast.cache.loader import PromptLoader
from veripo_fast.config.inputs import CacheConfig
from veripo_fast.config.schema import Config
from veripo_fast.data.skipped import Skipped, SkippedLog
from veripo_fast.data.sources import check_some, evenly, find_sources, read_listed_prompts
from veripo_fast.errors import ConfigError, MediaError
from veripo_fast.model.checkpoint_files import resolve_device, resolve_path
from veripo_fast.model.encoding import PromptEncoder, decode_frames
from veripo_fast.model.tower import load_tower
from veripo_fast.text import memory
from veripo_fast.types import Media, Message, Prompt
from veripo_fast.video.contract import TEMPORAL_PATCH, most_pixels
from veripo_fast.video.decode import check_decoder
from veripo_fast.video.pool import MediaPool

log = logging.getLogger(__name__)
MAX_BATCH = 16
"""Prompts that are loaded together, and as many that are decoded meanwhile; fewer where their frames are large."""


@dataclass(frozen=True)
class Held:
    """What the cache has of the media of one prompt."""

    bytes: int
    tower: bool
    """Whether the output of the tower is there, or not wanted."""
    frames: bool
    """Whether the decoded frames are there, or not wanted."""


@dataclass
class Progress:
    """What has been done so far; counts are of prompts with media, those with the same media counted once."""

    new: int = 0
    there: int = 0
    there_bytes: int = 0
    skipped: int = 0


def precompute_command(data: Sequence[Path], config: Config, rank: int | None, world: int | None, limit: int | None,
                       workers: int | None) -> None:
    """`veripo precompute`: fill `cache.folder` and print what was done.

    Args:
        rank, world: which share of the media, one in `world`; None: RANK and WORLD_SIZE as torchrun sets them, or all.
        limit: only so many media, evenly spread (None: all).
        workers: threads that decode (None: video.workers).

    Raises:
        UserError: DATA holds no medium, an option cannot be used, or the cache is too small or cannot be written.
    """
    if not config.cache.folder:
        raise ConfigError("precompute fills the disk level of the cache: name its folder, --cache.folder DIR")
    for name, value in (("--workers", workers), ("--limit", limit)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}")
    rank, world = share(rank, world)
    torch.set_num_threads(config.threads or torch.get_num_threads())
    wanted = find_prompts(data, config, limit)[rank::world]
    config = replace(config, video=replace(config.video, workers=workers or config.video.workers))
    if torch.cuda.is_available() and resolve_device(config.model.device).type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank)) % torch.cuda.device_count())
    filler = Filler(config, world, "precompute_skipped.jsonl" if world == 1 else f"precompute_skipped-rank{rank}.jsonl")
    started = time.perf_counter()
    try:
        filler.fill(wanted, f"precompute {rank}/{world}" if world > 1 else "precompute")
    finally:
        filler.close()
    filler.check_written()
    seconds = time.perf_counter() - started
    done = filler.progress
    print(f"{len(wanted)} media{f' of rank {rank} of {world}' if world > 1 else ''}: {done.new} new, {done.there} "
          f"already there, {done.skipped} skipped{f' ({filler.skipped.path} says why)' if done.skipped else ''}; "
          f"{memory(filler.store.written_bytes)} written in {seconds:.1f} s, {done.new / seconds:.1f} new media per "
          f"second" + (f"; {filler.store.evicted} older entries deleted" if filler.store.evicted else ""))


def share(rank: int | None, world: int | None) -> tuple[int, int]:
    """(rank, world) from the options, or from the environment when both are absent; ConfigError when they cannot be."""
    if (rank is None) != (world is None):
        raise ConfigError("--rank and --world belong together")
    if rank is None or world is None:
        try:
            rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        except ValueError as error:
            raise ConfigError(f"RANK and WORLD_SIZE in the environment must be whole numbers ({error})") from error
    if not 0 <= rank < world:
        raise ConfigError(f"--rank must be at least 0 and below --world, got {rank} and {world}")
    return rank, world


def find_prompts(data: Sequence[Path], config: Config, limit: int | None) -> list[Prompt | Skipped]:
    """Distinct media of DATA, in its order: those of a record together in a prompt without text, as the cache keys
    them; a Skipped for every medium that a record names and that is not there."""
    sources = find_sources(data)
    prompts, skipped = read_listed_prompts(sources, config.data)
    media: dict[tuple[Media, ...], str] = {}
    for prompt in prompts:
        if prompt.media:
            media.setdefault(prompt.media, prompt.prompt_id)
    used = {medium.path for together in media for medium in together}
    shards = tuple(f"{file}/" for file in sources.files)  # of those, training reads what their records name
    media |= {(medium,): medium.path for medium in sources.media
              if medium.path not in used and not medium.path.startswith(shards)}
    gone = {item.path: item for item in skipped if item.path not in sources.files or item.record == item.path}
    found: list[Prompt | Skipped] = [Prompt(name, (Message("user", together),), "text", "")
                                     for together, name in media.items()]
    found += [*gone.values(), *sources.broken]
    check_some(found, data)
    return evenly(found, limit)


class Filler:
    """Makes the entries of one share of the media. With a frozen tower its output, by a PromptLoader that decodes
    ahead; and decoded frames alone where the tower trains, without loading it, or where only they are missing.

    `world`: how many share the cache, each its part of the bytes. `skipped_name`: file in the folder of the cache that
    names what cannot be read; begun anew.
    """

    def __init__(self, config: Config, world: int, skipped_name: str) -> None:
        self.config = config
        self.max_bytes = config.cache.disk_bytes // world
        self.device = resolve_device(config.model.device)
        if self.device.type == "cuda":  # decoding threads would take the first one
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.progress = Progress()
        self.loader: PromptLoader | None = None
        self.encoder: PromptEncoder
        self.store: VisionStore
        self.wants_frames = config.cache.frames or not config.model.freeze_vision
        cache = CacheConfig(config.cache.folder, config.cache.disk_bytes, host_bytes=0, frames=config.cache.frames,
                            prefetch_bytes=config.cache.prefetch_bytes, prefetch_prompts=2 * MAX_BATCH)
        if config.model.freeze_vision:
            tower = load_tower(config.model)
            self.loader = PromptLoader(tower, config.video, sys.maxsize, self.skip, cache)
            assert self.loader.store is not None
            self.encoder, self.store = tower.encoder, self.loader.store
            self.version = tower_version(tower)
        else:
            check_decoder(config.video, self.device)
            self.encoder = PromptEncoder(resolve_path(config.model.path))
            self.store = VisionStore(Path(cache.folder), cache.disk_bytes)
        path = self.store.folder / skipped_name
        path.unlink(missing_ok=True)
        self.skipped = SkippedLog(path)

    def close(self) -> None:
        """Stop the decoding threads, and finish writing."""
        (self.loader or self.store).close()

    def fill(self, wanted: Sequence[Prompt | Skipped], label: str) -> None:
        """Make what is missing.

        Raises:
            ConfigError: the cache cannot be written, or cannot hold all.
        """
        for item in wanted:
            if isinstance(item, Skipped):
                self._skipped(item)
        prompts = [item for item in wanted if isinstance(item, Prompt)]
        towers, frames = self._missing(prompts, label)
        self._warn_of_size([*towers, *frames])
        with tqdm(total=len(wanted), initial=len(wanted) - len(towers) - len(frames), desc=label,
                  unit="medium") as bar:
            for steps in (self._make_towers(towers), self._make_frames(frames)):
                for count in steps:
                    bar.set_postfix_str(f"{self.progress.skipped} skipped", refresh=False)
                    bar.update(count)
                    self.check_written()
        self.progress.new = len(wanted) - self.progress.there - self.progress.skipped

    def skip(self, prompt: Prompt, reason: str) -> None:
        """Name media that cannot be read."""
        self._skipped(Skipped(prompt.prompt_id, ", ".join(medium.path for medium in prompt.media), reason))

    def check_written(self) -> None:
        """ConfigError when an entry could not be written, or all together cannot be kept."""
        if self.store.failed_writes:
            raise ConfigError(f"cache.folder {self.store.folder} takes no more entries (the log says why); run again "
                              f"to go on")
        held, most = self.progress.there_bytes + self.store.written_bytes, self.max_bytes
        kept = most - most // SLACK if self.store.evicted else most  # so far the store empties its folder
        if held > kept or self.store.too_large:
            part = "" if most == self.store.max_bytes else f" (this rank's part is {most})"
            raise ConfigError(f"cache.disk_bytes {self.store.max_bytes}{part} is too small for these media: after "
                              f"{held} bytes of entries the first of them would be deleted; raise it, or take fewer "
                              f"media")

    # -- what is missing ------------------------------------------------------------------------------------------

    def _missing(self, prompts: Sequence[Prompt], label: str) -> tuple[list[Prompt], list[Prompt]]:
        """Prompts that lack the output of the tower, and those that lack frames alone. One `stat` per entry."""
        towers, frames = [], []
        with MediaPool(self.config.video) as pool:
            found = tqdm(pool.map(self._look, prompts), total=len(prompts), desc=f"{label}: look", leave=False)
            for prompt, held in zip(prompts, found, strict=True):
                if isinstance(held, MediaError):
                    self.skip(prompt, str(held))
                    continue
                self.progress.there_bytes += held.bytes
                if not held.tower:
                    towers.append(prompt)
                elif not held.frames:
                    frames.append(prompt)
                else:
                    self.progress.there += 1
        return towers, frames

    def _look(self, prompt: Prompt) -> Held:
        key = self.encoder.media_key(prompt, self.config.video)
        tower = self.store.renew(tower_name(key, self.version)) if self.loader else 0
        frames = self.store.renew(frames_name(key)) if self.wants_frames else 0
        return Held((tower or 0) + (frames or 0), tower is not None, frames is not None)

    def _warn_of_size(self, prompts: Sequence[Prompt]) -> None:
        """Say how much the contract allows the missing media to take, when the cache may not hold it."""
        most = self.progress.there_bytes + sum(self._most_bytes(prompt) for prompt in prompts)
        if most > self.max_bytes:
            log.warning("these media may take up to %s under the contract, more than the %s that cache.disk_bytes %d "
                        "leaves for them: once they do, filling stops", memory(most), memory(self.max_bytes),
                        self.store.max_bytes)

    def _most_bytes(self, prompt: Prompt) -> int:
        """Bound on the entries of a prompt."""
        pixels = most_pixels(prompt.media, self.config.video)
        size = 3 * pixels if self.wants_frames else 0
        if self.loader:
            tokens = pixels // TEMPORAL_PATCH // self.encoder.vision.factor**2
            size += tokens * self.encoder.tower_bytes_per_token(self.config.model.dtype)
        return size

    # -- making it ------------------------------------------------------------------------------------------------

    def _make_towers(self, prompts: Sequence[Prompt]) -> Iterator[int]:
        """Yields how many are done; the next batch is decoded while the tower runs on one."""
        if not self.loader:
            return
        largest = max((3 * most_pixels(prompt.media, self.config.video) for prompt in prompts), default=1)
        size = min(max(self.config.cache.prefetch_bytes // largest // 2, 1), MAX_BATCH)
        for start in range(0, len(prompts), size):
            self.loader.prefetch(prompts[start:start + 2 * size])
            batch = prompts[start:start + size]
            self.loader.load(batch)
            yield len(batch)

    def _make_frames(self, prompts: Sequence[Prompt]) -> Iterator[int]:
        with MediaPool(self.config.video) as pool:
            for prompt, found in zip(prompts, pool.map(self._decode, prompts), strict=True):
                if isinstance(found, MediaError):
                    log.warning("skipped %s: %s", prompt.prompt_id, found)
                    self.skip(prompt, str(found))
                else:
                    write_frames(self.store, found)
                yield 1

    def _decode(self, prompt: Prompt) -> DecodedMedia:
        key = self.encoder.media_key(prompt, self.config.video)
        frames = decode_frames(prompt.media, self.config.video, self.encoder.vision.factor, str(self.device))
        return DecodedMedia(frames, key)

    def _skipped(self, item: Skipped) -> None:
        self.progress.skipped += 1
        self.skipped.add(item)
