"""FLOPs of a group (prompt, completions, head, and the vision tower where it is trained), and of all passes so far.

Letters: T packed tokens, P prompt, R completion tokens, D hidden, V vocabulary, H heads, K key heads, d head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from veripo_fast.config.families import FAMILIES


@dataclass(frozen=True)
class TowerCost:
    """A trained vision tower."""

    depth: int
    hidden: int
    intermediate: int
    out_hidden: int
    """Hidden size of the language model, which the mergers project to."""
    mlp_matrices: int
    """Matrices of a block's MLP: 3 where it is gated (Qwen2.5-VL), else 2 (Qwen3-VL)."""
    merged: int
    """Patches in a token."""
    mergers: int
    """Qwen3-VL has one for each deepstack level too."""
    patch_features: int
    """Numbers in a patch."""
    full_blocks: int
    """Blocks in which a patch attends to its whole picture (two frames of a video)."""
    window: int
    """Patches that a patch attends to in the other blocks."""

    @classmethod
    def of(cls, vision: Any) -> TowerCost:
        """From the vision part of a Hugging Face configuration."""
        full = getattr(vision, "fullatt_block_indexes", None)
        merged = vision.spatial_merge_size ** 2
        side = getattr(vision, "window_size", 0) // vision.patch_size // vision.spatial_merge_size
        return cls(vision.depth, vision.hidden_size, vision.intermediate_size, vision.out_hidden_size,
                   mlp_matrices=2 if full is None else 3, merged=merged,
                   mergers=1 + len(getattr(vision, "deepstack_visual_indexes", ())),
                   patch_features=vision.in_channels * vision.temporal_patch_size * vision.patch_size ** 2,
                   full_blocks=vision.depth if full is None else len(full), window=side ** 2 * merged)


@dataclass(frozen=True)
class ExpertsCost:
    """Layers whose MLP is a mixture of experts."""

    layers: int
    experts: int
    chosen: int
    """Experts that a token passes."""
    intermediate: int
    """Of an expert."""
    shared: int
    """Of the expert that every token passes besides; 0: none."""
    last: bool = True
    """Whether the last layer is one."""

    def per_token(self, hidden: int) -> int:
        """Multiply-adds of a layer."""
        shared = hidden * (3 * self.shared + 1) if self.shared else 0
        return hidden * self.experts + 3 * hidden * self.chosen * self.intermediate + shared


