"""Log-probabilities of chosen tokens, and entropy, of logits that are already in memory.

Letters: T rows, V vocabulary. Definition: reference.gather_logprobs and reference.entropy. Forward reads the logits
once, backward reads them once more and writes their gradient; no implementation makes anything else of size [T, V].
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal, overload

import torch

from veripo_kernels.derivatives import refuse_second, refuse_transforms
from veripo_kernels.dispatch import Impl, choose
from veripo_kernels.scalars import as_tensor, numbers_of

_CHUNK_BYTES = 256 << 20
"""Bound on the temporaries of the torch implementation, in bytes; one row is computed even where it needs more."""

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@overload
def gather_logprobs(logits: torch.Tensor, token_ids: torch.Tensor, *, temperature: float = ...,
                    entropy: Literal[False] = ..., impl: Impl = ...) -> torch.Tensor: ...


@overload
def gather_logprobs(logits: torch.Tensor, token_ids: torch.Tensor, *, temperature: float = ..., entropy: Literal[True],
                    impl: Impl = ...) -> tuple[torch.Tensor, torch.Tensor]: ...


def gather_logprobs(logits: torch.Tensor, token_ids: torch.Tensor, *, temperature: float = 1.0, entropy: bool = False,
                    impl: Impl = "auto") -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """log softmax(logits / temperature) at token_ids, with `entropy` also the entropy in nats; gradients through both.

    Logits of -inf have probability 0 and add nothing to the entropy. A token id outside of 0 to V - 1 gives NaN,
    and where a mask takes that row out of the loss, gradient 0.

    Args:
        logits: [..., V] bfloat16, float16, float32 or float64 (torch implementation only). Rows that one stride cannot
            reach (`logits[:, :-1]` of a batch) are copied: shift token_ids instead.
        token_ids: int64 [...].

    Returns:
        [...] float32 (float64 for float64 logits), or two of them. The gradient has the dtype of logits.

    Raises:
        ValueError: wrong shape, dtype, device or temperature. RuntimeError: `impl` cannot be used here.
    """
    _check(logits, token_ids, temperature)
    refuse_transforms("gather_logprobs", logits)
    logprobs, entropies, _ = _forward(_rows(logits), token_ids.reshape(-1), as_tensor(temperature), entropy, impl)
    if not entropy:
        return logprobs.view(token_ids.shape)
    return logprobs.view(token_ids.shape), entropies.view(token_ids.shape)


def gather_logprobs_fused(logits: torch.Tensor, token_ids: torch.Tensor, coefficient: torch.Tensor, *,
                          temperature: float = 1.0, impl: Impl = "auto") -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and the gradient of sum(coefficient * logprobs), in one go; no autograd.

    For losses whose derivative by each log-probability is known before the forward.

    Args:
        logits, token_ids, temperature: as in `gather_logprobs`.
        coefficient: [...] of any float dtype.

    Returns:
        logprobs [...] and dlogits [..., V] in the dtype of logits.
    """
    _check(logits, token_ids, temperature)
    _check_like("coefficient", coefficient, token_ids)
    refuse_transforms("gather_logprobs_fused", logits, coefficient)
    logprobs, dlogits = _fused(_rows(logits).detach(), token_ids.reshape(-1), coefficient.detach().reshape(-1),
                               as_tensor(temperature), impl)
    return logprobs.view(token_ids.shape), dlogits.view(logits.shape)


def _check(logits: torch.Tensor, token_ids: torch.Tensor, temperature: float) -> None:
    if logits.dtype not in _DTYPES:
        raise ValueError(f"logits must be bfloat16, float16, float32 or float64, got {logits.dtype}")
    if logits.ndim == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits must have shape [..., V] with V of at least 1, got {tuple(logits.shape)}")
    if token_ids.dtype != torch.int64:
        raise ValueError(f"token_ids must be int64, got {token_ids.dtype}")
    _check_like("token_ids", token_ids, logits[..., 0])
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}")


def _check_like(name: str, got: torch.Tensor, like: torch.Tensor) -> None:
    if got.shape != like.shape:
        raise ValueError(f"{name} must have shape {list(like.shape)}, got {list(got.shape)}")
    if got.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, got {got.device}")


