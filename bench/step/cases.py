"""What `veripo bench step` measures: the cases, and the fast paths that are switched off one by one.

A case is a full step on videos: GRPO from the tower to the optimizer, or DPO from the tower over the reference to the
optimizer. Completions have a fixed length and end tokens are banned, so both sides write and train the same number of
tokens. Imports neither torch nor a trainer.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Self

PEER = "trl"
PEER_VERSION = "1.16"
"""peer.py names methods that are TRL's own; another version may have others."""


@dataclass(frozen=True)
class Case:
    """One step, the same for both sides."""

    name: str
    kind: Literal["grpo", "dpo"]
    prompts: int
    """Prompts, each with a video of its own; of dpo: pairs."""
    vocabulary: int
    peer_batch: int
    """Rows of a forward pass of the peer (of dpo: two a pair)."""
    peer_head: Literal["completion", "all"]
    """At which positions the peer runs its head: those of the completion, as on a GPU, or all, as on a CPU."""
    max_tokens: int = 2048
    """`optimizer.max_tokens` of ours: 2,048 make passes of a group or of two pairs, and cost no time."""
    size: str = "23m"
    """Language model, a name in `wide_model.TEXT`."""
    group: int = 8
    completion: int = 64
    frames: int = 16
    side: int = 320
    """Height and width of a frame in pixels; 320 gives 100 tokens per two frames."""

    @property
    def rows(self) -> int:
        """Completions of a step."""
        return self.prompts * (2 if self.kind == "dpo" else self.group)

    def fields(self) -> dict[str, Any]:
        """As JSON, and as entries of a result line."""
        return asdict(self)

    @classmethod
    def of(cls, fields: dict[str, Any]) -> Self:
        return cls(**fields)

    def quick(self) -> Case:
        """The same step at a size that takes seconds: shows that it runs."""
        return replace(self, prompts=min(self.prompts, 2), vocabulary=min(self.vocabulary, 2048), size="2m", group=2,
                       completion=4, frames=4, side=64, peer_batch=2)


CASES = {case.name: case for case in (
    Case("A", "grpo", prompts=4, vocabulary=4096, peer_batch=32, peer_head="all", max_tokens=16384),
    Case("B", "grpo", prompts=2, vocabulary=4096, peer_batch=4, peer_head="completion"),
    Case("C", "grpo", prompts=1, vocabulary=151936, peer_batch=4, peer_head="completion"),
    Case("dpo", "dpo", prompts=8, vocabulary=4096, peer_batch=4, peer_head="completion"),
)}
"""4,096 rows give the head the share that it has in a model of 7 billion parameters; 151,936 are a stress."""

VISION = {"depth": 2, "hidden_size": 256, "intermediate_size": 768, "num_heads": 4, "deepstack_visual_indexes": [0]}
"""A tower that costs 23 % of the language model per token, as that of Qwen3-VL 8B does (24 %)."""

WITHOUT = {
    "shared prefix": "the prompt once per completion, in rollout and training",
    "shared tower": "the tower once in every pass that reads the video, once per group",
    "engine's log-probs": "one more pass for the old log-probs, as where the engine is not the trainer",
}
"""Fast path -> the step without it."""
WITH = {"vision cache": "a later epoch: the tower's output is in memory"}
"""What a step of the first epoch cannot have -> the step with it."""
OF_DPO = ("shared prefix", "shared tower", "vision cache")
"""Those that a DPO step has."""


def switches_of(case: Case) -> list[str]:
    """The fast paths of a case, by name."""
    names = [*WITHOUT, *WITH]
    return [name for name in names if case.kind == "grpo" or name in OF_DPO]
