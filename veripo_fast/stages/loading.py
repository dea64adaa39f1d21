"""How a stage gets at prompts and media: data files, this rank's share of a batch, and what other ranks have found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice

from veripo_fast.cache.loader import PromptLoader
from veripo_fast.config.schema import Config
from veripo_fast.data.prompts import load_prompts
from veripo_fast.distributed.shares import gathered, of_engine, own_numbers
from veripo_fast.distributed.world import World
from veripo_fast.errors import DataError
from veripo_fast.run.folder import RunDir
from veripo_fast.stages.books import Books
from veripo_fast.stages.step_work import StepWork
from veripo_fast.types import LoadedPrompt, Prompt, RolloutGroup


class Loading:
    """The part of a session that loads."""

    config: Config
    run: RunDir
    world: World
    books: Books
    loader: PromptLoader
    work: StepWork
    _told_bad = 0
    """Bad prompts that all ranks know, the first of the loader's."""

    def load(self, prompts: Sequence[Prompt]) -> list[LoadedPrompt]:
        """Load prompts whose media are still what they were. Raises DataError."""
        self.books.media.check(prompts)
        return self.loader.load(prompts)

    def load_share(self, batch: Sequence[Prompt]) -> dict[int, LoadedPrompt]:
        """This rank's share of a batch, by place in it; those that cannot be loaded are left out. Raises DataError."""
        own = self._own_numbers(batch)
        self.books.media.check([batch[number] for number in own])
        with self.work.shared():
            return of_engine(self.loader.load_some(batch, own), self.world, self.config.rollout.tensor_parallel)

    def prefetch_share(self, batch: Sequence[Prompt]) -> None:
        """Decode the media of a batch that comes next, of this rank's share."""
        self.loader.prefetch([batch[number] for number in self._own_numbers(batch)])

    def _own_numbers(self, batch: Sequence[Prompt]) -> list[int]:
        return own_numbers(len(batch), self.world, self.config.rollout.tensor_parallel)

    def gathered(self, own: Mapping[int, RolloutGroup]) -> dict[int, RolloutGroup]:
        """The groups of all ranks, by their numbers. Collective."""
        speaks = self.world.rank % self.config.rollout.tensor_parallel == 0  # for the ranks that share an engine
        return gathered(own if speaks else {}, self.world)

    def check_some_loaded(self, prompts: Sequence[Prompt], what: str) -> None:
        """Raise DataError when every prompt turned out to be bad. Collective: a rank alone may have bad ones only."""
        new = dict(islice(self.loader.bad.items(), self._told_bad, None))
        for bad in self.world.gather(new):
            self.loader.bad |= bad  # else a rank that gets the prompt later would try it, and say so, once more
        self._told_bad = len(self.loader.bad)
        if all(prompt in self.loader.bad for prompt in prompts):
            raise DataError(f"none of the {len(prompts)} {what} could be loaded; {self.run.skipped} says why for each")

    def load_prompts(self, files: tuple[str, ...]) -> list[Prompt]:
        """Prompts of data files; records that cannot be used are named in skipped.jsonl."""
        prompts, skipped = load_prompts(files, self.config.data)
        self.books.skip_records(skipped)
        return prompts
