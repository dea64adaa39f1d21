"""What a completion is rewarded for: columns of numbers, and how they are gated, normalised and weighted."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import eq, ge, gt, le, lt, ne
from typing import Any, Literal, NamedTuple, get_args

from veripo_fast.config.checks import OWN, known_or_own, require

RewardName = Literal["accuracy", "format", "length_window", "overlong", "shortness", "temporal", "spatial_map",
                     "agreement", "likely_answer", "semantic"]
"""The rewards that are shipped: keys of `recipes.tables.REWARDS`."""
SCORED = ("accuracy", "format")
"""Columns that every completion has, whatever it is rewarded for."""
_COMPARISONS: dict[str, Callable[[float, float], bool]] = {">=": ge, "<=": le, "==": eq, "!=": ne, ">": gt, "<": lt}
_GATE = re.compile(r"\s*([A-Za-z_][\w-]*)\s*(>=|<=|==|!=|>|<)\s*([-+]?(?:\d+\.?\d*|\.\d+))\s*")
_NAME = re.compile(r"[A-Za-z_][\w-]*")


class Gate(NamedTuple):
    """A comparison of a column with a number."""

    column: str
    comparison: str
    bound: float

    def opens(self, value: float) -> bool:
        """Whether a term counts for a completion whose column has this value."""
        return _COMPARISONS[self.comparison](value, self.bound)


def gate_of(text: str) -> Gate:
    """`accuracy > 0` as a gate. Raises ConfigError."""
    match = _GATE.fullmatch(text)
    require(match is not None, f"on must compare a column with a number, as in `accuracy > 0`, got {text!r}")
    assert match is not None
    return Gate(match[1], match[2], float(match[3]))


@dataclass(frozen=True)
class RewardTerm:
    """A column of the reward, with a number for every completion of a prompt."""

    use: str = ""
    """accuracy, format, length_window, overlong, shortness, temporal, spatial_map, agreement, likely_answer,
    semantic, or your own: module:function or path/file.py:function."""
    name: str = ""
    """Of the column, in metrics, gates and rollout files; empty: that of the function."""
    weight: float = 1.0
    """What the column is multiplied by before all are added up; 0: it is logged alone."""
    on: str = ""
    """Gate: the term is 0 where it is closed, e.g. `accuracy > 0`; empty: always open."""
    normalise: bool = False
    """(column - mean) / std of the group, after the gate and before the weight."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the function."""

    def __post_init__(self) -> None:
        known_or_own("use", self.use, get_args(RewardName))
        own = OWN.fullmatch(self.use)
        object.__setattr__(self, "name", self.name or (own[2] if own else self.use))
        require(_NAME.fullmatch(self.name) is not None, f"name must be a word, got {self.name!r}")
        require(self.use == self.name or self.name not in SCORED,
                f"name {self.name} is that of a column which every completion has; give {self.use} another name")
        require(math.isfinite(self.weight), f"weight must be a finite number, got {self.weight}")
        if self.on:
            gate_of(self.on)


DEFAULT_TERMS = (RewardTerm("accuracy"), RewardTerm("format", weight=0.5))
"""VerIPO's reward."""


def check_terms(terms: Sequence[RewardTerm]) -> None:
    """ConfigError unless there are some, with a name each, whose gates name columns that exist."""
    require(len(terms) > 0, "terms is empty: nothing would be rewarded")
    names = [term.name for term in terms]
    known = sorted({*SCORED, *names})
    for term in terms:
        require(names.count(term.name) == 1, f"two terms are named {term.name}; give one a name of its own")
        require(not term.on or gate_of(term.on).column in known,
                f"term {term.name} waits on {term.on!r}, which names none of the columns {', '.join(known)}")
