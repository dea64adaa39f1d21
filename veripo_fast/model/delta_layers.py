"""Layers with a recurrent state (Qwen3.5's gated delta rule) on packed groups: where a prompt ends, completions begin.

A prompt leaves its state and the last inputs of its convolution. Each completion of the group begins with them, so the
prompt runs once, and the gradients of all completions meet in it. Transformers' layers know no groups: their forward
goes on through one sequence, in which completions would read each other. The forward here takes its place in one model,
with the layer's own parameters; without groups it is transformers' own, the slow sibling on repeated prompts.

Letters: T packed tokens, P prompt, N prompts, W width of the convolution, X its channels, V value heads, d head sizes.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from veripo_kernels.once import once

from veripo_fast.config.families import Family
from veripo_fast.model.delta_fla import fla_delta_rule, refusal
from veripo_fast.model.delta_rule import DeltaRule, delta_rule, delta_step, wide
from veripo_fast.model.shared_prefix import GroupSpan, PromptCache

log = logging.getLogger(__name__)


def serve_groups(model: Any, family: Family) -> None:
    """Let the recurrent layers of one model take `groups` and `cache`, as its attention does; their parameters stay."""
    if not family.delta_class:
        return
    rule = select(model.device)
    for layer in model.model.language_model.modules():
        if type(layer).__name__ == family.delta_class:
            layer.forward = partial(_forward, layer, type(layer).forward, rule)


@once
def select(device: torch.device) -> DeltaRule:
    """What computes a packed row here; said in the log once where there is a GPU."""
    if device.type != "cuda":
        return delta_rule
    reason = refusal(device)
    log.info("gated delta rule: %s", "fla" if reason is None else f"torch, by chunks (fla {reason})")
    return fla_delta_rule if reason is None else delta_rule


def _forward(layer: Any, plain: Any, rule: DeltaRule, hidden_states: torch.Tensor, *,
             groups: tuple[GroupSpan, ...] | None = None, cache: PromptCache | None = None, **others: Any
             ) -> torch.Tensor:
    """[1, T, D] of a packed row, or [rows, 1, D] while decoding (then `groups` is None), to the same shape."""
    if groups is None and cache is None:
        output: torch.Tensor = plain(layer, hidden_states, **others)
        return output
    tokens = hidden_states.flatten(0, 1)
    mixed = layer.in_proj_qkv(tokens)
    gate = layer.in_proj_z(tokens).view(len(tokens), -1, layer.head_v_dim)
    strength = layer.in_proj_b(tokens).sigmoid()
    decay = -wide(layer.A_log).exp() * F.softplus(wide(layer.in_proj_a(tokens)) + layer.dt_bias)
    if groups is None:
        assert cache is not None
        mixed = _decode_convolution(layer, mixed, cache)
        out, state = delta_step(*_heads(layer, mixed), decay, strength, cache.states[layer.layer_idx][1])
        cache.states[layer.layer_idx] = cache.states[layer.layer_idx][0], state
    else:
        out = _packed(layer, rule, mixed, decay, strength, groups, cache)
    out = layer.norm(out.reshape(-1, layer.head_v_dim), gate.reshape(-1, layer.head_v_dim))
    projected: torch.Tensor = layer.out_proj(out.view(len(tokens), -1)).view(hidden_states.shape)
    return projected


def _packed(layer: Any, rule: DeltaRule, mixed: torch.Tensor, decay: torch.Tensor, strength: torch.Tensor,
            groups: tuple[GroupSpan, ...], cache: PromptCache | None) -> torch.Tensor:
    """The recurrent part of a packed row, [T, V, dv]: first all prompts, then all completions from where they end."""
    width = layer.conv_kernel_size - 1
    sizes = [size for group in groups for size in (group.prompt, *group.completions)]
    prompt_inputs = _ends(mixed.split(sizes), groups, width)
    mixed = _convolution(layer, _with_starts(mixed.split(sizes), prompt_inputs, groups, width))
    prompts, completions = _parted(mixed, [size + width for size in sizes], groups, width)
    decays, strengths = (_parted(rows, sizes, groups) for rows in (decay, strength))
    lengths = tuple(group.prompt for group in groups)
    of_prompts, states = rule(*_heads(layer, prompts), decays[0], strengths[0], lengths)
    if cache is not None:
        cache.keep_states(layer.layer_idx, torch.stack(prompt_inputs), states)
    owners = [number for number, group in enumerate(groups) for length in group.completions if length]
    if not owners:
        return of_prompts
    lengths = tuple(length for group in groups for length in group.completions if length)
    of_completions, _ = rule(*_heads(layer, completions), decays[1], strengths[1], lengths,
                             states.index_select(0, torch.tensor(owners, device=mixed.device)))
    return _joined(of_prompts, of_completions, groups)


def _ends(parts: Sequence[torch.Tensor], groups: tuple[GroupSpan, ...], width: int) -> list[torch.Tensor]:
    """Of each prompt the last inputs of the convolution, [W - 1, X], zeros before its first token."""
    ends, number = [], 0
    for group in groups:
        prompt = parts[number][-width:]
        ends.append(F.pad(prompt, (0, 0, width - len(prompt), 0)))
        number += 1 + len(group.completions)
    return ends


def _with_starts(parts: Sequence[torch.Tensor], ends: list[torch.Tensor], groups: tuple[GroupSpan, ...], width: int
                 ) -> torch.Tensor:
    """Inputs of the convolution: W - 1 zeros before each prompt, and its last inputs before each completion."""
    zeros, rows, number = parts[0].new_zeros(width, parts[0].shape[1]), [], 0
    for group, end in zip(groups, ends, strict=True):
        rows += [zeros, parts[number]]
        for part in parts[number + 1:number + 1 + len(group.completions)]:
            rows += [end, part]
        number += 1 + len(group.completions)
    return torch.cat(rows)


def _convolution(layer: Any, inputs: torch.Tensor) -> torch.Tensor:
    """Each channel with the W - 1 tokens before, [n, X]; of the first W - 1 nothing of use."""
    weight = layer.conv1d.weight
    out = F.conv1d(inputs.t()[None], weight, padding=weight.shape[-1] - 1, groups=len(weight))
    return F.silu(out[0, :, :len(inputs)].t())


def _decode_convolution(layer: Any, mixed: torch.Tensor, cache: PromptCache) -> torch.Tensor:
    """The same of one token of each completion, [rows, X]; its input is kept for the next."""
    before, state = cache.states[layer.layer_idx]
    inputs = torch.cat([before, mixed[:, None]], 1)
    cache.states[layer.layer_idx] = inputs[:, 1:], state
    return F.silu((inputs * layer.conv1d.weight[:, 0].t()).sum(1))


def _heads(layer: Any, mixed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries and keys [T, K, dk] and values [T, V, dv] of what the convolution gave."""
    query, key, value = mixed.split([layer.key_dim, layer.key_dim, layer.value_dim], -1)
    return (query.unflatten(-1, (-1, layer.head_k_dim)), key.unflatten(-1, (-1, layer.head_k_dim)),
            value.unflatten(-1, (-1, layer.head_v_dim)))


def _parted(rows: torch.Tensor, sizes: list[int], groups: tuple[GroupSpan, ...], skipped: int = 0
            ) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of all prompts, and those of all completions, without the first `skipped` of each."""
    parts, number = rows.split(sizes), 0
    prompts, completions = [], []
    for group in groups:
        prompts.append(parts[number][skipped:])
        completions += [part[skipped:] for part in parts[number + 1:number + 1 + len(group.completions)]]
        number += 1 + len(group.completions)
    return torch.cat(prompts), torch.cat(completions) if completions else rows[:0]


def _joined(prompts: torch.Tensor, completions: torch.Tensor, groups: tuple[GroupSpan, ...]) -> torch.Tensor:
    """The opposite of `_parted`."""
    own = prompts.split([group.prompt for group in groups])
    others = completions.split([sum(group.completions) for group in groups])
    return torch.cat([part for pair in zip(own, others, strict=True) for part in pair])
