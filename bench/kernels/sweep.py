"""Every op on a device against float64: float32 and bfloat16, ragged shapes, the real vocabulary, over 2^31 logits.

`sweep` yields one result per case, `smoke` gives one small case per op. A kernel may be off by twice what torch is in
the same type, plus some roundings; where that would allow too much (bfloat16 logits) by the project's limits.
Letters: T tokens, V vocabulary, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, get_args

import torch
from veripo_kernels import (
    PolicyLoss,
    PreferenceLoss,
    copy_slices,
    dpo_loss,
    frames_to_patches,
    frames_torch,
    gather_logprobs,
    gather_logprobs_fused,
    group_advantages,
    grpo_loss,
    linear_dpo_loss,
    linear_logprobs,
    planes_to_frames,
    planes_to_patches,
    reference,
    resize_frames,
)
from veripo_kernels.options import PolicyLossName, PreferenceLossName
from veripo_kernels.scalars import as_tensor

from bench.kernels import cases
from bench.kernels.cases import Shape
from bench.kernels.peers import eager_policy_loss, naive_logprobs, our_policy_loss
from bench.measure import relative_error

POLICY_LOSSES, PREFERENCE_LOSSES = get_args(PolicyLossName), get_args(PreferenceLossName)


@dataclass(frozen=True)
class Sizes:
    """How large the sweep's cases are."""

    vocabulary: int = 151936
    hidden: int = 1024
    many_rows: int = 14200
    """Times the vocabulary this is more than 2^31."""
    long_completion: int = 70000
    """More than 65,535 tokens."""


TINY = Sizes(vocabulary=300, hidden=24, many_rows=40, long_completion=90)


def sweep(device: torch.device, sizes: Sizes) -> Iterator[tuple[str, Callable[[], None]]]:
    """Names and checks; a check raises AssertionError."""
    return chain(_gather_cases(device, sizes), _linear_cases(device, sizes), _loss_cases(device, sizes),
                 _opcheck_cases(device), _large_cases(device, sizes))


def smoke(device: torch.device) -> dict[str, Callable[[], None]]:
    """A check of each op on a small ragged case in bfloat16 (losses in float32), by its name in `dispatch.OPS`.

    Ops with a Triton kernel are checked on that one, the others on what `auto` takes.
    """
    shape = Shape(65, 40, 257)
    return {"linear_policy_loss": lambda: _policy(device, torch.bfloat16, shape, True),
            "gather_logprobs": lambda: _gather(device, torch.bfloat16, 33, 257),
            "linear_logprobs": lambda: _logprobs(device, torch.bfloat16, shape),
            "linear_dpo_loss": lambda: _linear_dpo(device, torch.bfloat16, shape),
            "grpo_loss": lambda: _loss(grpo_loss, PolicyLoss("grpo"), device, TINY),
            "dpo_loss": lambda: _loss(dpo_loss, PreferenceLoss(), device, TINY),
            "group_advantages": lambda: _advantages("std", device),
            **{name: lambda name=name: _frames(device, name) for name in FRAME_OPS},
            "copy_slices": lambda: _copy(device)}


def close(what: str, got: torch.Tensor, want: torch.Tensor, torch_got: torch.Tensor | None = None, *,
          allowed: float = 1e-5) -> None:
    """Relative error at most twice torch's plus `allowed`; everything finite."""
    assert got.isfinite().all(), f"{what} is not finite"
    plain = 0.0 if torch_got is None else relative_error(torch_got, want)
    error = relative_error(got, want) if want.dim() else float((got.double() - want).abs() / want.abs().clamp(min=1))
    assert error <= 2 * plain + allowed, (
        f"{what}: relative error {error:.2e}, torch's {plain:.2e}, allowed {allowed:.0e} more")


def rounding(dtype: torch.dtype) -> float:
    return 4 * torch.finfo(dtype).eps


# -- logits in memory ------------------------------------------------------------------------------------------------

def _gather_cases(device: torch.device, sizes: Sizes) -> Iterator[tuple[str, Callable[[], None]]]:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for rows, vocabulary in ((5, 1000 % sizes.vocabulary), (33, sizes.vocabulary), (3, 129)):
            yield (f"gather_logprobs {dtype} [{rows}, {vocabulary}]",
                   lambda d=dtype, r=rows, v=vocabulary: _gather(device, d, r, v))


