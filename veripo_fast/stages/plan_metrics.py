"""Metrics of what the section `plan` asks for: contrast groups, and rounds of sampling."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from veripo_fast.config.schema import Config
from veripo_fast.recipes.temporal import chance, opens, temporal
from veripo_fast.reward.score import scores_of
from veripo_fast.types import RolloutGroup


def contrast_metrics(groups: Sequence[RolloutGroup], config: Config, tower_runs: int) -> dict[str, Any]:
    """Under `contrast`: groups that have one, the tower's runs on this rank for them, mean accuracy of both; and where
    the reward has the term `temporal`, the share of its gates that are open, beside the share that would be open for a
    policy that does not see the order of frames."""
    if config.plan.contrast == "none":
        return {}
    pairs = [(scores_of(group, "accuracy"), scores_of(group.contrast, "accuracy"))
             for group in groups if group.contrast is not None]
    metrics: dict[str, float] = {"groups": len(pairs), "tower_runs": tower_runs}
    if pairs:
        metrics["accuracy_mean"] = fmean(value for _, contrast in pairs for value in contrast)
        metrics["accuracy_mean_in_order"] = fmean(value for main, _ in pairs for value in main)
        for term in config.reward.terms:
            if term.use == "temporal":
                share = term.options.get("share", inspect.signature(temporal).parameters["share"].default)
                metrics["open_share"] = fmean(opens(main, contrast, share) for main, contrast in pairs)
                metrics["open_share_by_chance"] = fmean(chance(main, contrast, share) for main, contrast in pairs)
    return {"contrast": metrics}


def round_metrics(rounds: int, sampled: int, live: int, wanted: int) -> dict[str, Any]:
    """Under `refill`: rounds of sampling, groups of all of them, those with a signal, those that were not needed, and
    those that are missing although the last round that `plan.refill` allows is over."""
    return {"refill": {"rounds": rounds, "groups": sampled, "live": live, "surplus": max(live - wanted, 0),
                       "missing": max(wanted - live, 0)}}
