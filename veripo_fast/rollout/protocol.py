"""Rollout: prompts -> RolloutGroups with log-probabilities; what every engine keeps.

An engine is anything with this protocol; `torch_engine` is the one that defines the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from veripo_fast.errors import TrainingError
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

    @property
    def truncates(self) -> bool:
        """Whether some tokens are left out of the distribution."""
        return self.top_k > 0 or self.top_p < 1


OnGroup: TypeAlias = Callable[[int, RolloutGroup], None]
"""(number of the prompt in the batch, its group)."""


class RolloutEngine(Protocol):
    """What the trainer asks of an engine that shares its process."""

    rebuilds: int
    """Times that it was built again after a failure."""

    def generate(self, prompts: Sequence[LoadedPrompt], sampling: Sampling, on_group: OnGroup | None = None, *,
                 numbers: Sequence[int] | None = None, keep_caches: bool = False) -> list[RolloutGroup]:
        """Complete every prompt `sampling.group_size` times; `on_group` gets each group as soon as it is finished,
        while others are still sampled. Collective: a rank without prompts calls it too.

        The noise of a completion depends on the seed, on the prompt's number in the batch of all ranks (`numbers`; its
        place in `prompts` when there are none), and on nothing else.

        The completions are those of the policy's weights as they are now: an engine that keeps its own syncs first.
        `keep_caches` leaves what the engine has kept of earlier calls, to find out whether it is stale.
        """
        ...

    def sync(self) -> dict[str, float]:
        """Bring the engine to the policy's weights, if they moved; returns metrics of the hand-over."""
        ...

    def remedies(self) -> Iterable[tuple[str, Callable[[], None]]]:
        """What of this engine may be stale, each with what mends it; each is tried after those before it."""
        ...

    def sleep(self) -> None:
        """Give back the memory that only sampling needs; `generate` and `sync` wake the engine."""
        ...

    def close(self) -> None:
        """End the engine; it is not used again."""
        ...


def not_finite(version: int) -> TrainingError:
    """The error of weights that give NaN or infinity; `version` counts the optimizer steps behind them."""
    return TrainingError(f"the policy after {version} optimizer steps gives logits that are not finite: its weights "
                         "hold NaN or infinity; go back to an earlier checkpoint and lower the learning rate")
