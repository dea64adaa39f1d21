"""M-RoPE times of Qwen2.5-VL against the reference's formula, over rates, strides and lengths."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch

from veripo_fast.model.encoding import _grid_seconds
from veripo_fast.model.positions import grid_times, seconds_per_grid

RATES = (24000 / 1001, 24.0, 25.0, 30000 / 1001, 30.0, 50.0, 60000 / 1001, 60.0, 15.0)
STRIDES = (1, 5, 7, 12, 15, 20, 30)
LENGTHS = (8, 16, 30, 64, 120)
CASES = list(product(RATES, STRIDES, LENGTHS))


def reference(num_grids: int, seconds: float, tokens_per_second: float) -> tuple[int, ...]:
    """vLLM's and the paper's, in float64."""
    return tuple(math.floor(i * (seconds * tokens_per_second)) for i in range(num_grids))


def test_315_rates_and_lengths_have_the_times_of_the_reference() -> None:
    """From the times of the frames on, as a prompt is encoded: the spacing is that of rate and stride."""
    assert len(CASES) == 315
    wrong = []
    for rate, stride, length in CASES:
        seconds = _grid_seconds(torch.arange(length, dtype=torch.float64) * stride / rate, 2)
        got = grid_times(len(seconds), seconds_per_grid(seconds), 2)
        if got != reference(length // 2, 2 * stride / rate, 2):
            wrong.append((rate, stride, length))
    assert wrong == []


@pytest.mark.parametrize("tokens_per_second", [1, 2, 25, 2.5])
def test_the_formula_is_float64_in_the_order_of_the_reference(tokens_per_second: float) -> None:
    for rate, stride in product(RATES, STRIDES):
        seconds = 2 * stride / rate
        for given in (seconds, float(torch.tensor(seconds))):  # a processor may hand out float32
            assert grid_times(400, given, tokens_per_second) == reference(400, given, tokens_per_second)


def test_one_grid_and_times_of_a_variable_rate() -> None:
    assert seconds_per_grid([3.0]) == 1.0
    assert seconds_per_grid([]) == 1.0
    assert math.isclose(seconds_per_grid([0.0, math.pi, 2 * math.pi]), math.pi, rel_tol=1e-9)
