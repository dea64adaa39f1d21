"""`linear_logprobs`: log-probs straight from hidden states and head; logits never exist in memory.

A head that gets a gradient costs four matrix products (one forward, three backward: logits are computed again); a
frozen one two in all, because d logprob / d hidden is taken along in the forward pass. Losses that know their slopes
need three: `linear_loss.py`.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any, Literal, overload

import torch

from veripo_kernels import linear_torch
from veripo_kernels.derivatives import refuse_second, refuse_transforms, wants_gradient
from veripo_kernels.dispatch import Impl, choose
from veripo_kernels.grpo import check_device
from veripo_kernels.linear_torch import Head, Statistics
from veripo_kernels.scalars import as_tensor, numbers_of


def engine(impl: str) -> ModuleType:
    """The module that has `statistics`, `statistics_and_direction`, `gradients` and `Workspace`."""
    if impl == "triton":
        from veripo_kernels import linear_triton

        return linear_triton
    return linear_torch


def _head(weight: torch.Tensor, bias: torch.Tensor | None, reading: torch.Tensor) -> Head:
    temperature, softcap = numbers_of(reading)
    return Head(weight, bias, None if math.isnan(softcap) else softcap, temperature)


@torch.library.custom_op("veripo::linear_logprobs", mutates_args=())
def _forward(hidden: torch.Tensor, weight: torch.Tensor, token_ids: torch.Tensor, bias: torch.Tensor | None,
             reading: torch.Tensor, entropy: bool, direction: bool, impl: str,
             ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """logprobs, entropy, logsumexp [T], and d logprob / d hidden [T, D] (no rows unless `direction`).

    `reading`: temperature and softcap (`scalars.as_tensor`).
    """
    head = _head(weight, bias, reading)
    if direction:
        found, pull = engine(impl).statistics_and_direction(hidden, head, token_ids)
        return found.logprobs, found.entropy, found.logsumexp, pull
    found = engine(impl).statistics(hidden, head, token_ids, entropy=entropy)
    return found.logprobs, found.entropy, found.logsumexp, found.logprobs.new_empty(0, hidden.shape[1])


@_forward.register_fake
def _(hidden: torch.Tensor, weight: torch.Tensor, token_ids: torch.Tensor, bias: torch.Tensor | None,
      reading: torch.Tensor, entropy: bool, direction: bool, impl: str) -> tuple[torch.Tensor, ...]:
    dtype = linear_torch.product_dtype(hidden)
    rows = [hidden.new_empty(hidden.shape[0], dtype=dtype) for _ in range(3)]
    return *rows, hidden.new_empty(hidden.shape[0] if direction else 0, hidden.shape[1], dtype=dtype)


@torch.library.custom_op("veripo::linear_logprobs_backward", mutates_args=())
def _backward(hidden: torch.Tensor, weight: torch.Tensor, token_ids: torch.Tensor, bias: torch.Tensor | None,
              logprobs: torch.Tensor, entropy: torch.Tensor, logsumexp: torch.Tensor, slopes: torch.Tensor,
              entropy_slopes: torch.Tensor | None, reading: torch.Tensor, needs: list[bool], impl: str
              ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients by hidden, weight and bias; empty where `needs` is false."""
    found = Statistics(logprobs, entropy, logsumexp)
    out = engine(impl).gradients(hidden, _head(weight, bias, reading), token_ids, found, slopes, entropy_slopes,
                                 needs=tuple(needs))

    def present(part: torch.Tensor | None) -> torch.Tensor:
        return hidden.new_empty(0) if part is None else part

    return present(out.hidden), present(out.weight), present(out.bias)


@_backward.register_fake
def _(hidden: torch.Tensor, weight: torch.Tensor, token_ids: torch.Tensor, bias: torch.Tensor | None, *rest: Any
      ) -> tuple[torch.Tensor, ...]:
    needs = rest[-2]
    return tuple(part.new_empty(part.shape) if need and part is not None else hidden.new_empty(0)
                 for part, need in zip((hidden, weight, bias), needs, strict=True))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    hidden, weight, token_ids, bias, reading, entropy, direction, impl = inputs
    logprobs, row_entropy, logsumexp, pull = output
    ctx.mark_non_differentiable(logsumexp, pull)
    ctx.set_materialize_grads(False)
    ctx.options = (entropy, direction, impl)
    if direction:
        ctx.save_for_backward(pull)
        ctx.hidden_dtype = hidden.dtype
    else:
        ctx.save_for_backward(hidden, weight, token_ids, bias, reading, logprobs, row_entropy, logsumexp)


