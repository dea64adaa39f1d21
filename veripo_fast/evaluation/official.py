"""Metrics as the authors of a suite compute them, where ours forgives more: numbers to stand beside published ones.

VSI-Bench (Yang et al. 2024, arXiv 2412.14171; lmms_eval/tasks/vsibench/utils.py of thinking-in-space): the answer is
its first word without a point at its end, read by Python's float, and the thresholds are floating-point numbers that
nothing is forgiven at. Our own accuracy reads units and words, and forgives rounding (reward/quantities.py).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

_GRADES = ("_easy", "_medium", "_hard")
_THRESHOLDS = 1 - np.linspace(0.5, 0.95, 10)


def vsi_number(answer: str | None) -> float | None:
    """The number of an answer; None without one."""
    try:
        return float((answer or "").split(" ")[0].rstrip(".").strip())
    except ValueError:
        return None


def vsi_mra(answer: str | None, gold: str) -> float:
    """Mean relative accuracy of an answer; 0 where it, or the gold, is no finite number. A gold of 0, by which the
    formula divides, counts exact answers."""
    number, wanted = vsi_number(answer), vsi_number(gold)
    if number is None or wanted is None or not (math.isfinite(number) and math.isfinite(wanted)):
        return 0.0
    if not wanted:
        return float(number == 0)
    return float((abs(number - wanted) / wanted <= _THRESHOLDS).mean())


def task_means(tasks: Sequence[str], values: Sequence[float]) -> dict[str, float]:
    """Mean of the values of each task. Tasks that are named as one but for `_easy`, `_medium` or `_hard` at the end are
    one, whose mean is that of its grades (relative direction of VSI-Bench)."""
    by_task: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for task, value in zip(tasks, values, strict=True):
        grade = next((grade for grade in _GRADES if task.endswith(grade)), "")
        by_task[task.removesuffix(grade)][grade].append(value)
    return {task: _mean([_mean(those) for those in grades.values()]) for task, grades in sorted(by_task.items())}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
