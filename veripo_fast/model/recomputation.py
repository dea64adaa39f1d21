"""Activations that a backward pass computes again: what norms give, what the gated MLP multiplies, and the copy of what
attention read.

Transformers' layers save all of these for the backward pass, and they are half of what a decoder layer saves. Each is a
few cheap operations away from something else that is saved: selective activation recomputation (Korthikanti et al.
2022, "Reducing Activation Recomputation in Large Transformer Models", section 5). The operations are those of
transformers' modules in their order, so values and gradients have the same bits (tests/model/test_recomputation.py).

A norm and the product of an MLP become autograd functions that save their inputs alone. The linear layers behind them
stay as they are, whoever wraps them: they save their input through hooks, and where that is an output which is here
known by its storage, the hook keeps how it was computed. Gradient checkpointing has hooks of its own, which come first:
a layer that it runs again saves what its linear layers read.

Letters: T packed tokens, D hidden, I width of the MLP.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from transformers.activations import SiLUActivation

Compute = Callable[[], torch.Tensor]


# -- saved tensors that are computed again -----------------------------------------------------------------------------


class _Again:
    """A tensor that is computed when it is asked for, and kept until all who saved it have asked."""

    def __init__(self, compute: Compute) -> None:
        self.compute = compute
        self.savers = 0
        self._asked = 0
        self._kept: torch.Tensor | None = None

    def get(self) -> torch.Tensor:
        if self._kept is None:
            with torch.no_grad():
                self._kept = self.compute()
        found, self._asked = self._kept, self._asked + 1
        if self._asked == self.savers:
            self._kept, self._asked = None, 0
        return found


class _Known:
    """Outputs of the pass that runs, by their storage, while they live: (the output, how to compute it).

    What an output is computed from lives no longer for it, unless somebody saved the output.
    """

    def __init__(self) -> None:
        self.by_address: dict[int, tuple[weakref.ref[torch.Tensor], _Again]] = {}

    def add(self, output: torch.Tensor, compute: Compute) -> None:
        address, known = output.untyped_storage().data_ptr(), self.by_address

        def gone(output: weakref.ref[torch.Tensor]) -> None:
            if address in known and known[address][0] is output:
                del known[address]

        known[address] = weakref.ref(output, gone), _Again(compute)

    def pack(self, tensor: torch.Tensor) -> Any:
        _, again = self.by_address.get(tensor.untyped_storage().data_ptr(), (None, None))
        if again is None:
            return tensor.detach()  # what an operation saves of its own output would hold itself, by its graph
        again.savers += 1
        return again, tensor.shape, tensor.stride(), tensor.storage_offset()

    @staticmethod
    def unpack(packed: Any) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        again, shape, stride, offset = packed
        return again.get().as_strided(shape, stride, offset)


_known: ContextVar[_Known | None] = ContextVar("known", default=None)  # of a thread, as hooks are


@contextmanager
def recomputing() -> Iterator[None]:
    """A block around a forward pass whose layers `recompute` has changed; without gradients it does nothing."""
    if not torch.is_grad_enabled():
        yield
        return
    known = _Known()
    before = _known.set(known)
    try:
        with torch.autograd.graph.saved_tensors_hooks(known.pack, known.unpack):
            yield
    finally:
        _known.reset(before)


def computed_by(output: torch.Tensor, compute: Compute) -> torch.Tensor:
    """`output`, which those who save it now compute again by `compute`: a contiguous tensor of the same values."""
    known = _known.get()
    if known is not None and output.is_contiguous():
        known.add(output, compute)
    return output


# -- norms -------------------------------------------------------------------------------------------------------------


def _normed(inputs: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor, centred: bool) -> torch.Tensor:
    """What a norm gives.

    Args:
        scale: float32 [..., 1], one over the root of the mean square.
        centred: it multiplies by 1 + weight in float32, else by the weight in its own dtype.
    """
    wide = inputs.float() * scale
    return (wide * (1.0 + weight.float())).type_as(inputs) if centred else weight * wide.to(inputs.dtype)


class _Norm(torch.autograd.Function):
    """RMS norm that saves its input and a scale per token.

    The input comes twice, as in the formula x * scale(x): in float32 autograd adds both parts of its gradient to that
    of the residual stream one after the other, which rounds otherwise than their sum.
    """

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, again: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor,
                centred: bool) -> torch.Tensor:
        ctx.save_for_backward(inputs, scale, weight)
        ctx.centred = centred
        return _normed(inputs, scale, weight, centred)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        inputs, scale, weight = ctx.saved_tensors
        wide = inputs.float()
        normed = wide * scale
        over = tuple(range(grad.dim() - 1))
        if ctx.centred:
            grad = grad.float()
            by_weight = (grad * normed).sum(over).to(weight.dtype) if ctx.needs_input_grad[3] else None
            grad = grad * (1.0 + weight.float())
        else:
            by_weight = (grad * normed.to(grad.dtype)).sum(over) if ctx.needs_input_grad[3] else None
            grad = (grad * weight).float()
        if not ctx.needs_input_grad[0]:
            return None, None, None, by_weight, None
        by_scale = (grad * wide).sum(-1, keepdim=True)
        by_mean = -0.5 * by_scale * scale.pow(3) / wide.shape[-1]
        direct, through_scale = grad * scale, by_mean * (2.0 * wide)
        if inputs.dtype == torch.float32:
            return direct, through_scale, None, by_weight, None
        return (direct + through_scale).to(inputs.dtype), None, None, by_weight, None


def _norm_forward(norm: Any, plain: Any, eps: float, centred: bool, hidden_states: torch.Tensor) -> torch.Tensor:
    """[..., D] -> [..., D], as transformers' module."""
    weight = norm.weight
    if not torch.is_grad_enabled() or weight.dtype != hidden_states.dtype:
        plain_output: torch.Tensor = plain(norm, hidden_states)
        return plain_output
    inputs, own_weight = hidden_states.detach(), weight.detach().clone()  # whoever shards takes the weight away
    scale = torch.rsqrt(inputs.float().pow(2).mean(-1, keepdim=True) + eps)
    output = _Norm.apply(hidden_states, hidden_states, scale, weight, centred)
    return computed_by(output, lambda: _normed(inputs, scale, own_weight, centred))


