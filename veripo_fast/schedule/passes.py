"""How often a step runs the model: rounds of sampling, passes beside those of an update, products with the head alone.

What the options of a configuration ask for, for the cost model (costs.py). A pass is a forward and a backward of what
is trained on; one without a backward counts a third (`group_flops`).
"""

from __future__ import annotations

import math

from veripo_fast.config.plans import PlanConfig
from veripo_fast.config.schema import Config

FORWARD = 1 / 3


def rounds_of(plan: PlanConfig, wanted: int, live_share: float) -> list[int]:
    """Prompts that each round of a step samples, until `wanted` of them carry a signal (`stages/batches.py`).

    Args:
        live_share: prompts with a signal among those that are sampled.
    """
    rounds: list[int] = []
    live = 0.0
    while len(rounds) <= (plan.refill if plan.selects else 0):
        missing = math.ceil(wanted - live - 1e-9)
        if missing <= 0:
            break
        rounds.append(plan.sampled_prompts(missing))
        live += rounds[-1] * live_share
    return rounds


def trained_groups(plan: PlanConfig, wanted: int, live_share: float) -> float:
    """Groups that the updates of a step take, on average."""
    if plan.selects:
        return min(sum(rounds_of(plan, wanted, live_share)) * live_share, wanted)
    return wanted * plan.wordings * live_share


def trained_size(config: Config) -> int:
    """Completions that such a group has."""
    return config.rollout.group_size * (config.plan.wordings if config.plan.pairing == "all" else 1)


def recomputed(config: Config) -> float:
    """Passes of a forward and backward: gradient checkpointing runs the forward a second time."""
    return 1 + FORWARD if config.model.gradient_checkpointing else 1.0


def grpo_passes(config: Config) -> float:
    """Passes over the groups of a step's updates, the reference's included.

    Behind the first update of a rollout the policy has moved. Then one pass finds its new log-probs where tokens are
    chosen by them. Before the first update one finds the old log-probs of the later ones, where the loss needs them.
    """
    later = 1 - 1 / config.grpo.updates_per_rollout
    extra = float(bool(config.grpo.kl_coef))
    if config.grpo.importance or config.plan.pairing == "all":
        extra += later
    if config.grpo.tokens.covariance != "none":
        extra += later
    return recomputed(config) + FORWARD * extra


def dpo_passes(config: Config) -> float:
    """Passes over the pairs of a DPO step, with a step's share of the reference's, which runs once for each pair."""
    sorting = config.dpo.match != "pairs"
    return recomputed(config) + FORWARD * (sorting + 1 / config.dpo.epochs)


def grpo_head_products(config: Config) -> int:
    """Products of an update's hidden states with the head, beyond those of its loss: TW-GRPO takes two."""
    return 2 if config.grpo.tokens.weights == "divergence" else 0


def dpo_head_products(config: Config) -> int:
    """The same of a DPO step: WPO takes two."""
    return 2 if config.dpo.weights == "wpo" else 0
