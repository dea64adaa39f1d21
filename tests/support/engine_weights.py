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
    """Of a small model of any family."""

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
    experts: int = 3
    expert_width: int = 8
    shared_width: int = 12
    key_heads: int = 4
    value_heads: int = 8
    key_dim: int = 6
    value_dim: int = 10
    layer_types: tuple[str, ...] = ("linear_attention", "full_attention")
    """Of families with recurrent layers, over and over."""

    @property
    def mixed(self) -> bool:
        return self.family.endswith("_moe")

    @property
    def hybrid(self) -> bool:
        return self.family.startswith("qwen3_5")

    def recurrent(self, layer: int) -> bool:
        """Whether a layer has a state in place of attention."""
        return self.hybrid and self.layer_types[layer % len(self.layer_types)] == "linear_attention"


def policy_shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Names and shapes of Hugging Face's `named_parameters()`."""
    hidden, shapes = sizes.hidden, {}
    shapes["model.language_model.embed_tokens.weight"] = (sizes.vocabulary, hidden)
    for number in range(sizes.layers):
        layer = f"model.language_model.layers.{number}."
        (_recurrent_shapes if sizes.recurrent(number) else _attention_shapes)(shapes, layer, sizes)
        (_expert_shapes if sizes.mixed else _dense_shapes)(shapes, layer, sizes)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{layer}{norm}.weight"] = (hidden,)
    shapes["model.language_model.norm.weight"] = (hidden,)
    if not sizes.tied:
        shapes["lm_head.weight"] = (sizes.vocabulary, hidden)
    return shapes | _tower_shapes(sizes)


def _attention_shapes(shapes: dict[str, tuple[int, ...]], layer: str, sizes: Sizes) -> None:
    q, kv, hidden = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim, sizes.hidden
    for kind, rows in (("q", 2 * q if sizes.hybrid else q), ("k", kv), ("v", kv)):
        shapes[f"{layer}self_attn.{kind}_proj.weight"] = (rows, hidden)
        if sizes.family == "qwen2_5_vl":
            shapes[f"{layer}self_attn.{kind}_proj.bias"] = (rows,)
    if sizes.family != "qwen2_5_vl":
        shapes[f"{layer}self_attn.q_norm.weight"] = shapes[f"{layer}self_attn.k_norm.weight"] = (sizes.head_dim,)
    shapes[f"{layer}self_attn.o_proj.weight"] = (hidden, q)


def _recurrent_shapes(shapes: dict[str, tuple[int, ...]], layer: str, sizes: Sizes) -> None:
    keys, values = sizes.key_heads * sizes.key_dim, sizes.value_heads * sizes.value_dim
    own = f"{layer}linear_attn."
    shapes[f"{own}dt_bias"] = shapes[f"{own}A_log"] = (sizes.value_heads,)
    shapes[f"{own}conv1d.weight"] = (2 * keys + values, 1, 4)
    shapes[f"{own}norm.weight"] = (sizes.value_dim,)
    shapes[f"{own}out_proj.weight"] = (sizes.hidden, values)
    for name, rows in (("qkv", 2 * keys + values), ("z", values), ("b", sizes.value_heads), ("a", sizes.value_heads)):
        shapes[f"{own}in_proj_{name}.weight"] = (rows, sizes.hidden)


def _dense_shapes(shapes: dict[str, tuple[int, ...]], layer: str, sizes: Sizes, mlp: str = "mlp", width: int = 0
                  ) -> None:
    for kind in ("gate", "up"):
        shapes[f"{layer}{mlp}.{kind}_proj.weight"] = (width or sizes.intermediate, sizes.hidden)
    shapes[f"{layer}{mlp}.down_proj.weight"] = (sizes.hidden, width or sizes.intermediate)