def _gather(device: torch.device, dtype: torch.dtype, rows: int, vocabulary: int) -> None:
    case = cases.logits(Shape(rows, 1, vocabulary), dtype, device)
    wide = torch.cat([case.logits, case.logits[:, :3]], 1)[:, :vocabulary]  # rows that do not follow each other

    def run(logits: torch.Tensor, impl: str) -> list[torch.Tensor]:
        leaf = logits.detach().requires_grad_()
        logprobs, entropy = gather_logprobs(leaf, case.token_ids, temperature=0.7, entropy=True, impl=impl)
        slopes = case.slopes.to(logprobs.dtype)
        return [logprobs.detach(), entropy.detach(), *torch.autograd.grad((slopes * (logprobs + entropy)).sum(), leaf)]

    truth = run(case.logits.double(), "torch")
    for logits in (case.logits, wide):
        for name, got, plain, want in zip(("logprobs", "entropy", "dlogits"), run(logits, "triton"),
                                          run(logits, "torch"), truth, strict=True):
            close(name, got, want, plain, allowed=rounding(got.dtype))
    fused, dlogits = gather_logprobs_fused(case.logits, case.token_ids, case.slopes, temperature=0.7, impl="triton")
    leaf = case.logits.double().requires_grad_()
    logprobs = gather_logprobs(leaf, case.token_ids, temperature=0.7, impl="torch")
    close("fused logprobs", fused, logprobs.detach(), allowed=rounding(torch.float32))
    close("fused dlogits", dlogits, torch.autograd.grad(logprobs, leaf, case.slopes.double())[0],
          allowed=rounding(dtype))


# -- hidden states and head ------------------------------------------------------------------------------------------

def _linear_cases(device: torch.device, sizes: Sizes) -> Iterator[tuple[str, Callable[[], None]]]:
    shapes = (Shape(7, 64 % sizes.hidden or 64, 130), Shape(129, sizes.hidden, sizes.vocabulary), Shape(65, 40, 257))
    for dtype in (torch.float32, torch.bfloat16):
        for shape in shapes:
            for train_head in (True, False):
                title = f"{dtype} {tuple(shape)} {'trainable' if train_head else 'frozen'} head"
                yield (f"linear_policy_loss {title}",
                       lambda d=dtype, s=shape, t=train_head: _policy(device, d, s, t))
            yield f"linear_logprobs {dtype} {tuple(shape)}", lambda d=dtype, s=shape: _logprobs(device, d, s)
            yield f"linear_dpo_loss {dtype} {tuple(shape)}", lambda d=dtype, s=shape: _linear_dpo(device, d, s)


def _limit(name: str, dtype: torch.dtype) -> float:
    """For gradients in bfloat16 its own rounding; kept logits of two bytes may add as much."""
    return 4e-3 if name.startswith("d") and dtype == torch.bfloat16 else 2e-5


def _policy(device: torch.device, dtype: torch.dtype, shape: Shape, train_head: bool) -> None:
    case = cases.problem(shape, dtype, device, idle=0.5, train_head=train_head)
    case = replace(case, workspace_bytes=40 * shape.vocabulary * 4)  # several runs of rows
    truth = eager_policy_loss(naive_logprobs, case.to(torch.float64))
    for name, got in our_policy_loss(case, "triton").items():
        close(name, got, truth[name], allowed=_limit(name, dtype))


def _logprobs(device: torch.device, dtype: torch.dtype, shape: Shape) -> None:
    """With bias, softcap, temperature, and gradients through the entropy."""
    case = cases.problem(shape, dtype, device)
    bias = torch.linspace(-1, 1, shape.vocabulary, device=device).to(dtype)
    exact = case.to(torch.float64)
    leaves = [value.detach().requires_grad_() for value in (exact.hidden, exact.head, bias.double())]
    logits = reference.linear_logits(*leaves[:2], bias=leaves[2], softcap=30.0)
    want = (reference.gather_logprobs(logits, case.token_ids, temperature=0.7),
            reference.entropy(logits, temperature=0.7))
    truth = torch.autograd.grad((exact.slopes * (want[0] + 0.1 * want[1])).sum(), leaves)
    mine = [value.detach().requires_grad_() for value in (case.hidden, case.head, bias)]
    got = linear_logprobs(*mine[:2], case.token_ids, temperature=0.7, entropy=True, bias=mine[2], softcap=30.0,
                          impl="triton")
    close("logprobs", got[0].detach(), want[0].detach(), allowed=2e-5)
    close("entropy", got[1].detach(), want[1].detach(), allowed=1e-4)
    gradients = torch.autograd.grad((case.slopes * (got[0] + 0.1 * got[1])).sum(), mine)
    for name, value, true in zip(("dhidden", "dhead", "dbias"), gradients, truth, strict=True):
        close(name, value, true, allowed=2 * _limit(name, dtype))


