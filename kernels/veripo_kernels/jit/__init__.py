"""Triton kernel bodies, one file per op. Imported only where a kernel is about to run.

A module lists in `SM90_CASES` the launch configurations it uses; testing/sm90.py compiles each for an H100 without one.
"""

from typing import Any, TypedDict


class Sm90Case(TypedDict):
    """One launch configuration that must compile for sm_90 without spilling registers."""

    name: str
    """Unique in its module; the test is called module.name."""
    kernel: Any
    """The @triton.jit function."""
    signature: dict[str, str]
    """Type of each parameter that is not constexpr: "*bf16", "i32", "fp32", "tensordesc<bf16[128, 64]>"."""
    constexprs: dict[str, Any]
    """Value of each constexpr parameter."""
    divisible_by_16: tuple[str, ...]
    """Pointers that are 16-byte aligned and integers that divide by 16, as the launch would find them."""
    num_warps: int
    num_stages: int
    wgmma: bool
    """Whether the matrix products must be Hopper's warp-group instructions."""


_TYPES = {"cu_seqlens": "*i64", "loss_mask": "*i8", "sequences": "i32", "columns": "i32", "tokens": "i32"}
_NUMBERS = ("clip_low", "clip_high", "dual_clip", "log_low", "log_high", "temperature_pos", "temperature_neg",
            "k_pos", "lambda_pos", "k_neg", "lambda_neg", "kl_coef", "floor", "cap", "entropy_coef", "squared_coef",
            "scale")
_INPUTS = ("policy_logprobs", "old_logprobs", "advantages", "ref_logprobs", "rollout_logprobs", "entropy", "gradient",
           "entropy_gradient")


def sm90_case(name: str, kernel: Any, constexprs: dict[str, Any], *, dtype: str = "fp32",
              types: dict[str, str] | None = None, num_warps: int) -> Sm90Case:
    """A launch: parameters in `constexprs` are fixed (None: no such tensor), all others run-time arguments."""
    known = {**dict.fromkeys(_NUMBERS, "fp32"), **dict.fromkeys(_INPUTS, f"*{dtype}"), **_TYPES, **(types or {})}
    return {"name": name, "kernel": kernel, "constexprs": constexprs, "num_warps": num_warps, "num_stages": 3,
            "signature": {name: known.get(name, "*fp32") for name in kernel.arg_names if name not in constexprs},
            "divisible_by_16": (), "wgmma": False}
