"""Which attention a packed row runs on: SDPA (the definition), one varlen call of a flash library, or FlexAttention.

`select` takes the first backend that is installed, fits the GPU and computes what the definition does.
packed_attention.py holds the backends.

Letters: T packed tokens, H query heads, K key heads, d head size.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch
from veripo_kernels.once import once

from veripo_fast.errors import ConfigError
from veripo_fast.model import shared_prefix
from veripo_fast.model.packed_attention import LIBRARIES, attend_flex, attend_varlen
from veripo_fast.model.shared_prefix import Attend, GroupSpan, attend_packed

log = logging.getLogger(__name__)
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


PREFERENCE = (*LIBRARIES, "flex", "sdpa")
"""Order in which `auto` tries: kernels made for Hopper first, then what torch brings, then the general ones."""


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