def _linear_dpo(device: torch.device, dtype: torch.dtype, shape: Shape) -> None:
    case = cases.problem(shape, dtype, device)

    def run(case: cases.Problem, impl: str) -> dict[str, torch.Tensor]:
        leaves = case.leaves()
        loss, _, logprobs = linear_dpo_loss(*leaves, case.token_ids, case.old_logprobs, case.cu_seqlens, impl=impl)
        return {"loss": loss.detach(), "logprobs": logprobs, **dict(zip(("dhidden", "dhead"),
                                                                       torch.autograd.grad(loss, leaves), strict=True))}

    truth = run(case.to(torch.float64), "torch")
    for name, got in run(case, "triton").items():
        close(name, got, truth[name], allowed=_limit(name, dtype))


# -- losses of given log-probs ---------------------------------------------------------------------------------------

def _loss_cases(device: torch.device, sizes: Sizes) -> Iterator[tuple[str, Callable[[], None]]]:
    for name in POLICY_LOSSES:
        yield f"grpo_loss {name}", lambda n=name: _loss(grpo_loss, PolicyLoss(n, constant_length=64), device, sizes)
    for name in PREFERENCE_LOSSES:
        loss = PreferenceLoss(name, label_smoothing=0.1 if name in ("robust", "exo") else 0.0)  # type: ignore[arg-type]
        yield f"dpo_loss {name}", lambda loss=loss: _loss(dpo_loss, loss, device, sizes)
    for kind in ("std", "no_std", "leave_one_out", "batch_std"):
        yield f"group_advantages {kind}", lambda k=kind: _advantages(k, device)


def _loss(loss_of: Callable[..., Any], loss: PolicyLoss | PreferenceLoss, device: torch.device, sizes: Sizes) -> None:
    """A completion of more than 65,535 tokens, an empty one, and two short ones."""
    lengths = torch.tensor([sizes.long_completion, 0, 5, 300 % sizes.long_completion])
    tokens = int(lengths.sum())
    case = cases.rollouts(max(tokens, 2), device)
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(device)
    advantages = torch.tensor([0.5, -1.0, 2.0, -0.7], device=device)
    given = (case.old_logprobs, advantages) if loss_of is grpo_loss else (case.ref_logprobs,)
    mask = torch.arange(tokens, device=device) % 7 != 3

    def run(dtype: torch.dtype, impl: str) -> list[torch.Tensor]:
        leaf = case.policy_logprobs.to(dtype).detach().requires_grad_()
        value, metrics = loss_of(leaf, *(part.to(dtype) for part in given), cu_seqlens, loss=loss, loss_mask=mask,
                                 impl=impl)
        return [value.detach(), torch.stack([metrics[key] for key in sorted(metrics)]),
                *torch.autograd.grad(value, leaf)]

    for name, got, plain, want in zip(("loss", "metrics", "dlogprobs"), run(torch.float32, "triton"),
                                      run(torch.float32, "torch"), run(torch.float64, "torch"), strict=True):
        close(name, got, want, plain)


def _advantages(kind: str, device: torch.device) -> None:
    rewards = torch.randn(37, generator=torch.Generator().manual_seed(0)).to(device)
    groups = (torch.arange(37, device=device) * 7) % 5
    want = group_advantages(rewards.double(), groups, kind=kind, impl="torch")  # type: ignore[arg-type]
    close("advantages", group_advantages(rewards, groups, kind=kind, impl="triton"), want)  # type: ignore[arg-type]


# -- frames and slices: what `auto` takes on the device against plain torch on the CPU --------------------------------

FRAME_OPS: dict[str, Callable[..., torch.Tensor]] = {
    "resize_frames": resize_frames, "frames_to_patches": frames_to_patches, "planes_to_frames": planes_to_frames,
    "planes_to_patches": planes_to_patches}


