"""The section `model.lora`: low-rank adapters in place of all weights."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields

from veripo_fast.config.checks import require

PARTS = ("language", "merger", "head")
"""Parts of a model that `targets` can name; any other target is the name of linear layers of the language model."""
_LAYER = re.compile(r"[A-Za-z_]\w*")


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (arXiv 2106.09685), which peft makes: weights W stay, and W + alpha / rank * B A is trained.
    See docs/lora.md."""

    rank: int = 0
    """Rows of A and columns of B; 0: no adapters, every weight is trained. Needs peft: `veripo-fast[lora]`."""
    alpha: float = 32.0
    """What B A is multiplied with, over the rank."""
    dropout: float = 0.0
    """Share of an adapter's inputs that is dropped in passes with a gradient; sampling and references drop none."""
    targets: tuple[str, ...] = ("language",)
    """What gets adapters: `language`, all linear layers of the language model; `merger`, those between tower and
    language model (with freeze_vision false); `head`; or layers of the language model by name, such as q_proj."""
    adapter: str = ""
    """Folder of adapters to begin with, such as a checkpoint of another run; empty: new ones, where B is 0."""

    def __post_init__(self) -> None:
        require(self.rank >= 0, f"rank must be 0 or larger, got {self.rank}")
        require(self.alpha > 0, f"alpha must be greater than 0, got {self.alpha}")
        require(0.0 <= self.dropout < 1.0, f"dropout must be at least 0 and below 1, got {self.dropout}")
        changed = [item.name for item in fields(self)
                   if item.name != "rank" and getattr(self, item.name) != item.default]
        require(self.rank > 0 or not changed, f"{', '.join(changed)} changes nothing while rank is 0")
        require(bool(self.targets), "targets names nothing; language is all linear layers of the language model")
        require(len(set(self.targets)) == len(self.targets), f"targets name one twice: {', '.join(self.targets)}")
        for target in self.targets:
            require(_LAYER.fullmatch(target) is not None,
                    f"targets must be {', '.join(PARTS)} or names of layers such as q_proj, got {target!r}")
        whole = [target for target in self.targets if target in PARTS[1:]]
        require(not self.dropout or not whole,
                f"dropout is of layers of the language model; take targets without {' and '.join(whole)}, or dropout 0")
