"""Shared-prefix attention: a group packed as [prompt, completion_1, ..., completion_G] attends as if repeated.

Every completion attends to the prompt and to itself, so the prompt runs once for the whole group, forward and backward.
It plugs into transformers through its attention registry; no model code is touched. The slow sibling that defines it is
the plain forward of the model on G copies of the prompt (tests/model/test_shared_prefix.py). SDPA computes it here;
attention.py has what takes its place on a GPU.

Letters: T packed tokens, P prompt, R completion tokens, N prompts, G group, H query heads, K key heads, d head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Any, TypeAlias, cast

import torch
import torch.nn.functional as F
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from veripo_fast.model.recomputation import computed_by
from veripo_fast.schedule.blocks import blocks_of

NAME = "veripo_shared_prefix"
MOST_SCORES, MOST_SCORES_ON_GPU = 1 << 20, 1 << 27
"""Attention scores that exist at once while completions are written, on a CPU and on a GPU."""


@dataclass(frozen=True)
class GroupSpan:
    """One group inside a packed row: first token, prompt length P, completion lengths R."""

    start: int
    prompt: int
    completions: tuple[int, ...] = ()

    @property
    def completion_start(self) -> int:
        return self.start + self.prompt

    @property
    def end(self) -> int:
        return self.completion_start + sum(self.completions)

    @cached_property
    def blocks(self) -> list[tuple[int, torch.Tensor]]:
        """Runs of completions attended together (`blocks_of`): their tokens, and a bool mask [tokens, P + tokens]."""
        return [(sum(lengths), _block_mask(self.prompt, lengths))
                for lengths in blocks_of(self.prompt, self.completions)]


def _block_mask(prompt: int, lengths: list[int]) -> torch.Tensor:
    """bool [sum(lengths), prompt + sum(lengths)]: True where a completion token may look."""
    tokens = sum(lengths)
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    own = (owner[:, None] == owner[None, :]) & torch.ones(tokens, tokens, dtype=torch.bool).tril()
    return torch.cat([torch.ones(tokens, prompt, dtype=torch.bool), own], 1)


@lru_cache(maxsize=4)
def read_tokens(groups: tuple[GroupSpan, ...], device: torch.device) -> torch.Tensor:
    """int64 [n]: the packed tokens from which one is predicted: the last of each prompt, and those of completions."""
    return torch.cat([torch.arange(group.completion_start - 1, group.end) for group in groups]).to(device)


@lru_cache(maxsize=1)
def _added_masks(groups: tuple[GroupSpan, ...], like: tuple[torch.dtype, torch.device]) -> list[list[torch.Tensor]]:
    """Of each group and block: 0 where a completion token may look, else -inf, of a dtype and on a device.

    SDPA makes this of a bool mask, and saves it for the backward pass: made here, all layers save the same. Behind a
    pass `forget_masks` leaves them to who saved them.
    """
    dtype, device = like
    return [[torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, float("-inf")).to(device)
             for _, mask in group.blocks] for group in groups]


forget_masks = _added_masks.cache_clear

Attend: TypeAlias = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, tuple[GroupSpan, ...], float | None], torch.Tensor]
"""query [1, H, T, d], key and value [1, K, T, d], groups, scaling -> [1, H, T, d]."""


class PromptCache:
    """Keys and values of a decoding batch: one copy per prompt, shared by its G completions, plus the tokens written.

    Prefill fills [N, K, longest P, d] of each layer, some prompts at a time (`keep_prompts`); behind `start_decoding`
    every forward takes one token of each of the N*G completions. A layer with a recurrent state has that instead
    (`states`), and the last inputs of its convolution; while decoding every completion has its own.

    Args:
        lengths: P of each prompt.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = list(lengths)
        self.padding = min(lengths) < max(lengths)
        self.padded: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.written: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.states: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.visible = torch.arange(max(lengths)) < torch.tensor(self.lengths)[:, None]
        self.group_size = 1
        self.length = 0
        self._filled: dict[int, int] = {}

    def keep_prompts(self, layer: int, keys: torch.Tensor, values: torch.Tensor, groups: tuple[GroupSpan, ...]) -> None:
        """Take what the prompts of a packed row leave in a layer that attends: keys and values [1, K, T, d]."""
        if layer not in self.padded:
            shape = (len(self.lengths), keys.shape[1], max(self.lengths), keys.shape[-1])
            self.padded[layer] = keys.new_zeros(shape), values.new_zeros(shape)
        for number, group in enumerate(groups, self._filled.get(layer, 0)):
            for kept, rows in zip(self.padded[layer], (keys, values), strict=True):
                kept[number, :, :group.prompt] = rows[0, :, group.start:group.completion_start]
        self._filled[layer] = self._filled.get(layer, 0) + len(groups)

    def keep_states(self, layer: int, inputs: torch.Tensor, states: torch.Tensor) -> None:
        """Take what further prompts leave in a recurrent layer: [N, ...] each, the convolution's inputs first."""
        if layer in self.states:
            inputs, states = (torch.cat(pair) for pair in zip(self.states[layer], (inputs, states), strict=True))
        self.states[layer] = inputs, states

    def start_decoding(self, group_size: int, max_new_tokens: int) -> None:
        """Make room for G * N completions of `max_new_tokens`."""
        self.group_size = group_size
        for number, (keys, _) in self.padded.items():
            shape = (len(keys) * group_size, keys.shape[1], max_new_tokens, keys.shape[-1])
            self.written[number] = keys.new_zeros(shape), keys.new_zeros(shape)
            self.visible = self.visible.to(keys.device)
        for number, (inputs, state) in self.states.items():
            self.states[number] = inputs.repeat_interleave(group_size, 0), state.repeat_interleave(group_size, 0)

    def keep(self, prompts: torch.Tensor) -> None:
        """Drop the prompts whose completions have all ended; `prompts` int64 lists the rows to keep."""
        rows = (prompts[:, None] * self.group_size + torch.arange(self.group_size, device=prompts.device)).flatten()
        for kept, which in ((self.padded, prompts), (self.written, rows), (self.states, rows)):
            for layer, (keys, values) in kept.items():
                kept[layer] = keys[which], values[which]  # one layer at a time is held twice
        self.visible = self.visible[prompts]


