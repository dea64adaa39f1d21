"""Memory levels of the vision cache: the tower's output per media key, bounded by bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TypeAlias

from veripo_fast.types import MediaInputs, VisionFeatures

Entry: TypeAlias = tuple[MediaInputs, VisionFeatures]
"""Media and the tower's output, without pixels while the tower is frozen."""


class VisionCache:
    """Media key -> (media without pixels, tower output), bounded by bytes; the least recently used go first."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.bytes = self.hits = 0
        self._entries: OrderedDict[str, Entry] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: str) -> Entry | None:
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                return None
            self.hits += 1
            self._entries.move_to_end(key)
            return entry

    def put(self, media: MediaInputs, features: VisionFeatures) -> None:
        """Keep the tower's output; `media` without its pixels."""
        with self._lock:
            if media.key in self._entries or features.nbytes > self.max_bytes:
                return
            self._entries[media.key] = (media, features)
            self.bytes += features.nbytes
            while self.bytes > self.max_bytes:
                _, (_, oldest) = self._entries.popitem(last=False)
                self.bytes -= oldest.nbytes
