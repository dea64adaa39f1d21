"""Reading boxes: `[10, 20, 110, 220]`, `(10,20),(110,220)`, `{"bbox_2d": [..]}`, lists of them, graded by IoU.

A box is its left, top, right and lower edge, in the unit of the gold (pixels, or thousandths of the frame). A box whose
right edge is not right of its left one, or whose lower edge is not below its upper one, is none.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from veripo_fast.recipes.boxes import iou
from veripo_fast.reward.answers import clean

Box = tuple[float, float, float, float]
"""Left, top, right and lower edge."""
MOST_BOXES = 64
LONGEST_BOXES = 12_000
"""Characters of an answer that holds boxes."""
_KEYS = ("bbox_2d", "bbox", "box_2d", "box", "boxes", "bboxes", "bounding_box", "bounding_boxes", "answer")
_BESIDE = frozenset(("label", "labels", "name", "object", "category", "class", "score", "confidence", "id"))
_EDGES = (("x1", "y1", "x2", "y2"), ("left", "top", "right", "bottom"), ("xmin", "ymin", "xmax", "ymax"),
          ("x_min", "y_min", "x_max", "y_max"))
_FENCE = re.compile(r"\A\s*```(?:json)?\s*(.*?)\s*```\s*\Z", re.DOTALL)
_TOKENS = re.compile(r"<\|?/?(?:box|box_start|box_end|ref|quad)\|?>")
_NUMBER = r"[-+]?(?:\d{1,9}(?:\.\d{0,12})?|\.\d{1,12})"
_FOUR = re.compile(rf"[\[({{\s]*({_NUMBER})\s*,\s*({_NUMBER})[\s\])]*,?[\s\[(]*({_NUMBER})\s*,\s*({_NUMBER})[\])}}\s]*")
_SPACED = re.compile(rf"\s*({_NUMBER})\s+({_NUMBER})\s+({_NUMBER})\s+({_NUMBER})\s*")
_NAMED = re.compile(
    rf"[\[({{\s]*x_?1\s*[=:]\s*({_NUMBER})[\s,;]+y_?1\s*[=:]\s*({_NUMBER})[\s,;]+x_?2\s*[=:]\s*({_NUMBER})"
    rf"[\s,;]+y_?2\s*[=:]\s*({_NUMBER})[\])}}\s]*", re.IGNORECASE)
_LEAD = re.compile(r"(?:(?:the|final|answer|bounding|box|boxes|bbox|bbox_2d|coordinates|are|is|it|object|at|of|in|:|=)"
                   r"(?![^\W_])\s*)*", re.IGNORECASE)
_BETWEEN = re.compile(r"\s*(?:[,;\n]|and)?\s*(?=[\[(])")


def box_accuracy(answer: str, gold: str) -> float:
    """IoU in [0, 1] of the answer's only box and the gold's; 0 for several boxes."""
    wanted, given = read_boxes(gold), read_boxes(answer)
    return iou(given[0], wanted[0]) if len(wanted) == len(given) == 1 else 0.0


def boxes_accuracy(answer: str, gold: str) -> float:
    """The largest sum of IoUs that pairs each box with at most one of the gold's, over the larger number of boxes.

    A missing box costs as much as one too many. At most 64 boxes are read. [0, 1]
    """
    wanted, given = read_boxes(gold), read_boxes(answer)
    if not wanted or not given:
        return 0.0
    table = [[iou(one, other) for other in wanted] for one in given]
    return min(1.0, best_pairing(table) / max(len(wanted), len(given)))


def best_pairing(gains: Sequence[Sequence[float]]) -> float:
    """The largest sum of gains that takes at most one from each row and column (Kuhn 1955, with potentials).

    Args:
        gains: [rows][columns], none below 0. Time grows with the square of the smaller number and the larger one.
    """
    if len(gains) > len(gains[0]):
        gains = [list(column) for column in zip(*gains, strict=True)]
    rows, columns = len(gains), len(gains[0])
    of_row, of_column = [0.0] * (rows + 1), [0.0] * (columns + 1)
    owner, way = [0] * (columns + 1), [0] * (columns + 1)
    for row in range(1, rows + 1):
        owner[0], column = row, 0
        least = [math.inf] * (columns + 1)
        done = [False] * (columns + 1)
        while owner[column]:
            done[column] = True
            current, delta, following = owner[column], math.inf, 0
            for other in range(1, columns + 1):
                if done[other]:
                    continue
                slack = -gains[current - 1][other - 1] - of_row[current] - of_column[other]
                if slack < least[other]:
                    least[other], way[other] = slack, column
                if least[other] < delta:
                    delta, following = least[other], other
            for other in range(columns + 1):
                if done[other]:
                    of_row[owner[other]] += delta
                    of_column[other] -= delta
                else:
                    least[other] -= delta
            column = following
        while column:
            owner[column], column = owner[way[column]], way[column]
    return sum(gains[owner[column] - 1][column - 1] for column in range(1, columns + 1) if owner[column])


def read_boxes(text: str) -> list[Box]:
    """The boxes of a text; none when any of it cannot be read, a box is reversed or empty, or there are over 64."""
    if len(text) > LONGEST_BOXES:
        return []
    text = unicodedata.normalize("NFKC", clean(_TOKENS.sub("", text))).replace("\u2212", "-")
    text = _FENCE.sub(r"\1", text) if "```" in text else text
    text = text.strip(" \t\n.$*`")
    boxes = _of_json(_loaded(text), 0)
    if boxes is None:
        boxes = _of_text(text)
    whole = boxes is not None and len(boxes) <= MOST_BOXES and all(map(_is_box, boxes))
    return [] if boxes is None or not whole else boxes


def _is_box(box: Box) -> bool:
    return all(map(math.isfinite, box)) and box[0] < box[2] and box[1] < box[3] and max(map(abs, box)) < 1e9


def _loaded(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _of_json(value: Any, depth: int) -> list[Box] | None:
    """Boxes of four numbers, of a mapping with one known key or with four edges, or of a list of such."""
    if depth > 4 or not isinstance(value, list | dict) or not value or len(value) > 4 * MOST_BOXES:
        return None
    if isinstance(value, dict):
        return _of_mapping(value, depth)
    if len(value) == 4 and all(isinstance(part, int | float) and not isinstance(part, bool) for part in value):
        return [_box(value)]
    if len(value) == 2 and all(isinstance(part, list) and len(part) == 2 for part in value):
        return _of_json([*value[0], *value[1]], depth + 1)
    parts = [_of_json(part, depth + 1) for part in value]
    return None if None in parts else [box for part in parts if part for box in part]


def _of_mapping(value: dict[str, Any], depth: int) -> list[Box] | None:
    for names in _EDGES:
        if all(name in value for name in names):
            return _of_json([value[name] for name in names], depth + 1)
    known = [key for key in _KEYS if key in value]
    if len(known) != 1 or not all(key in _BESIDE for key in value if key != known[0]):
        return None
    return _of_json(value[known[0]], depth + 1)


def _box(value: Sequence[float]) -> Box:
    try:
        left, top, right, bottom = map(float, value)
    except OverflowError:
        return math.inf, math.inf, math.inf, math.inf
    return left, top, right, bottom


def _of_text(text: str) -> list[Box] | None:
    text = text[_LEAD.match(text).end():]  # type: ignore[union-attr]
    alone = _NAMED.fullmatch(text) or _SPACED.fullmatch(text)
    if alone:
        return [_box([float(edge) for edge in alone.groups()])]
    boxes: list[Box] = []
    place = 0
    while match := _FOUR.match(text, place):
        boxes.append(_box([float(edge) for edge in match.groups()]))
        place = match.end()
        if place == len(text) or len(boxes) > MOST_BOXES:
            break
        between = _BETWEEN.match(text, place)
        if between is None:
            return None
        place = between.end()
    return boxes if boxes and not text[place:].strip(" ])}.") else None