def attend_packed(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, groups: tuple[GroupSpan, ...],
                  scaling: float | None, tails: bool = False) -> torch.Tensor:
    """The definition: attention [1, H, T, d] of a packed row by SDPA, query [1, H, T, d], key and value [1, K, T, d].

    The row is split once: slicing it per group would make the backward pass quadratic in the number of groups.

    Args:
        tails: of each prompt only the last token asks (`read_tokens`); zeros stand for the others.
    """
    sizes = [size for group in groups for size in (group.prompt, *(tokens for tokens, _ in group.blocks))]
    parts = zip(query.split(sizes, 2), key.split(sizes, 2), value.split(sizes, 2), strict=True)
    gqa = query.shape[1] != key.shape[1]
    outputs: list[torch.Tensor] = []
    for masks in _added_masks(groups, (query.dtype, query.device)):
        prompt_query, prompt_key, prompt_value = next(parts)
        if tails:
            outputs.append(torch.zeros_like(prompt_query[:, :, :-1]))
            prompt_query = prompt_query[:, :, -1:]
        outputs.append(F.scaled_dot_product_attention(prompt_query, prompt_key, prompt_value, is_causal=not tails,
                                                      scale=scaling, enable_gqa=gqa))
        for mask, (own_query, own_key, own_value) in zip(masks, parts, strict=False):
            outputs.append(F.scaled_dot_product_attention(
                own_query, torch.cat([prompt_key, own_key], 2), torch.cat([prompt_value, own_value], 2),
                attn_mask=mask, scale=scaling, enable_gqa=gqa))
    by_token = [output.transpose(1, 2) for output in outputs]
    kept = [output.detach() for output in by_token]  # SDPA saves them itself
    return computed_by(torch.cat(by_token, 1), lambda: torch.cat(kept, 1)).transpose(1, 2)


