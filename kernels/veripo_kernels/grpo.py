"""Policy losses of the GRPO family on given log-probs: loss, metrics and gradient in three launches.

Letters: M tokens, S completions. Definition: reference.grpo_loss. Nothing waits for the device, so that a CUDA graph
can hold the op; nothing is changed in place, so that backward may run twice.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch

from veripo_kernels import reference
from veripo_kernels.derivatives import refuse_second, refuse_transforms, wants_gradient
from veripo_kernels.dispatch import Impl, choose
from veripo_kernels.options import AdvantagesPer, PolicyLoss, as_policy_loss, check_counts, log_bounds
from veripo_kernels.scalars import as_tensor, numbers_of

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_METRICS = ("clip_low_share", "clip_high_share", "kl", "entropy", "importance", "ratio_max")
_METRIC_ROWS = (1, 2, 3, 4, 5, 7)


def grpo_loss(policy_logprobs: torch.Tensor, old_logprobs: torch.Tensor | None, advantages: torch.Tensor,
              cu_seqlens: torch.Tensor, *, loss: PolicyLoss | str = "grpo", loss_mask: torch.Tensor | None = None,
              ref_logprobs: torch.Tensor | None = None, rollout_logprobs: torch.Tensor | None = None,
              entropy: torch.Tensor | None = None, num_sequences: int | None = None, num_tokens: int | None = None,
              advantages_per: AdvantagesPer | None = None, impl: Impl = "auto",
              ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Policy loss of packed completions (which one, with its source: `PolicyLoss`).

    Computed in float32 (float64 in float64, by the torch implementation only). Completions may be empty; tokens that
    the mask leaves out may hold anything, NaN too.

    Args:
        policy_logprobs: [M] with gradient, any float dtype. old_logprobs: [M], or None when they are the policy's own.
        advantages: [M] per token or [S] per completion.
        cu_seqlens: int32 or int64 [S + 1], from 0 to M. loss_mask: [M] of any dtype, 0 leaves a token out.
        ref_logprobs, rollout_logprobs: [M]; a NaN of the latter (the engine could not score the token) weighs 1.
        entropy: [M] in nats, with gradient where it has one. No other argument gets a gradient.
        num_sequences, num_tokens: counts of the whole optimizer step when this is a part of it, at least 1.
        advantages_per: "token" or "sequence"; needed where M = S, because the shape does not say which they are.

    Returns:
        scalar loss, float32, and detached metrics: clip_low_share, clip_high_share, kl, entropy, importance (means
        under the tokens' weights, so that those of micro-batches add up) and ratio_max (0 without tokens).

    Raises:
        ValueError: wrong shape, dtype or device; a coefficient without its tensor.
        RuntimeError: `impl` cannot be used here. NotImplementedError: forward-mode derivatives of a kernel.
    """
    loss = as_policy_loss(loss)
    tokens = {"old_logprobs": old_logprobs, "loss_mask": loss_mask, "ref_logprobs": ref_logprobs,
              "rollout_logprobs": rollout_logprobs, "entropy": entropy}
    check_packed(policy_logprobs, cu_seqlens, tokens)
    check_counts(num_sequences=num_sequences, num_tokens=num_tokens)
    sequences = len(cu_seqlens) - 1
    check_device("advantages", advantages, policy_logprobs)
    advantages = reference.told_apart(advantages, cu_seqlens, len(policy_logprobs), advantages_per)
    for name, coefficient, needed, value in (("kl_coef", loss.kl_coef, "ref_logprobs", ref_logprobs),
                                             ("entropy_coef", loss.entropy_coef, "entropy", entropy)):
        if coefficient and value is None:
            raise ValueError(f"loss with {name}={coefficient} needs {needed}")
    old, gains, mask = map(_detached, (old_logprobs, advantages, loss_mask))
    ref, rollout = map(_detached, (ref_logprobs, rollout_logprobs))
    if implementation("grpo_loss", impl, policy_logprobs) == "torch":
        policy, old, gains, ref, rollout, bonus = widen(policy_logprobs, old, gains, ref, rollout, entropy)
        return reference.grpo_loss(policy, old, gains, cu_seqlens, loss=loss, loss_mask=mask, ref_logprobs=ref,
                                   rollout_logprobs=rollout, entropy=bonus, num_sequences=num_sequences,
                                   num_tokens=num_tokens,
                                   advantages_per="token" if gains.shape == policy.shape else "sequence")
    refuse_transforms("grpo_loss", policy_logprobs, entropy)
    slope = entropy is not None and wants_gradient(entropy) and loss.entropy_coef != 0
    value, totals, _, _ = _forward(policy_logprobs, old, gains, cu_seqlens, mask, ref, rollout, entropy, _kinds(loss),
                                   _numbers(loss), _divisor(loss, sequences, num_sequences, num_tokens), slope)
    return value, dict(zip(_METRICS, (totals.detach()[row] for row in _METRIC_ROWS), strict=True))


