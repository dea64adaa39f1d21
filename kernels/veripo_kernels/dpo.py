"""Preference losses of the DPO family on given log-probs: loss, metrics and gradient in three launches.

Letters: M tokens, B pairs. Definition: reference.dpo_loss.
"""

from __future__ import annotations

from typing import Any

import torch

from veripo_kernels import reference
from veripo_kernels.derivatives import refuse_second, refuse_transforms
from veripo_kernels.dispatch import Impl
from veripo_kernels.grpo import check_device, check_packed, implementation, readable, scale_slopes, widen
from veripo_kernels.options import PreferenceLoss, as_preference_loss, check_counts
from veripo_kernels.scalars import as_tensor, numbers_of

_METRICS = ("preference_accuracy", "margin", "chosen_logprobs_mean", "rejected_logprobs_mean", "chosen_drift")


def dpo_loss(policy_logprobs: torch.Tensor, ref_logprobs: torch.Tensor, cu_seqlens: torch.Tensor, *,
             loss: PreferenceLoss | str = "sigmoid", loss_mask: torch.Tensor | None = None,
             weights: torch.Tensor | None = None, num_pairs: int | None = None, impl: Impl = "auto",
             ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Preference loss of packed pairs: completion 2b is the chosen one of pair b, 2b + 1 the rejected one.

    Computed in float32 (float64 in float64, by the torch implementation only). Completions may be empty; tokens that
    the mask leaves out may hold anything, NaN too.

    Args:
        policy_logprobs: [M] with gradient, any float dtype. cu_seqlens: int32 or int64 [2B + 1], from 0 to M.
        ref_logprobs: [M] per token, or [B, 2] summed by `reference.pair_sums`, when they were computed before.
        loss_mask: [M] of any dtype, 0 leaves a token out. No argument but policy_logprobs gets a gradient.
        weights: [B] of any float dtype, factor of each pair's loss (WPO, arXiv 2406.11827, eq. 2); None: 1.
        num_pairs: pairs of the whole optimizer step when this is a part of it (default B).

    Returns:
        scalar loss, float32, and detached metrics, means over the pairs: preference_accuracy, margin (dpo_beta times
        the difference of the log-ratios), chosen_logprobs_mean, rejected_logprobs_mean, chosen_drift (per token).

    Raises:
        ValueError: wrong shape, dtype, device or number of completions. RuntimeError: `impl` cannot be used here.
    """
    loss = as_preference_loss(loss)
    check_packed(policy_logprobs, cu_seqlens, {"loss_mask": loss_mask})
    check_counts(num_pairs=num_pairs)
    pairs = (len(cu_seqlens) - 1) // 2
    if len(cu_seqlens) % 2 == 0:
        raise ValueError(f"cu_seqlens must bound an even number of completions, got {len(cu_seqlens) - 1}")
    if ref_logprobs.shape not in (policy_logprobs.shape, (pairs, 2)):
        raise ValueError(f"ref_logprobs must have shape [{len(policy_logprobs)}] or [{pairs}, 2], "
                         f"got {list(ref_logprobs.shape)}")
    check_device("ref_logprobs", ref_logprobs, policy_logprobs)
    if weights is not None:
        if weights.shape != (pairs,):
            raise ValueError(f"weights must have shape [{pairs}], got {list(weights.shape)}")
        check_device("weights", weights, policy_logprobs)
        weights = weights.detach()
    ref_logprobs = ref_logprobs.detach()
    if implementation("dpo_loss", impl, policy_logprobs) == "torch":
        policy, ref = widen(policy_logprobs, ref_logprobs)
        return reference.dpo_loss(policy, ref, cu_seqlens, loss=loss, loss_mask=loss_mask, weights=weights,
                                  num_pairs=num_pairs)
    refuse_transforms("dpo_loss", policy_logprobs)
    numbers = as_tensor(loss.dpo_beta, loss.label_smoothing, loss.tail_weight, loss.nll_coef, loss.discopop_tau,
                        loss.divergence_alpha)
    value, totals, _ = _forward(policy_logprobs, ref_logprobs, cu_seqlens, loss_mask, weights,
                                f"{loss.loss} {loss.score}", numbers, loss.length_normalize, num_pairs or pairs)
    return value, dict(zip(_METRICS, totals.detach()[1:6].unbind(), strict=True))


@torch.library.custom_op("veripo::dpo_loss", mutates_args=())
def _forward(policy_logprobs: torch.Tensor, ref_logprobs: torch.Tensor, cu_seqlens: torch.Tensor,
             loss_mask: torch.Tensor | None, weights: torch.Tensor | None, kinds: str, numbers: torch.Tensor,
             normalize: bool, divisor: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """loss [], totals [8] and slopes [M], all float32."""
    from veripo_kernels.jit import dpo as bodies

    policy, ref, bounds = map(readable, (policy_logprobs, ref_logprobs, cu_seqlens))
    assert policy is not None and ref is not None and bounds is not None
    return bodies.forward(policy, ref, bounds, readable(loss_mask), readable(weights), kinds.split(),
                          numbers_of(numbers), normalize, 1 / max(divisor, 1))


@_forward.register_fake
def _(policy_logprobs: torch.Tensor, ref_logprobs: torch.Tensor, cu_seqlens: torch.Tensor,
      loss_mask: torch.Tensor | None, weights: torch.Tensor | None, kinds: str, numbers: torch.Tensor, normalize: bool,
      divisor: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    new = policy_logprobs.new_empty
    return (new((), dtype=torch.float32), new(8, dtype=torch.float32),
            new(policy_logprobs.shape[0], dtype=torch.float32))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])
    ctx.dtype = inputs[0].dtype


def _backward(ctx: Any, upstream: torch.Tensor | None, *_unused: torch.Tensor | None
              ) -> tuple[torch.Tensor | None, ...]:
    refuse_second("dpo_loss")
    gradient = None
    if upstream is not None:
        totals, slopes = ctx.saved_tensors
        gradient, _ = scale_slopes(upstream, totals, slopes, slopes.new_empty(0), ctx.dtype, torch.float32)
    return gradient, *[None] * 8


_forward.register_autograd(_backward, setup_context=_save)
