"""What a policy may write to make scoring slow: long answers of hostile patterns, and mathematics that explodes."""

from __future__ import annotations

import importlib.util
import logging
import time

import pytest

from tests.support.verifier_groups import prompt, written
from veripo_fast.config.objectives import RewardConfig
from veripo_fast.config.schema import Config
from veripo_fast.errors import ConfigError
from veripo_fast.reward import math_answers
from veripo_fast.reward.groups import reward_groups
from veripo_fast.reward.math_answers import math_budget, math_equal
from veripo_fast.reward.score import score
from veripo_fast.types import Completion, RolloutGroup

SIZE = 100_000
PATTERNS = (r"\(", r"\[", "(", "{", "$", "<", " ", "7", "7 ", "7,", "9^", "a ", "not ", "B. ", r"\frac{", r"\text{",
            r"\boxed{", "²", "½", "√", "<think>", "three ", "x=", "[", "[1,2,3,4],", "10 to ", "1:00 ", "A, ", "A. x ",
            "and ", "yes ", "1 m*", "m^2 ", '{"a":', "1 m 1 s ")
GOLDS = (("choice", "B"), ("number", "7"), ("number", "2.5 m"), ("estimate", "7"),
         ("math", r"$2\sqrt{3}$"), ("math", "7"), ("text", "a red ball"), ("multi_select", "A, C"),
         ("soft_select", "A, C"), ("boolean", "Yes"), ("rounded", "0.67"), ("ocr", "a red ball"),
         ("time_span", "7 to 9"),
         ("timestamp", "7"), ("box", "[1, 2, 3, 4]"), ("boxes", "[[1, 2, 3, 4], [5, 6, 7, 8]]"),
         *((kind, gold) for kind, gold, library in (("quantity", "7 m/s", "pint"),
                                                    ("rouge", "a red ball", "rouge_score"))
           if importlib.util.find_spec(library)))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_long_answer_takes_no_time(pattern):
    answer = pattern * (SIZE // len(pattern))
    started = time.process_time()
    for problem_type, gold in GOLDS:
        assert score(written("why", answer), prompt(problem_type, gold), RewardConfig()).accuracy < 1
        score(written("why", f"7 {answer}"[:2000]), prompt(problem_type, gold), RewardConfig())
        score(answer, prompt(problem_type, gold), RewardConfig())
    assert time.process_time() - started < 20


BOMBS = [rf"\sqrt{{{number}}} + 9^{{9^{{9^{{9}}}}}}" for number in range(2, 60)]


def test_a_batch_of_bombs_stays_within_its_budget(caplog):
    asked = prompt("math", r"$5\sqrt{7}$")
    groups = [RolloutGroup(asked, [Completion([0], written("why", bomb), [], "stop", 0) for bomb in BOMBS])]
    started = time.monotonic()
    with caplog.at_level(logging.WARNING):
        reward_groups(groups, Config(reward=RewardConfig(math_seconds_per_batch=2.0)))
    assert time.monotonic() - started < 60  # each bomb alone takes 3 s
    assert {completion.accuracy for completion in groups[0].completions} == {0.0}
    said = [record.getMessage() for record in caplog.records if "math_seconds_per_batch" in record.getMessage()]
    assert len(said) == 1 and int(said[0].split()[0]) > 40


def test_an_answer_over_budget_is_compared_again_in_the_next_batch():
    math_equal("1", "1")
    with math_budget(1e-9) as budget:
        assert not math_equal(r"\sqrt{1183}", r"13\sqrt{7}")
        assert not math_equal(r"\sqrt{1183}", r"13\sqrt{7}")
        assert budget.refused == 2
    with math_budget(60.0) as budget:
        assert math_equal(r"\sqrt{1183}", r"13\sqrt{7}")
        assert budget.refused == 0 and budget.spent_seconds > 0
    assert math_answers._budget.get() is None


def test_the_budget_is_positive():
    with pytest.raises(ConfigError, match="math_seconds_per_batch"):
        RewardConfig(math_seconds_per_batch=0.0)
