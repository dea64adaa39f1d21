"""Decoding ahead: the media of the next step are fetched by the pool's threads while the current one trains.

Bounded by bytes, one slot per media in flight: whoever asks for media that are being fetched waits for that slot. What
a step gets does not depend on what was fetched ahead, only how long it waits.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Generic

from veripo_fast.config.inputs import VideoConfig
from veripo_fast.errors import MediaError
from veripo_fast.types import Media, Prompt
from veripo_fast.video.pool import MediaPool, Result

log = logging.getLogger(__name__)


@dataclass
class _Slot(Generic[Result]):
    """Media being fetched, or fetched and not yet taken."""

    future: Future[Result]
    nbytes: int
    """What they hold in memory; until they are there, the most that they can hold."""


class MediaSlots(MediaPool, Generic[Result]):
    """A pool that fetches the media of prompts, on demand and ahead.

    Args:
        fetch: the media of a prompt; runs on a worker thread and may raise MediaError.
        most_bytes: the most that the media of a prompt can hold in memory.
        nbytes: what they do hold.
        max_bytes: bound on what is fetched ahead, in flight included.
    """

    def __init__(self, contract: VideoConfig, fetch: Callable[[Prompt], Result], *, max_bytes: int,
                 most_bytes: Callable[[Prompt], int], nbytes: Callable[[Result], int]) -> None:
        super().__init__(contract)
        self._fetch, self._most_bytes, self._nbytes = fetch, most_bytes, nbytes
        self.max_bytes = max_bytes
        self._lock = threading.RLock()
        self._waiting: dict[tuple[Media, ...], Prompt] = {}
        self._slots: dict[tuple[Media, ...], _Slot[Result]] = {}
        self._said = False

    @property
    def held_bytes(self) -> int:
        """Bytes fetched ahead and not yet taken, those of slots in flight at their bound."""
        with self._lock:
            return sum(slot.nbytes for slot in self._slots.values())

    def ahead(self, prompts: Mapping[tuple[Media, ...], Prompt]) -> None:
        """Fetch these in order as room allows, and forget what an earlier call asked for beyond them."""
        with self._lock:
            self._waiting = {}
            for media, slot in list(self._slots.items()):
                if media not in prompts and (slot.future.done() or slot.future.cancel()):
                    del self._slots[media]
            self._waiting = {media: prompt for media, prompt in prompts.items() if media not in self._slots}
            self._start()

    def take(self, prompts: Mapping[tuple[Media, ...], Prompt]) -> dict[tuple[Media, ...], Result | MediaError]:
        """The media of each prompt, from its slot or fetched now; a MediaError in place of what cannot be read."""
        with self._lock:
            futures = {}
            for media, prompt in prompts.items():
                self._waiting.pop(media, None)
                slot = self._slots.pop(media, None)
                futures[media] = slot.future if slot else self._threads.submit(self._fetch, prompt)
            self._start()
        taken: dict[tuple[Media, ...], Result | MediaError] = {}
        try:
            for media, future in futures.items():
                try:
                    taken[media] = future.result()
                except MediaError as error:
                    taken[media] = error
        finally:
            for future in futures.values():
                future.cancel()
        return taken

    def close(self) -> None:
        """Forget what was asked for and wait for what runs (at most `timeout_seconds`)."""
        self.ahead({})
        super().close()

    def _start(self) -> None:
        """Start what waits, one per free thread, as long as all of it surely fits; called with the lock held."""
        while self._waiting and sum(not slot.future.done() for slot in self._slots.values()) < self.contract.workers:
            media, prompt = next(iter(self._waiting.items()))
            most = self._most_bytes(prompt)
            if most <= self.max_bytes < self.held_bytes + most:
                return
            del self._waiting[media]
            if most > self.max_bytes:
                self._say_too_large(prompt, most)
                continue
            slot = self._slots[media] = _Slot(self._threads.submit(self._fetch, prompt), most)
            slot.future.add_done_callback(partial(self._done, slot))

    def _done(self, slot: _Slot[Result], future: Future[Result]) -> None:
        with self._lock:
            if not future.cancelled():
                slot.nbytes = 0 if future.exception() else self._nbytes(future.result())
            self._start()

    def _say_too_large(self, prompt: Prompt, most: int) -> None:
        if not self._said:
            self._said = True
            log.warning("%s may take %d bytes, more than cache.prefetch_bytes %d: it is not decoded ahead",
                        prompt.prompt_id, most, self.max_bytes)
