"""Rollout: prompts -> RolloutGroups with log-probabilities; what every engine keeps.

An engine is anything with this protocol; `torch_engine` is the one that defines the result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from veripo_fast.types import LoadedPrompt, RolloutGroup


@dataclass(frozen=True)
class Sampling:
    """How completions of one call are drawn."""

    group_size: int
    """Completions per prompt."""
    temperature: float
    """Softmax temperature; 0 takes the most likely token (log-probabilities are then those at temperature 1)."""
    max_new_tokens: int
    """Longest completion, end of turn included."""
    seed: int
    """Seed of this call; equal seeds, prompts and weights give equal completions."""
    top_p: float = 1.0
    top_k: int = 0


class RolloutEngine(Protocol):
    """What the trainer asks of an engine that shares its process."""

    def generate(self, prompts: Sequence[LoadedPrompt], sampling: Sampling,
                 on_progress: Callable[[int], None] | None = None) -> list[RolloutGroup]:
        """Complete every prompt `sampling.group_size` times; `on_progress` gets the number of prompts just finished."""
        ...
