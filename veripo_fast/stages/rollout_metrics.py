"""Metrics of a rewarded rollout batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from veripo_fast.config.objectives import RewardConfig
from veripo_fast.config.terms import SCORED
from veripo_fast.reward.groups import has_signal
from veripo_fast.reward.score import scores_of
from veripo_fast.types import RolloutGroup


def rollout_metrics(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """Means over all completions of a rollout batch, and the share of groups that carry no signal."""
    rows = [completion for group in groups for completion in group.completions]

    def mean(values: list[float]) -> float:
        return sum(values) / max(len(values), 1)

    return {"reward_mean": mean([value for group in groups for value in scores_of(group, "reward")]),
            "accuracy_mean": mean([value for group in groups for value in scores_of(group, "accuracy")]),
            "format_mean": mean([value for group in groups for value in scores_of(group, "format")]),
            "length_mean": mean([float(len(row.token_ids)) for row in rows]),
            "length_max": float(max((len(row.token_ids) for row in rows), default=0)),
            "finished_share": mean([float(row.finish_reason == "stop") for row in rows]),
            "zero_variance_share": mean([float(not has_signal(group)) for group in groups]),
            "prompts": len(groups)}


ROUTER_COUNTS = ("router_choices", "router_differing", "router_unknown")
"""What a pass that replays experts counts (`model/replay.py: Replay`)."""


def router_shares(metrics: dict[str, float]) -> dict[str, float]:
    """Takes the counts out of the sums of an update, and gives their shares; nothing where none was replayed."""
    if ROUTER_COUNTS[0] not in metrics:
        return {}
    choices, differing, unknown = (metrics.pop(name) for name in ROUTER_COUNTS)
    return {"router_mismatch": differing / max(choices, 1.0), "router_unknown": unknown / max(choices + unknown, 1.0)}


def column_metrics(groups: Sequence[RolloutGroup], config: RewardConfig) -> dict[str, Any]:
    """Under `columns` the mean of each term of the reward, before gate and weight; accuracy and format have means of
    their own. With `on_error: count` the number of prompts for which a function failed."""
    means: dict[str, float] = {}
    for term in config.terms:
        if term.name not in SCORED:
            values = [row.columns[term.name] for group in groups for row in group.completions]
            known = [value for value in values if value is not None]
            means[term.name] = sum(known) / max(len(known), 1)
    metrics: dict[str, Any] = {"columns": means} if means else {}
    if config.on_error == "count":
        metrics["reward_errors"] = sum(None in group.completions[0].columns.values() for group in groups)
    return metrics
