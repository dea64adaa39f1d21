"""The phases of a step: what each took in time and memory, and that one which fails leaves nothing behind.

An exception holds the frames that it came through, and they hold their tensors: activations of half a forward pass, a
batch of key/value caches. Whoever keeps the exception keeps them (a notebook keeps the last one). So a phase that fails
lets go of these frames: they stand as text behind the error's message, and a debugger can read no variables in them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from veripo_fast.cache.loader import PromptLoader
from veripo_fast.distributed.world import World
from veripo_fast.run.failure import forget
from veripo_fast.run.memory import HighWater, return_all_freed_memory
from veripo_fast.schedule.timeline import count, span
from veripo_fast.stages.step_work import StepWork


class Phases:
    """Measures the phases of a session.

    Args:
        let_go: drops what a failed phase has left in the session's own parts.
    """

    def __init__(self, loader: PromptLoader, work: StepWork, high_water: HighWater, world: World,
                 let_go: Callable[[], None]) -> None:
        self.loader, self.work, self.high_water, self.world = loader, work, high_water, world
        self.let_go = let_go

    @contextmanager
    def phase(self, name: str, step: int) -> Iterator[None]:
        """See `Session.phase`."""
        loaded = self.loader.work
        started = time.perf_counter()
        self.world.doing(f"in {name} of step {step}")
        try:
            with span(name), self.high_water.phase(name):
                yield
        except BaseException as error:
            forget(error)
            self.let_go()
            return_all_freed_memory(self.high_water.device)
            raise
        finally:
            seconds = time.perf_counter() - started
            if name == "vision":
                done = self.loader.work - loaded
                seconds -= done.wait_seconds
                self.work.add_seconds("decode", done.wait_seconds)
                self.work.loaded(done)
            self.work.add_seconds(name, seconds)
            count("prefetched bytes", self.loader.held_bytes)
