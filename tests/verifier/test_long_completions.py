"""Completions of a million characters: reward, checks and the rules judge take time in proportion to the length."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from tests.support.verifier_groups import prompt, written
from veripo_fast.config.objectives import RewardConfig, VerifierConfig
from veripo_fast.reward.answers import compatible, normalise_text
from veripo_fast.reward.score import score
from veripo_fast.types import Completion, Prompt, RolloutGroup
from veripo_fast.verifier.checks import check_group
from veripo_fast.verifier.judge_rules import RulesJudge
from veripo_fast.verifier.judges import no_progress

SHORT, LONG = 100_000, 1_000_000
PATTERNS = ("<think>", "{}", "7 ", "Wait, ", "so A. ", "\ufdfa")
MOST_SECONDS, MOST_RATIO = 4.0, 25.0
"""Twice what is asked for, because other work shares the processor; what is quadratic takes 100 times as long."""


def stages(whole: str, to: Prompt) -> dict[str, float]:
    """Seconds of each reader of one completion."""
    group = RolloutGroup(to, [Completion([1], whole, [], "stop", 0, 0.0, 0.0)])
    judged = RulesJudge().judge([group], no_progress)[0]
    work: dict[str, Callable[[], object]] = {
        "reward": lambda: score(whole, to, RewardConfig()), "rules": lambda: RulesJudge().judge([group], no_progress),
        "checks": lambda: check_group(group, judged, VerifierConfig(), len)}
    seconds = {}
    for name, do in work.items():
        began = time.process_time()
        do()
        seconds[name] = time.process_time() - began
    return seconds


@pytest.mark.parametrize("pattern", PATTERNS, ids=ascii)
def test_a_million_characters_take_ten_times_as_long_as_a_tenth(pattern: str) -> None:
    for problem_type, place in (("choice", "think"), ("text", "answer")):
        to = prompt(problem_type, "B" if problem_type == "choice" else "up")
        short, long = (stages(written(f"so {text}", "B") if place == "think" else written("so up", text), to)
                       for text in (pattern * (size // len(pattern)) for size in (SHORT, LONG)))
        for name, seconds in long.items():
            assert seconds < MOST_SECONDS, (name, problem_type)
            assert seconds < MOST_RATIO * max(short[name], 0.04), (name, problem_type)


@pytest.mark.parametrize(("text", "form"), [
    ("-2.5", "-2.5"), ("a. b - c", "a b c"), (".5", ".5"), ("x-1", "x 1"), ("1.5.2", "1.5.2"), ("\ue000-3\ue001", "-3"),
    ("1,000 - 2", "1000 2"), ("50 %.", "50 %")])
def test_points_and_minus_signs_of_numbers_stay(text: str, form: str) -> None:
    assert normalise_text(text) == form


def test_a_text_that_grows_beyond_measure_stays() -> None:
    assert compatible("\ufb01") == "fi" and compatible("\ufdfa") != "\ufdfa"
    assert compatible("\ufdfa" * 1000) == "\ufdfa" * 1000
