"""Packed groups on a GPU: one varlen call of a flash library, or FlexAttention.

A varlen call takes the prompt with its first completion as one sequence and every further completion as one whose keys
are [prompt, completion]; the prompt's keys are copied for those. Two calls merged by their log-sum-exp would copy none
(Qwen2.5-VL-7B, P 8192, R 1024, G 8: 56 MiB a layer for a second output instead of 112 MiB of copies), but none of these
libraries has a public function with the gradient of the log-sum-exp; torch drops it without a word.

Letters: T packed tokens, P prompt, H query heads, K key heads, d head size, S sequences.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from importlib import import_module
from itertools import accumulate
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from veripo_kernels.once import once

from veripo_fast.model.shared_prefix import GroupSpan

BLOCK = 128
"""Side of FlexAttention's blocks, in tokens."""


@dataclass(frozen=True)
class Library:
    """A varlen function and what its kernels take; all align a causal mask to the last key (`PROBE` sees to it)."""

    module: str
    function: str
    capabilities: tuple[int, ...]
    """Major compute capabilities with forward and backward."""
    max_head_size: int = 256


LIBRARIES = {
    "flash3": Library("flash_attn_interface", "flash_attn_varlen_func", (9,)),
    "flash4": Library("flash_attn.cute", "flash_attn_varlen_func", (9, 10), max_head_size=128),
    "varlen": Library("torch.nn.attention.varlen", "varlen_attn", (8, 9, 10, 12)),
    "flash2": Library("flash_attn.flash_attn_interface", "flash_attn_varlen_func", (8, 9, 10, 12)),
}


# -- one varlen call ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class VarlenPlan:
    """A packed row as S sequences, causal from the end: the last query of each sees all its keys."""

    cu_seqlens_q: torch.Tensor
    """int32 [S + 1]: sequence s owns the packed tokens cu_seqlens_q[s] to cu_seqlens_q[s + 1] as queries."""
    cu_seqlens_k: torch.Tensor
    """int32 [S + 1]: and these rows of `key_index` as keys."""
    max_seqlen_q: int
    max_seqlen_k: int
    key_index: torch.Tensor
    """int64 [cu_seqlens_k[-1]]: the packed token of each key row."""
    copies: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    """For n = 0, 1, ...: the tokens that have an n-th copy, and the key rows that hold it; all tokens have the 0-th."""


@lru_cache(maxsize=4)
def varlen_plan(groups: tuple[GroupSpan, ...], device: torch.device) -> VarlenPlan:
    """Sequences of a packed row, made once for all layers; groups tile the row."""
    queries, keys, rows = [0], [0], []
    for group in groups:
        first, *others = [length for length in group.completions if length] or [0]
        prompt = torch.arange(group.start, group.completion_start)
        start = group.completion_start + first
        rows.append(torch.arange(group.start, start))
        queries.append(group.prompt + first)
        keys.append(group.prompt + first)
        for length in others:
            rows += [prompt, torch.arange(start, start + length)]
            queries.append(length)
            keys.append(group.prompt + length)
            start += length
    index = torch.cat(rows)
    cumulative = [torch.tensor(list(accumulate(lengths)), dtype=torch.int32, device=device)
                  for lengths in (queries, keys)]
    copies = tuple((tokens.to(device), positions.to(device)) for tokens, positions in _copies(index))
    return VarlenPlan(cumulative[0], cumulative[1], max(queries), max(keys), index.to(device), copies)


