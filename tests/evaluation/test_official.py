"""Metrics of suites against their formulas, written again in plain floats."""

from __future__ import annotations

import math
import random

import pytest

from veripo_fast.evaluation.official import vsi_mra
from veripo_fast.reward.quantities import estimate_accuracy


def formula(prediction: float, gold: float) -> float:
    """VSI-Bench's, with numpy's linspace(0.5, 0.95, 10) as start + number * step."""
    step = (0.95 - 0.5) / 9
    thresholds = [0.5 + number * step for number in range(9)] + [0.95]
    return sum(abs(prediction - gold) / gold <= 1 - threshold for threshold in thresholds) / 10


def test_golds_and_predictions_like_the_suite() -> None:
    """2,640 golds (counts, metres, centimetres, square metres), 20 predictions each: exact, near a threshold, on it,
    and anything. Equal to the last digit; ours differs from it only where rounding decides."""
    draw = random.Random(0)
    forgiven = 0
    for number in range(2640):
        gold = (draw.randint(2, 15), round(draw.uniform(0.2, 9), 1), draw.randint(10, 250),
                round(draw.uniform(5, 60), 1))[number % 4]
        on = [gold * (1 + sign * step / 20) for step in range(1, 6) for sign in (-1, 1)]
        near = [round(value + draw.choice((-1, 1)) * 10 ** -draw.randint(2, 9), 9) for value in draw.sample(on, 4)]
        for prediction in (gold, *on, *near, *(draw.randint(0, 30) for _ in range(5))):
            text = repr(prediction)
            official = vsi_mra(text, repr(gold))
            assert official == formula(float(text), float(gold)), (text, gold)
            ours = estimate_accuracy(text, repr(gold))
            assert ours >= official and ours - official < 0.1 + 1e-9
            forgiven += ours != official
    assert 0 < forgiven < 0.2 * 2640 * 20


@pytest.mark.parametrize(("answer", "gold", "expected"), [
    ("4 chairs", "4", 1.0), ("4.", "4", 1.0), ("about 4", "4", 0.0), ("four", "4", 0.0), (None, "4", 0.0),
    ("", "4", 0.0), ("nan", "4", 0.0),
    ("inf", "4", 0.0), ("6", "4", 0.1), ("0", "0", 1.0), ("1", "0", 0.0), ("4", "many", 0.0)])
def test_answers(answer: str | None, gold: str, expected: float) -> None:
    assert math.isclose(vsi_mra(answer, gold), expected)
