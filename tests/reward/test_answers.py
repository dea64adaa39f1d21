import math
import os
import signal
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from veripo_fast.reward import math_answers
from veripo_fast.reward.answers import normalise_text, words
from veripo_fast.reward.choice_answers import read_choice
from veripo_fast.reward.math_answers import math_equal, math_parses
from veripo_fast.reward.number_answers import find_numbers, read_number
from veripo_fast.reward.spans import answer_prefix, parse_completion

CHAIRS = ("table", "chair", "Person A", "a sofa")
quick = settings(deadline=None, max_examples=80)
TAGS = ("<think>", "</think>", "<answer>", "</answer>")


# The think and answer spans

@pytest.mark.parametrize("text", [
    "<think>why</think><answer>B</answer>",
    "<think>\nwhy\n\nso\n</think>\n\n<answer>\nB\n</answer>",
    "Well. <think>why</think> \t\n<answer> B </answer> Thanks!",
])
def test_accepted_form(text):
    parsed = parse_completion(text)
    assert parsed.format_ok and parsed.answer == "B" and parsed.think.startswith("why")


@pytest.mark.parametrize(("text", "think", "answer"), [
    ("", None, None),
    ("B", None, None),
    ("<answer>B</answer>", None, "B"),
    ("<think></think><answer>B</answer>", None, "B"),
    ("<think> \n</think><answer>B</answer>", None, "B"),
    ("<think>why</think><answer></answer>", "why", None),
    ("<think>why</think><answer> </answer>", "why", None),
    ("<think>why</think>so<answer>B</answer>", "why", "B"),
    ("<think>why</think>B", "why", None),
    ("<think>why</think><answer>B", "why", None),
    ("<think>why", None, None),
    ("<think>why</think><answer>A</answer><answer>B</answer>", "why", None),
    ("<think>why</think><answer>A</answer> or <answer>B", "why", None),
    ("<think>a <think> tag</think><answer>B</answer>", None, "B"),
    ("<think>my <answer> is</think><answer>B</answer>", "my <answer> is", None),
    ("<answer>B</answer><think>why</think>", "why", "B"),
    ("<think>why<answer>B</answer></think>", "why<answer>B</answer>", "B"),
    ("</think>why<think><answer>B</answer>", None, "B"),
    ("<think>why</think></answer>B<answer>", "why", None),
    ("<THINK>why</THINK><ANSWER>B</ANSWER>", None, None),
])
def test_refused_form(text, think, answer):
    parsed = parse_completion(text)
    assert (parsed.think, parsed.answer, parsed.format_ok) == (think, answer, False)


@quick
@given(st.lists(st.sampled_from([*TAGS, "B", " ", "why"]), max_size=8).map("".join))
def test_format_ok_means_each_tag_once_and_both_spans(text):
    parsed = parse_completion(text)
    if parsed.format_ok:
        assert all(text.count(tag) == 1 for tag in TAGS) and parsed.think and parsed.answer
        assert [tag for tag in TAGS if tag in text] == sorted(TAGS, key=text.index)
    if parsed.answer is not None:
        assert text[len(answer_prefix(text)):].startswith(parsed.answer)
    else:
        assert answer_prefix(text) is None


def test_answer_prefix_ends_where_the_answer_begins():
    assert answer_prefix("<think>a</think><answer>\n B</answer>") == "<think>a</think><answer>\n "


# Choices

@pytest.mark.parametrize("text", [
    "B", "(B)", "b", "B.", "B. Chair", "Option B", r"$\text{B}$", r"\boxed{B}", "$B$", r"\mathrm{B}", r"$\boxed{B}$",
    r"\boxed{\text{B}}", r"\(B\)", "**B**", "[B]", "B)", "b) chair", "(B) chair", "B: chair", "B - chair", "B, chair",
    "B\n", "'B'", "The answer is B.", "the correct answer is option (B)", "Answer: B. chair", "choice B", "chair",
    "Chair.", "a chair", "The answer is a chair", r"\textbf{B}.", "Ｂ", r"$\text{B. Chair}$",
])
def test_choice_is_read(text):
    assert read_choice(text, CHAIRS) == "B"