# -- the gated MLP -----------------------------------------------------------------------------------------------------


class _Gated(torch.autograd.Function):
    """silu(gate) * up, which saves both and nothing else."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), grad * F.silu(gate)


def _mlp_forward(mlp: Any, plain: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """[..., D] -> [..., D], as transformers' module: down(silu(gate(x)) * up(x)), of width I."""
    if not torch.is_grad_enabled():
        plain_output: torch.Tensor = plain(mlp, hidden_states)
        return plain_output
    gate, up = mlp.gate_proj(hidden_states), mlp.up_proj(hidden_states)
    kept = gate.detach(), up.detach()
    product = computed_by(_Gated.apply(gate, up), lambda: F.silu(kept[0]) * kept[1])
    down: torch.Tensor = mlp.down_proj(product)
    return down


# -- one model ---------------------------------------------------------------------------------------------------------


def recompute(language_model: torch.nn.Module) -> None:
    """Let the norms and gated MLPs of one model save less, least inside of `recomputing`.

    Only transformers' own are changed: Liger's norms and MLPs have their own way.
    """
    for module in language_model.modules():
        kind = type(module)
        if "forward" in module.__dict__ or not kind.__module__.startswith("transformers.models."):
            continue  # the first: another policy of the same model has done so
        if kind.__name__.endswith("RMSNorm"):
            centred = not hasattr(module, "variance_epsilon")
            eps: Any = module.eps if centred else module.variance_epsilon
            module.forward = partial(_norm_forward, module, kind.forward, eps, centred)
        elif hasattr(module, "gate_proj") and isinstance(module.act_fn, (torch.nn.SiLU, SiLUActivation)):
            module.forward = partial(_mlp_forward, module, kind.forward)
