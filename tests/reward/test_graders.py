"""The types of answers: their functions against numbers worked by hand, their table, and a missing library."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.verifier_groups import prompt
from veripo_fast.errors import DataError, UserError
from veripo_fast.reward import physical, text_grades
from veripo_fast.reward.box_answers import best_pairing, boxes_accuracy, iou, read_boxes
from veripo_fast.reward.graders import (
    DECLARED_TYPES,
    GRADERS,
    answer_accuracy,
    answers_equal,
    check_gold,
    infer_problem_type,
    nearest_type,
)
from veripo_fast.reward.select_answers import multi_select_accuracy, read_choices, soft_select_accuracy
from veripo_fast.reward.text_grades import edit_distance, ocr_accuracy
from veripo_fast.reward.time_answers import read_spans, read_time, spans_iou, time_span_accuracy, timestamp_accuracy
from veripo_fast.types import ProblemType

GOLDS = {"choice": ("B", ("x", "y")), "multi_select": ("A, B", ("x", "y", "z")),
         "soft_select": ("A, B", ("x", "y", "z")), "boolean": ("Yes", ()), "number": ("3", ()),
         "rounded": ("0.67", ()), "quantity": ("3 m", ()),
         "estimate": ("3", ()), "math": (r"$\sqrt{3}$", ()), "text": ("a cat", ()), "ocr": ("STOP", ()),
         "rouge": ("a cat sleeps", ()), "time_span": ("3 to 7", ()), "timestamp": ("1:23", ()),
         "box": ("[1, 2, 3, 4]", ()), "boxes": ("[[1, 2, 3, 4], [5, 6, 7, 8]]", ())}
LIBRARIES = {"quantity": "pint", "rouge": "rouge_score"}


def asked(kind):
    if kind in LIBRARIES:
        pytest.importorskip(LIBRARIES[kind])
    gold, options = GOLDS[kind]
    return prompt(kind, gold, options)


def test_every_type_has_a_grader():
    assert set(GRADERS) == set(ProblemType.__args__) == set(GOLDS) == set(DECLARED_TYPES.values())


@pytest.mark.parametrize("kind", GOLDS)
def test_a_gold_answers_itself_and_an_empty_answer_does_not(kind):
    question = asked(kind)
    check_gold(question)
    assert answer_accuracy(question.gold, question, 1e-6) == pytest.approx(1)
    assert answers_equal(question.gold, question.gold, question)
    for answer in ("", " ", "\0", "?", "[", "none of these", "NaN", "9" * 400):
        assert answer_accuracy(answer, question, 1e-6) < 0.5
        assert not answers_equal(answer, question.gold, question)
    with pytest.raises(DataError, match=f"cannot be read as {kind}"):
        check_gold(prompt(kind, "..." if kind != "ocr" else "", question.options))


@pytest.mark.parametrize("kind", [kind for kind in GOLDS if kind != "math"])  # its worker is killed over an answer
@settings(max_examples=60, deadline=None)
@given(answer=st.one_of(st.text(max_size=60), st.text("0123456789.,:-[]() {}toABCandms/^*\\\"'", max_size=80)))
def test_no_answer_makes_a_grader_raise(kind, answer):
    question = asked(kind)
    assert 0 <= answer_accuracy(answer, question, 1e-6) <= 1
    assert answers_equal(answer, question.gold, question) in (True, False)
    GRADERS[kind].reads(answer, question.options)


# -- spans and boxes --------------------------------------------------------------------------------------------------

def test_temporal_iou():
    assert time_span_accuracy("4 to 10", "2 to 8") == pytest.approx(4 / 8)
    assert time_span_accuracy("[[0, 2], [1, 3]]", "[[0, 1], [2, 4]]") == pytest.approx(2 / 4)  # overlaps count once
    assert spans_iou([(0, 1)], [(1, 2)]) == 0
    assert time_span_accuracy("4 to 10", "10 to 4") == 0
    assert read_spans("1 to 2 minutes") == [(60, 120)] and read_spans("1m30s - 2m") == [(90, 120)]
    assert read_spans('[{"start": "0:03", "end": "0:07.5"}]') == [(3, 7.5)]
    assert read_spans(" and ".join(f"{2 * n} to {2 * n + 1}" for n in range(65))) == []


def test_times():
    assert [timestamp_accuracy(f"{83 + d}", "1:23") for d in (0, 2, -10, 10.5)] == pytest.approx(
        [1, math.exp(-1), math.exp(-5), 0])
    for text in ("1:02:03", "62 min 3 s", "1h2m3s", "3723", "3723000 ms"):
        assert read_time(text) == 3723


def test_iou_of_boxes():
    assert iou((0, 0, 2, 2), (1, 1, 3, 3)) == pytest.approx(1 / 7)
    assert iou((0, 0, 2, 2), (2, 0, 4, 2)) == 0 and iou((0, 0, 4, 4), (1, 1, 2, 2)) == pytest.approx(1 / 16)
    gold = "[[0,0,2,2], [10,10,12,12]]"
    assert boxes_accuracy("[[10,10,12,12], [1,1,3,3]]", gold) == pytest.approx((1 + 1 / 7) / 2)
    assert boxes_accuracy("[[0,0,2,2]]", gold) == 0.5
    assert len(read_boxes(str([[0, 0, 1, 1]] * 64))) == 64 and read_boxes(str([[0, 0, 1, 1]] * 65)) == []


def test_pairing_is_the_best_of_all():
    rng = random.Random(0)
    for rows, columns in itertools.product(range(1, 5), range(1, 6)):
        gains = [[rng.choice((0.0, rng.random())) for _ in range(columns)] for _ in range(rows)]
        table = gains if rows <= columns else [list(column) for column in zip(*gains, strict=True)]
        best = max(sum(row[column] for row, column in zip(table, order, strict=False))
                   for order in itertools.permutations(range(len(table[0])), len(table)))
        assert best_pairing(gains) == pytest.approx(best)


# -- words ------------------------------------------------------------------------------------------------------------

@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from("abc"), max_size=9), st.lists(st.sampled_from("abc"), max_size=9))
def test_edit_distance(one, other):
    row = list(range(len(other) + 1))
    for number, item in enumerate(one, start=1):
        diagonal, row[0] = row[0], number
        for column, candidate in enumerate(other, start=1):
            diagonal, row[column] = row[column], min(row[column] + 1, row[column - 1] + 1,
                                                     diagonal + (item != candidate))
    assert edit_distance(one, other) == row[-1]


def test_ocr_is_one_minus_the_word_error_rate():
    assert ocr_accuracy("No parking on Sundays", "No parking on Sunday") == 0.75
    assert ocr_accuracy("no Parking", "No parking") == 0 and ocr_accuracy("No", "No parking today ever") == 0.25
    assert ocr_accuracy("a b c d", "a b") == 0  # two words too many of two


def test_rouge_is_video_r1s():
    pytest.importorskip("rouge_score")
    # 4 of 5 words, 3 of 4 pairs, a subsequence of 4: (0.8 + 0.75 + 0.8) / 3
    assert text_grades.rouge_accuracy("the dog runs very fast", "the dog runs very slowly") == pytest.approx(2.35 / 3)
    assert text_grades.rouge_accuracy("the dogs run", "the dog runs") == 1  # stems
    assert text_grades.rouge_accuracy(" ".join(["dog"] * 2000), "dog") == 0


# -- selections -------------------------------------------------------------------------------------------------------

def test_soft_select_is_the_share_unless_one_is_wrong():
    assert [soft_select_accuracy(text, "A, B, D") for text in ("A, B, D", "B", "A, B", "A, C", "")] == pytest.approx(
        [1, 1 / 3, 2 / 3, 0, 0])
    assert multi_select_accuracy("A, B", "A, B, D") == 0 and read_choices("E", ("x", "y")) is None


# -- names and libraries ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("declared", "gold", "options", "kind"), [
    ("temporal grounding", "3 to 7", (), "time_span"), ("spatial grounding", "[1, 2, 3, 4]", (), "box"),
    ("multi-select", "A, C", ("x", "y", "z"), "multi_select"),
    ("multiple choice", "A, C", ("x", "y", "z"), "multi_select"),
    ("multiple choice", "AC", (), "multi_select"), (None, "A, C", ("x", "y", "z"), "multi_select"),
    ("OCR", "STOP", (), "ocr"), ("true/false", "True", (), "boolean"), ("time_span", "1 to 2", (), "time_span"),
    (None, "Yes", (), "text"), (None, "1:30", (), "text"),
    (None, "cat, cow", ("cat", "dog", "cow"), "multi_select"),
    (None, "2, 4", ("2", "3", "4"), "multi_select"),
])
def test_names_of_types(declared, gold, options, kind):
    assert infer_problem_type(declared, gold, options) == kind


def test_the_nearest_name():
    assert nearest_type("temporal groundng") == "temporal grounding" and nearest_type("Time-Span") == "time span"
    assert nearest_type("qwertz") == "" and nearest_type("x" * 100_000) == ""


@pytest.mark.parametrize(("kind", "module", "cached", "package"), [
    ("quantity", "pint", physical._registry, "pint"),
    ("rouge", "rouge_score.rouge_scorer", text_grades._rouge, "rouge-score")])
def test_a_missing_library_is_said_by_name(monkeypatch, kind, module, cached, package):
    monkeypatch.setitem(__import__("sys").modules, module, None)
    cached.cache_clear()
    try:
        with pytest.raises(UserError, match=rf"type {kind} needs the package {package}.*veripo-fast\[answers\]"):
            check_gold(prompt(kind, "9 stones" if kind == "quantity" else "nine stones lie there", ()))
    finally:
        cached.cache_clear()