@pytest.mark.parametrize("text", [
    "A or B", "A, B", "A/B", "A and B", "A. or B", "A. B. C", "(A) (B)", "(A) or (B)", "B. table", "B) Person A", "E",
    "Z", "", "none", "both", "Best chair in the house", "1", "?", "table or chair", r"$A$ or $B$",
])
def test_hedged_or_impossible_choice_is_none(text):
    assert read_choice(text, CHAIRS) is None


@pytest.mark.parametrize("letter", "ABCDEFGHIJ")
def test_bare_letters_work_up_to_j(letter):
    assert read_choice(letter) == read_choice(f"({letter.lower()})") == read_choice(f"${letter}$") == letter


def test_letters_end_with_the_options():
    assert read_choice("K") == "K"
    assert read_choice("K", CHAIRS) is None
    assert read_choice("D", ("x", "y", "z")) is None
    assert read_choice("L", tuple(f"option {n}" for n in range(12))) == "L"


def test_articles_break_ties_only():
    assert read_choice("the A", ("the A", "A the")) == "A"
    assert read_choice("Person A", CHAIRS) == "C"
    assert read_choice("sofa", CHAIRS) == "D"


@quick
@given(st.text(max_size=40))
def test_reading_a_choice_never_fails(text):
    assert read_choice(text, CHAIRS) in (None, *"ABCD")


# Numbers

@pytest.mark.parametrize(("text", "value"), [
    ("1,000", 1000), ("12,345,678.9", 12345678.9), ("2.5m", 2.5), ("about 2.5", 2.5), (r"\frac{5}{2}", 2.5),
    (r"$\frac{5}{2}$", 2.5), (r"-\frac{1}{2}", -0.5), (r"1\frac{1}{2}", 1.5), ("1 1/2", 1.5), ("5/2", 2.5),
    ("two", 2), ("Twenty-one", 21), ("one hundred and five", 105), ("two million five hundred", 2000500),
    ("2 million", 2e6), ("-5", -5), ("−5", -5), ("minus five", -5), ("negative 5", -5), ("about -5", -5),
    ("x = 5", 5), ("2 + 3 = 5", 5), ("25 m^2", 25), (r"25\,\text{m}^{2}", 25), ("1e3", 1000), ("1e-3", 0.001),
    (r"3 \times 10^{4}", 30000), ("10^3", 1000), ("2 meters", 2), ("$2$", 2), ("2.0", 2), ("2.", 2), (".5", 0.5),
    (r"\boxed{7}.", 7), (r"90^\circ", 90), ("~3", 3), ("$5", 5), ("two (2)", 2), ("The answer is 3.", 3),
])
def test_number_is_read(text, value):
    number = read_number(text)
    assert number is not None and number.value == pytest.approx(value, rel=1e-12) and not number.percent


@pytest.mark.parametrize("text", ["50%", r"50\%", "50 %", "fifty percent", "50 per cent", "$50\\%$"])
def test_percent_is_kept(text):
    number = read_number(text)
    assert number is not None and number.value == 50 and number.percent


@pytest.mark.parametrize("text", [
    "", "red", "2 or 3", "2-3", "2, 3", "two or three", "1/2/2020", "10:30", "nan", "inf", "1e999", "1/0",
    "2+2", "1+1", "x+1", "$x^2+1$", r"\sqrt{3}", r"2\pi", "2^3", "5 - 5", "two and three", "5 m or 6 m",
])
def test_no_single_number(text):
    assert read_number(text) is None


@quick
@given(st.floats(allow_nan=False, allow_infinity=False))
def test_floats_are_read_back(value):
    number = read_number(repr(value))
    assert number is not None and number.value == value


@quick
@given(st.integers(-10**12, 10**12))
def test_grouped_integers_are_read_back(value):
    assert read_number(f"{value:,}").value == value


@quick
@given(st.text(alphabet="0123456789.,-+/%eE one two hundred$\\{}^", max_size=40))
def test_reading_numbers_never_fails(text):
    number = read_number(text)
    assert number is None or math.isfinite(number.value)


def test_numbers_in_order_with_their_units():
    assert [(n.value, n.unit) for n in find_numbers("3 red at 2s, then four")] == [(3, "red"), (2, "s"), (4, "")]


