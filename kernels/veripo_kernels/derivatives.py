"""Derivatives that these ops do not have are refused: torch would give zeros, or leave a term out, without a word."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad


def refuse_forward_mode(op: str, *tensors: torch.Tensor | None) -> None:
    """NotImplementedError where a tensor carries a tangent (torch.func.jvp, jacfwd, forward_ad.make_dual)."""
    if forward_ad._current_level < 0:
        return
    for tensor in tensors:
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(f"{op} has no forward-mode derivative: use reverse mode (backward, "
                                      "torch.func.vjp), or its definition in veripo_kernels.reference")


def once(op: str, gradients: tuple[torch.Tensor | None, ...]) -> tuple[torch.Tensor | None, ...]:
    """Gradients by what an op saved, as its backward returns them; differentiating them (create_graph) is an error."""
    if not torch.is_grad_enabled():
        return gradients
    return tuple(None if part is None else _Once.apply(op, part.detach().requires_grad_()) for part in gradients)


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, op: str, gradient: torch.Tensor) -> torch.Tensor:
        ctx.op = op
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> tuple[None, None]:
        raise NotImplementedError(f"{ctx.op} has no second derivative: use its definition in veripo_kernels.reference")
