"""Products of a few rows on a CPU: while completions are written, weights lie as oneDNN reads them fastest.

A token of each completion is one row, and a product of 16 rows in float32 reaches half of what the processor can:
`F.linear` reorders the weight anew at every token. Here it is reordered once per rollout, by the two operators with
which torch's own compiler does so (torch/_inductor/fx_passes/mkldnn_fusion.py), and costs a copy of the weights until
the rollout ends. bench/bench_skinny.py times both.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

FEWEST_TOKENS = 16
"""Below, reordering costs more than it gives: as much as one token of each completion where they are many, and as nine
where they are eight."""


def available(weight: torch.Tensor) -> bool:
    """Whether products with a weight can be taken so: float32 on a CPU, by a torch that has the operators."""
    return (weight.device.type == "cpu" and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()
            and hasattr(torch.ops.mkldnn, "_reorder_linear_weight") and hasattr(torch.ops.mkldnn, "_linear_pointwise"))


@contextmanager
def reordered(parts: list[torch.nn.Module], rows: int, tokens: int) -> Iterator[None]:
    """A block in which the linear layers in `parts` run on reordered weights, where that pays; the weights must not
    change in it, and no gradient can pass.

    Args:
        rows: of a product, at the start. tokens: at most, of a completion.
    """
    layers = [layer for part in parts for layer in part.modules() if type(layer) is torch.nn.Linear]
    if not layers or tokens < FEWEST_TOKENS or not all(available(x.weight) for x in layers):
        yield
        return
    try:
        for layer in layers:
            layer.__dict__["forward"] = partial(
                _product, torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), rows), layer.bias)
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def _product(weight: torch.Tensor, bias: torch.Tensor | None, rows: torch.Tensor) -> Any:
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
