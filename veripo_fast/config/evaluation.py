"""The section `eval`: what is evaluated, when, by whom it is judged, and what it decides."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from veripo_fast.config.checks import positive, require


@dataclass(frozen=True)
class EvalConfig:
    """Held-out evaluation between stages, and of a subset inside of them."""

    at: Literal["stages", "ends", "never"] = "stages"
    """Evaluate before the first and after every stage, before the first and after the last, or not at all."""
    limit: int | None = None
    """Use the first so many prompts; null: all."""
    samples: int = 4
    """Sampled completions per prompt (temperature of `rollout`), besides one greedy; 0: greedy only."""
    prompts_per_batch: int = 64
    """Prompts sampled together."""
    bootstrap: int = 2000
    """Resamples behind each 95 % interval."""
    task_key: str = ""
    """Key of the records, also in data.keep_keys, that names a task: accuracy by task, and the mean of these; empty:
    none."""
    judge: Literal["rules", "endpoint", "llm"] = "rules"
    """Who says whether answer and reasoning agree. Each result says whether the same judge also chose pairs."""
    judge_options: dict[str, Any] = field(default_factory=dict)
    """Options of the section `verifier` in which this judge differs: {llm_path: ...}."""
    controls: tuple[Literal["blind", "shuffled"], ...] = ()
    """Ask again without the media (`blind`), or with the temporal patches of videos in another order (`shuffled`)."""
    every: int | None = None
    """Evaluate inside a stage too, greedily, every so many of its steps; null: never. The scores are in the metrics."""
    every_limit: int = 64
    """Of these evaluations: the first so many prompts."""
    metric: Literal["accuracy", "accurate_and_consistent_rate", "format_rate", "inconsistency_rate"] = "accuracy"
    """What of them says which is better; of inconsistency_rate the lower."""
    keep_best: bool = False
    """Keep the checkpoint where the metric was best; checkpoints/best names it."""
    patience: int | None = None
    """End a stage after so many of them in a row that were no better than the best of the stage; null: never."""

    def __post_init__(self) -> None:
        positive(self, "limit", "prompts_per_batch", "bootstrap", "every", "every_limit", "patience")
        inside = ("every_limit", "metric", "keep_best", "patience")
        changed = [name for name in inside if getattr(self, name) != getattr(EvalConfig, name)]
        require(self.every is not None or not changed, f"{', '.join(changed)} changes nothing while every is null")
        require(self.metric == EvalConfig.metric or self.keep_best or self.patience is not None,
                f"metric {self.metric} decides nothing without keep_best or patience")
        require(self.samples >= 0, f"samples must be 0 or larger, got {self.samples}")
        require(len(set(self.controls)) == len(self.controls), f"controls names one twice: {', '.join(self.controls)}")
