"""The reward of a completion: typed accuracy in [0, 1] and format in {0, 1}. Training and evaluation share it.

A gold answer that cannot be read never scores: `check_gold` refuses it when the data is loaded, and `score` gives 0.
Left out on purpose: rewards for length or repetition; those are checks of the verifier.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from veripo_fast.config.objectives import RewardConfig
from veripo_fast.reward.answers import parse_completion
from veripo_fast.reward.graders import answer_accuracy, answers_equal
from veripo_fast.types import Prompt, RolloutGroup

__all__ = ["Score", "answer_accuracy", "answers_equal", "score", "scores_of", "total"]


@dataclass(frozen=True)
class Score:
    """The two terms of the reward."""

    accuracy: float
    """0 to 1."""
    format: float
    """0 or 1."""


def score(text: str, prompt: Prompt, config: RewardConfig, think_opened: bool = False) -> Score:
    """Score a completion text against the prompt's gold answer; without an <answer> span accuracy is 0.

    `think_opened` is that of the completion's `RolloutGroup`.
    """
    parsed = parse_completion(text, think_opened)
    accuracy = 0.0 if parsed.answer is None else answer_accuracy(parsed.answer, prompt, config.number_tolerance)
    return Score(accuracy, float(parsed.format_ok))


def scores_of(group: RolloutGroup, name: Literal["accuracy", "format", "reward", "advantage"]) -> list[float]:
    """One score of every completion of a group.

    Raises:
        ValueError: a completion is not scored.
    """
    scores = [getattr(completion, name) for completion in group.completions]
    if None in scores:
        raise ValueError(f"completion {scores.index(None)} of prompt {group.prompt.prompt_id} has no {name}: "
                         "it is not scored")
    return scores


def total(score: Score, config: RewardConfig) -> float:
    """accuracy + format_weight * format (VerIPO: 0.5)."""
    return score.accuracy + config.format_weight * score.format
