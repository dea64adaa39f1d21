"""What a checkpoint is made of: names and shapes of its weights, read from config.json and the safetensors headers.

No weight is read, nothing is built, torch is not needed. Widths come from the tensors themselves, because a config.json
may leave out what its class has as a default.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from veripo_fast.config.families import FAMILIES, names
from veripo_fast.distributed.flops import DeltaCost, ExpertsCost
from veripo_fast.errors import CheckpointError
from veripo_fast.run.weight_files import read_json, weight_files
from veripo_fast.schedule.layer_kinds import DRAFTS, Shape, apart, delta_of, ending, experts_of, layer_sizes, loaded

VISION = re.compile(r"(model\.)?visual\.")
"""What the names of a tower's weights begin with."""
HEAD, EMBEDDING = "lm_head.weight", "embed_tokens.weight"
_LARGEST_HEADER = 100 << 20
"""Bytes; safetensors itself refuses a larger one."""
_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}


@dataclass(frozen=True)
class TowerShape:
    """A vision tower."""

    depth: int
    hidden: int
    intermediate: int
    out_hidden: int
    """Hidden size of the language model."""
    gated: bool
    """Whether it is Qwen2.5-VL's: RMS norms and a gated MLP, else layer norms and a plain one."""
    merged: int
    """Patches in a token."""
    merge_size: int
    patch_size: int
    temporal_patch_size: int
    deepstack: int
    """Mergers besides the last one."""
    heads: int
    features: int
    """Numbers in a patch."""
    full_blocks: int = 0
    """Blocks in which a patch attends to its whole picture; Qwen2.5-VL's others have windows."""
    window: int = 0
    """Patches of a window."""

    @property
    def factor(self) -> int:
        """Pixels of a side of a merged token."""
        return self.patch_size * self.merge_size


@dataclass(frozen=True)
class ModelShape:
    """A checkpoint of a family in `config/families.py`."""

    family: str
    layers: int
    hidden: int
    intermediate: int
    """Of a dense MLP; 0: every layer has experts."""
    queries: int
    """Width of a token's queries: heads times head size."""
    keys: int
    """Width of a token's keys, which is that of its values."""
    heads: int
    vocabulary: int
    positions: int
    """Longest sequence."""
    tied: bool
    """Whether the head is the embedding."""
    tower: TowerShape
    language: tuple[Shape, ...]
    """Of each weight of the language model and the head; a tied one counts once."""
    vision: tuple[Shape, ...]
    """Of each weight of the tower."""
    stored_bytes: int
    """Of the weights in the files."""
    stored_itemsizes: frozenset[int]
    """Bytes of a number in the files."""
    named: tuple[tuple[str, Shape], ...] = ()
    """Name and shape of each weight, those of the tower as visual.NAME."""
    experts: ExpertsCost | None = None
    apart: int = 0
    """Numbers of experts that the files hold one by one."""
    delta: DeltaCost | None = None
    """Layers with a recurrent state; where there are any, attention has a gate, and norms multiply in float32."""

    @property
    def language_numbers(self) -> int:
        return numbers(self.language)

    @property
    def vision_numbers(self) -> int:
        return numbers(self.vision)

    @property
    def head_numbers(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def attending(self) -> int:
        """Layers that attend."""
        return self.layers - (self.delta.layers if self.delta else 0)

    def trims_last_layer(self, router_balance: float = 0.0) -> bool:
        """`flops.trims_last_layer`, from the names of weights."""
        last = f"layers.{self.layers - 1}.self_attn.q_proj.weight"
        attends = any(name.endswith(last) for name, _ in self.named)
        return not router_balance and attends and self.tower.deepstack < self.layers

    @cached_property
    def layer_numbers(self) -> int:
        """Weights of the largest decoder layer."""
        return max(layer_sizes(self._language))

    @cached_property
    def outside_numbers(self) -> int:
        """Weights of the language model outside of its layers."""
        return self.language_numbers - sum(layer_sizes(self._language))

    @property
    def _language(self) -> dict[str, Shape]:
        return {name: shape for name, shape in self.named if not name.startswith("visual.")}


def numbers(shapes: tuple[Shape, ...]) -> int:
    """How many numbers tensors of these shapes hold."""
    return sum(math.prod(shape) for shape in shapes)


def read_shape(folder: Path) -> ModelShape:
    """The shape of a checkpoint folder.

    Raises:
        CheckpointError: a file is missing or damaged, or it is no checkpoint of a family that is trained.
    """
    config = read_json(folder / "config.json")
    tensors: dict[str, tuple[Shape, int]] = {}
    for name in weight_files(folder):
        tensors |= header(folder / name)
    return shape_of(config, tensors, folder)


def shape_of(config: Mapping[str, Any], tensors: Mapping[str, tuple[Shape, int]], folder: Path) -> ModelShape:
    """The shape that a config.json and the tensors of the files, with the bytes of their numbers, describe.

    Raises:
        CheckpointError: a weight or an option that everything has is not there.
    """
    for part in ("text_config", "vision_config"):
        if not isinstance(config.get(part) or {}, dict):
            raise CheckpointError(f"{folder / 'config.json'} must hold a JSON object as {part}")
    family = FAMILIES.get(str(config.get("model_type")))
    text = config.get("text_config") or config  # before transformers 4.52 Qwen2.5-VL's lay at the top
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(DRAFTS)}
    shapes = {name: shape for name, (shape, _) in tensors.items()}
    vision = {VISION.sub("", name): shape for name, shape in shapes.items() if VISION.match(name)}
    files = {name: shape for name, shape in shapes.items() if not VISION.match(name)}
    language = loaded(files)
    tied = bool(config.get("tie_word_embeddings") or text.get("tie_word_embeddings")) or HEAD not in language
    if tied:
        language.pop(HEAD, None)
    try:
        vocabulary, hidden = ending(language, EMBEDDING)
        queries = ending(language, "self_attn.q_proj.weight")[0]
        keys = ending(language, "self_attn.k_proj.weight")[0]
        experts, delta = experts_of(family, language, text), delta_of(family, language, text)
        mixtures = experts.layers if experts else 0
        layers = _count(language, r"layers\.(\d+)\.")
        intermediate = ending(language, "mlp.gate_proj.weight")[0] if layers > mixtures else 0
        tower = _tower(config.get("vision_config") or {}, vision, hidden)
        if delta:
            queries //= 2  # the other half are gates
        heads = int(text.get("num_attention_heads") or 32)
        if family is not None and family.query_norm:
            heads = queries // ending(language, "self_attn.q_norm.weight")[0]
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"{folder} does not hold the weights of a family that is trained ({names()}): {error} "
                              "is missing") from error
    return ModelShape(
        str(config.get("model_type")), layers, hidden, intermediate, queries, keys, heads, vocabulary,
        int(text.get("max_position_embeddings") or 32768), tied, tower, tuple(language.values()),
        tuple(vision.values()), sum(math.prod(shape) * size for shape, size in tensors.values()),
        frozenset(size for _, size in tensors.values()),
        (*language.items(), *((f"visual.{name}", shape) for name, shape in vision.items())), experts,
        apart(files), delta)


