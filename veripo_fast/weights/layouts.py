"""How the engine lays out the parameters of the policy: names, fused matrices, and the share of a tensor-parallel rank.

The policy has the names of Hugging Face 5, the engine those of vLLM, which fuses `qkv_proj` and `gate_up_proj` and
gives each of `tp` ranks rows or columns of a matrix. Pure: names and shapes alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from veripo_fast.config.families import FAMILIES, names
from veripo_fast.errors import ConfigError
from veripo_fast.weights.parts import Part, Range, Shape, SliceCopy, joined, length, matrix, times

VOCABULARY_PADDING = 64
"""The engine rounds the rows of embeddings and head up to a multiple of it."""
_KNOWN = {name: family for name, family in FAMILIES.items() if family.engine_rules}
"""Families whose parameters have places in the engine: `engine_rules` names the method of `Rules` for each."""


@dataclass(frozen=True)
class Recurrent:
    """Of layers with a recurrent state (gated delta rule)."""

    key_heads: int
    value_heads: int
    key_dim: int
    """Of one head."""
    value_dim: int

    @classmethod
    def of(cls, text: Any) -> Recurrent:
        """From the configuration of a language model."""
        return cls(text.linear_num_key_heads, text.linear_num_value_heads, text.linear_key_head_dim,
                   text.linear_value_head_dim)


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
    expert_width: int = 0
    """Rows of an expert's gate; 0: there are no experts."""
    recurrent: Recurrent | None = None

    @classmethod
    def of(cls, config: Any) -> Geometry:
        """The geometry of a Hugging Face configuration.

        Raises:
            ConfigError: a family that the plan does not know.
        """
        if config.model_type not in _KNOWN:
            raise ConfigError(f"weights of {config.model_type} cannot be handed to the engine; those of "
                              f"{names(_KNOWN)} can")
        text, family = config.get_text_config(), _KNOWN[config.model_type]
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return cls(config.model_type, text.num_attention_heads, text.num_key_value_heads, head_dim, text.vocab_size,
                   bool(config.tie_word_embeddings), config.vision_config.num_heads,
                   text.moe_intermediate_size if family.router_class else 0,
                   Recurrent.of(text) if family.delta_class else None)

    @property
    def query_rows(self) -> int:
        """Rows of a query head; where `gated_queries`, with those of the gate of its output."""
        return self.head_dim * (2 if _KNOWN[self.family].gated_queries else 1)


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
        of_all, each = (geometry.heads, geometry.query_rows) if kind == "q" else (geometry.kv_heads, geometry.head_dim)
        if size[0] != of_all * each:
            raise ConfigError(f"{name} must have {of_all} heads of {each} rows, got {size[0]} rows")
        query, keys = self._share("attention heads", geometry.heads), self._kv_heads()
        own = query if kind == "q" else keys
        of_queries, of_keys = length(query) * geometry.query_rows, length(keys) * geometry.head_dim
        at = {"q": 0, "k": of_queries, "v": of_queries + of_keys}[kind]
        fused = re.sub(r"\.[qkv]_proj\.", ".qkv_proj.", target)
        return _place(name, size, fused, (of_queries + 2 * of_keys, size[1]),
                      [((own[0] * each, own[1] * each), (0, size[1]), at)])

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

    def recurrent_inputs(self, name: str, target: str, size: tuple[int, int]) -> Place:
        """The rank's queries, keys, values and gates of a recurrent layer one above the other; of a convolution all but
        the gates. The policy has queries, keys and values in one parameter, and the gates in another."""
        assert self.geometry.recurrent is not None
        own = self.geometry.recurrent
        keys = self._share("key heads of recurrent layers", own.key_heads)
        values = self._share("value heads of recurrent layers", own.value_heads)
        blocks = [(own.key_heads * own.key_dim, times(keys, own.key_dim))] * 2
        blocks += [(own.value_heads * own.value_dim, times(values, own.value_dim))] * 2
        gates, convolution = ".in_proj_z." in name, ".conv1d." in name
        wanted = sum(rows for rows, _ in (blocks[3:] if gates else blocks[:3]))
        if size[0] != wanted:
            raise ConfigError(f"{name} must have {wanted} rows, got {size[0]}")
        pieces, row, at = [], 0, 0
        for number, (rows, share) in enumerate(blocks[:3] if convolution else blocks):
            if (number == 3) == gates:
                pieces.append(((row + share[0], row + share[1]), (0, size[1]), at))
                row += rows
            at += length(share)
        fused = re.sub(r"\.in_proj_(?:qkv|z)\.", ".in_proj_qkvz.", target)
        return _place(name, size, fused, (at, size[1]), joined(pieces))

    def strengths_decays(self, name: str, target: str, size: tuple[int, int]) -> Place:
        """What the rank's value heads of a recurrent layer read strengths with, above what they read decays with."""
        first, last = self._share(name, size[0])
        fused = re.sub(r"\.in_proj_[ab]\.", ".in_proj_ba.", target)
        return _place(name, size, fused, (2 * (last - first), size[1]),
                      [((first, last), (0, size[1]), last - first if ".in_proj_a." in name else 0)])

    def experts_in(self, name: str, target: str, size: tuple[int, int]) -> Place:
        """Of each expert, a row of the matrix [experts, 2 I D], a share of its gate above the same of up."""
        gates = self._expert_columns(name, size[1], 2)
        first, last = self._share("rows of an expert's gate", self.geometry.expert_width)
        own = times((first, last), gates // self.geometry.expert_width)
        up = own[0] + gates, own[1] + gates
        pieces = [(columns, number * length(own)) for number, columns in enumerate((own, up))]
        copies = []
        for columns, at in [((0, 2 * gates), 0)] if self.tp == 1 else pieces:
            to = Part(_expert(target, "w13"), (0, size[0]), (at, at + length(columns)), 2 * length(own))
            copies.append(SliceCopy(Part(name, (0, size[0]), columns, size[1]), to))
        return Place(_expert(target, "w13"), (size[0], 2 * length(own)), tuple(copies))

    def experts_out(self, name: str, target: str, size: tuple[int, int]) -> Place:
        """A share of the columns of every expert, seen as the matrix [experts D, I]."""
        width = self.geometry.expert_width
        rows = size[0] * self._expert_columns(name, size[1], 1) // width
        return self.columns(name, _expert(target, "w2"), (rows, width))

    def _expert_columns(self, name: str, count: int, matrices: int) -> int:
        """Elements of one matrix of an expert that has `matrices`, `count` together."""
        if count % (matrices * self.geometry.expert_width):
            raise ConfigError(f"{name} must have experts of {matrices} x {self.geometry.expert_width} rows or columns, "
                              f"got {count} elements for each")
        return count // matrices

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


def _place(source: str, source_size: tuple[int, int], target: str, size: tuple[int, int],
           pieces: list[tuple[Range, Range, int]]) -> Place:
    """A place from (rows and columns of the source, first row of the target); columns begin at 0 there."""
    copies = []
    for rows, columns, at in pieces:
        to = Part(target, (at, at + length(rows)), (0, length(columns)), size[1])
        copies.append(SliceCopy(Part(source, rows, columns, source_size[1]), to))
    return Place(target, size, tuple(copies))


def stored(name: str, tensor: Any, family: str) -> Any:
    """A view of a parameter as files of the family hold it and the engine's own loader reads it: some hold matrices
    of experts turned."""
    return tensor.transpose(-1, -2) if FAMILIES[family].transposed_experts and ".experts." in name else tensor


def _expert(target: str, matrix_name: str) -> str:
    """The engine's name of the matrices of all experts of a layer."""
    return re.sub(r"\.experts\..*", f".experts.routed_experts.{matrix_name}_weight", target)