def _gradients(ctx: Any, slopes: torch.Tensor | None, entropy_slopes: torch.Tensor | None, *_: object
               ) -> tuple[torch.Tensor | None, ...]:
    refuse_second("linear_logprobs")
    entropy, direction, impl = ctx.options
    unused = (None,) * 4
    if direction:
        pull, = ctx.saved_tensors
        if slopes is None:
            return None, None, None, None, *unused
        kept = torch.where(slopes[:, None] != 0, slopes[:, None] * pull, 0)  # a row of an invalid id pulls with NaN
        return kept.to(ctx.hidden_dtype), None, None, None, *unused
    hidden, weight, token_ids, bias, reading, logprobs, row_entropy, logsumexp = ctx.saved_tensors
    needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3]]
    if slopes is None:
        slopes = torch.zeros_like(logprobs)
    out = _backward(hidden, weight, token_ids, bias, logprobs, row_entropy, logsumexp, slopes,
                    entropy_slopes if entropy else None, reading, needs, impl)
    dhidden, dweight, dbias = (part if need else None for part, need in zip(out, needs, strict=True))
    return dhidden, dweight, None, dbias, *unused


_forward.register_autograd(_gradients, setup_context=_setup)


@overload
def linear_logprobs(hidden: torch.Tensor, head: torch.Tensor, token_ids: torch.Tensor, *, temperature: float = 1.0,
                    entropy: Literal[False] = False, bias: torch.Tensor | None = None, softcap: float | None = None,
                    impl: Impl = "auto") -> torch.Tensor: ...


@overload
def linear_logprobs(hidden: torch.Tensor, head: torch.Tensor, token_ids: torch.Tensor, *, temperature: float = 1.0,
                    entropy: Literal[True], bias: torch.Tensor | None = None, softcap: float | None = None,
                    impl: Impl = "auto") -> tuple[torch.Tensor, torch.Tensor]: ...


@overload
def linear_logprobs(hidden: torch.Tensor, head: torch.Tensor, token_ids: torch.Tensor, *, temperature: float = 1.0,
                    entropy: bool, bias: torch.Tensor | None = None, softcap: float | None = None,
                    impl: Impl = "auto") -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]: ...


def linear_logprobs(hidden: torch.Tensor, head: torch.Tensor, token_ids: torch.Tensor, *, temperature: float = 1.0,
                    entropy: bool = False, bias: torch.Tensor | None = None, softcap: float | None = None,
                    impl: Impl = "auto") -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """log softmax(softcap(hidden @ head.T + bias) / temperature) at token_ids, without the logits in memory.

    Sums are float32 and never rounded to the inputs' type. Rows whose upstream gradient is 0 cost nothing backward.

    Args:
        hidden: [..., D], float32, bfloat16, float16 or float64. head: [V, D] of the same type. token_ids: int64 [...].
        bias: [V]. softcap: c of c * tanh(logits / c). entropy: return the entropy in nats too, also with gradient.

    Returns:
        logprobs [...] float32 (float64 for float64), NaN for an id outside [0, V); or (logprobs, entropy).

    Raises:
        ValueError: an argument of the wrong shape or type, by name and value.
    """
    check_linear(hidden, head, token_ids, temperature)
    if bias is not None and bias.shape != head.shape[:1]:
        raise ValueError(f"bias must have shape [{head.shape[0]}], got {list(bias.shape)}")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap must be above 0, got {softcap}")
    refuse_transforms("linear_logprobs", hidden, head, bias)
    chosen = choose("linear_logprobs", impl, hidden.device)
    frozen = (wants_gradient(hidden) and not wants_gradient(head) and not entropy and softcap is None
              and (bias is None or not wants_gradient(bias)))
    logprobs, row_entropy, _, _ = _forward(
        hidden.reshape(-1, hidden.shape[-1]), head, token_ids.reshape(-1), bias, as_tensor(temperature, softcap),
        entropy, frozen and torch.is_grad_enabled(), chosen)
    logprobs = logprobs.view(token_ids.shape)
    return (logprobs, row_entropy.view(token_ids.shape)) if entropy else logprobs


def check_linear(hidden: torch.Tensor, head: torch.Tensor, token_ids: torch.Tensor, temperature: float) -> None:
    """What every op on hidden states and head demands."""
    if head.dim() != 2 or hidden.shape[-1:] != head.shape[1:]:
        raise ValueError(f"head must have shape [V, {hidden.shape[-1]}] for hidden {list(hidden.shape)}, "
                         f"got {list(head.shape)}")
    if hidden.dtype != head.dtype or not hidden.dtype.is_floating_point:
        raise ValueError(f"hidden and head must have one floating point dtype, got {hidden.dtype} and {head.dtype}")
    if token_ids.shape != hidden.shape[:-1] or token_ids.dtype != torch.int64:
        raise ValueError(f"token_ids must be int64 {list(hidden.shape[:-1])}, got {token_ids.dtype} "
                         f"{list(token_ids.shape)}")
    check_device("head", head, hidden)
    check_device("token_ids", token_ids, hidden)
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