def _detached(value: torch.Tensor | None) -> Any:
    return None if value is None else value.detach()


def _kinds(loss: PolicyLoss) -> str:
    """Surrogate, weighting, KL, level and treatment of the importance weights, and whether the log-ratio of a
    completion is squared: what is compiled into a kernel."""
    return " ".join((loss.surrogate, loss.weighting, loss.kl_kind, *loss.importance.split("_"),
                     "squared" if loss.squared_coef else "plain"))


def _numbers(loss: PolicyLoss) -> torch.Tensor:
    """The constant length, and the numbers of jit.grpo.forward_kernel in its order, but for the clip's logarithms."""
    return as_tensor(loss.length or 1, loss.clip_low, loss.clip_high, loss.dual, loss.sapo_temperature_pos,
                     loss.sapo_temperature_neg, loss.vespo_k_pos, loss.vespo_lambda_pos, loss.vespo_k_neg,
                     loss.vespo_lambda_neg, loss.kl_coef, loss.importance_floor, loss.importance_cap,
                     loss.entropy_coef, loss.squared_coef)


def _divisor(loss: PolicyLoss, sequences: int, num_sequences: int | None, num_tokens: int | None) -> int:
    """What the sum over the batch is divided by; 0 stands for the tokens counted on the device."""
    return (num_tokens or 0) if loss.weighting == "token" else num_sequences or sequences


