"""Intervals around scores. The unit that is resampled is the prompt, or all prompts of one video where several ask
about it: completions of one prompt are not independent, and neither are questions about one video (Miller 2024, arXiv
2411.00640, section 2.2).

Percentile bootstrap, 95 %. It has no width when all prompts score alike (0 of 12 right), which would claim certainty.
There other prompts may score otherwise, and their share is at most Wilson's upper bound for 0 of P, z^2 / (P + z^2)
(E. B. Wilson, JASA 22, 1927; Brown, Cai and DasGupta, Statistical Science 16, 2001, section 3.1.1). For scores of 0 and
1 this is Wilson's interval itself. Shape letters: P prompts.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

from veripo_fast.verifier.proportions import Z

_CHUNK_VALUES = 1 << 22
"""Resampled values held at once (32 MiB of float64)."""


class Interval(NamedTuple):
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float


def bootstrap_interval(values_by_prompt: Sequence[float], resamples: int = 2000, seed: int = 0,
                       bounds: tuple[float, float] = (0.0, 1.0), clusters: Sequence[Hashable] | None = None
                       ) -> Interval:
    """Mean over prompts and its interval. values_by_prompt: [P], one score per prompt (the mean of its completions).

    `clusters` says what each prompt is about; those of one cluster are drawn together. Without it each stands alone.
    `bounds` are the lowest and the highest score that there can be; they matter when all prompts score alike. The same
    input and seed give the same numbers. Raises ValueError when there is no prompt, or a value is not finite.
    """
    values = np.asarray(values_by_prompt, dtype=np.float64)
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(f"values_by_prompt must hold one number per prompt, got shape {list(values.shape)}")
    if not np.isfinite(values).all():
        raise ValueError(f"values_by_prompt[{int(np.argmin(np.isfinite(values)))}] is not finite")
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    if clusters is not None and len(clusters) != len(values):
        raise ValueError(f"clusters must hold one entry per prompt, got {len(clusters)} for {len(values)}")
    owners = np.arange(len(values)) if clusters is None else _numbered(clusters)
    units = int(owners.max()) + 1
    if values.min() == values.max():
        return _alike(float(values[0]), units, bounds)
    if units == len(values):
        means = _resampled_means(values, resamples, seed)
    else:
        sums, counts = np.bincount(owners, values), np.bincount(owners).astype(np.float64)
        means = _resampled_means(sums, resamples, seed) / _resampled_means(counts, resamples, seed)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(values.mean()), float(low), float(high))


def paired_difference(before: Sequence[float], after: Sequence[float], resamples: int = 2000, seed: int = 0,
                      clusters: Sequence[Hashable] | None = None) -> Interval:
    """Mean of after - before over the same prompts in the same order, [P] each, and its interval.

    Differences within a prompt are resampled, so what makes a prompt hard or easy cancels. `clusters` as in
    `bootstrap_interval`. Raises ValueError.
    """
    if len(before) != len(after):
        raise ValueError(f"before and after must hold the same prompts, got {len(before)} and {len(after)}")
    changes = np.subtract(after, before, dtype=np.float64).tolist()
    return bootstrap_interval(changes, resamples, seed, (-1.0, 1.0), clusters)


def _numbered(clusters: Sequence[Hashable]) -> np.ndarray:
    """The clusters as numbers from 0, in the order in which they first occur."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(cluster, len(numbers)) for cluster in clusters])


def _alike(value: float, units: int, bounds: tuple[float, float]) -> Interval:
    """The interval when all prompts of `units` clusters score `value`: others may lie anywhere within the bounds."""
    if not bounds[0] <= value <= bounds[1]:
        raise ValueError(f"values_by_prompt must lie within {bounds}, got {value}")
    others = Z ** 2 / (units + Z ** 2)
    return Interval(value, value + others * (bounds[0] - value), value + others * (bounds[1] - value))


def _resampled_means(values: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """[resamples]: means of P values drawn with replacement."""
    rng = np.random.default_rng(seed)
    rows = max(1, _CHUNK_VALUES // len(values))
    means = [values[rng.integers(len(values), size=(min(rows, resamples - start), len(values)))].mean(axis=1)
             for start in range(0, resamples, rows)]
    return np.concatenate(means)
