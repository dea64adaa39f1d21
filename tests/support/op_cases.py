"""A small call of every op, forward and backward, in every implementation that takes CPU tensors here, and every dtype.

Letters: T rows, V vocabulary, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from veripo_kernels import (
    copy_slices,
    dispatch,
    dpo_loss,
    frames_to_patches,
    frames_torch,
    gather_logprobs,
    gather_logprobs_fused,
    group_advantages,
    grpo_loss,
    linear_dpo_loss,
    linear_logprobs,
    linear_policy_loss,
    planes_to_frames,
    planes_to_patches,
    resize_frames,
)

CPU = torch.device("cpu")
SHORT = (torch.float32, torch.bfloat16, torch.float16)
ROWS, WIDTH, VOCABULARY = 12, 16, 70
BOUNDS = torch.tensor([0, 6, 6, 9, 12])
IDS = (torch.arange(ROWS) * 31) % VOCABULARY
GEOMETRY: dict[str, Any] = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4), "patch_size": 7, "merge_size": 2,
                            "temporal_patch_size": 2}


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def levels(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def gather(impl: Any, dtype: torch.dtype) -> Any:
    logits = rand(ROWS, VOCABULARY + 2).to(dtype)[:, :VOCABULARY].requires_grad_()
    logprobs, entropy = gather_logprobs(logits, IDS, temperature=0.7, entropy=True, impl=impl)
    slopes = rand(ROWS, seed=1).to(logprobs.dtype)
    fused = () if dtype == torch.float64 else gather_logprobs_fused(logits.detach(), IDS, rand(ROWS, seed=2), impl=impl)
    return logprobs, entropy, fused, torch.autograd.grad((slopes * (logprobs + entropy)).sum(), logits)


def linear(impl: Any, dtype: torch.dtype) -> Any:
    leaves = _leaves(dtype)
    logprobs, entropy = linear_logprobs(*leaves, IDS, entropy=True, softcap=5.0, impl=impl)
    slopes = rand(ROWS, seed=1).to(logprobs.dtype)
    return logprobs, entropy, torch.autograd.grad((slopes * (logprobs + entropy)).sum(), leaves)


def linear_policy(impl: Any, dtype: torch.dtype) -> Any:
    """Whole completions and, with a workspace of one byte, none of them."""
    results = []
    for loss in ("grpo", "gspo"):
        for room in (1, 1 << 20):
            leaves = _leaves(dtype)
            out = linear_policy_loss(*leaves, IDS, None, rand(4), BOUNDS, loss=loss, workspace_bytes=room, impl=impl)
            results.append((out, torch.autograd.grad(out[0], leaves)))
    return results


def linear_pairs(impl: Any, dtype: torch.dtype) -> Any:
    leaves = _leaves(dtype)
    out = linear_dpo_loss(*leaves, IDS, rand(2, 2, seed=4), BOUNDS, impl=impl)
    return out, torch.autograd.grad(out[0], leaves)


def policy(impl: Any, dtype: torch.dtype) -> Any:
    logprobs = rand(ROWS).to(dtype).requires_grad_()
    out = grpo_loss(logprobs, None, rand(4, seed=5).to(dtype), BOUNDS, impl=impl)
    return out, torch.autograd.grad(out[0], logprobs)


def pairs(impl: Any, dtype: torch.dtype) -> Any:
    logprobs = rand(ROWS).to(dtype).requires_grad_()
    out = dpo_loss(logprobs, rand(ROWS, seed=4).to(dtype), BOUNDS, impl=impl)
    return out, torch.autograd.grad(out[0], logprobs)


def advantages(impl: Any, dtype: torch.dtype) -> Any:
    return [group_advantages(rand(19).to(dtype), torch.arange(19) % 5, kind=kind, impl=impl)
            for kind in ("std", "no_std", "leave_one_out", "batch_std")]


def slices(impl: Any, dtype: torch.dtype) -> Any:
    sources = [rand(5, 41)[:, 3:20], rand(1, 300, seed=1)]
    targets = [torch.empty(source.shape, dtype=dtype) for source in sources]
    return copy_slices(sources, targets, impl=impl), targets


def frames(op: str, impl: str, dtype: torch.dtype) -> Any:
    """These ops take no `impl`: `auto` is the C++ op where that is, and plain torch is called by name."""
    planes = levels(3, 33, 21), levels(3, 17, 11), levels(3, 17, 11)
    rgb = frames_torch.planes_to_rgb(*planes, frames_torch.yuv_matrix("bt601", False))
    if impl == "torch":
        return (frames_torch.frames_to_patches(rgb, 28, 42, dtype=dtype, **GEOMETRY) if op.endswith("patches")
                else frames_torch.resize_frames(rgb, 28, 42))
    calls: dict[str, Callable[[], torch.Tensor]] = {
        "resize_frames": lambda: resize_frames(rgb, 28, 42),
        "frames_to_patches": lambda: frames_to_patches(rgb, 28, 42, dtype=dtype, **GEOMETRY),
        "planes_to_frames": lambda: planes_to_frames(*planes, 28, 42, matrix="bt601"),
        "planes_to_patches": lambda: planes_to_patches(*planes, 28, 42, matrix="bt601", dtype=dtype, **GEOMETRY)}
    return calls[op]()


def _leaves(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return (rand(ROWS, WIDTH).to(dtype).requires_grad_(), rand(VOCABULARY, WIDTH, seed=2).to(dtype).requires_grad_())


CALLS: dict[str, tuple[Callable[..., Any], tuple[torch.dtype, ...]]] = {
    "gather_logprobs": (gather, SHORT), "linear_logprobs": (linear, SHORT),
    "linear_policy_loss": (linear_policy, SHORT), "linear_dpo_loss": (linear_pairs, SHORT),
    "grpo_loss": (policy, SHORT), "dpo_loss": (pairs, SHORT),
    "group_advantages": (advantages, SHORT), "copy_slices": (slices, SHORT),
    "resize_frames": (partial(frames, "resize_frames"), (torch.uint8,)),
    "frames_to_patches": (partial(frames, "frames_to_patches"), (torch.float32, torch.bfloat16)),
    "planes_to_frames": (partial(frames, "planes_to_frames"), (torch.uint8,)),
    "planes_to_patches": (partial(frames, "planes_to_patches"), (torch.float32, torch.bfloat16))}

CASES: dict[tuple[str, str, str], Callable[[], Any]] = {}
"""(op, implementation, dtype) -> the call."""
for _op, (_call, _dtypes) in CALLS.items():
    for _impl in dispatch.OPS[_op]:
        if dispatch.refusal(_impl, CPU) is None:
            _all = (*_dtypes, torch.float64) if _impl == "torch" and _dtypes is SHORT else _dtypes
            CASES |= {(_op, _impl, str(_dtype)): partial(_call, _impl, _dtype) for _dtype in _all}
