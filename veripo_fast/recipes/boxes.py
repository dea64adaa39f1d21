"""Overlap of boxes: what rewards and graders both compare by."""

from __future__ import annotations

from collections.abc import Sequence


def iou(one: Sequence[float], other: Sequence[float]) -> float:
    """Area of the intersection over that of the union, of boxes (left, top, right, bottom); 0 for one without area."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other))
    return width * height / (areas - width * height)
