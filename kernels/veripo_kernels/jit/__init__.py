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
