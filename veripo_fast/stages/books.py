"""What a run notes of its media (which were left out and why, and which content each had when first used) and times.

Rank 0 alone writes into the run folder. What other ranks note waits until the next step ends.
"""

from __future__ import annotations

from collections.abc import Sequence

from veripo_fast.data.skipped import Skipped, SkippedLog
from veripo_fast.distributed.world import World
from veripo_fast.run.folder import RunDir
from veripo_fast.stages.media_log import MediaLog
from veripo_fast.stages.time_log import TimeLog
from veripo_fast.types import Prompt


class Books:
    """skipped.jsonl, media.jsonl and timeline.jsonl. Made on all ranks together.

    Args:
        changed_media: whether media may differ from what they were when the run first used them.
        timeline: whether times are noted. after: the step that the run stands at.
    """

    def __init__(self, run: RunDir, world: World, changed_media: bool, timeline: bool, after: int) -> None:
        self.world = world
        self.times = TimeLog(run.timeline, world, timeline, after)
        self.skipped = SkippedLog(run.skipped)
        self.media = MediaLog(run.media, changed_media, write=world.main)
        self._waiting: list[Skipped] = []

    def skip_records(self, records: Sequence[Skipped]) -> None:
        """Note records of data files, which every rank reads alike."""
        if self.world.main:
            self.skipped.add(*records)

    def skip_prompt(self, prompt: Prompt, reason: str) -> None:
        """Note a prompt whose media cannot be read."""
        skipped = Skipped.of_prompt(prompt, reason)
        if self.world.main:
            self.skipped.add(skipped)
        else:
            self._waiting.append(skipped)

    def write(self, stage: str, global_step: int) -> None:
        """Write what all ranks have noted. Collective.

        Args:
            stage: the one that runs, or was the last. global_step: of the step that is done, or was the last.
        """
        noted = self.world.gather((self._waiting, self.media.waiting, self.times.taken(stage)))
        self.times.write([taken for _, _, taken in noted], global_step)
        if self.world.size == 1:
            return
        self._waiting, self.media.waiting = [], []
        if self.world.main:
            for skipped, media, _ in noted:
                self.skipped.add(*skipped)
                self.media.add(media)
