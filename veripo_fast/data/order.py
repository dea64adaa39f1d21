"""The order in which prompts are used: without end, and known from one integer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial

from veripo_fast.config.objectives import GrpoConfig
from veripo_fast.errors import ConfigError
from veripo_fast.recipes.own import described, named
from veripo_fast.recipes.samplers import permutation
from veripo_fast.recipes.tables import SAMPLERS
from veripo_fast.types import Prompt

_LOG = logging.getLogger(__name__)


class PromptOrder:
    """An order without end, shared by all ranks, in which an integer says how far one is.

    `position` counts the prompts that all ranks together have taken. Epoch e is an order that depends on (seed, e)
    alone, so a run may be resumed with another number of ranks.

    Args:
        epoch: the numbers of the prompts of an epoch, as many in each; None: all of them, shuffled anew.
    """

    def __init__(self, num_prompts: int, seed: int, rank: int = 0, world_size: int = 1,
                 epoch: Callable[[int], Sequence[int]] | None = None) -> None:
        if num_prompts < 1:
            raise ValueError(f"num_prompts must be at least 1, got {num_prompts}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, {world_size}), got {rank}")
        self.num_prompts, self.seed, self.rank, self.world_size = num_prompts, seed, rank, world_size
        self._epoch = partial(permutation, num_prompts, seed) if epoch is None else epoch
        self._length = num_prompts if epoch is None else len(epoch(0))

    def take(self, position: int, count: int) -> tuple[list[int], int]:
        """The next `count` prompt indices of this rank, and the position after all ranks have taken as many."""
        first = position + self.rank * count
        indices = []
        for slot in range(first, first + count):
            epoch, offset = divmod(slot, self._length)
            indices.append(self._epoch(epoch)[offset])
        return indices, position + self.world_size * count


def prompt_order(prompts: Sequence[Prompt], config: GrpoConfig, seed: int) -> PromptOrder:
    """The order that the sampler of a stage gives.

    Raises:
        ConfigError: the user's sampler fails, or gives no order.
    """
    if config.sampler == "shuffled":
        return PromptOrder(len(prompts), seed)
    if config.sampler == "mixed" and config.drop_easy:
        config = _without_dropped(prompts, config)
    return PromptOrder(len(prompts), seed, epoch=_Epochs(prompts, config, seed))


def _without_dropped(prompts: Sequence[Prompt], config: GrpoConfig) -> GrpoConfig:
    """Without the weights of sources that have no prompt: all of theirs may have been easy, which nobody could know
    when the run began. A misspelt source is refused all the same, because the true one has no weight."""
    weights, there = config.sampler_options.get("weights"), {prompt.data_source for prompt in prompts}
    if not isinstance(weights, dict) or there >= set(weights):
        return config
    gone = sorted(set(weights) - there)
    _LOG.warning("sampler mixed: no prompt is left of data_source %s, because of grpo.drop_easy; the weights "
                 "of the others stand", ", ".join(map(repr, gone)))
    kept = {source: weight for source, weight in weights.items() if source in there}
    return replace(config, sampler_options={**config.sampler_options, "weights": kept})


class _Epochs:
    """Epochs of a sampler, each checked and kept while it is used."""

    def __init__(self, prompts: Sequence[Prompt], config: GrpoConfig, seed: int) -> None:
        self._prompts, self._config, self._seed = prompts, config, seed
        self._function = named(config.sampler, SAMPLERS)
        self._kept = lru_cache(maxsize=4)(self._checked)
        self._length = len(self._kept(0))

    def __call__(self, epoch: int) -> Sequence[int]:
        order = self._kept(epoch)
        if len(order) != self._length:
            raise ConfigError(f"sampler {self._config.sampler} gave {len(order)} prompts in epoch {epoch} and "
                              f"{self._length} in epoch 0; every epoch must have as many")
        return order

    def _checked(self, epoch: int) -> tuple[int, ...]:
        """The order of an epoch; asked for twice, because ranks and a resume have to get the same one."""
        what = f"sampler {self._config.sampler}"
        one, other = self._called(epoch), self._called(epoch)
        if one != other:
            raise ConfigError(f"{what} gave two orders for epoch {epoch} and seed {self._seed}; take randomness from "
                              "random.Random(f'{seed}/{epoch}') alone, or a resume would go on with another order")
        if not one:
            raise ConfigError(f"{what} gave no prompts for epoch {epoch}")
        for number in one:
            if type(number) is not int or not 0 <= number < len(self._prompts):
                raise ConfigError(f"{what} gave {number!r} in epoch {epoch}; it must give numbers of prompts, from 0 "
                                  f"to {len(self._prompts) - 1}")
        return one

    def _called(self, epoch: int) -> tuple[int, ...]:
        try:
            order = self._function(self._prompts, epoch, self._seed, **self._config.sampler_options)
            return tuple(order.tolist() if hasattr(order, "tolist") else order)
        except Exception as error:  # of whatever a user's function does
            raise ConfigError(f"sampler {self._config.sampler} failed in epoch {epoch}: {described(error)}") from error


def steps_of(count: int, size: int, epochs: int, most: int | None, seed: int) -> list[list[int]]:
    """Numbers below `count` of every step: each epoch takes all of them once, in an order of its own.

    Args:
        size: of a step; the last one of an epoch may be short.
        most: steps in all; None: all epochs.
    """
    steps: list[list[int]] = []
    for epoch in range(epochs):
        order = permutation(count, seed, epoch)
        steps += [list(order[start:start + size]) for start in range(0, count, size)]
        if most is not None and len(steps) >= most:
            break
    return steps[:most]
