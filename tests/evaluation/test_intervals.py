"""Bootstrap intervals: known coverage, degenerate input, refusals."""

import numpy as np
import pytest

from veripo_fast.evaluation.intervals import bootstrap_interval, paired_difference


def test_coverage_of_a_known_mean():
    # 300 draws of 50 prompts; 95 % intervals of a percentile bootstrap at P=50 cover about 94 %, sd 1.4 %
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(300):
        interval = bootstrap_interval(rng.binomial(4, 0.6, size=50) / 4, resamples=400, seed=seed)
        covered += interval.low <= 0.6 <= interval.high
    assert 0.90 <= covered / 300 <= 0.98


def test_width_is_that_of_the_normal_approximation():
    values = np.random.default_rng(1).normal(size=400)
    interval = bootstrap_interval(values, resamples=4000)
    half = 1.96 * values.std() / 20
    assert interval.mean == pytest.approx(values.mean())
    assert (interval.high - interval.low) / 2 == pytest.approx(half, rel=0.05)


def test_same_seed_same_numbers():
    values = [0.0, 1.0, 0.5, 0.25]
    assert bootstrap_interval(values, 200, seed=3) == bootstrap_interval(values, 200, seed=3)
    assert bootstrap_interval(values, 200, seed=3) != bootstrap_interval(values, 200, seed=4)


def test_chunks_change_nothing(monkeypatch):
    values = list(np.random.default_rng(2).random(10))
    whole = bootstrap_interval(values, 100)
    monkeypatch.setattr("veripo_fast.evaluation.intervals._CHUNK_VALUES", 70)
    assert bootstrap_interval(values, 100) == whole


def test_pairing_removes_the_spread_between_prompts():
    rng = np.random.default_rng(3)
    hardness = rng.random(100)
    before, after = hardness * 0.8, hardness * 0.8 + 0.1 + rng.normal(0, 0.02, 100)
    paired = paired_difference(before.tolist(), after.tolist(), resamples=500)
    assert paired.low < 0.1 < paired.high
    assert paired.high - paired.low < 0.02
    assert bootstrap_interval(after, 500).high - bootstrap_interval(after, 500).low > 0.05


@pytest.mark.parametrize(("call", "words"), [
    (lambda: bootstrap_interval([]), "one number per prompt, got shape [0]"),
    (lambda: bootstrap_interval([[1.0, 2.0]]), "one number per prompt, got shape [1, 2]"),
    (lambda: bootstrap_interval([1.0, float("nan")]), "values_by_prompt[1] is not finite"),
    (lambda: bootstrap_interval([1.0], resamples=0), "resamples must be at least 1, got 0"),
    (lambda: paired_difference([1.0], [1.0, 2.0]), "the same prompts, got 1 and 2"),
])
def test_refusals(call, words):
    with pytest.raises(ValueError) as caught:
        call()
    assert words in str(caught.value)


def test_questions_about_one_video_are_drawn_together():
    """20 videos with 5 questions that share their score: the interval is that of 20 prompts, not of 100."""
    scores = np.random.default_rng(0).integers(0, 2, 20).astype(float)
    each = bootstrap_interval(scores.tolist(), seed=3)
    together = bootstrap_interval(scores.repeat(5).tolist(), seed=3, clusters=[n // 5 for n in range(100)])
    alone = bootstrap_interval(scores.repeat(5).tolist(), seed=3)
    assert together == pytest.approx(each)
    assert (together.high - together.low) > 1.8 * (alone.high - alone.low)


def test_clusters_of_one_are_prompts():
    values = np.random.default_rng(1).random(40).tolist()
    assert bootstrap_interval(values, clusters=[f"v{n}" for n in range(40)]) == bootstrap_interval(values)
    before = np.random.default_rng(2).random(40).tolist()
    assert paired_difference(before, values, clusters=list(range(40))) == paired_difference(before, values)


def test_clusters_of_unequal_size_keep_the_mean_over_prompts():
    interval = bootstrap_interval([1.0, 0.0, 0.0, 0.0], clusters=["a", "b", "b", "b"])
    assert interval == pytest.approx((0.25, 0.0, 1.0))


def test_all_alike_counts_videos():
    """Wilson's bound of 0 of 4 videos, however many questions."""
    assert bootstrap_interval([0.0] * 40, clusters=[n % 4 for n in range(40)]) == bootstrap_interval([0.0] * 4)


def test_clusters_are_one_per_prompt():
    with pytest.raises(ValueError, match="clusters must hold one entry per prompt, got 1 for 2"):
        bootstrap_interval([0.0, 1.0], clusters=["a"])
