"""The engine's parameters made by hand from those of the policy, layer by layer: what every plan has to give.

Written from the shapes that vLLM has on a rank, with `cat` and `chunk`, and from nothing of `veripo_fast.weights`.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch

Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Sizes:
    """Of a small model of either family."""

    family: str = "qwen3_vl"
    tied: bool = True
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8
    hidden: int = 24
    intermediate: int = 40
    vocabulary: int = 100
    depth: int = 2
    tower_heads: int = 4
    tower_hidden: int = 16
    tower_intermediate: int = 32
    deepstack: int = 1


def policy_shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Names and shapes of Hugging Face's `named_parameters()`."""
    hidden, shapes = sizes.hidden, {}
    shapes["model.language_model.embed_tokens.weight"] = (sizes.vocabulary, hidden)
    for number in range(sizes.layers):
        layer, q, kv = f"model.language_model.layers.{number}.", sizes.heads * sizes.head_dim, \
            sizes.kv_heads * sizes.head_dim
        for kind, rows in (("q", q), ("k", kv), ("v", kv)):
            shapes[f"{layer}self_attn.{kind}_proj.weight"] = (rows, hidden)
            if sizes.family == "qwen2_5_vl":
                shapes[f"{layer}self_attn.{kind}_proj.bias"] = (rows,)
        if sizes.family == "qwen3_vl":
            shapes[f"{layer}self_attn.q_norm.weight"] = shapes[f"{layer}self_attn.k_norm.weight"] = (sizes.head_dim,)
        shapes[f"{layer}self_attn.o_proj.weight"] = (hidden, q)
        for kind in ("gate", "up"):
            shapes[f"{layer}mlp.{kind}_proj.weight"] = (sizes.intermediate, hidden)
        shapes[f"{layer}mlp.down_proj.weight"] = (hidden, sizes.intermediate)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{layer}{norm}.weight"] = (hidden,)
    shapes["model.language_model.norm.weight"] = (hidden,)
    if not sizes.tied:
        shapes["lm_head.weight"] = (sizes.vocabulary, hidden)
    return shapes | _tower_shapes(sizes)


def _tower_shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    wide, old = sizes.tower_hidden, sizes.family == "qwen2_5_vl"
    shapes: dict[str, tuple[int, ...]] = {"model.visual.patch_embed.proj.weight": (wide, 3, 2, 4, 4)}
    if not old:
        shapes["model.visual.patch_embed.proj.bias"] = (wide,)
        shapes["model.visual.pos_embed.weight"] = (36, wide)
    for number in range(sizes.depth):
        block = f"model.visual.blocks.{number}."
        _linear(shapes, f"{block}attn.qkv", 3 * wide, wide)
        _linear(shapes, f"{block}attn.proj", wide, wide)
        for name in ("gate_proj", "up_proj") if old else ("linear_fc1",):
            _linear(shapes, f"{block}mlp.{name}", sizes.tower_intermediate, wide)
        _linear(shapes, f"{block}mlp.{'down_proj' if old else 'linear_fc2'}", wide, sizes.tower_intermediate)
        for norm in ("norm1", "norm2"):
            shapes[f"{block}{norm}.weight"] = (wide,)
            if not old:
                shapes[f"{block}{norm}.bias"] = (wide,)
    merged = 4 * wide
    if old:
        shapes["model.visual.merger.ln_q.weight"] = (wide,)
        _linear(shapes, "model.visual.merger.mlp.0", merged, merged)
        _linear(shapes, "model.visual.merger.mlp.2", sizes.hidden, merged)
        return shapes
    for merger in ["merger", *(f"deepstack_merger_list.{number}" for number in range(sizes.deepstack))]:
        _linear(shapes, f"model.visual.{merger}.norm", *([wide] if merger == "merger" else [merged]))
        _linear(shapes, f"model.visual.{merger}.linear_fc1", merged, merged)
        _linear(shapes, f"model.visual.{merger}.linear_fc2", sizes.hidden, merged)
    return shapes


def _linear(shapes: dict[str, tuple[int, ...]], name: str, rows: int, *columns: int) -> None:
    shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (rows, *columns), (rows,)


