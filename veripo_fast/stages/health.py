"""What the rollouts of a stage say about its training: rewards of 0, no signal, a policy that collapsed.

Each is counted in the metrics and said once per stage. A resumed stage goes on from the metrics that were written.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from veripo_fast.errors import TrainingError
from veripo_fast.reward.groups import has_signal
from veripo_fast.reward.score import scores_of
from veripo_fast.run.metrics import STEPS_WITHOUT_SIGNAL
from veripo_fast.types import RolloutGroup

log = logging.getLogger(__name__)
ALIVE = 0.2
"""A mean reward or a share of finished completions that was above this and falls to 0 is a collapse."""
WATCHED = ("reward_mean", "finished_share")


class StageHealth:
    """Counts over the steps of one stage.

    Args:
        stage: its name, for what is said.
        records: metrics of the steps that are done.
    """

    def __init__(self, stage: str, records: Sequence[Mapping[str, float]]) -> None:
        self.stage = stage
        last = records[-1] if records else {}
        self.zero_reward_steps = last.get("zero_reward_steps", 0)
        self.steps_without_signal = last.get("steps_without_signal", 0)
        self.collapsed_steps = last.get("collapsed_steps", 0)
        self._highest = {name: max((record.get(name, 0.0) for record in records), default=0.0) for name in WATCHED}
        self._silence_said = any(record.get("steps_without_signal", 0) >= STEPS_WITHOUT_SIGNAL for record in records)

    def observe(self, groups: Sequence[RolloutGroup], means: Mapping[str, float]) -> dict[str, float]:
        """Count one step, whose metrics hold `WATCHED`; returns the counts, the second one of steps in a row."""
        if groups:
            self._count_zero_rewards(groups)
            self._count_silence(groups)
            self._count_collapse(groups, means)
        return {"zero_reward_steps": self.zero_reward_steps, "steps_without_signal": self.steps_without_signal,
                "collapsed_steps": self.collapsed_steps}

    def _count_zero_rewards(self, groups: Sequence[RolloutGroup]) -> None:
        if any(reward != 0 for group in groups for reward in scores_of(group, "reward")):
            return
        self.zero_reward_steps += 1
        if self.zero_reward_steps == 1:
            log.warning("%s: all rewards of a step are 0; look at its rollouts, and at reward and the data's answers",
                        self.stage)

    def _count_silence(self, groups: Sequence[RolloutGroup]) -> None:
        self.steps_without_signal = 0 if any(map(has_signal, groups)) else self.steps_without_signal + 1
        if self.steps_without_signal >= STEPS_WITHOUT_SIGNAL and not self._silence_said:
            self._silence_said = True
            log.warning("%s: no group carried a signal for %d steps, so nothing is learned; the prompts are too easy "
                        "or too hard, or rollout.temperature is too low", self.stage, STEPS_WITHOUT_SIGNAL)

    def _count_collapse(self, groups: Sequence[RolloutGroup], means: Mapping[str, float]) -> None:
        reasons = [f"{name} fell to 0 from {self._highest[name]:.2f}" for name in WATCHED
                   if means[name] == 0 and self._highest[name] > ALIVE]
        if all(map(_says_one_thing, groups)):
            reasons.append("the completions of every group are all the same")
        for name in WATCHED:
            self._highest[name] = max(self._highest[name], means[name])
        if not reasons:
            return
        self.collapsed_steps += 1
        if self.collapsed_steps == 1:
            log.warning("%s: the policy collapsed: %s; lower the learning rate or raise grpo.kl_coef", self.stage,
                        " and ".join(reasons))


def _says_one_thing(group: RolloutGroup) -> bool:
    first, *others = (completion.token_ids for completion in group.completions)
    return bool(others) and all(other == first for other in others)


def check_rollout_logprobs(groups: Sequence[RolloutGroup], file: Path) -> None:
    """Raise TrainingError when an engine gave log-probs that no update may read; `file` holds the rollouts."""
    broken = [completion for group in groups for completion in group.completions
              if not all(map(math.isfinite, completion.rollout_logprobs))]
    if broken:
        total = sum(len(group.completions) for group in groups)
        raise TrainingError(f"{len(broken)} of {total} completions in {file} have rollout log-probs that are not "
                            "finite, so the engine is broken or its weights are; the last checkpoint is untouched")


def parity(logprobs: torch.Tensor, rollout_logprobs: torch.Tensor) -> float:
    """Largest difference between the trainer's and the engine's log-probs [M]; infinite when one is not finite."""
    largest = (logprobs - rollout_logprobs).abs().amax().item()
    return largest if math.isfinite(largest) else math.inf
