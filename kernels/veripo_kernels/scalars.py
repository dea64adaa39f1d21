"""Numbers of ours (temperature, clip range, beta) as an argument of an op: a small tensor that stays on the CPU.

torch.compile holds a float that an op takes as a constant, and compiles again for each value. A number that became a
tensor by arithmetic stays an input of the graph (torch 2.13; a factory with the number as its value does not).
"""

from __future__ import annotations

import math
from typing import Any

import torch


def as_tensor(*numbers: float | None) -> torch.Tensor:
    """float64 [n] on the CPU; NaN stands for None."""
    values = [math.nan if number is None else number for number in numbers]
    if not torch.compiler.is_compiling():
        return torch.tensor(values, dtype=torch.float64, device="cpu")
    one = torch.ones((), dtype=torch.float64, device="cpu")
    return torch.stack([one * value for value in values])


def numbers_of(values: torch.Tensor) -> list[float]:
    """The numbers of `as_tensor`, inside an op. They lie on the CPU, so no GPU is waited for."""
    return list(values.tolist())


def traced(like: torch.Tensor, *numbers: float) -> tuple[Any, ...]:
    """The numbers as they are; in a graph that is being compiled, tensors [] of the dtype of `like`, on the CPU.

    For plain torch: a bound of `clamp` or a choice of `where` is a constant to the graph, a factor is not.
    """
    if not torch.compiler.is_compiling():
        return numbers
    one = torch.ones((), dtype=like.dtype, device="cpu")
    return tuple(one * number for number in numbers)