def _expert_shapes(shapes: dict[str, tuple[int, ...]], layer: str, sizes: Sizes) -> None:
    shapes[f"{layer}mlp.gate.weight"] = (sizes.experts, sizes.hidden)
    shapes[f"{layer}mlp.experts.gate_up_proj"] = (sizes.experts, 2 * sizes.expert_width, sizes.hidden)
    shapes[f"{layer}mlp.experts.down_proj"] = (sizes.experts, sizes.hidden, sizes.expert_width)
    if sizes.hybrid:
        _dense_shapes(shapes, layer, sizes, "mlp.shared_expert", sizes.shared_width)
        shapes[f"{layer}mlp.shared_expert_gate.weight"] = (1, sizes.hidden)


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
    deepstack = 0 if sizes.hybrid else sizes.deepstack
    for merger in ["merger", *(f"deepstack_merger_list.{number}" for number in range(deepstack))]:
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

    def parts(tensor: torch.Tensor, *counts: int) -> list[torch.Tensor]:
        """The rank's rows of each part of so many rows."""
        return [rows(part) for part in tensor.split(counts)]

    engine: Weights = {}
    for name in ("embed_tokens", "norm"):
        engine[f"language_model.model.{name}.weight"] = weights[f"model.language_model.{name}.weight"]
    engine["language_model.model.embed_tokens.weight"] = vocabulary(
        engine["language_model.model.embed_tokens.weight"])
    if not sizes.tied:
        engine["language_model.lm_head.weight"] = vocabulary(weights["lm_head.weight"])

    def dense(theirs: str, ours: str) -> None:
        engine[f"{theirs}.gate_up_proj.weight"] = torch.cat(
            [rows(weights[f"{ours}.{kind}_proj.weight"]) for kind in ("gate", "up")])
        engine[f"{theirs}.down_proj.weight"] = columns(weights[f"{ours}.down_proj.weight"])

    def attention(theirs: str, ours: str) -> None:
        for leaf in ("weight", "bias") if sizes.family == "qwen2_5_vl" else ("weight",):
            query = weights[f"{ours}q_proj.{leaf}"]
            engine[f"{theirs}qkv_proj.{leaf}"] = torch.cat(
                [rows(query), *(heads(weights[f"{ours}{kind}_proj.{leaf}"]) for kind in "kv")])
        engine[f"{theirs}o_proj.weight"] = columns(weights[f"{ours}o_proj.weight"])
        if sizes.family != "qwen2_5_vl":
            for norm in "qk":
                engine[f"{theirs}{norm}_norm.weight"] = weights[f"{ours}{norm}_norm.weight"]

    def recurrent(theirs: str, ours: str) -> None:
        keys, values = sizes.key_heads * sizes.key_dim, sizes.value_heads * sizes.value_dim
        qkv, z = weights[f"{ours}in_proj_qkv.weight"], weights[f"{ours}in_proj_z.weight"]
        engine[f"{theirs}in_proj_qkvz.weight"] = torch.cat([*parts(qkv, keys, keys, values), rows(z)])
        engine[f"{theirs}in_proj_ba.weight"] = torch.cat(
            [rows(weights[f"{ours}in_proj_{kind}.weight"]) for kind in "ba"])
        engine[f"{theirs}conv1d.weight"] = torch.cat(parts(weights[f"{ours}conv1d.weight"], keys, keys, values))
        for name in ("A_log", "dt_bias"):
            engine[theirs + name] = rows(weights[ours + name])
        engine[f"{theirs}norm.weight"] = weights[f"{ours}norm.weight"]
        engine[f"{theirs}out_proj.weight"] = columns(weights[f"{ours}out_proj.weight"])

    def mixture(theirs: str, ours: str) -> None:
        gates, ups = weights[f"{ours}experts.gate_up_proj"].chunk(2, 1)
        engine[f"{theirs}experts.routed_experts.w13_weight"] = torch.stack(
            [torch.cat([rows(gate), rows(up)]) for gate, up in zip(gates, ups, strict=True)])
        engine[f"{theirs}experts.routed_experts.w2_weight"] = torch.stack(
            [columns(down) for down in weights[f"{ours}experts.down_proj"]])
        engine[f"{theirs}gate.weight"] = weights[f"{ours}gate.weight"]
        if sizes.hybrid:
            engine[f"{theirs}shared_expert_gate.weight"] = weights[f"{ours}shared_expert_gate.weight"]
            dense(f"{theirs}shared_expert", f"{ours}shared_expert")

    for number in range(sizes.layers):
        ours, theirs = f"model.language_model.layers.{number}.", f"language_model.model.layers.{number}."
        if sizes.recurrent(number):
            recurrent(f"{theirs}linear_attn.", f"{ours}linear_attn.")
        else:
            attention(f"{theirs}self_attn.", f"{ours}self_attn.")
        if sizes.mixed:
            mixture(f"{theirs}mlp.", f"{ours}mlp.")
        else:
            dense(f"{theirs}mlp", f"{ours}mlp")
        for norm in ("input_layernorm", "post_attention_layernorm"):
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