def _attend_decode(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cache: PromptCache, layer: int,
                   scaling: float) -> torch.Tensor:
    """One new token of each completion: query [N*G, H, 1, d], key and value [N*G, K, 1, d] -> [N*G, H, 1, d].

    Scores exist for some prompts at a time, so that they do not grow with the batch.
    """
    keys, values = cache.written[layer]
    keys[:, :, cache.length], values[:, :, cache.length] = key[:, :, 0], value[:, :, 0]
    keys, values = keys[:, :, :cache.length + 1], values[:, :, :cache.length + 1]
    prompt_keys, prompt_values = cache.padded[layer]
    group = len(query) // len(prompt_keys)
    of_prompt = group * query.shape[1] * (prompt_keys.shape[2] + cache.length + 1)
    most = MOST_SCORES if query.device.type == "cpu" else MOST_SCORES_ON_GPU
    part = max(most // of_prompt, 1)
    outputs = []
    for start in range(0, len(prompt_keys), part):
        rows, prompts = slice(start * group, (start + part) * group), slice(start, start + part)
        outputs.append(_attend_groups(query[rows], keys[rows], values[rows], prompt_keys[prompts],
                                      prompt_values[prompts], cache.visible[prompts] if cache.padding else None,
                                      scaling))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _attend_groups(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, prompt_keys: torch.Tensor,
                   prompt_values: torch.Tensor, visible: torch.Tensor | None, scaling: float) -> torch.Tensor:
    """Of N prompts: query [N*G, H, 1, d], keys and values [N*G, K, t, d] that the completions wrote and [N, K, P, d] of
    the prompts -> [N*G, H, 1, d]; visible bool [N, P], where prompts differ in length."""
    rows, heads, _, size = query.shape
    prompts, key_heads, length, _ = prompt_keys.shape
    repeat = heads // key_heads
    own = query.reshape(rows, key_heads, repeat, size) * scaling
    shared = own.view(prompts, -1, key_heads, repeat, size).transpose(1, 2).reshape(prompts, key_heads, -1, size)
    prompt_scores = shared @ prompt_keys.transpose(-1, -2)
    if visible is not None:
        prompt_scores.masked_fill_(~visible[:, None, None], float("-inf"))
    prompt_scores = prompt_scores.view(prompts, key_heads, -1, repeat, length).transpose(1, 2)
    scores = torch.cat([prompt_scores.reshape(rows, key_heads, repeat, length), own @ keys.transpose(-1, -2)], -1)
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype)
    to_prompt = weights[..., :length].view(prompts, -1, key_heads, repeat, length).transpose(1, 2)
    out = (to_prompt.reshape(prompts, key_heads, -1, length) @ prompt_values).view(
        prompts, key_heads, -1, repeat, size).transpose(1, 2).reshape(rows, key_heads, repeat, size)
    return (out + weights[..., length:] @ values).reshape(rows, heads, 1, size)


def shared_prefix_attention(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: torch.Tensor | None, *, groups: tuple[GroupSpan, ...] | None = None,
    cache: PromptCache | None = None, scaling: float | None = None, attend: Attend = attend_packed,
    tails: bool = False, **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention function for transformers' registry.

    Args:
        query: [1, H, T, d] of a packed row, or [N*G, H, 1, d] while decoding (then `groups` is None).
        key, value: the same with K heads.
        groups: where the groups lie in the packed row; they tile it without gaps.
        cache: collects the prompts' keys and values while packing, serves them while decoding.
        attend: what computes a packed row: the definition, or a backend that agrees with it.
        tails: of each prompt only what the last token sees is read (model/last_layer.py). The definition computes no
            more; a backend attends for the others too, with queries of zero.

    Returns:
        [rows, T, H, d] and None, as transformers expects.
    """
    layer = cast(int, module.layer_idx)
    if groups is None:
        assert cache is not None
        out = _attend_decode(query, key, value, cache, layer, scaling or query.shape[-1] ** -0.5)
        return out.transpose(1, 2), None
    if cache is not None:
        cache.keep_prompts(layer, key, value, groups)
    if tails and attend is attend_packed:
        attend = partial(attend_packed, tails=True)
    return attend(query, key, value, groups, scaling).transpose(1, 2).contiguous(), None


def register(name: str, attend: Attend) -> None:
    """Make `attend` an attention implementation of transformers that needs no mask."""
    ALL_ATTENTION_FUNCTIONS.register(name, partial(shared_prefix_attention, attend=attend))
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, lambda *args, **kwargs: None)


register(NAME, attend_packed)
