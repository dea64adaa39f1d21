"""Rollouts that are finished and on disk: those of an earlier stage, and those of a step whose update was lost.

The first step behind a checkpoint takes them from there, because its weights are exactly those that sampled them. Later
steps sample again: their weights come from updates that are computed anew.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from veripo_fast.config.load import apply_overrides
from veripo_fast.config.schema import Config
from veripo_fast.distributed.world import World
from veripo_fast.errors import DataError
from veripo_fast.rollout.protocol import Sampling
from veripo_fast.rollout.store import read_groups
from veripo_fast.run.folder import RunDir
from veripo_fast.run.metrics import read_records
from veripo_fast.types import LoadedPrompt, RolloutGroup

log = logging.getLogger(__name__)


def stage_rollouts(run: RunDir, config: Config, name: str, some_may_be_gone: bool) -> list[RolloutGroup]:
    """All rollouts of a finished stage, in the order they were made. Raises DataError when some are gone."""
    stage = next(stage for stage in config.stages if stage.name == name)
    files = run.rollout_files(name)
    expected = apply_overrides(config, stage.set).grpo.steps
    if config.eval.patience is not None:  # it may have ended early: its metrics say where
        expected = min(expected, sum(row.get("stage") == name for row in read_records(run.metrics)))
    if len(files) < expected and not some_may_be_gone:
        raise DataError(f"{expected - len(files)} of {expected} rollout files of stage {name} are gone from "
                        f"{run.root / 'rollouts' / name}; what follows would learn from the rest. Put them back, or go "
                        "on with --resume --allow-changes rollouts")
    groups: list[RolloutGroup] = []
    for path in files:
        groups += read_groups(path)
    return groups


def stored_groups(path: Path, loaded: Mapping[int, LoadedPrompt], sampling: Sampling, policy_version: int, world: World,
                  *, replayed: bool = False) -> list[RolloutGroup] | None:
    """This rank's groups of a step, in the order of its prompts; None where they are not those of the step. Collective.

    Args:
        path: where the step's rollouts lie when they are finished.
        loaded: this rank's prompts.
        policy_version: optimizer steps behind the weights that the step samples from.
        replayed: whether the update replays the experts that the engine chose, which they then must have.
    """
    groups = world.on_main(lambda: _read(path, replayed))
    numbers = sorted(set().union(*world.gather(set(loaded))))
    own: list[RolloutGroup] = []
    fits = groups is not None and len(groups) == len(numbers)
    if groups is not None and fits:
        own = [groups[numbers.index(number)] for number in loaded]
        fits = all(_is_of(group, prompt, sampling, policy_version) and (not replayed or _has_experts(group))
                   for group, prompt in zip(own, loaded.values(), strict=True))
    if not numbers or world.most(not fits):
        return None
    if world.main:
        log.info("the finished rollouts in %s are used again", path)
    return own


def _read(path: Path, experts: bool) -> list[RolloutGroup] | None:
    try:
        return read_groups(path, experts=experts) if path.is_file() else None
    except DataError as error:
        log.warning("%s; the step is sampled again", error)
        return None


def _is_of(group: RolloutGroup, prompt: LoadedPrompt, sampling: Sampling, policy_version: int) -> bool:
    return (group.prompt == prompt.prompt and len(group.completions) == sampling.group_size
            and all(completion.policy_version == policy_version for completion in group.completions))


def _has_experts(group: RolloutGroup) -> bool:
    return group.prompt_experts is not None and all(row.experts is not None for row in group.completions)
