"""Which implementation an op uses on which device, and why.

`auto` takes the Triton kernel for CUDA tensors, the C++ op for CPU tensors where the extension was built, and plain
torch otherwise. Naming one takes that one or raises. Triton kernels take CPU tensors only under TRITON_INTERPRET=1.
"""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from typing import Literal

import torch

Impl = Literal["auto", "triton", "cpp", "torch"]

OPS: dict[str, tuple[Impl, ...]] = {
    "gather_logprobs": ("triton", "cpp", "torch"),
    "linear_logprobs": ("triton", "torch"),
    "linear_policy_loss": ("triton", "torch"),
    "linear_dpo_loss": ("triton", "torch"),
    "group_advantages": ("triton", "torch"),
    "grpo_loss": ("triton", "torch"),
    "dpo_loss": ("triton", "torch"),
    "resize_frames": ("cpp", "torch"),
    "frames_to_patches": ("cpp", "torch"),
    "planes_to_frames": ("cpp", "torch"),
    "planes_to_patches": ("cpp", "torch"),
    "copy_slices": ("cpp", "torch"),
}
"""Implementations of each op, in order of preference."""


@cache
def missing(implementation: Impl) -> str | None:
    """Why an implementation cannot be used in this process; None when it can."""
    if implementation == "triton" and importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if implementation == "cpp":
        from veripo_kernels import cpp

        return cpp.missing()
    return None


def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, on any device."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def refusal(implementation: Impl, device: torch.device) -> str | None:
    """Why an implementation cannot take tensors of a device; None when it can."""
    if implementation == "triton" and device.type != "cuda" and not interpreted():
        return f"Triton kernels need CUDA tensors, not {device.type} (or TRITON_INTERPRET=1 before Triton is imported)"
    if implementation == "cpp" and device.type not in ("cpu", "cuda"):
        return f"the compiled op has no kernel for {device.type}"
    if implementation == "cpp" and device.type == "cuda":
        from veripo_kernels import cpp

        return missing("cpp") or cpp.missing_cuda()
    return missing(implementation)


@torch.compiler.assume_constant_result
def choose(op: str, impl: Impl, device: torch.device) -> Impl:
    """The implementation that `impl` means for an op on a device.

    Raises:
        ValueError: the op has no such implementation. RuntimeError: it has, but cannot be used here; says why.
    """
    if impl == "auto":
        on_gpu = device.type == "cuda" and "triton" in OPS[op]
        preferred: tuple[Impl, ...] = ("triton", "torch") if on_gpu else ("cpp", "torch")
        return next(name for name in preferred if name in OPS[op] and refusal(name, device) is None)
    if impl not in OPS[op]:
        raise ValueError(f"{op} has no implementation '{impl}'; it has auto, {', '.join(OPS[op])}")
    reason = refusal(impl, device)
    if reason is not None:
        raise RuntimeError(f"{op}: impl='{impl}' cannot be used: {reason}")
    return impl


def status() -> dict[str, dict[str, str]]:
    """For each op the implementation that `auto` takes on cpu and (where there is one) cuda, and what is missing.

    Example:
        {"gather_logprobs": {"cpu": "torch (cpp: the extension was not built)", "cuda": "triton"}, ...}
    """
    devices = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]
    return {op: {device.type: _describe(op, device) for device in devices} for op in OPS}


def _describe(op: str, device: torch.device) -> str:
    chosen = choose(op, "auto", device)
    better = OPS[op][:OPS[op].index(chosen)]
    reasons = [f"{name}: {refusal(name, device)}" for name in better if refusal(name, device) is not None]
    return f"{chosen} ({'; '.join(reasons)})" if reasons else chosen