def _frames(device: torch.device, name: str) -> None:
    """Levels, and patches scaled to levels, may be two off: torch on a GPU filters in float32, not in integers."""
    random = torch.Generator().manual_seed(0)
    planes = name.startswith("planes")
    sizes = [(3, 45, 70), (3, 23, 35), (3, 23, 35)] if planes else [(3, 3, 45, 70)]
    pixels = [torch.randint(256, size, dtype=torch.uint8, generator=random) for size in sizes]
    geometry: dict[str, Any] = {"mean": (0.0,) * 3, "std": (1 / 255,) * 3, "patch_size": 14, "merge_size": 2,
                                "temporal_patch_size": 2} if name.endswith("patches") else {}
    frames = frames_torch.planes_to_rgb(*pixels, frames_torch.yuv_matrix("bt601", False)) if planes else pixels[0]
    want = (frames_torch.frames_to_patches(frames, 28, 56, dtype=torch.float32, **geometry) if geometry
            else frames_torch.resize_frames(frames, 28, 56))
    colours = {"matrix": "bt601"} if planes else {}
    got = FRAME_OPS[name](*(plane.to(device) for plane in pixels), 28, 56, **colours, **geometry)
    error = float((got.cpu().float() - want.float()).abs().max())
    assert error <= 2.001, f"{name}: {error:.3f} levels off"  # 1 / 255 is no number of float32


def _copy(device: torch.device) -> None:
    source = torch.randn(33, 50, generator=torch.Generator().manual_seed(0))
    sources = [source.to(device)[:, :41], source.to(device)[1:7]]
    targets = [torch.empty(part.shape, dtype=torch.bfloat16, device=device) for part in sources]
    sent, arrived = copy_slices(sources, targets).tolist()
    assert sent == arrived, f"checksums {sent} and {arrived}"
    for part, target in zip(sources, targets, strict=True):
        assert torch.equal(target, part.bfloat16()), "another element than torch rounds to"


# -- registration, and sizes that overflow ---------------------------------------------------------------------------

def _opcheck_cases(device: torch.device) -> Iterator[tuple[str, Callable[[], None]]]:
    case = cases.problem(Shape(9, 32, 130), torch.float32, device)
    leaves = case.leaves()
    plain = cases.logits(Shape(5, 1, 130), torch.float32, device)
    ops = torch.ops.veripo
    yield "opcheck gather_logprobs", lambda: _opcheck(
        ops.gather_logprobs, (plain.logits.requires_grad_(), plain.token_ids, as_tensor(0.7), True, "triton"))
    yield "opcheck linear_logprobs", lambda: _opcheck(
        ops.linear_logprobs, (*leaves, case.token_ids, None, as_tensor(0.7, None), True, False, "triton"))


def _opcheck(op: Any, arguments: tuple[Any, ...]) -> None:
    torch.library.opcheck(op.default, arguments)


def _large_cases(device: torch.device, sizes: Sizes) -> Iterator[tuple[str, Callable[[], None]]]:
    elements = sizes.many_rows * sizes.vocabulary
    yield f"gather_logprobs with {elements} logits", lambda: _many_logits(device, sizes)
    yield f"linear_policy_loss with {elements} logits", lambda: _many_rows(device, sizes)


def _many_logits(device: torch.device, sizes: Sizes) -> None:
    """The last rows of a large tensor as they are alone."""
    case = cases.logits(Shape(sizes.many_rows, 1, sizes.vocabulary), torch.bfloat16, device)

    def run(rows: slice) -> list[torch.Tensor]:
        leaf = case.logits[rows].detach().requires_grad_()
        logprobs = gather_logprobs(leaf, case.token_ids[rows], impl="triton")
        return [logprobs.detach()[-8:], torch.autograd.grad(logprobs, leaf, case.slopes[rows])[0][-8:]]

    for name, got, want in zip(("logprobs", "dlogits"), run(slice(None)), run(slice(-8, None)), strict=True):
        close(name, got, want, allowed=1e-6)


def _many_rows(device: torch.device, sizes: Sizes) -> None:
    """One run of rows that holds them all against runs that hold a few each."""
    case = cases.problem(Shape(sizes.many_rows, 64, sizes.vocabulary), torch.bfloat16, device)
    pitch = -(-sizes.vocabulary // 128) * 128  # rows of the workspace are padded to it
    whole = our_policy_loss(replace(case, workspace_bytes=2 * (sizes.many_rows + 128) * pitch), "triton")
    parts = our_policy_loss(replace(case, workspace_bytes=2 * pitch * max(sizes.many_rows // 8, 1)), "triton")
    for name, want in parts.items():
        close(name, whole[name], want, allowed=_limit(name, torch.bfloat16))
