"""T-GRPO (Video-R1, arXiv 2503.21776): a bonus where a prompt is answered better with its frames in order.

The bonus is one constant for all right completions of a group. With binary accuracy and equal format the std of the
group takes it out again: (r - mean) / std does not know how far right and wrong lie apart. It acts without that std
(`grpo.advantage: no_std`), on graded accuracies, and where format varies.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import comb

from veripo_fast.recipes.view import CONTRAST, Column, PromptView

_PARTS = 1000
"""Accuracies are taken in thousandths to count chances exactly."""


def temporal(asked: PromptView, share: float = 0.8, accurate: float = 0.1) -> Column:
    """1 for a completion whose accuracy is above `accurate`, where the mean accuracy with the frames in order is at
    least `share` of that of the contrast group; else 0, and 0 for a prompt without a contrast group.

    The paper's weight is 0.3. Its code has share 0.8, the paper 1.
    """
    contrast = asked.groups.get(CONTRAST)
    main = [completion.accuracy for completion in asked.completions]
    if contrast is None or not opens(main, [completion.accuracy for completion in contrast], share):
        return [0.0] * len(main)
    return [float(value > accurate) for value in main]


def opens(main: Sequence[float], contrast: Sequence[float], share: float) -> bool:
    """Whether the mean of `main` is at least `share` of the mean of `contrast`."""
    return sum(main) / len(main) >= share * (sum(contrast) / len(contrast))


def chance(main: Sequence[float], contrast: Sequence[float], share: float) -> float:
    """The probability that `opens` holds for a policy that does not see the order: then any completions of both groups
    may have been those of the contrast, all alike likely."""
    values = [round(value * _PARTS) for value in (*main, *contrast)]
    total, most, open_ways = sum(values), len(contrast), 0
    for held, ways in _subset_sums(values, most).items():
        if (total - held) / len(main) >= share * (held / most):
            open_ways += ways
    return open_ways / comb(len(values), most)


def _subset_sums(values: Sequence[int], size: int) -> dict[int, int]:
    """Sum -> number of subsets of `size` values that have it."""
    ways: list[dict[int, int]] = [{0: 1}] + [{} for _ in range(size)]
    for value in values:
        for taken in range(size, 0, -1):
            for held, count in ways[taken - 1].items():
                ways[taken][held + value] = ways[taken].get(held + value, 0) + count
    return ways[size]
