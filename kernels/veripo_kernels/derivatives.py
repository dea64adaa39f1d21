"""Derivatives that these ops do not have are refused: torch would give zeros, or leave a term out, without a word."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch._C import _functorch as functorch
from torch.autograd import forward_ad


def refuse_transforms(op: str, *tensors: torch.Tensor | None) -> None:
    """NotImplementedError where a tensor carries a tangent (torch.func.jvp, jacfwd, forward_ad.make_dual), or is
    followed by torch.func.grad, vjp or jacrev."""
    given = [tensor for tensor in tensors if tensor is not None]
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in given):
        raise NotImplementedError(f"{op} has no forward-mode derivative: use reverse mode (backward, "
                                  "torch.autograd.grad), or its definition in veripo_kernels.reference")
    if torch.compiler.is_compiling() or functorch.peek_interpreter_stack() is None:
        return
    if any(functorch.is_gradtrackingtensor(layer) for tensor in given for layer in _layers(tensor)):
        raise NotImplementedError(f"{op} is not differentiated by torch.func.grad, vjp or jacrev: use backward or "
                                  "torch.autograd.grad, or its definition in veripo_kernels.reference")


def refuse_wrapped(op: str, *tensors: torch.Tensor) -> None:
    """NotImplementedError where a tensor is one of torch.func's wrappers, which have no memory to write into."""
    if any(functorch.is_functorch_wrapped_tensor(tensor) for tensor in tensors):
        raise NotImplementedError(f"{op} writes into memory: it takes no part in torch.func's transforms")


def wants_gradient(tensor: torch.Tensor) -> bool:
    """Whether backward reaches a tensor, also where torch.func.vmap has wrapped it."""
    if torch.compiler.is_compiling():
        return tensor.requires_grad
    return any(layer.requires_grad for layer in _layers(tensor))


def is_batched(tensor: torch.Tensor) -> bool:
    """Whether torch.func.vmap, or `is_grads_batched` of torch.autograd.grad, has put many tensors into one."""
    if torch.compiler.is_compiling():
        return False
    return functorch.is_functorch_wrapped_tensor(tensor) or torch._C._dispatch_keys(tensor).has("Batched")


def _layers(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensor, and what torch.func's transforms wrapped in it."""
    yield tensor
    while functorch.is_functorch_wrapped_tensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
        yield tensor


def refuse_second(op: str) -> None:
    """NotImplementedError in a backward that is itself to be differentiated (create_graph).

    Refused at once: a gradient by what an op saved is a constant to autograd, and a term that it should have had would
    be missing without a word.
    """
    if torch.is_grad_enabled():
        raise NotImplementedError(f"{op} has no second derivative: call backward without create_graph, or use its "
                                  "definition in veripo_kernels.reference")