def _rows(logits: torch.Tensor) -> torch.Tensor:
    """[T, V] with unit column stride; a view where there is one."""
    rows = logits.reshape(-1, logits.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _implementation(impl: str, logits: torch.Tensor) -> Any:
    """What computes the op: a module or class with forward, backward and fused."""
    double = logits.dtype == torch.float64
    if double and impl not in ("auto", "torch"):
        raise ValueError(f"gather_logprobs: impl='{impl}' has no float64; impl='torch' does")
    chosen = "torch" if double else choose("gather_logprobs", impl, logits.device)
    if chosen == "triton":
        from veripo_kernels.jit import gather as triton_bodies

        return triton_bodies
    return _Cpp if chosen == "cpp" else _Torch


@torch.library.custom_op("veripo::gather_logprobs", mutates_args=())
def _forward(logits: torch.Tensor, token_ids: torch.Tensor, temperature: torch.Tensor, entropy: bool, impl: str
              ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """logprobs [T], entropy [T] ([0] unless asked for) and normalizer [3, T].

    The normalizer is the largest of logits / temperature in each row (Triton: of logits), the logarithm of the sum of
    exponentials relative to it, and for Triton the token's 1 - p. The first two added up would lose the digits of small
    probabilities where logits are large; the compiled op gives only the sum, beside which stands 0.
    """
    return _implementation(impl, logits).forward(logits, token_ids.contiguous(), numbers_of(temperature)[0], entropy)


@_forward.register_fake
def _(logits: torch.Tensor, token_ids: torch.Tensor, temperature: torch.Tensor, entropy: bool, impl: str
      ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, dtype = logits.shape[0], _wide(logits)
    return (logits.new_empty(rows, dtype=dtype), logits.new_empty(rows if entropy else 0, dtype=dtype),
            logits.new_empty(3, rows, dtype=dtype))


@torch.library.custom_op("veripo::gather_logprobs_backward", mutates_args=())
def _backward(logits: torch.Tensor, token_ids: torch.Tensor, normalizer: torch.Tensor, entropy: torch.Tensor,
              dlogprobs: torch.Tensor, dentropy: torch.Tensor, temperature: torch.Tensor, impl: str) -> torch.Tensor:
    return _implementation(impl, logits).backward(logits, token_ids.contiguous(), normalizer, entropy,
                                                  dlogprobs.contiguous(), dentropy.contiguous(),
                                                  numbers_of(temperature)[0])


@_backward.register_fake
def _(logits: torch.Tensor, token_ids: torch.Tensor, normalizer: torch.Tensor, entropy: torch.Tensor,
      dlogprobs: torch.Tensor, dentropy: torch.Tensor, temperature: torch.Tensor, impl: str) -> torch.Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@torch.library.custom_op("veripo::gather_logprobs_fused", mutates_args=())
def _fused(logits: torch.Tensor, token_ids: torch.Tensor, coefficient: torch.Tensor, temperature: torch.Tensor,
           impl: str) -> tuple[torch.Tensor, torch.Tensor]:
    return _implementation(impl, logits).fused(logits, token_ids.contiguous(),
                                               coefficient.to(_wide(logits)).contiguous(), numbers_of(temperature)[0])


@_fused.register_fake
def _(logits: torch.Tensor, token_ids: torch.Tensor, coefficient: torch.Tensor, temperature: torch.Tensor, impl: str
      ) -> tuple[torch.Tensor, torch.Tensor]:
    return (logits.new_empty(logits.shape[0], dtype=_wide(logits)),
            torch.empty_like(logits, memory_format=torch.contiguous_format))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    logits, token_ids, temperature, _, ctx.impl = inputs
    _, entropy, normalizer = output
    ctx.save_for_backward(logits, token_ids, normalizer, entropy, temperature)


def _differentiate(ctx: Any, dlogprobs: torch.Tensor, dentropy: torch.Tensor, _: torch.Tensor) -> tuple[Any, ...]:
    refuse_second("gather_logprobs")
    logits, token_ids, normalizer, entropy, temperature = ctx.saved_tensors
    dlogits = _backward(logits, token_ids, normalizer, entropy, dlogprobs, dentropy, temperature, ctx.impl)
    return dlogits, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_setup)


def _wide(logits: torch.Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


class _Cpp:
    """The compiled op, which always computes the entropy: it costs nothing beside reading the logits."""

    @staticmethod
    def forward(logits: torch.Tensor, token_ids: torch.Tensor, temperature: float, entropy: bool
                ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        from veripo_kernels import cpp

        logprobs, entropies, lse = cpp.forward(logits, token_ids, temperature)
        normalizer = torch.stack((lse, *lse.new_zeros(2, len(lse))))
        return logprobs, entropies if entropy else entropies.new_empty(0), normalizer

    @staticmethod
    def backward(logits: torch.Tensor, token_ids: torch.Tensor, normalizer: torch.Tensor, entropy: torch.Tensor,
                 dlogprobs: torch.Tensor, dentropy: torch.Tensor, temperature: float) -> torch.Tensor:
        from veripo_kernels import cpp

        if not entropy.numel():
            entropy = dentropy = torch.zeros_like(dlogprobs)
        return cpp.backward(logits, token_ids, normalizer[0], entropy, dlogprobs, dentropy, temperature)

    @staticmethod
    def fused(logits: torch.Tensor, token_ids: torch.Tensor, coefficient: torch.Tensor, temperature: float
              ) -> tuple[torch.Tensor, torch.Tensor]:
        from veripo_kernels import cpp

        return cpp.fused(logits, token_ids, coefficient, temperature)


class _Torch:
    """Plain torch, over so many rows at a time that the temporaries stay within `_CHUNK_BYTES`."""

    @staticmethod
    def forward(logits: torch.Tensor, token_ids: torch.Tensor, temperature: float, entropy: bool
                ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        rows, dtype = logits.shape[0], _wide(logits)
        logprobs, normalizer = logits.new_empty(rows, dtype=dtype), logits.new_zeros(3, rows, dtype=dtype)
        entropies = logits.new_empty(rows if entropy else 0, dtype=dtype)
        for part in _chunks(logits):
            scaled = _scaled(logits[part], temperature)
            peak, place = scaled.max(-1, keepdim=True)
            gaps = scaled.sub_(peak)
            others = gaps.exp().scatter_(-1, place, gaps.gather(-1, place))  # the peak: 0, or NaN
            log_total = others.sum(-1, keepdim=True).log1p()  # beside the peak's 1 a small sum would be lost
            log_p = gaps.sub_(log_total)
            normalizer[:2, part] = torch.cat((peak, log_total), 1).T
            logprobs[part] = _chosen(log_p, token_ids[part])
            if entropy:
                entropies[part] = -(log_p.exp() * _finite(log_p)).sum(-1)
        return logprobs, entropies, normalizer

    @staticmethod
    def backward(logits: torch.Tensor, token_ids: torch.Tensor, normalizer: torch.Tensor, entropy: torch.Tensor,
                 dlogprobs: torch.Tensor, dentropy: torch.Tensor, temperature: float) -> torch.Tensor:
        dlogits = torch.empty_like(logits, memory_format=torch.contiguous_format)
        for part in _chunks(logits):
            log_p = _scaled(logits[part], temperature)
            log_p.sub_(normalizer[0, part, None]).sub_(normalizer[1, part, None])
            weight, own = -dlogprobs[part, None], _chosen(log_p, token_ids[part])
            own_slopes = -dlogprobs[part] * own.expm1()  # with all digits of 1 - p
            if entropy.numel():
                weight = weight - dentropy[part, None] * (entropy[part, None] + _finite(log_p))
                own_slopes -= dentropy[part] * own.exp() * (entropy[part] + _finite(own))
            dlogits[part] = _put_chosen(log_p.exp_().mul_(weight), token_ids[part], own_slopes).div_(temperature)
        return dlogits

    @staticmethod
    def fused(logits: torch.Tensor, token_ids: torch.Tensor, coefficient: torch.Tensor, temperature: float
              ) -> tuple[torch.Tensor, torch.Tensor]:
        logprobs, entropy, normalizer = _Torch.forward(logits, token_ids, temperature, False)
        return logprobs, _Torch.backward(logits, token_ids, normalizer, entropy, coefficient, entropy, temperature)


def _chunks(logits: torch.Tensor) -> Iterator[slice]:
    """Slices of rows; five temporaries of a chunk's size live at most."""
    rows, vocabulary = logits.shape
    step = max(1, _CHUNK_BYTES // (5 * vocabulary * _wide(logits).itemsize))
    return (slice(start, start + step) for start in range(0, rows, step))


def _scaled(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """A new float32 (float64) tensor of logits / temperature."""
    return logits.to(_wide(logits), copy=True).div_(temperature)


def _chosen(log_p: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Values [T] of log_p [T, V] at token_ids, NaN at ids that are outside."""
    known = (token_ids >= 0) & (token_ids < log_p.shape[-1])
    return log_p.gather(-1, token_ids.where(known, 0)[:, None])[:, 0].masked_fill(~known, torch.nan)


def _put_chosen(slopes: torch.Tensor, token_ids: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """slopes [T, V] with own [T] at token_ids; rows whose id is outside stay as they are."""
    known = (token_ids >= 0) & (token_ids < slopes.shape[-1])
    return slopes.scatter_(-1, token_ids.where(known, 0)[:, None], own.where(known, slopes[:, 0])[:, None])


def _finite(log_p: torch.Tensor) -> torch.Tensor:
    """log p with a number for -inf, so that 0 * log 0 is 0."""
    return log_p.clamp(min=-1e4)
