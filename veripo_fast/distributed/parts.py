"""The parts of a model, by the names of its parameters: learning rates and gradient norms of their own."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from veripo_fast.config.schema import OptimizerConfig

PARTS = ("tower", "merger", "language_model", "head")


def part_of(name: str) -> str:
    """Of a parameter. A head that is the embedding is a part of the language model, where its name is."""
    if "visual." in name:
        return "merger" if "visual.merger." in name or "visual.deepstack_merger_list." in name else "tower"
    return "head" if name.startswith("lm_head.") else "language_model"


def rate_of(config: OptimizerConfig, name: str) -> float:
    """What the learning rate is multiplied with for a parameter."""
    rates = {"tower": config.tower_rate, "merger": config.merger_rate}
    return rates.get(part_of(name), config.language_rate)


def rate_groups(parameters: Sequence[torch.nn.Parameter], names: Sequence[str], config: OptimizerConfig
                ) -> list[torch.nn.Parameter] | list[dict[str, Any]]:
    """What an optimizer is made of: the parameters, or a group for each rate among them, each with its `scale`."""
    rates = [rate_of(config, name) for name in names]
    if all(rate == 1.0 for rate in rates):
        return list(parameters)
    return [{"params": [parameter for parameter, own in zip(parameters, rates, strict=True) if own == rate],
             "scale": rate} for rate in dict.fromkeys(rates)]


def squares_of(gradients: Iterable[tuple[str, torch.Tensor | None]], device: torch.device | str) -> torch.Tensor:
    """float64 [4]: sum of the squares of the gradients of each of `PARTS`, by parameter name."""
    squares = torch.zeros(len(PARTS), dtype=torch.float64, device=device)
    for name, gradient in gradients:
        if gradient is not None:
            squares[PARTS.index(part_of(name))] += gradient.detach().double().square().sum()
    return squares


def norms_of(squares: torch.Tensor, names: Iterable[str]) -> dict[str, float]:
    """Euclidean norm of each part that has one of the parameters."""
    known = {part_of(name) for name in names}
    return {part: math.sqrt(value) for part, value in zip(PARTS, squares.tolist(), strict=True) if part in known}
