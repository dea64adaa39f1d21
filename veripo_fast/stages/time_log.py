"""timeline.jsonl: what each rank did in each window (schedule/timeline.py), written by rank 0, a line per window.

A run on 8 ranks takes about 10 KB per step. Once the file is larger than `SPAN_BYTES` it gets sums alone, 200 bytes per
rank and step, and beyond `MOST_BYTES` nothing more. Both are said once.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from veripo_fast.distributed.world import World
from veripo_fast.run.jsonlines import append_objects, parse_object
from veripo_fast.schedule import timeline
from veripo_fast.schedule.timeline import FOR_RANKS, Timeline, span
from veripo_fast.text import memory

log = logging.getLogger(__name__)
SPAN_BYTES, MOST_BYTES = 256 << 20, 1 << 30


class Taken(NamedTuple):
    """What a rank brings to the exchange."""

    windows: list[dict[str, Any]]
    size: int
    """Bytes of the file, on rank 0."""


class TimeLog:
    """Begins the timeline of this process, and appends what all ranks recorded. Made on all ranks together.

    Args:
        wanted: whether there is a timeline (`train.timeline`).
        after: the step that the run stands at. Later ones will be run again, so what the file says of them is cut.
    """

    def __init__(self, path: Path, world: World, wanted: bool, after: int) -> None:
        self.path = path
        self.world = world
        self.timeline: Timeline | None = None
        self._limits = [(SPAN_BYTES, "from here on it gets no spans, only sums"), (MOST_BYTES, "it gets nothing more")]
        if world.main:
            cut_after(path, after)
        if wanted:
            world.barrier()
            self.timeline = Timeline()
            timeline.begin(self.timeline)
            world.watch.around = lambda: span(FOR_RANKS)

    def begin_step(self, stage: str, step: int) -> None:
        """What follows is a step."""
        if self.timeline is not None:
            self.timeline.begin_step(stage, step)

    def taken(self, stage: str) -> Taken:
        """What this rank did since the last call, for `write`."""
        if self.timeline is None:
            return Taken([], 0)
        size = self.path.stat().st_size if self.world.main and self.path.exists() else 0
        return Taken(self.timeline.take(stage), size)

    def write(self, taken: Sequence[Taken], global_step: int) -> None:
        """Add what all ranks took, right behind the exchange that brought it.

        Args:
            global_step: the last step of the run that is done.
        """
        if self.timeline is None:
            return
        self.timeline.exchanged()
        size = taken[0].size
        self.timeline.keep_spans = size < SPAN_BYTES
        if not self.world.main:
            return
        while self._limits and size >= self._limits[0][0]:
            limit, consequence = self._limits.pop(0)
            log.warning("%s has grown to %s: %s", self.path, memory(limit), consequence)
        if size < MOST_BYTES:
            windows = [part.windows for part in taken]
            append_objects(self.path, timeline.lines(windows, global_step, self.timeline.began))

    def close(self) -> None:
        """End the timeline of this process."""
        timeline.end()
        self.world.watch.around = None


def cut_after(path: Path, global_step: int) -> None:
    """Cut a file before its first line of a later step, and before what a kill has left of a line."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        keep = 0
        for line in file:
            row = parse_object(line) if line.endswith(b"\n") else None
            if row is None or not isinstance(row.get("global_step"), int) or row["global_step"] > global_step:
                break
            keep += len(line)
        file.truncate(keep)
