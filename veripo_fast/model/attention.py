"""Which attention a packed row runs on: SDPA (the definition), one varlen call of a flash library, or FlexAttention.

A varlen call takes the prompt with its first completion as one sequence and every further completion as one whose keys
are [prompt, completion]; the prompt's keys are copied for those. Two calls merged by their log-sum-exp would copy none
(Qwen2.5-VL-7B, P 8192, R 1024, G 8: 56 MiB a layer for a second output instead of 112 MiB of copies), but none of these
libraries has a public function with the gradient of the log-sum-exp; torch drops it without a word.

Letters: T packed tokens, P prompt, H query heads, K key heads, d head size, S sequences.
"""

from __future__ import annotations

import inspect
import logging
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

from veripo_fast.errors import ConfigError
from veripo_fast.model import shared_prefix
from veripo_fast.model.shared_prefix import Attend, GroupSpan, attend_packed

log = logging.getLogger(__name__)
BLOCK = 128
"""Side of FlexAttention's blocks, in tokens."""
PROBE = (GroupSpan(0, 5, (3, 0, 1, 4)), GroupSpan(13, 2), GroupSpan(15, 140, (0, 9, 130)))
"""What a backend must compute like the definition before it is used: ragged, empty and longer than a block."""


@dataclass(frozen=True)
class AttentionShape:
    """What a backend has to run."""

    device: torch.device
    dtype: torch.dtype
    heads: int
    key_heads: int
    head_size: int

    @classmethod
    def of(cls, model: Any) -> AttentionShape:
        """The attention of a Qwen-VL's language model."""
        text = model.config.get_text_config()
        size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return cls(model.device, model.dtype, text.num_attention_heads, text.num_key_value_heads, size)


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
PREFERENCE = (*LIBRARIES, "flex", "sdpa")
"""Order in which `auto` tries: kernels made for Hopper first, then what torch brings, then the general ones."""


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


# -- choice ------------------------------------------------------------------------------------------------------------

ATTEND: dict[str, Attend] = {**{name: partial(attend_varlen, name) for name in LIBRARIES}, "flex": attend_flex,
                             "sdpa": attend_packed}


def implementation(backend: str) -> str:
    """Name of a backend in transformers' registry (without `flash`, which it would take for its own functions)."""
    return shared_prefix.NAME if backend == "sdpa" else f"{shared_prefix.NAME}_{backend.replace('flash', 'fa')}"


for _name, _attend in ATTEND.items():
    shared_prefix.register(implementation(_name), _attend)


def refusal(backend: str, shape: AttentionShape) -> str | None:
    """Why a backend cannot run a shape here; None when it can."""
    if backend == "sdpa":
        return None
    if shape.device.type != "cuda":
        return f"needs a GPU, not {shape.device.type}"
    if backend == "flex":
        return None
    library = LIBRARIES[backend]
    if shape.dtype not in (torch.float16, torch.bfloat16):
        return f"computes in bfloat16 or float16, not {str(shape.dtype).removeprefix('torch.')}"
    major = torch.cuda.get_device_capability(shape.device)[0]
    if major not in library.capabilities:
        return f"has no kernel for compute capability {major}.x"
    if shape.head_size % 8 or shape.head_size > library.max_head_size:
        return f"takes heads of up to {library.max_head_size} in steps of 8, not {shape.head_size}"
    try:
        module = import_module(library.module)
    except ImportError as error:
        return f"cannot be imported ({error})"
    return None if hasattr(module, library.function) else f"{library.module} has no {library.function}"


def disagreement(attend: Attend, shape: AttentionShape, groups: tuple[GroupSpan, ...] = PROBE) -> str | None:
    """Where a backend differs from the definition on random numbers, forward or backward; None when it agrees.

    Truth is the definition in float64; compared are the norms of each token's error, which are steadier than single
    numbers. Allowed is twice the definition's own largest in `shape.dtype` plus one rounding step of the largest token.
    """
    generator = torch.Generator().manual_seed(0)
    heads = (shape.heads, shape.key_heads, shape.key_heads, shape.heads)
    sides = [torch.randn(1, count, groups[-1].end, shape.head_size, generator=generator, device="cpu")
             .to(shape.device, shape.dtype) for count in heads]
    exact = _forward_backward(attend_packed, [side.double() for side in sides], groups)
    plain, ours = (_forward_backward(function, sides, groups) for function in (attend_packed, attend))
    for name, truth, own, got in zip(("output", "query", "key", "value"), exact, plain, ours, strict=True):
        own_error, error, size = (_largest_token(part) for part in (own - truth, got - truth, truth))
        allowed = 2 * own_error + torch.finfo(shape.dtype).eps * size
        if not error <= allowed:  # a NaN is no agreement
            part = name if name == "output" else f"gradient of the {name}"
            return f"its {part} is off by {error:.1e}, allowed {allowed:.1e}"
    return None


def _largest_token(rows: torch.Tensor) -> float:
    """Largest norm of a token in [1, heads, T, d]; NaN if there is one."""
    return float(torch.linalg.vector_norm(rows, dim=(0, 1, 3)).max())


def _forward_backward(attend: Attend, sides: list[torch.Tensor], groups: tuple[GroupSpan, ...]) -> list[torch.Tensor]:
    """Output and gradients of query, key and value, float64, under the upstream gradient sides[3]."""
    inputs = [side.detach().requires_grad_() for side in sides[:3]]
    with torch.enable_grad():
        out = attend(inputs[0], inputs[1], inputs[2], groups, 0.8 * sides[0].shape[-1] ** -0.5)
    return [part.detach().double() for part in (out, *torch.autograd.grad(out, inputs, sides[3]))]


def unusable(backend: str, shape: AttentionShape) -> str | None:
    """`refusal`, `disagreement`, or how the kernel failed: built for another GPU, or for other heads (flash-attn 4
    asserts); None when the backend computes what the definition does."""
    reason = refusal(backend, shape)
    if reason is not None or backend == "sdpa":
        return reason
    try:
        return disagreement(ATTEND[backend], shape)
    except (RuntimeError, AssertionError) as error:
        return f"fails on a small example ({type(error).__name__} {str(error).partition(chr(10))[0]})"


@once
def select(requested: str, shape: AttentionShape) -> str:
    """The backend that `model.attention` means here; said in the log once, with what was passed over and why.

    Raises:
        ConfigError: the named backend cannot run here, or disagrees with the definition.
    """
    passed: dict[str, list[str]] = {}
    for backend in PREFERENCE if requested == "auto" else (requested,):
        reason = unusable(backend, shape)
        if reason is None:
            break
        passed.setdefault(reason, []).append(backend)
    else:
        raise ConfigError(f"model.attention is {requested!r}, which cannot be used: {', '.join(passed)}; "
                          f"`auto` takes the best that can")
    reasons = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in passed.items())
    log.info("attention: %s%s", backend, f" ({reasons})" if reasons else "")
    return backend