@dataclass(frozen=True)
class DeltaCost:
    """Layers with a recurrent state (gated delta rule) in place of attention."""

    layers: int
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    convolution: int
    """Tokens of the convolution before the rule, whose FLOPs are left out."""

    @property
    def channels(self) -> int:
        """Of the convolution: queries, keys and values of a token."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim

    def matrices(self, hidden: int) -> int:
        """Multiply-adds of a layer and token: queries, keys, values, gate, decay and strength, and the way out."""
        keys, values = self.key_heads * self.key_dim, self.value_heads * self.value_dim
        return hidden * (2 * keys + 3 * values + 2 * self.value_heads)

    @property
    def rule(self) -> int:
        """Multiply-adds of a layer and token by the rule itself: the state is read, written and read. Chunks of 64
        tokens compute more."""
        return 3 * self.value_heads * self.key_dim * self.value_dim


@dataclass(frozen=True)
class ModelCost:
    """What the cost of a group depends on."""

    layers: int
    hidden: int
    intermediate: int
    """Of a dense MLP; 0: every layer has experts."""
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tower: TowerCost | None
    """None: frozen, so that an update never runs it."""
    gated: bool = False
    """Whether the output of attention has a gate, as wide as the queries."""
    experts: ExpertsCost | None = None
    delta: DeltaCost | None = None
    adapters: int = 0
    """Numbers of the adapters of the language model, which are then all that is trained of it."""
    trimmed: bool = False
    """Whether the last layer computes only what is read of it (`trims_last_layer`)."""
    unread_adapters: int = 0
    """Numbers of the adapters that a token passes in the last layer only where it is read."""

    @classmethod
    def of(cls, config: Any, *, tower_trained: bool, adapters: int = 0, unread_adapters: int = 0,
           router_balance: float = 0.0) -> ModelCost:
        """From a Hugging Face configuration of a family in `config/families.py`."""
        text, family = config.get_text_config(), FAMILIES[config.model_type]
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        experts = _experts(text) if family.router_class else None
        dense = text.num_hidden_layers > (experts.layers if experts else 0)
        return cls(text.num_hidden_layers, text.hidden_size, text.intermediate_size if dense else 0,
                   text.num_attention_heads, text.num_key_value_heads, head_dim, text.vocab_size,
                   TowerCost.of(config.vision_config) if tower_trained else None, bool(family.delta_class),
                   experts, _delta(text) if family.delta_class else None, adapters,
                   trims_last_layer(config, router_balance), unread_adapters)

    @property
    def attending(self) -> int:
        """Layers that attend."""
        return self.layers - (self.delta.layers if self.delta else 0)

    def unread_matrices(self) -> int:
        """Multiply-adds that a prompt token whose last hidden state nobody reads leaves out in a trimmed last layer:
        queries, gate and way out of the attention, and the MLP."""
        attention = self.hidden * self.head_dim * self.heads * (3 if self.gated else 2)
        return attention + (self.experts.per_token(self.hidden) if self.experts and self.experts.last
                            else 3 * self.hidden * self.intermediate)

    def layer_matrices(self) -> int:
        """Multiply-adds of a token in all layers, what tokens have to do with each other left out."""
        heads = 2 * (self.heads + self.kv_heads) + (self.heads if self.gated else 0)
        total = self.attending * self.hidden * self.head_dim * heads
        dense = self.layers - (self.experts.layers if self.experts else 0)
        total += dense * 3 * self.hidden * self.intermediate
        if self.experts:
            total += self.experts.layers * self.experts.per_token(self.hidden)
        if self.delta:
            total += self.delta.layers * self.delta.matrices(self.hidden)
        return total


def _experts(text: Any) -> ExpertsCost:
    sparse = [True] * text.num_hidden_layers
    if hasattr(text, "decoder_sparse_step"):  # Qwen3-VL-MoE's; in Qwen3.5-MoE every layer is one
        sparse = [layer not in (text.mlp_only_layers or ()) and (layer + 1) % text.decoder_sparse_step == 0
                  for layer in range(text.num_hidden_layers)]
    return ExpertsCost(sum(sparse), text.num_experts, text.num_experts_per_tok, text.moe_intermediate_size,
                       getattr(text, "shared_expert_intermediate_size", 0), sparse[-1])


def _delta(text: Any) -> DeltaCost:
    return DeltaCost(list(text.layer_types).count("linear_attention"), text.linear_num_key_heads,
                     text.linear_num_value_heads, text.linear_key_head_dim, text.linear_value_head_dim,
                     text.linear_conv_kernel_dim)


def trims_last_layer(config: Any, router_balance: float = 0.0) -> bool:
    """Whether the last decoder layer leaves out what nobody reads (model/last_layer.py): where it attends, no output of
    the tower is added behind it, and the load of its experts is not balanced, which counts every token.

    Args:
        config: a Hugging Face configuration. router_balance: `model.router_balance`.
    """
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None) or ["full_attention"]
    deepstack = getattr(config.vision_config, "deepstack_visual_indexes", None) or ()
    return not router_balance and kinds[-1] != "linear_attention" and len(deepstack) < text.num_hidden_layers


def group_flops(cost: ModelCost, prompt_tokens: int, completion_lengths: Sequence[int],
                grid_thw: Sequence[Sequence[int]] = (), *, backward: bool = True) -> int:
    """FLOPs of forward and backward of a packed group whose completions share their prompt.

        T = P + sum(R - 1), a completion's last token not being packed
        pairs = P (P + 1) / 2 + sum((R - 1) P + R (R - 1) / 2)
        FLOPs = 6 layers (T (2 D d (H + K) + 3 D intermediate) + 2 H d pairs) + 6 D V sum(R)

    of a dense model that attends in every layer. Of experts those count that a token passes; a layer with a recurrent
    state has no pairs, and per token what `DeltaCost` says. A trimmed last layer leaves out P - 1 tokens of its queries
    and of all that follows them.

    A multiply and add is 2 FLOPs and backward takes twice the forward, which makes 6 (arXiv 2001.08361 sec. 2.1; arXiv
    2104.04473 eq. 3, which also counts recomputation and pairs that are masked). Norms, rotary embedding, softmax and
    activations are left out, and so is what is computed twice (gradient checkpointing, scores in a flash backward).
    Where adapters are trained, weights have no gradient: their products count 4 in place of 6, and adapters of N
    numbers add 6 N for each token.

    Args:
        completion_lengths: tokens R of each completion, as sampled.
        grid_thw: of each image and video, as in `MediaInputs`; counts only where the tower is trained.
        backward: without it a third, a tower's patch embedding excepted. Sampling takes as much: its prompts are run
            once for all completions, and every token but the last of each completion.
    """
    packed = [max(length - 1, 0) for length in completion_lengths]
    tokens = prompt_tokens + sum(packed)
    unread = prompt_tokens - 1 if cost.trimmed else 0
    layers = tokens * cost.layer_matrices() - unread * cost.unread_matrices()
    pairs = cost.attending * attention_pairs(prompt_tokens, packed) - unread * prompt_tokens // 2
    attention = 2 * cost.heads * cost.head_dim * pairs
    if cost.delta:
        attention += tokens * cost.delta.layers * cost.delta.rule
    head = cost.hidden * cost.vocabulary * sum(completion_lengths)
    tower = tower_flops(cost.tower, grid_thw, backward=backward) if cost.tower else 0
    passes = 6 if backward else 2
    weights = 4 if backward and cost.adapters else passes
    adapted = cost.adapters * tokens - cost.unread_adapters * unread
    return weights * (layers + head) + passes * (attention + adapted) + tower


def attention_pairs(prompt: int, packed: Sequence[int]) -> int:
    """(query, key) pairs of a packed group: a completion token sees the prompt, and its own completion up to itself."""
    return prompt * (prompt + 1) // 2 + sum(length * prompt + length * (length + 1) // 2 for length in packed)


def tower_flops(tower: TowerCost, grid_thw: Sequence[Sequence[int]], *, backward: bool = True) -> int:
    """FLOPs of forward and backward of a trained tower; the gradient of the pixels is not computed.

    A patch sees its whole picture, or in windowed blocks `window` patches: windows cut by an edge count as full ones.
    """
    patches = sum(t * h * w for t, h, w in grid_thw)
    whole = sum(t * (h * w) ** 2 for t, h, w in grid_thw)
    windowed = sum(t * h * w * min(tower.window, h * w) for t, h, w in grid_thw)
    block = patches * (4 * tower.hidden ** 2 + tower.mlp_matrices * tower.hidden * tower.intermediate)
    pairs = tower.full_blocks * whole + (tower.depth - tower.full_blocks) * windowed
    wide = tower.merged * tower.hidden
    mergers = tower.mergers * (patches // tower.merged) * wide * (wide + tower.out_hidden)
    embedding = patches * tower.patch_features * tower.hidden
    matrices = tower.depth * block + 2 * tower.hidden * pairs + mergers
    return 6 * matrices + 4 * embedding if backward else 2 * (matrices + embedding)


@dataclass
class Passes:
    """What the passes of a model have computed so far, on this rank."""

    flops: int = 0
    spare_flops: int = 0
    """Of these: what was not needed, see `stages/step_work.py`."""
    trained_tokens: int = 0
    """Packed tokens of the passes with a backward."""

    def copy(self) -> Passes:
        """As it is now."""
        return replace(self)

    def since(self, before: Passes) -> Passes:
        """What has come since a copy was made."""
        return Passes(self.flops - before.flops, self.spare_flops - before.spare_flops,
                      self.trained_tokens - before.trained_tokens)

    @contextmanager
    def spare(self, spare: bool = True) -> Iterator[None]:
        """A block whose passes are not needed."""
        before = self.copy()
        yield
        if spare:
            self.spare_flops = before.spare_flops + self.flops - before.flops
            self.trained_tokens = before.trained_tokens
