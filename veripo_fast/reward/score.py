"""The reward of a completion: typed accuracy in [0, 1] and format in {0, 1}. Training and evaluation share it.

A gold answer that cannot be read never scores: `check_gold` refuses it when the data is loaded, and `score` gives 0.
What a completion is rewarded for besides is in columns.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from veripo_fast.config.objectives import RewardConfig
from veripo_fast.reward.graders import answer_accuracy, answers_equal
from veripo_fast.reward.spans import Parsed, parse_completion
from veripo_fast.types import Prompt, RolloutGroup

__all__ = ["Score", "answer_accuracy", "answers_equal", "score", "scores_of"]


@dataclass(frozen=True)
class Score:
    """What every completion is scored for."""

    accuracy: float
    """0 to 1."""
    format: float
    """0 or 1."""


def score(text: str, prompt: Prompt, config: RewardConfig, think_opened: bool = False) -> Score:
    """Score a completion text against the prompt's gold answer; without an answer span accuracy is 0.

    `think_opened` is that of the completion's `RolloutGroup`.
    """
    return parsed_score(parse_completion(text, think_opened, prompt.form), prompt, config)


def parsed_score(parsed: Parsed, prompt: Prompt, config: RewardConfig) -> Score:
    """Score the spans of a completion; without an answer accuracy is 0."""
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
