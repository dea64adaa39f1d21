"""Layers beside attention with a dense MLP, as the weights of a checkpoint describe them: experts, recurrent states."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from veripo_fast.config.families import Family
from veripo_fast.distributed.flops import DeltaCost, ExpertsCost

Shape = tuple[int, ...]
DRAFTS = "mtp."
"""What the names of layers for multi-token prediction begin with; transformers does not load them."""
_EXPERT = re.compile(r"(.*\.mlp\.experts)\.\d+\.(gate|up|down)_proj\.weight")
_LAYER = re.compile(r"(?:.*\.)?layers\.(\d+)\.")
_EXPERTS, _KEY_HEADS = 8, 16
"""Experts of a token, and key heads of a recurrent layer, where a config.json leaves out transformers' default."""


def loaded(language: Mapping[str, Shape]) -> dict[str, Shape]:
    """The weights of a language model as transformers holds them: a file may have three matrices for each expert, and
    the model has [E, 2 I, D] and [E, D, I] for all of them."""
    weights: dict[str, Shape] = {}
    matrices: dict[str, list[Shape]] = {}
    for name, shape in language.items():
        match = _EXPERT.fullmatch(name)
        if match is None:
            weights[name] = shape
        else:
            matrices.setdefault(f"{match[1]}.{'down_proj' if match[2] == 'down' else 'gate_up_proj'}", []).append(shape)
    for name, shapes in matrices.items():
        rows, columns = shapes[0]
        whole = (len(shapes), rows, columns)
        weights[name] = whole if name.endswith("down_proj") else (len(shapes) // 2, 2 * rows, columns)
    return weights


def apart(language: Mapping[str, Shape]) -> int:
    """Numbers of experts that a file holds one by one, so that loading puts them together."""
    return sum(math.prod(shape) for name, shape in language.items() if _EXPERT.fullmatch(name))


def ending(shapes: Mapping[str, Shape], name: str) -> Shape:
    """The first shape whose name ends so. Raises KeyError without any."""
    for found, shape in shapes.items():
        if found.endswith(name):
            return shape
    raise KeyError(name)


def layer_sizes(language: Mapping[str, Shape]) -> tuple[int, ...]:
    """Numbers of each decoder layer."""
    sizes: dict[int, int] = {}
    for name, shape in language.items():
        if match := _LAYER.match(name):
            sizes[int(match[1])] = sizes.get(int(match[1]), 0) + math.prod(shape)
    return tuple(size for _, size in sorted(sizes.items()))


def experts_of(family: Family | None, language: Mapping[str, Shape], text: Mapping[str, Any]) -> ExpertsCost | None:
    """Mixtures of a language model, whose weights are `loaded`; None without any. Raises KeyError for a missing one."""
    if family is None or not family.router_class:
        return None
    sparse = [name for name in language if name.endswith("mlp.experts.down_proj")]
    last = max(int(match[1]) for name in language if (match := _LAYER.match(name)))
    count, hidden = ending(language, "mlp.gate.weight")
    width = math.prod(ending(language, "mlp.experts.down_proj")) // (count * hidden)  # a file may hold them transposed
    shared = ending(language, "mlp.shared_expert.gate_proj.weight")[0] if family.shared_expert else 0
    return ExpertsCost(len(sparse), count, int(text.get("num_experts_per_tok") or _EXPERTS), width, shared,
                       any(f"layers.{last}." in name for name in sparse))


def delta_of(family: Family | None, language: Mapping[str, Shape], text: Mapping[str, Any]) -> DeltaCost | None:
    """Recurrent layers of a language model; None without any. Raises KeyError for a missing weight."""
    if family is None or not family.delta_class:
        return None
    layers = sum(name.endswith("linear_attn.in_proj_qkv.weight") for name in language)
    value_heads, value_dim = ending(language, "linear_attn.A_log")[0], ending(language, "linear_attn.norm.weight")[0]
    channels, _, convolution = ending(language, "linear_attn.conv1d.weight")
    key_heads = int(text.get("linear_num_key_heads") or _KEY_HEADS)
    key_dim = (channels - value_heads * value_dim) // 2 // key_heads
    return DeltaCost(layers, key_heads, value_heads, key_dim, value_dim, convolution)
