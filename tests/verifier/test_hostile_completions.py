"""What a policy may write to make verifying slow: completions of 100,000 characters, read in proportionate time."""

from __future__ import annotations

import time

import pytest

from tests.support.verifier_groups import completion, prompt, written
from veripo_fast.config.objectives import VerifierConfig
from veripo_fast.types import Prompt, RolloutGroup
from veripo_fast.verifier.checks import repetition
from veripo_fast.verifier.conclusions import conclusions, reflectiveness, supported_answer
from veripo_fast.verifier.judge_rules import RulesJudge
from veripo_fast.verifier.verify import verify

SIZE = 100_000
PATTERNS = (r"\(", r"\[", "{", "{}", r"\boxed{", r"\text{", "$", "<think>", "7", "7 ", "7,", "1-", "a", "a ", "\n",
            "\t", " ", " \n", ".", "'", "=", "**", "\u200b", "\u0301", "一", "so ", "so\n", "so A. ", "so 7 ",
            "so left or up ", "i'll choose ", "answer: ", "the answer is B. ", "the answer is not ", "option (",
            "A is the correct ", "A ", "(A) ", "left ", "not left ", "n't ", "if ", "is the ", "wait ", "re-",
            "thus not B ")
NUMBERED = tuple("".join(f"{word} {number} " for number in range(SIZE // 12)) for word in ("so", "so left", "thus (A)"))
"""No two sentences are the same."""
TYPES = (("choice", "B", ()), ("number", "7", ()), ("math", r"$2\sqrt{3}$", ("7", "8")), ("text", "up", ("left", "up")))
MOST_SECONDS = 1.0
"""Of one reader; the slowest takes 0.3 s, and what is quadratic takes 5 s to minutes."""


def seconds(function, *arguments) -> float:
    began = time.process_time()
    function(*arguments)
    return time.process_time() - began


@pytest.mark.parametrize("text", [pattern * (SIZE // len(pattern)) for pattern in PATTERNS] + list(NUMBERED),
                         ids=lambda text: repr(text[:12]))
def test_every_reader_takes_time_in_proportion(text: str) -> None:
    for problem_type, gold, given in TYPES:
        asked = prompt(problem_type, gold)
        assert seconds(conclusions, text, asked, given) < MOST_SECONDS, problem_type
        assert seconds(supported_answer, f"so {text}", asked, (*given, text)) < MOST_SECONDS, problem_type
        assert seconds(reflectiveness, text, asked, given) < MOST_SECONDS, problem_type
    assert seconds(repetition, text, 6) < MOST_SECONDS


def test_a_group_of_them_is_verified_in_seconds() -> None:
    asked: Prompt = prompt("text", "up")
    group = RolloutGroup(asked, [])
    for number, pattern in enumerate(("so ", "so 7 ", "left ", r"\(", "wait ", "up up ")):
        text = written(pattern * (SIZE // len(pattern)), f"{pattern * 900}{number}")
        group.completions.append(completion(text, asked))
    for row in group.completions:
        row.accuracy = 0.0
    config = VerifierConfig()
    assert seconds(lambda: verify([group], config, RulesJudge(), len, lambda text: [1], 0, 0, progress=False)) < 10


def test_the_first_and_the_last_conclusion_of_a_long_text_are_read() -> None:
    text = "So A. " + "so B. " * 10_000 + "So C."
    asked = prompt()
    found = conclusions(text, asked)
    assert (found[0].answer, found[-1].answer) == ("A", "C") and len(found) == 2000
    assert reflectiveness(text, asked).self_corrected
