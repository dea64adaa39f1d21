"""How the engine lays out the parameters of the policy: names, fused matrices, and the share of a tensor-parallel rank.

The policy has the names of Hugging Face 5, the engine those of vLLM, which fuses `qkv_proj` and `gate_up_proj` and
gives each of `tp` ranks rows or columns of a matrix. Pure: names and shapes alone.

Slices are rows and columns of a parameter seen as a matrix, [shape[0], the rest]. What a sharded trainer holds of a
parameter is one too: rows of it (FSDP2), or, of a flat partition (ZeRO), whole rows between two pieces of a row.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from veripo_fast.config.families import FAMILIES, names
from veripo_fast.errors import ConfigError

Shape: TypeAlias = tuple[int, ...]
Range: TypeAlias = tuple[int, int]
"""First index, and the one after the last."""

VOCABULARY_PADDING = 64
"""The engine rounds the rows of embeddings and head up to a multiple of it."""
_KNOWN = {name: family for name, family in FAMILIES.items() if family.engine_rules}
"""Families whose parameters have places in the engine: `engine_rules` names the method of `Rules` for each."""


@dataclass(frozen=True)
class Part:
    """Rows and columns of a parameter."""

    name: str
    rows: Range
    columns: Range
    width: int
    """Columns of the whole parameter; 1 for a vector."""

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows[1] - self.rows[0], self.columns[1] - self.columns[0]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def offset(self) -> int:
        """Elements of the flattened parameter before the first of the part."""
        return self.rows[0] * self.width + self.columns[0]

    @property
    def contiguous(self) -> bool:
        return self.shape[1] == self.width or self.shape[0] == 1

    def overlaps(self, other: Part) -> bool:
        """Whether both name an element of one parameter."""
        return self.name == other.name and meet(self.rows, other.rows) and meet(self.columns, other.columns)


@dataclass(frozen=True)
class SliceCopy:
    """A part of a parameter of the policy, and the part of equal shape of an engine parameter that it fills."""

    source: Part
    target: Part


@dataclass(frozen=True)
class Geometry:
    """What the names and shapes of parameters do not tell."""

    family: str
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    """Whether the head is the embedding."""
    tower_heads: int

    @classmethod
    def of(cls, config: Any) -> Geometry:
        """The geometry of a Hugging Face configuration.

        Raises:
            ConfigError: a family that the plan does not know, mixtures of experts among them.
        """
        if "moe" in config.model_type:
            raise ConfigError(_experts(f"model_type {config.model_type}"))
        if config.model_type not in _KNOWN:
            raise ConfigError(f"weights of {config.model_type} cannot be handed to the engine; those of "
                              f"{names(_KNOWN)} can")
        text = config.get_text_config()
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return cls(config.model_type, text.num_attention_heads, text.num_key_value_heads, head_dim, text.vocab_size,
                   bool(config.tie_word_embeddings), config.vision_config.num_heads)


# -- where a parameter goes -------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Place:
    """Where a parameter goes: an engine parameter, its size as a matrix, and the parts that are written."""

    target: str
    size: tuple[int, int]
    copies: tuple[SliceCopy, ...]


class Rules:
    """How a family's parameters are laid out on one rank; a method per layout, all of them for one parameter."""

    def __init__(self, geometry: Geometry, tp: int, rank: int) -> None:
        if not 0 <= rank < tp:
            raise ValueError(f"rank must be 0 to {tp - 1}, got {rank}")
        self.geometry, self.tp, self.rank = geometry, tp, rank
        self.patterns = {re.compile(pattern): rule for pattern, rule in _KNOWN[geometry.family].engine_rules.items()}

    def place(self, name: str, shape: Shape) -> Place:
        """Where a parameter of the policy goes.

        Raises:
            ConfigError: the family has no such parameter, or its shape cannot be split.
        """
        if ".experts." in name or name.endswith(".mlp.gate.weight"):
            raise ConfigError(_experts(name))
        for pattern, rule in self.patterns.items():
            if pattern.fullmatch(name):
                return getattr(self, rule)(name, engine_name(name), matrix(shape))
        raise ConfigError(f"{name}: the weights of {self.geometry.family} have no parameter of this name")

    def whole(self, name: str, target: str, size: tuple[int, int]) -> Place:
        """The same on every rank."""
        return _place(name, size, target, size, [((0, size[0]), (0, size[1]), 0)])

    def rows(self, name: str, target: str, size: tuple[int, int]) -> Place:
        """An equal share of the rows (a column-parallel linear layer)."""
        first, last = self._share(name, size[0])
        return _place(name, size, target, (last - first, size[1]), [((first, last), (0, size[1]), 0)])

    def columns(self, name: str, target: str, size: tuple[int, int]) -> Place:
        """An equal share of the columns (a row-parallel linear layer); its bias is whole on every rank."""
        if name.endswith(".bias"):
            return self.whole(name, target, size)
        first, last = self._share(name, size[1])
        return _place(name, size, target, (size[0], last - first), [((0, size[0]), (first, last), 0)])

    def gate_up(self, name: str, target: str, size: tuple[int, int]) -> Place:
        """A share of the rows, gate above up."""
        first, last = self._share(name, size[0])
        count = last - first
        fused = re.sub(r"\.(?:gate|up)_proj\.", ".gate_up_proj.", target)
        return _place(name, size, fused, (2 * count, size[1]),
                      [((first, last), (0, size[1]), count if ".up_proj." in name else 0)])

    def heads(self, name: str, target: str, size: tuple[int, int]) -> Place:
        """The rank's query heads above its key heads above its value heads; fewer key heads than ranks are repeated."""
        geometry, kind = self.geometry, name.rsplit("_proj.", 1)[0][-1]
        of_all = geometry.heads if kind == "q" else geometry.kv_heads
        if size[0] != of_all * geometry.head_dim:
            raise ConfigError(f"{name} must have {of_all} heads of {geometry.head_dim} rows, got {size[0]} rows")
        query = self._share("attention heads", geometry.heads)
        keys = self._kv_heads()
        own = query if kind == "q" else keys
        at = {"q": 0, "k": length(query), "v": length(query) + length(keys)}[kind] * geometry.head_dim
        rows = own[0] * geometry.head_dim, own[1] * geometry.head_dim
        total = (length(query) + 2 * length(keys)) * geometry.head_dim
        fused = re.sub(r"\.[qkv]_proj\.", ".qkv_proj.", target)
        return _place(name, size, fused, (total, size[1]), [(rows, (0, size[1]), at)])

    def blocks(self, name: str, target: str, size: tuple[int, int]) -> Place:
        """The tower's fused queries, keys and values: of each third the rows of the rank's heads."""
        if self.tp == 1:
            return self.whole(name, target, size)
        heads, third = self._share("heads of the vision tower", self.geometry.tower_heads), size[0] // 3
        if size[0] % (3 * self.geometry.tower_heads):
            raise ConfigError(f"{name} must have three times {self.geometry.tower_heads} heads, got {size[0]} rows")
        head_dim = third // self.geometry.tower_heads
        count = length(heads) * head_dim
        pieces = []
        for number in range(3):
            first = number * third + heads[0] * head_dim
            pieces.append(((first, first + count), (0, size[1]), number * count))
        return _place(name, size, target, (3 * count, size[1]), pieces)

    def vocabulary(self, name: str, target: str, size: tuple[int, int]) -> Place:
        """A share of the rows, of which the padding at the end is not written."""
        if size[0] != self.geometry.vocabulary:
            raise ConfigError(f"{name} must have {self.geometry.vocabulary} rows, one a token, got {size[0]}")
        padded = -(-size[0] // VOCABULARY_PADDING) * VOCABULARY_PADDING
        first, last = self._share("rows of the padded vocabulary", padded)
        rows = min(first, size[0]), min(last, size[0])
        return _place(name, size, target, (last - first, size[1]), [(rows, (0, size[1]), 0)] if length(rows) else [])

    def padding(self, target: str) -> int:
        """Rows at the end of an engine parameter that stand for no token."""
        if target not in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
            return 0
        padded = -(-self.geometry.vocabulary // VOCABULARY_PADDING) * VOCABULARY_PADDING
        first, last = self._share("rows of the padded vocabulary", padded)
        return last - max(first, min(last, self.geometry.vocabulary))

    def _share(self, what: str, count: int) -> Range:
        if count % self.tp:
            raise ConfigError(f"{what} ({count}) cannot be split over {self.tp} tensor-parallel ranks")
        return self.rank * count // self.tp, (self.rank + 1) * count // self.tp

    def _kv_heads(self) -> Range:
        count = self.geometry.kv_heads
        if count >= self.tp:
            return self._share("key and value heads", count)
        if self.tp % count:
            raise ConfigError(f"{count} key and value heads cannot be repeated on {self.tp} tensor-parallel ranks")
        own = self.rank * count // self.tp
        return own, own + 1


def engine_name(name: str) -> str:
    """The name that the engine gives a parameter which it does not fuse with others."""
    if name == "lm_head.weight":
        return "language_model.lm_head.weight"
    return name.removeprefix("model.").replace("language_model.", "language_model.model.", 1)


def matrix(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a parameter: its first dimension and all others, [n, 1] of a vector."""
    return shape[0], math.prod(shape[1:])


def _place(source: str, source_size: tuple[int, int], target: str, size: tuple[int, int],
           pieces: list[tuple[Range, Range, int]]) -> Place:
    """A place from (rows and columns of the source, first row of the target); columns begin at 0 there."""
    copies = []
    for rows, columns, at in pieces:
        to = Part(target, (at, at + length(rows)), (0, length(columns)), size[1])
        copies.append(SliceCopy(Part(source, rows, columns, source_size[1]), to))
    return Place(target, size, tuple(copies))


def length(span: Range) -> int:
    return span[1] - span[0]


def meet(one: Range, other: Range) -> bool:
    return one[0] < other[1] and other[0] < one[1]


def _experts(what: str) -> str:
    return (f"{what}: weights of a mixture of experts cannot be copied into the engine, because it lays them out anew "
            "after loading; they have to go through its own reload")