def policy_weights(sizes: Sizes, dtype: torch.dtype = torch.float32, seed: int = 0) -> Weights:
    """Random parameters; no two elements of a float32 parameter are likely to be equal."""
    weights = {}
    for name, shape in policy_shapes(sizes).items():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)
        weights[name] = torch.randn(shape, generator=generator).to(dtype)
    return weights


# -- the engine -------------------------------------------------------------------------------------------------------

def engine_weights(weights: Weights, sizes: Sizes, tp: int = 1, rank: int = 0) -> Weights:
    """What the engine's rank holds; rows that pad the vocabulary are zero."""
    def rows(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.chunk(tp, 0)[rank]

    def columns(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.chunk(tp, 1)[rank]

    def heads(tensor: torch.Tensor) -> torch.Tensor:
        each = tensor.split(sizes.head_dim, 0)
        repeated = [head for head in each for _ in range(max(1, tp // len(each)))]
        count = len(repeated) // tp
        return torch.cat(repeated[rank * count:(rank + 1) * count])

    def vocabulary(tensor: torch.Tensor) -> torch.Tensor:
        padding = -len(tensor) % 64
        return rows(torch.cat([tensor, tensor.new_zeros(padding, tensor.shape[1])]))

    engine: Weights = {}
    for name in ("embed_tokens", "norm"):
        engine[f"language_model.model.{name}.weight"] = weights[f"model.language_model.{name}.weight"]
    engine["language_model.model.embed_tokens.weight"] = vocabulary(
        engine["language_model.model.embed_tokens.weight"])
    if not sizes.tied:
        engine["language_model.lm_head.weight"] = vocabulary(weights["lm_head.weight"])
    for number in range(sizes.layers):
        ours, theirs = f"model.language_model.layers.{number}.", f"language_model.model.layers.{number}."
        for leaf in ("weight", "bias") if sizes.family == "qwen2_5_vl" else ("weight",):
            parts = [heads(weights[f"{ours}self_attn.{kind}_proj.{leaf}"]) for kind in "qkv"]
            engine[f"{theirs}self_attn.qkv_proj.{leaf}"] = torch.cat(parts)
        engine[f"{theirs}self_attn.o_proj.weight"] = columns(weights[f"{ours}self_attn.o_proj.weight"])
        engine[f"{theirs}mlp.gate_up_proj.weight"] = torch.cat(
            [rows(weights[f"{ours}mlp.{kind}_proj.weight"]) for kind in ("gate", "up")])
        engine[f"{theirs}mlp.down_proj.weight"] = columns(weights[f"{ours}mlp.down_proj.weight"])
        norms = ["input_layernorm", "post_attention_layernorm"]
        norms += ["self_attn.q_norm", "self_attn.k_norm"] if sizes.family == "qwen3_vl" else []
        for norm in norms:
            engine[f"{theirs}{norm}.weight"] = weights[f"{ours}{norm}.weight"]
    for name, tensor in weights.items():
        if name.startswith("model.visual."):
            _add_tower(engine, name.removeprefix("model."), tensor, weights, rows, columns)
    return {name: tensor.clone().contiguous() for name, tensor in engine.items()}


def _add_tower(engine: Weights, name: str, tensor: torch.Tensor, weights: Weights, rows, columns) -> None:
    layer, leaf = name.rsplit(".", 1)
    if layer.endswith("attn.qkv"):
        engine[name] = torch.cat([rows(part) for part in tensor.chunk(3)])
    elif layer.endswith("gate_proj"):
        up = weights[f"model.{name.replace('gate_proj', 'up_proj')}"]
        engine[name.replace("gate_proj", "gate_up_proj")] = torch.cat([rows(tensor), rows(up)])
    elif layer.endswith("up_proj"):
        return
    elif layer.endswith(("linear_fc1", "merger.mlp.0")):
        engine[name] = rows(tensor)
    elif layer.endswith(("linear_fc2", "merger.mlp.2", "attn.proj", "down_proj")) and leaf == "weight":
        engine[name] = columns(tensor)
    else:
        engine[name] = tensor