@torch.library.custom_op("veripo::grpo_loss", mutates_args=())
def _forward(policy_logprobs: torch.Tensor, old_logprobs: torch.Tensor | None, advantages: torch.Tensor,
             cu_seqlens: torch.Tensor, loss_mask: torch.Tensor | None, ref_logprobs: torch.Tensor | None,
             rollout_logprobs: torch.Tensor | None, entropy: torch.Tensor | None, kinds: str, numbers: torch.Tensor,
             divisor: int, entropy_slope: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """loss [], totals [8], slopes [M] and entropy slopes ([M], [0] unless asked for), all float32."""
    from veripo_kernels.jit import grpo as bodies

    tensors = map(readable, (policy_logprobs, old_logprobs, advantages, cu_seqlens, loss_mask, ref_logprobs,
                             rollout_logprobs, entropy))
    names = kinds.split()
    length, low, high, dual, *others = numbers_of(numbers)
    scale = 1 / (divisor * (length if names[1] == "constant" else 1)) if divisor else None
    return bodies.forward(tuple(tensors), names, [low, high, dual, *log_bounds(low, high), *others], scale,
                          entropy_slope)


@_forward.register_fake
def _(policy_logprobs: torch.Tensor, old_logprobs: torch.Tensor | None, advantages: torch.Tensor,
      cu_seqlens: torch.Tensor, loss_mask: torch.Tensor | None, ref_logprobs: torch.Tensor | None,
      rollout_logprobs: torch.Tensor | None, entropy: torch.Tensor | None, kinds: str, numbers: torch.Tensor,
      divisor: int, entropy_slope: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    tokens = policy_logprobs.shape[0]
    new = policy_logprobs.new_empty
    return (new((), dtype=torch.float32), new(8, dtype=torch.float32), new(tokens, dtype=torch.float32),
            new(tokens if entropy_slope else 0, dtype=torch.float32))


@torch.library.custom_op("veripo::grpo_loss_backward", mutates_args=())
def scale_slopes(upstream: torch.Tensor, totals: torch.Tensor, slopes: torch.Tensor, entropy_slopes: torch.Tensor,
                 dtype: torch.dtype, entropy_dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients by log-probs [M] and entropy ([M] or [0]): slopes times the factor in totals and upstream []."""
    from veripo_kernels.jit import grpo as bodies

    return bodies.backward(upstream, totals, slopes, entropy_slopes if len(entropy_slopes) else None, dtype,
                           entropy_dtype)


@scale_slopes.register_fake
def _(upstream: torch.Tensor, totals: torch.Tensor, slopes: torch.Tensor, entropy_slopes: torch.Tensor,
      dtype: torch.dtype, entropy_dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(slopes, dtype=dtype), torch.empty_like(entropy_slopes, dtype=entropy_dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)  # or autograd would launch a fill for each output that nobody differentiates
    ctx.save_for_backward(*output[1:])
    ctx.dtypes = inputs[0].dtype, torch.float32 if inputs[7] is None else inputs[7].dtype


def _backward(ctx: Any, upstream: torch.Tensor | None, *_unused: torch.Tensor | None
              ) -> tuple[torch.Tensor | None, ...]:
    refuse_second("grpo_loss")
    gradients: list[torch.Tensor | None] = [None] * 12
    if upstream is not None:
        totals, slopes, entropy_slopes = ctx.saved_tensors
        gradients[0], by_entropy = scale_slopes(upstream, totals, slopes, entropy_slopes, *ctx.dtypes)
        gradients[7] = by_entropy if len(entropy_slopes) else None
    return tuple(gradients)


_forward.register_autograd(_backward, setup_context=_save)


def implementation(op: str, impl: Impl, values: torch.Tensor) -> Impl:
    """What `impl` means for an op on values [M]; float64 is the torch implementation's."""
    if values.dtype != torch.float64:
        return choose(op, impl, values.device)
    if impl not in ("auto", "torch"):
        raise ValueError(f"{op}: impl='{impl}' has no float64; impl='torch' does")
    return "torch"


def widen(*values: torch.Tensor | None) -> tuple[Any, ...]:
    """bfloat16 and float16 to float32."""
    return tuple(value.float() if value is not None and value.dtype in (torch.bfloat16, torch.float16) else value
                 for value in values)


def readable(values: torch.Tensor | None) -> torch.Tensor | None:
    """Contiguous, and bool as bytes: what a kernel reads."""
    if values is None:
        return None
    return (values.view(torch.uint8) if values.dtype == torch.bool else values).contiguous()


def check_packed(policy_logprobs: torch.Tensor, cu_seqlens: torch.Tensor, tokens: dict[str, torch.Tensor | None]
                 ) -> None:
    """policy_logprobs [M], cu_seqlens and the tensors [M] that are given belong together."""
    if policy_logprobs.ndim != 1 or policy_logprobs.dtype not in _DTYPES:
        raise ValueError(f"policy_logprobs must be a float tensor of shape [M], got {policy_logprobs.dtype} "
                         f"{list(policy_logprobs.shape)}")
    check_cu_seqlens(cu_seqlens, policy_logprobs)
    for name, value in tokens.items():
        if value is None:
            continue
        if value.shape != policy_logprobs.shape:
            raise ValueError(f"{name} must have shape {list(policy_logprobs.shape)}, got {list(value.shape)}")
        check_device(name, value, policy_logprobs)


def check_cu_seqlens(cu_seqlens: torch.Tensor, tokens: torch.Tensor) -> None:
    """cu_seqlens [S + 1] bounds the completions of tokens [M, ...]."""
    if cu_seqlens.ndim != 1 or not len(cu_seqlens) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens must be int32 or int64 of shape [S + 1], got {cu_seqlens.dtype} "
                         f"{list(cu_seqlens.shape)}")
    check_device("cu_seqlens", cu_seqlens, tokens)
    check_bounds(cu_seqlens, len(tokens))


def check_bounds(cu_seqlens: torch.Tensor, tokens: int) -> None:
    """cu_seqlens rises from 0 to M. Only where it can be seen at once: a GPU would have to be waited for."""
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return
    bounds = cu_seqlens.tolist()
    if (bounds[0], bounds[-1]) != (0, tokens):
        raise ValueError(f"cu_seqlens must run from 0 to {tokens}, the number of tokens, got {bounds[0]} to "
                         f"{bounds[-1]}")
    for before, after in pairwise(bounds):
        if after < before:
            raise ValueError(f"cu_seqlens must not decrease, got {after} after {before}")


def check_device(name: str, value: torch.Tensor, like: torch.Tensor) -> None:
    if value.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, got {value.device}")