def _tower(config: Mapping[str, Any], shapes: Mapping[str, Shape], out_hidden: int) -> TowerShape:
    hidden, channels, temporal, patch, _ = ending(shapes, "patch_embed.proj.weight")
    gated = "blocks.0.mlp.gate_proj.weight" in shapes
    intermediate = ending(shapes, f"blocks.0.mlp.{'gate_proj' if gated else 'linear_fc1'}.weight")[0]
    merge = int(config.get("spatial_merge_size", 2))
    depth = _count(shapes, r"blocks\.(\d+)\.")
    full = config.get("fullatt_block_indexes", [7, 15, 23, 31])
    side = int(config.get("window_size", 112)) // (patch * merge) * merge
    return TowerShape(
        depth, hidden, intermediate, out_hidden, gated, merge ** 2, merge, patch, temporal,
        _count(shapes, r"deepstack_merger_list\.(\d+)\."), int(config.get("num_heads", 16)),
        channels * temporal * patch ** 2, sum(index < depth for index in full) if gated else depth,
        side ** 2 if gated else 0)


def _count(shapes: Mapping[str, Shape], pattern: str) -> int:
    numbered = {int(match[1]) for name in shapes if (match := re.search(pattern, name))}
    return len(numbered)


def header(path: Path) -> dict[str, tuple[Shape, int]]:
    """Shape, and bytes of a number, of each tensor of a safetensors file: eight bytes of length, then JSON.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    try:
        with path.open("rb") as file:
            length, = struct.unpack("<Q", file.read(8))
            if length > _LARGEST_HEADER:
                raise ValueError(f"a header of {length} bytes")
            entries = json.loads(file.read(length))
        return {name: (tuple(map(int, entry["shape"])), _BYTES.get(entry["dtype"], 4))
                for name, entry in entries.items() if name != "__metadata__"}
    except (OSError, ValueError, struct.error, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"the weight file {path} is damaged: {error}") from error
