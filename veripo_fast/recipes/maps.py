"""SpaceR (arXiv 2504.01805): a policy draws where objects stand on a grid, and is rewarded for a map that is right."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from veripo_fast.recipes.view import Column, PromptView

Cell = tuple[float, float]


def spatial_map(asked: PromptView, key: str = "cognitive_map", tag: str = "map", size: int = 10,
                accurate: float = 0.5) -> Column:
    """What a map adds to the accuracy of a completion that is above `accurate`: its likeness to the record's map, in
    [0, 1]; minus the accuracy where the likeness is 0, so that a map which says nothing costs the answer; 0 where no
    map was drawn, and for records without one.

    `key` is that of the record, {"category": [[row, column], ...]}; `tag` that of the completion's span, which holds
    the same as JSON. `size` is the number of cells on a side.
    """
    gold = cells_of(asked.side.get(key))
    if gold is None:
        return [0.0] * len(asked.completions)
    column = []
    for completion in asked.completions:
        text = completion.spans.get(tag)
        if completion.accuracy <= accurate or text is None:
            column.append(0.0)
            continue
        drawn = cells_of(_parsed(text))
        score = 0.0 if drawn is None else likeness(drawn, gold, size)
        column.append(score if score > 0 else -completion.accuracy)
    return column


def likeness(drawn: Mapping[str, Sequence[Cell]], gold: Mapping[str, Sequence[Cell]], size: int = 10) -> float:
    """The mean over gold's objects of how near each category was drawn (SpaceR's map reward).

    Of a category: pairs of drawn and true cells are taken from the nearest on, each cell once; a pair counts
    max(0, 1 - distance / diagonal), and their sum is divided by the larger number of cells. Two empty maps are alike.
    """
    counted = {name: cells for name, cells in gold.items() if cells}
    if not counted:
        return float(not any(drawn.values()))
    total = sum(map(len, counted.values()))
    return sum(len(cells) * _category(drawn.get(name, ()), cells, size) for name, cells in counted.items()) / total


def _category(drawn: Sequence[Cell], gold: Sequence[Cell], size: int) -> float:
    pairs = sorted((math.dist(one, other), i, j) for i, one in enumerate(drawn) for j, other in enumerate(gold))
    left, right, near = set(range(len(drawn))), set(range(len(gold))), 0.0
    for distance, i, j in pairs:
        if i in left and j in right:
            left.discard(i)
            right.discard(j)
            near += max(0.0, 1.0 - distance / (size * math.sqrt(2)))
    return near / max(len(drawn), len(gold))


def cells_of(value: Any) -> dict[str, list[Cell]] | None:
    """{"category": [[row, column], ...]} with finite numbers; None for anything else."""
    if not isinstance(value, dict):
        return None
    found: dict[str, list[Cell]] = {}
    for name, cells in value.items():
        if not isinstance(cells, list) or not all(map(_is_cell, cells)):
            return None
        found[str(name)] = [(float(row), float(column)) for row, column in cells]
    return found


def _is_cell(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_number, value))


def _is_number(value: Any) -> bool:
    try:
        return type(value) in (int, float) and math.isfinite(value)
    except OverflowError:  # a whole number that no float holds
        return False


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
