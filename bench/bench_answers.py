"""How often a grader is wrong: answers with the score that is evident to a human, by kind.

    python bench/bench_answers.py [CASES.jsonl] [--store NOTE]
    python bench/bench_answers.py --hostile [--store NOTE]

A case is a JSON line of class, kind (a problem type; `completion:` in front means that the answer is a whole
completion), gold, answer, options and expected: a score, or the two ends of an allowed range. 0.5 outside of estimates
means that either reading may stand. A false positive scores above what is expected, a false negative below it.
--hostile measures the longest time that a grader takes for 100 kB of one pattern, and for a gold that is as long as an
answer may be.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # bench/ itself on the path would offer bench/kernels as `kernels`, a Hugging Face package
    sys.path[0] = __file__.rpartition("/bench/")[0]

from bench import recipe
from veripo_fast.config.objectives import RewardConfig
from veripo_fast.reward.graders import GRADERS
from veripo_fast.reward.score import score
from veripo_fast.types import Prompt

CASES = Path(__file__).parent / "answer_cases.jsonl"
SLACK = 1e-6
HOSTILE_BYTES = 100_000
PATTERNS = ("(", "[", "{", "$", "<", " ", "7", "7 ", "7,", "9^", "a ", "not ", "B. ", "A, ", "yes ", "x=", "10 to ",
            "1:00 ", "[1,2,3,4],", '{"a":', "m*", "1 m ", "m^2 ", r"\(", r"\frac{", r"\text{", r"\boxed{", "½", "²",
            "√", "红", "the ")
GRADED = ("estimate", "time_span", "timestamp", "box", "boxes", "ocr", "rouge", "soft_select")
"""Types whose score of 0.5 is a score, and not a doubt."""


@dataclass(frozen=True)
class Wrong:
    """A case whose score is not the expected one."""

    case: dict[str, Any]
    score: float
    too_high: bool


def judged(case: dict[str, Any]) -> float:
    """The accuracy that the reward gives the answer of a case."""
    whole, _, kind = case["kind"].rpartition(":")
    prompt = Prompt(case["class"], (), kind, case["gold"], tuple(case["options"]))
    text = case["answer"] if whole else f"<think>why</think> <answer>{case['answer']}</answer>"
    return score(text, prompt, RewardConfig()).accuracy


def allowed(case: dict[str, Any]) -> tuple[float, float]:
    """The lowest and the highest score that a human would accept."""
    expected = case["expected"]
    if isinstance(expected, list):
        return expected[0], expected[1]
    if expected == 0.5 and case["kind"].rpartition(":")[2] not in GRADED:
        return 0.0, 1.0
    return expected, expected


def wrong(case: dict[str, Any]) -> Wrong | None:
    """What is wrong about the score of a case, or None."""
    lowest, highest = allowed(case)
    given = judged(case)
    if lowest - SLACK <= given <= highest + SLACK:
        return None
    return Wrong(case, given, given > highest)


def confusion(cases: Iterable[dict[str, Any]]) -> tuple[dict[str, Counter[str]], list[Wrong]]:
    """Per kind the counts `cases`, `positives` (a human gives more than 0), `false_positives`, `false_negatives`."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    mistakes = []
    for case in cases:
        kind = counts[case["kind"].rpartition(":")[2]]
        kind["cases"] += 1
        kind["positives"] += allowed(case)[0] > 0
        mistake = wrong(case)
        if mistake is not None:
            kind["false_positives" if mistake.too_high else "false_negatives"] += 1
            mistakes.append(mistake)
    return dict(counts), mistakes


def slowest(kind: str, gold: str, options: tuple[str, ...]) -> tuple[float, str]:
    """CPU seconds of the answer that takes longest, and its pattern: 100 kB, and shorter ones with the gold ahead."""
    worst = (0.0, "")
    for pattern in PATTERNS:
        long = pattern * (HOSTILE_BYTES // len(pattern.encode()))
        for answer in (long, f"{gold} {long}"[:2000], f"{gold}{long}"[:12_000]):
            started = time.process_time()
            GRADERS[kind].accuracy(answer, gold, options, 1e-6)  # type: ignore[index]
            worst = max(worst, (time.process_time() - started, pattern))
    return worst


def hostile(cases: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Per kind but math, whose worker is bounded by itself, the slowest pattern for the first gold of the cases."""
    rows = {}
    for case in cases:
        kind = case["kind"].rpartition(":")[2]
        if kind in rows or kind == "math":
            continue
        GRADERS[kind].accuracy(case["gold"], case["gold"], tuple(case["options"]), 1e-6)  # loads its library
        seconds, pattern = slowest(kind, case["gold"], tuple(case["options"]))
        rows[kind] = {"seconds": round(seconds, 4), "pattern": pattern}
        print(f"{kind:14}{seconds * 1e3:8.1f} ms of CPU at most, by {pattern!r}")
    return rows


def read(path: Path) -> list[dict[str, Any]]:
    """The cases of a file."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]


def _row(count: Counter[str]) -> dict[str, int]:
    return {name: count[name] for name in ("cases", "positives", "false_positives", "false_negatives")}


def main() -> None:
    """Print the confusion and what is wrong; with --store, append a line to bench/results/answers.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", type=Path, nargs="?", default=CASES)
    parser.add_argument("--hostile", action="store_true", help="measure the slowest answers instead")
    parser.add_argument("--store", metavar="NOTE", help="append the result with this note to bench/results/")
    arguments = parser.parse_args()
    cases = read(arguments.cases)
    if arguments.hostile:
        rows = hostile(cases)
        if arguments.store:
            print(f"stored in {recipe.append('answers', {'note': arguments.store, 'hostile': rows})}")
        return
    started = time.process_time()
    counts, mistakes = confusion(cases)
    seconds = time.process_time() - started
    for mistake in mistakes:
        case = mistake.case
        print(f"{'too high' if mistake.too_high else 'too low '} {mistake.score:.3g} for {case['expected']}: "
              f"{case['class']} | {case['gold']!r} | {case['answer'][:80]!r} {case['options'] or ''}")
    print(f"{'kind':14}{'cases':>7}{'positives':>11}{'false +':>9}{'false -':>9}")
    total: Counter[str] = sum(counts.values(), Counter())
    for kind, count in [*sorted(counts.items()), ("all", total)]:
        print(f"{kind:14}{count['cases']:7}{count['positives']:11}{count['false_positives']:9}"
              f"{count['false_negatives']:9}")
    print(f"{seconds / len(cases) * 1e3:.2f} ms of CPU per answer in this process")
    if arguments.store:
        row = {"file": arguments.cases.name,
               "sha256": hashlib.sha256(arguments.cases.read_bytes()).hexdigest()[:16],
               "note": arguments.store, "all": _row(total), "kinds": {kind: _row(counts[kind]) for kind in counts}}
        sys.argv[1:] = [arguments.cases.name, "--store", arguments.store]
        print(f"stored in {recipe.append('answers', row)}")


if __name__ == "__main__":
    main()
