"""Evaluations inside of a stage: their scores in the metrics, the best checkpoint, and the end of a stage that gains no
more. What is decided lies in the state, so a resumed run decides the same.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from veripo_fast.config.schema import EvalConfig
from veripo_fast.stages.saves import State
from veripo_fast.text import number, plural

log = logging.getLogger(__name__)
SCORES = ("accuracy", "accurate_and_consistent_rate", "format_rate", "inconsistency_rate", "length_mean")
"""Of the record of an evaluation: what goes into the metrics, as eval_NAME."""
LOWER_IS_BETTER = ("inconsistency_rate",)

Score = Callable[[str, int], Mapping[str, Any]]
"""(stage, step) -> the record of a greedy evaluation of the subset. Collective."""


class Inside:
    """What evaluations inside of stages decide.

    Args:
        score: evaluates; None: nothing is evaluated.
    """

    def __init__(self, config: EvalConfig, score: Score | None = None) -> None:
        self.config, self.score = config, score

    def due(self, state: State) -> bool:
        """Whether the step that is done ends with an evaluation."""
        return self.score is not None and self.config.every is not None and state.step % self.config.every == 0

    def scores(self, state: State, stage: str, checkpoint: str) -> dict[str, float]:
        """Evaluate, and note in the state what follows; returns metrics.

        Args:
            state: the step that is done is counted. checkpoint: the name that a checkpoint of it has.
        """
        assert self.score is not None
        record = self.score(stage, state.step)
        value = float(record[self.config.metric])
        if state.stage_best is None or self._better(value, state.stage_best):
            state.stage_best, state.stale = value, 0
        else:
            state.stale += 1
        if self.config.keep_best and (state.best_score is None or self._better(value, state.best_score)):
            state.best_score, state.best = value, checkpoint
        return {f"eval_{name}": float(record[name]) for name in SCORES}

    def ends(self, state: State) -> bool:
        """Whether the stage ends before its last step."""
        return self.config.patience is not None and state.stale >= self.config.patience

    def say_end(self, state: State, stage: str, total: int) -> None:
        """Say that a stage has ended early."""
        if state.stage_best is not None and state.step < total:
            log.info("%s ends at step %d of %d: eval_%s was no better than %s in %s", stage, state.step, total,
                     self.config.metric, number(state.stage_best), plural(state.stale, "evaluation"))

    def _better(self, value: float, than: float) -> bool:
        return value < than if self.config.metric in LOWER_IS_BETTER else value > than