def _copies(index: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Split the rows of a gather into rounds in which no token comes twice: (tokens ascending, rows) of each."""
    tokens, rows = torch.sort(index, stable=True)
    counts = torch.bincount(index)
    number = torch.arange(len(index)) - (counts.cumsum(0) - counts)[tokens]
    return [(tokens[number == n], rows[number == n]) for n in range(int(counts.max()))]


class _CopyKeys(torch.autograd.Function):
    """Keys or values [T, K, d] -> one row per entry of `key_index`.

    The backward adds up a token's copies in float32, in a fixed order: the same bits every time, one rounding.
    """

    @staticmethod
    def forward(ctx: Any, packed: torch.Tensor, plan: VarlenPlan) -> torch.Tensor:
        ctx.plan = plan
        return packed.index_select(0, plan.key_index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (_, first), *others = ctx.plan.copies
        total = grad.index_select(0, first).to(torch.promote_types(grad.dtype, torch.float32))
        for tokens, rows in others:
            total.index_add_(0, tokens, grad.index_select(0, rows).to(total.dtype))
        return total.to(grad.dtype), None


def copy_keys(packed: torch.Tensor, plan: VarlenPlan) -> torch.Tensor:
    """Keys or values of all sequences, [T, K, d] -> [cu_seqlens_k[-1], K, d]; no copy where each token is in one."""
    return packed if len(plan.copies) == 1 else _CopyKeys.apply(packed, plan)


@cache
def _varlen_function(name: str) -> Callable[..., torch.Tensor]:
    """(query, key, value, plan, scaling) -> [T, H, d] by the public function of a library."""
    library = LIBRARIES[name]
    function = getattr(import_module(library.module), library.function)
    if name != "varlen":
        return partial(_call_flash, function)
    # torch 2.13 asks for consent to fewer key heads; 2.11 has no such argument and leaves them to the kernel
    consent = {"enable_gqa": True} if "enable_gqa" in inspect.signature(function).parameters else {}
    return partial(_call_torch, partial(function, **consent))


def _call_torch(function: Callable[..., Any], query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                plan: VarlenPlan, scaling: float | None) -> torch.Tensor:
    return function(query, key, value, plan.cu_seqlens_q, plan.cu_seqlens_k, plan.max_seqlen_q, plan.max_seqlen_k,
                    scale=scaling, window_size=(-1, 0))


def _call_flash(function: Callable[..., Any], query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                plan: VarlenPlan, scaling: float | None) -> torch.Tensor:
    out = function(query, key, value, cu_seqlens_q=plan.cu_seqlens_q, cu_seqlens_k=plan.cu_seqlens_k,
                   max_seqlen_q=plan.max_seqlen_q, max_seqlen_k=plan.max_seqlen_k, softmax_scale=scaling, causal=True)
    return out[0] if isinstance(out, tuple) else out  # flash-attn 4 and some builds of 3 add the log-sum-exp


def attend_varlen(name: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                  groups: tuple[GroupSpan, ...], scaling: float | None) -> torch.Tensor:
    """`attend_packed` by one varlen call of a library."""
    plan = varlen_plan(groups, query.device)
    query, key, value = (side[0].transpose(0, 1) for side in (query, key, value))
    out = _varlen_function(name)(query, copy_keys(key, plan), copy_keys(value, plan), plan, scaling)
    return out.transpose(0, 1)[None]


# -- FlexAttention -----------------------------------------------------------------------------------------------------


def token_runs(groups: tuple[GroupSpan, ...], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each packed token, int64 [T]: the number of its prompt or completion, and of its group's prompt."""
    lengths = [length for group in groups for length in (group.prompt, *group.completions)]
    first = [0, *accumulate(1 + len(group.completions) for group in groups)]
    run = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    sizes = torch.tensor([group.end - group.start for group in groups])
    return run.to(device), torch.repeat_interleave(torch.tensor(first[:-1]), sizes).to(device)


@lru_cache(maxsize=4)
def flex_block_mask(groups: tuple[GroupSpan, ...], device: torch.device) -> BlockMask:
    """Who sees whom, with the blocks that nobody or everybody sees; 128 queries at a time, never a [T, T] mask."""
    run, prompt_run = token_runs(groups, device)

    def visible(batch: Any, head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (query >= key) & ((run[key] == run[query]) | (run[key] == prompt_run[query]))

    tokens = torch.arange(len(run), device=device)
    some, every = [], []
    for queries in tokens.split(BLOCK):
        seen = F.pad(visible(0, 0, queries[:, None], tokens), (0, -len(tokens) % BLOCK, 0, BLOCK - len(queries)))
        blocks = seen.view(BLOCK, -1, BLOCK)
        every.append(blocks.all(-1).all(0))
        some.append(blocks.any(-1).any(0) & ~every[-1])
    return BlockMask.from_kv_blocks(*_ordered(torch.stack(some)), *_ordered(torch.stack(every)), BLOCK_SIZE=BLOCK,
                                    mask_mod=visible, seq_lengths=(len(run), len(run)))


def _ordered(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """bool [query blocks, key blocks] -> how many are set and their numbers, int32, [1, 1, ...]."""
    indices = torch.argsort(blocks.int(), dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[None, None], indices.int()[None, None].contiguous()


@once
def _flex_function(device_type: str) -> Callable[..., Any]:
    """Compiled for GPUs; uncompiled it forms all scores."""
    return cast(Callable[..., Any],
                torch.compile(flex_attention, dynamic=True) if device_type == "cuda" else flex_attention)


def attend_flex(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, groups: tuple[GroupSpan, ...],
                scaling: float | None) -> torch.Tensor:
    """`attend_packed` by FlexAttention; no backward on the CPU."""
    return _flex_function(query.device.type)(query, key, value, block_mask=flex_block_mask(groups, query.device),
                                             scale=scaling, enable_gqa=query.shape[1] != key.shape[1])