@pytest.mark.parametrize("text", ["9" * 30_000, "1 " * 15_000, "1,000," * 5_000, r"\text{" * 3_000 + "5" + "}" * 3_000,
                                  r"\frac{1}{2}" * 3_000, "one " * 8_000])
def test_no_text_takes_long(text):
    started = time.process_time()
    find_numbers(text)
    assert read_number(text) is None and read_choice(text, CHAIRS) is None
    assert time.process_time() - started < 3  # the first pattern for fractions took 25 s for the digits


# Text

@pytest.mark.parametrize(("one", "other"), [
    ("Paris", "paris"), ("The Eiffel Tower.", "eiffel  tower"), ("don't", "dont"), ("1,000", "1000"), ("a", "A"),
    ("red-ball", "red ball"), (r"\text{Paris}", "Paris"), ("Ａ１", "a1"), ("x, y", "x y"),
])
def test_same_text(one, other):
    assert normalise_text(one) == normalise_text(other) != ""


@pytest.mark.parametrize(("one", "other"), [
    ("-2.5", "2.5"), ("2.5", "25"), ("50%", "50"), ("1,00", "100"), ("Paris", "Pari s"), ("c b", "b c"),
])
def test_different_text(one, other):
    assert normalise_text(one) != normalise_text(other)


def test_chinese_characters_are_words():
    assert words("北京 is big") == ["北", "京", "is", "big"]


# Mathematics

@pytest.mark.parametrize(("answer", "gold"), [
    (r"$\sqrt{12}$", r"2\sqrt{3}"), ("(x+1)^2", "x^2+2x+1"), (r"\boxed{\frac{1}{2}}", "0.5"), ("x=3", "3"),
    ("(1,2)", "$(1,2)$"), ("$x^2$.", "x^2"),
])
def test_equal_mathematics(answer, gold):
    assert math_equal(answer, gold)


@pytest.mark.parametrize(("answer", "gold"), [
    ("3, 2", "2"), ("2 or 3", "2"), ("$x=2$ or $x=3$", "3"), ("$3$, $2$", "3"), ("(2,1)", "(1,2)"), ("", "3"),
    ("3", ""), (r"\frac{1}{", "1"), ("x" * 5000, "x"),
])
def test_unequal_or_hedged_mathematics(answer, gold):
    assert not math_equal(answer, gold)


def test_unreadable_mathematics():
    assert math_parses(r"2\sqrt{3}")
    assert not any(math_parses(text) for text in ("", "$$", r"\frac{1}{", "!!"))


def test_mathematics_in_a_thread():
    results = []
    thread = threading.Thread(target=lambda: results.append(math_equal(r"\sqrt{48}", r"4\sqrt{3}")))
    thread.start()
    thread.join()
    assert results == [True]


def test_runaway_expression_ends_and_the_next_one_is_answered():
    assert not math_equal("9^{9^{9^{9}}}", "4")
    assert math_equal(r"\frac{8}{2}", "4")


def test_a_worker_that_hangs_is_replaced(monkeypatch):
    math_parses("1")
    before = math_answers._worker.process.pid
    os.kill(before, signal.SIGSTOP)
    with monkeypatch.context() as patch:
        patch.setattr(math_answers, "_WORKER_SECONDS", 0.0)
        assert not math_equal(r"\sqrt{75}", r"5\sqrt{3}")
    assert math_equal(r"\sqrt{147}", r"7\sqrt{3}")
    assert math_answers._worker.process.pid != before


ENDLESS = """
import sys, types
sys.modules["math_verify"] = fake = types.ModuleType("math_verify")
sys.modules["math_verify.errors"] = errors = types.ModuleType("math_verify.errors")
errors.TimeoutException, fake.LatexExtractionConfig, fake.verify = TimeoutError, object, None
fake.parse = lambda *_, **__: 9 ** 9 ** 9  # 370 million digits, computed in C
from veripo_fast.reward import math_worker
math_worker.WORKER_SECONDS = 0.3
math_worker.serve()
"""


def test_a_worker_whose_trainer_was_killed_ends_within_an_endless_expression(python):
    done = python("-c", ENDLESS, input='["9", null]\n')
    assert (done.returncode, done.stdout) == (-signal.SIGPROF, "ready\n"), done.stderr
