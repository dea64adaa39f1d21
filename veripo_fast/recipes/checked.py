"""The functions that a configuration names: all of them, looked at before anything else is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from veripo_fast.config.load import apply_overrides
from veripo_fast.config.schema import Config
from veripo_fast.recipes.own import check_call, named, own_file
from veripo_fast.recipes.tables import ADVANTAGES, MOVING_ADVANTAGES, REFERENCES, REWARDS, SAMPLERS


class Use(NamedTuple):
    """A function that a configuration names."""

    what: str
    name: str
    table: Mapping[str, Callable[..., Any]]
    arguments: tuple[str, ...]
    options: Mapping[str, Any]


def uses_of(config: Config) -> Iterator[Use]:
    """Every function that is named, for the run or a stage of it."""
    for template in config.data.own_templates():
        yield Use("template", template, {}, ("question",), {})
    for part in (config, *(apply_overrides(config, stage.set) for stage in config.stages)):
        grpo = part.grpo
        for term in part.reward.terms:
            yield Use("reward", term.use, REWARDS, ("asked",), term.options)
        yield Use("advantage", grpo.advantage, {**ADVANTAGES, **MOVING_ADVANTAGES}, _given(grpo.advantage),
                  grpo.advantage_options)
        yield Use("sampler", grpo.sampler, SAMPLERS, ("prompts", "epoch", "seed"), grpo.sampler_options)
        yield Use("reference", grpo.reference, REFERENCES, ("model", "started_from"), {})


def _given(advantage: str) -> tuple[str, ...]:
    """What an advantage is called with beside its options."""
    if advantage in MOVING_ADVANTAGES:
        return "rewards", "group_ids", "tasks", "moments"
    return ("rewards", "group_ids") if advantage in ADVANTAGES else ("rewards",)


def check_functions(config: Config) -> None:
    """Import what a configuration names, and see that it can be called with its options.

    Raises:
        ConfigError: naming the function and what is wrong.
    """
    for use in uses_of(config):
        check_call(use.what, use.name, named(use.name, use.table), use.arguments, use.options)


def own_files(config: Config) -> dict[str, Path]:
    """The files that hold the user's functions, by the module or file that the configuration names."""
    files = {use.name.rpartition(":")[0]: own_file(use.name) for use in uses_of(config)}
    return {place: file for place, file in files.items() if file is not None}
