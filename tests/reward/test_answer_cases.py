"""Answers whose right score is evident to a person, of all types: none may score too high, and none too low."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections import Counter

import pytest

from bench import bench_answers
from tests.support.paths import REPOSITORY

CASES = bench_answers.read(bench_answers.CASES)
LIBRARIES = {"quantity": "pint", "rouge": "rouge_score"}


def kind_of(case):
    return case["kind"].rpartition(":")[2]


KINDS = sorted({kind_of(case) for case in CASES})


def test_there_are_cases_of_every_type():
    from veripo_fast.reward.graders import GRADERS

    assert set(KINDS) == set(GRADERS)
    counts = Counter(map(kind_of, CASES))
    assert sum(counts.values()) >= 600 and min(counts.values()) >= 8


@pytest.mark.parametrize("kind", KINDS)
def test_no_answer_scores_above_or_below_what_a_person_gives(kind):
    if kind in LIBRARIES and importlib.util.find_spec(LIBRARIES[kind]) is None:
        pytest.skip(f"{LIBRARIES[kind]} is not installed")
    counts, mistakes = bench_answers.confusion([case for case in CASES if kind_of(case) == kind])
    assert [(mistake.case["gold"], mistake.case["answer"][:80], mistake.score) for mistake in mistakes] == []
    assert set(counts) == {kind} and 0 < counts[kind]["positives"] < counts[kind]["cases"]


def test_confusion_counts_both_ways():
    case = {"class": "x", "kind": "number", "gold": "3", "answer": "3", "options": [], "expected": 0}
    counts, (wrong,) = bench_answers.confusion([case])
    assert wrong.too_high and counts["number"] == {"cases": 1, "positives": 0, "false_positives": 1}
    counts, (wrong,) = bench_answers.confusion([case | {"expected": 1, "answer": "4"}])
    assert not wrong.too_high and counts["number"] == {"cases": 1, "positives": 1, "false_negatives": 1}
    assert bench_answers.confusion([case | {"expected": 0.5}])[1] == []
    assert bench_answers.wrong(case | {"kind": "estimate", "expected": 0.5}).too_high
    assert bench_answers.wrong(case | {"kind": "completion:number"}) is None  # no tags, no answer


def test_the_script_prints_the_confusion(tmp_path):
    path = tmp_path / "cases.jsonl"
    path.write_text(json.dumps({"class": "x", "kind": "choice", "gold": "A", "answer": "A", "options": ["x", "y"],
                                "expected": 0}) + "\n")
    done = subprocess.run([sys.executable, str(REPOSITORY / "bench/bench_answers.py"), str(path)], capture_output=True,
                          text=True, check=True)
    assert "too high 1 for 0: x | 'A' | 'A'" in done.stdout
    assert done.stdout.splitlines()[-2].split() == ["all", "1", "0", "1", "0"]
