"""M-RoPE positions (Qwen2-VL, arXiv 2409.12191, section 2.1), computed here and not by transformers.

transformers 5.17 to 5.23 places the text after a multi-frame Qwen2.5-VL video at max(h, w) instead of max(t, h, w) and
truncates the seconds per grid, so that trainer and rollout engine disagree by up to 17 nats. The reference rule: text
advances all three axes by one; a visual grid of t x h x w merged patches starts where the text stopped and spans
(time, row, column); what follows starts one past the largest position used so far.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch

_LARGEST_DENOMINATOR = 100_000
"""Of a spacing in seconds: 24 frames at 24,000/1,001 per second have 1,001/1,000."""


@dataclass(frozen=True)
class TextSpan:
    """`length` tokens of text."""

    length: int


@dataclass(frozen=True)
class GridSpan:
    """One run of visual tokens: `times` [t] are the integer time offsets of its temporal grids."""

    times: tuple[int, ...]
    height: int
    width: int

    @property
    def length(self) -> int:
        return len(self.times) * self.height * self.width


def seconds_per_grid(seconds: Sequence[float]) -> float:
    """Mean spacing of temporal grids at `seconds`; 1 second when there is only one.

    It is the nearest fraction with a small denominator, as rates are: what rounding leaves of the times (a second that
    is 1 - 1e-16) would move whole positions when it is floored, in 42 of 315 combinations of rate, stride and length.
    """
    if len(seconds) < 2:
        return 1.0
    spacing = (seconds[-1] - seconds[0]) / (len(seconds) - 1)
    return float(Fraction(spacing).limit_denominator(_LARGEST_DENOMINATOR))


def grid_times(num_grids: int, seconds_per_grid: float, tokens_per_second: float) -> tuple[int, ...]:
    """Time offsets of Qwen2.5-VL (arXiv 2502.13923, section 2.1): floor(i * (seconds_per_grid * tokens_per_second)).

    In float64 and in this order, as vLLM has it; float32 is off by one in up to a third of the grids.
    """
    return tuple(math.floor(i * (seconds_per_grid * tokens_per_second)) for i in range(num_grids))


def mrope_positions(spans: list[TextSpan | GridSpan]) -> tuple[torch.Tensor, int]:
    """Positions of a prompt made of `spans`.

    Returns:
        int64 [3, P] positions (time, height, width), and the position at which text continues.
    """
    parts: list[torch.Tensor] = []
    start = 0
    for span in spans:
        if isinstance(span, TextSpan):
            block = torch.arange(span.length).expand(3, -1)
        else:
            axes = torch.tensor(span.times), torch.arange(span.height), torch.arange(span.width)
            block = torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1)
        if span.length:
            parts.append(block + start)
            start = int(parts[-1].max()) + 1
    return torch.cat(parts, 1) if parts else torch.zeros(3, 0, dtype=torch.long), start
