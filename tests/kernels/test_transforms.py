"""Every op under every transform of torch: right, or refused by name; never zeros, and never a term that is missing.

Letters: M tokens, V vocabulary, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad
from veripo_kernels import (
    copy_slices,
    dispatch,
    dpo_loss,
    frames_to_patches,
    gather_logprobs,
    gather_logprobs_fused,
    group_advantages,
    grpo_loss,
    linear_dpo_loss,
    linear_logprobs,
    linear_policy_loss,
    reference,
    resize_frames,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() and not dispatch.interpreted() else "cpu")


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


BOUNDS = torch.tensor([0, 2, 2, 3, 4], device=DEVICE)
GAINS = torch.tensor([1.0, -3.0, 0.5, 2.0], device=DEVICE)
IDS = torch.arange(4, device=DEVICE)
HIDDEN, HEAD, REF, TANGENT = rand(4, 6, seed=1), rand(9, 6, seed=2), rand(4, seed=3), rand(4, 6, seed=7)

Function = Callable[[torch.Tensor], torch.Tensor]

OPS: dict[str, Callable[[torch.Tensor, Any], torch.Tensor]] = {
    "linear_logprobs": lambda x, impl: linear_logprobs(x, HEAD, IDS, impl=impl),
    "linear_logprobs of the head": lambda x, impl: linear_logprobs(HIDDEN, HEAD + x[0], IDS, impl=impl),
    "linear_logprobs of the bias": lambda x, impl: linear_logprobs(HIDDEN, HEAD, IDS, bias=x.flatten()[:9], impl=impl),
    "linear_logprobs with entropy": lambda x, impl: torch.cat(
        linear_logprobs(x, HEAD, IDS, entropy=True, softcap=2.0, impl=impl)),
    "linear_policy_loss": lambda x, impl: linear_policy_loss(
        x, HEAD, IDS, None, GAINS, BOUNDS, advantages_per="token", impl=impl)[0],
    "linear_policy_loss of the head": lambda x, impl: linear_policy_loss(
        HIDDEN, HEAD + x[0], IDS, None, GAINS, BOUNDS, advantages_per="token", impl=impl)[0],
    "linear_dpo_loss": lambda x, impl: linear_dpo_loss(x, HEAD, IDS, REF, BOUNDS, impl=impl)[0],
    "gather_logprobs": lambda x, impl: gather_logprobs(x, IDS, impl=impl),
    "gather_logprobs with entropy": lambda x, impl: torch.cat(gather_logprobs(x, IDS, entropy=True, impl=impl)),
    "gather_logprobs_fused": lambda x, impl: gather_logprobs_fused(x, IDS, GAINS, impl=impl)[0],
    "group_advantages": lambda x, impl: group_advantages(x[:, 0], IDS // 2, impl=impl),
    "grpo_loss": lambda x, impl: grpo_loss(x[:, 0], None, GAINS, BOUNDS, advantages_per="token", impl=impl)[0],
    "grpo_loss of the entropy": lambda x, impl: grpo_loss(
        REF, None, GAINS, BOUNDS, loss=reference.PolicyLoss(entropy_coef=0.3), entropy=x[:, 0], advantages_per="token",
        impl=impl)[0].square(),
    "dpo_loss": lambda x, impl: dpo_loss(x[:, 0], REF, BOUNDS, impl=impl)[0]}
CASES = [(name, impl) for name in OPS for impl in dispatch.OPS[name.partition(" ")[0].removesuffix("_fused")]]
PLAIN = ("grpo_loss", "dpo_loss")
"""Their torch implementation is the definition, which torch differentiates."""
CONSTANT = ("gather_logprobs_fused", "group_advantages")
"""Ops whose results have no gradient, as documented."""


def grad(function: Function) -> Function:
    return torch.func.grad(lambda x: function(x).sum())


def dual(function: Function, x: torch.Tensor) -> torch.Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, TANGENT))).tangent


def batched_gradients(function: Function, x: torch.Tensor) -> torch.Tensor:
    leaf = x.clone().requires_grad_()
    values = function(leaf).flatten()
    return torch.autograd.grad(values, leaf, torch.eye(len(values), device=DEVICE), is_grads_batched=True)[0]


def backward_through_vmap(function: Function, x: torch.Tensor) -> torch.Tensor:
    """Also where another term of the loss has a gradient, beside which a missing one would not be seen."""
    leaf = x.clone().requires_grad_()
    batch = torch.stack([leaf, 0.5 * leaf])
    return torch.autograd.grad(torch.func.vmap(function)(batch).sum() + leaf.sum(), leaf)[0] - 1


def second_backward(function: Function, x: torch.Tensor) -> torch.Tensor:
    leaf = x.clone().requires_grad_()
    first, = torch.autograd.grad(function(leaf).square().sum(), leaf, create_graph=True)
    return torch.autograd.grad(first.square().sum(), leaf)[0]


def jacobian(function: Function, x: torch.Tensor) -> torch.Tensor:
    """[outputs..., M, D] by one backward for each output."""
    leaf = x.clone().requires_grad_()
    values = function(leaf)
    rows = [torch.autograd.grad(value, leaf, retain_graph=True)[0] for value in values.flatten()]
    return torch.stack(rows).view(*values.shape, *x.shape)


def hessian(function: Function, x: torch.Tensor) -> torch.Tensor:
    """[M, D, M, D] of the sum, by one double backward for each entry."""
    def first(at: torch.Tensor) -> torch.Tensor:
        leaf = at if at.requires_grad else at.clone().requires_grad_()
        return torch.autograd.grad(function(leaf).sum(), leaf, create_graph=True)[0]

    return jacobian(first, x)


Transform = Callable[[Function, torch.Tensor], torch.Tensor]

FORWARD: dict[str, tuple[Transform, Transform]] = {
    "jvp": (lambda f, x: torch.func.jvp(f, (x,), (TANGENT,))[1], lambda f, x: (jacobian(f, x) * TANGENT).sum((-2, -1))),
    "jacfwd": (lambda f, x: torch.func.jacfwd(f)(x), jacobian),
    "dual numbers": (dual, lambda f, x: (jacobian(f, x) * TANGENT).sum((-2, -1)))}
"""Transform, and what it must give."""
FUNCTIONAL: dict[str, tuple[Transform, Transform]] = {
    "grad": (lambda f, x: grad(f)(x), lambda f, x: jacobian(f, x).reshape(-1, *x.shape).sum(0)),
    "vjp": (lambda f, x: torch.func.vjp(lambda y: f(y).sum(), x)[1](torch.ones((), device=DEVICE))[0],
            lambda f, x: jacobian(f, x).reshape(-1, *x.shape).sum(0)),
    "jacrev": (lambda f, x: torch.func.jacrev(f)(x), jacobian),
    "vmap of grad": (lambda f, x: torch.func.vmap(grad(f))(x[None])[0],
                     lambda f, x: jacobian(f, x).reshape(-1, *x.shape).sum(0)),
    "grad of vmap": (lambda f, x: grad(lambda y: torch.func.vmap(f)(y[None]))(x),
                     lambda f, x: jacobian(f, x).reshape(-1, *x.shape).sum(0)),
    "hessian": (lambda f, x: torch.func.jacrev(torch.func.jacrev(lambda y: f(y).sum()))(x), hessian)}
SECOND: dict[str, tuple[Transform, Transform]] = {
    "second backward": (second_backward, lambda f, x: 2 * torch.einsum(
        "mdne,ne->md", hessian(lambda y: f(y).square(), x), jacobian(lambda y: f(y).square(), x).reshape(-1, *x.shape)
        .sum(0)))}
BATCHED: dict[str, tuple[Transform, Transform]] = {
    "vmap": (lambda f, x: torch.func.vmap(f)(torch.stack([x, 0.5 * x])),
             lambda f, x: torch.stack([f(x), f(0.5 * x)])),
    "backward through vmap": (backward_through_vmap, lambda f, x: sum(
        share * jacobian(f, share * x).reshape(-1, *x.shape).sum(0) for share in (1.0, 0.5))),
    "batched gradients": (batched_gradients, lambda f, x: jacobian(f, x).reshape(-1, *x.shape)),
    "vectorized jacobian": (lambda f, x: torch.autograd.functional.jacobian(f, x, vectorize=True), jacobian)}

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")


def function_of(name: str, impl: Any) -> Function:
    reason = dispatch.refusal(impl, DEVICE)
    if reason is not None:
        pytest.skip(reason)
    return lambda x: OPS[name](x, impl)


@pytest.mark.parametrize(("name", "impl"), CASES)
@pytest.mark.parametrize("transform", [*FORWARD, *FUNCTIONAL, *SECOND, *BATCHED])
def test_right_or_refused(name: str, impl: Any, transform: str) -> None:
    function, op = function_of(name, impl), name.partition(" ")[0]
    apply, expected = (FORWARD | FUNCTIONAL | SECOND | BATCHED)[transform]
    if op in CONSTANT and transform in (*SECOND, *BATCHED):
        if transform == "vmap":
            torch.testing.assert_close(apply(function, HIDDEN), expected(function, HIDDEN))
        assert not function(HIDDEN.clone().requires_grad_()).requires_grad
        return
    if transform in BATCHED or (op in PLAIN and impl == "torch"):
        torch.testing.assert_close(apply(function, HIDDEN), expected(function, HIDDEN), rtol=1e-4, atol=1e-5)
        return
    words = (f"{op} has no forward-mode derivative" if transform in FORWARD else
             f"{op} is not differentiated by torch.func.grad" if transform in FUNCTIONAL else
             f"{op}.* has no second derivative")
    with pytest.raises(NotImplementedError, match=words):
        apply(function, HIDDEN)


def test_forward_mode_of_something_else_does_not_disturb() -> None:
    with forward_ad.dual_level():
        forward_ad.make_dual(rand(3), rand(3))
        assert linear_logprobs(HIDDEN, HEAD, IDS).isfinite().all()

    def beside(x: torch.Tensor) -> torch.Tensor:
        return (x * linear_logprobs(HIDDEN, HEAD, IDS)[0]).sum()

    torch.testing.assert_close(torch.func.grad(beside)(rand(3)), linear_logprobs(HIDDEN, HEAD, IDS)[0].expand(3))


def test_frames_under_vmap() -> None:
    frames = torch.randint(255, (2, 2, 3, 28, 28), generator=torch.Generator().manual_seed(0)).to(torch.uint8)

    def patches(clip: torch.Tensor) -> torch.Tensor:
        return frames_to_patches(clip, 28, 28, mean=[0.5] * 3, std=[0.5] * 3, patch_size=14, merge_size=1)

    for function in (lambda clip: resize_frames(clip, 14, 14), patches):
        assert torch.equal(torch.func.vmap(function)(frames), torch.stack([function(clip) for clip in frames]))


@pytest.mark.parametrize("impl", ["torch", "cpp"])
def test_copies_take_no_part(impl: Any) -> None:
    function_of("linear_logprobs", impl)

    def copied(source: torch.Tensor) -> torch.Tensor:
        target = torch.empty_like(source)
        copy_slices([source], [target], impl=impl)
        return target

    for transform in (grad(copied), torch.func.vmap(copied), lambda x: torch.func.jvp(copied, (x,), (x,)),
                      lambda x: dual(copied, x)):
        with pytest.raises(NotImplementedError, match=r"copy_slices (writes into memory|has no forward-mode)"):
            transform(HIDDEN)
