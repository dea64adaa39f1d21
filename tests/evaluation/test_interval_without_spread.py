"""Prompts that all score alike leave doubt: the interval has a width, and it covers."""

import math

import numpy as np
import pytest

from veripo_fast.evaluation.intervals import bootstrap_interval, paired_difference


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """The textbook formula, written out another way."""
    z = 1.959963984540054
    share = successes / trials
    centre = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials**2))
    return centre - half, centre + half


@pytest.mark.parametrize("prompts", [1, 2, 12, 1000])
@pytest.mark.parametrize("score", [0, 1])
def test_none_or_all_right_is_wilsons_interval(prompts: int, score: int) -> None:
    interval = bootstrap_interval([float(score)] * prompts)
    assert interval.mean == score
    assert (interval.low, interval.high) == pytest.approx(wilson(score * prompts, prompts), abs=1e-12)


def test_0_of_12() -> None:
    assert bootstrap_interval([0.0] * 12) == pytest.approx((0, 0, 0.2425), abs=1e-4)


@pytest.mark.parametrize("prompts", [5, 12, 40])
def test_rare_successes_are_covered(prompts: int) -> None:
    """With a true rate at which no prompt is right in 6 % of the draws, that draw's interval holds the rate."""
    rate = 1 - 0.06 ** (1 / prompts)
    assert bootstrap_interval([0.0] * prompts).high >= rate
    assert bootstrap_interval([1.0] * prompts).low <= 1 - rate


def test_a_score_between_the_bounds() -> None:
    interval = bootstrap_interval([0.25] * 12)
    others = wilson(0, 12)[1]
    assert interval == pytest.approx((0.25, 0.25 - others * 0.25, 0.25 + others * 0.75))


def test_no_change_on_any_prompt_is_no_proof_that_there_is_none() -> None:
    scores = np.random.default_rng(0).random(12).tolist()
    interval = paired_difference(scores, scores)
    assert interval == pytest.approx((0, -0.2425, 0.2425), abs=1e-4)
    assert paired_difference([0.0] * 12, [1.0] * 12) == pytest.approx((1, 1 - 2 * 0.2425, 1), abs=1e-4)


def test_scores_beyond_the_bounds_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must lie within \(0\.0, 1\.0\), got 3\.0"):
        bootstrap_interval([3.0, 3.0])
