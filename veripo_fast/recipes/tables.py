"""What a recipe can name. A paper's idea is one entry; a configuration may name a function of its own instead.

Names are declared in config/, so that a misspelt one is refused before torch is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from veripo_fast.recipes import (
    advantages,
    agreement,
    likely,
    maps,
    mixing,
    moving,
    pass_rates,
    references,
    rewards,
    samplers,
    semantic,
    temporal,
)

REWARDS: Mapping[str, Callable[..., Any]] = {
    "accuracy": rewards.accuracy, "format": rewards.format, "length_window": rewards.length_window,
    "overlong": rewards.overlong, "shortness": rewards.shortness, "temporal": temporal.temporal,
    "spatial_map": maps.spatial_map, "agreement": agreement.agreement,
    "likely_answer": likely.likely_answer, "semantic": semantic.semantic}
"""(PromptView, **options) -> column."""
ADVANTAGES: Mapping[str, Callable[..., Any]] = {
    "std": advantages.std, "no_std": advantages.no_std, "leave_one_out": advantages.leave_one_out,
    "batch_std": advantages.batch_std, "live_scaled": advantages.live_scaled}
"""(rewards [S], group ids [S], **options) -> [S]; one of your own: (rewards [G] of a group, **options) -> column."""
MOVING_ADVANTAGES: Mapping[str, Callable[..., Any]] = {"task_std": moving.task_std}
"""(rewards [S], group ids [S], tasks of the groups, moments, **options) -> [S] and the moments behind the step, which
the checkpoint holds. An option `by` says what a task is."""
SAMPLERS: Mapping[str, Callable[..., Any]] = {
    "shuffled": samplers.shuffled, "sequential": samplers.sequential, "curriculum": pass_rates.curriculum,
    "prioritized": pass_rates.prioritized, "mixed": mixing.mixed}
"""(prompts, epoch, seed, **options) -> numbers of the prompts."""
REFERENCES: Mapping[str, Callable[[Path, Path], Path]] = {
    "stage_start": references.stage_start, "base": references.base, "ema": references.ema}
"""(folder of the model, folder that the stage began from) -> folder of the reference."""
