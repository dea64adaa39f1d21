"""Which completions of a group could form a pair, family by family. Malformed or unfinished ones are never chosen.

Families after the paper and its reviews: accuracy (penalty), consistency, reflection; repetition besides.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Literal

from veripo_fast.config.objectives import VerifierConfig
from veripo_fast.reward.score import answers_equal
from veripo_fast.reward.spans import parse_group
from veripo_fast.types import PairFamily, RolloutGroup, Verdict
from veripo_fast.verifier.checks import is_clean, is_well_formed
from veripo_fast.verifier.conclusions import reflectiveness
from veripo_fast.verifier.judges import given_answers

ACCURACY_GAP = 0.5
"""The chosen side of an accuracy or reflection pair is more accurate by at least this much."""


@dataclass(frozen=True)
class Candidate:
    """A pair that could be built from one group."""

    family: PairFamily
    chosen: int
    """Index of the completion; with `kind` answer the same as `rejected`."""
    rejected: int
    kind: Literal["whole", "answer", "assembled"] = "whole"
    """Two whole completions; one completion with its answer swapped; or the chosen side assembled from both."""


@dataclass
class Found:
    """What one family found in one group."""

    candidates: list[Candidate]
    dropped: Counter[str]
    """Combinations that were ruled out, by reason."""
    lacking: str = ""
    """Why there are no candidates and no dropped ones."""


class GroupView:
    """A group beside its verdicts, and the roles that its completions can play. Repeated completions play none."""

    def __init__(self, group: RolloutGroup, verdicts: list[Verdict], config: VerifierConfig) -> None:
        self.group, self.verdicts, self.config = group, verdicts, config
        first: dict[tuple[int, ...], int] = {}
        for index, completion in enumerate(group.completions):
            first.setdefault(tuple(completion.token_ids), index)
        self.repeated = set(range(len(verdicts))) - set(first.values())
        usable = [verdict for verdict in verdicts
                  if verdict.index not in self.repeated and group.completions[verdict.index].token_ids]
        self.clean = [v for v in usable if is_clean(v)]
        self.right = [v for v in self.clean if v.consistent]
        self.wrong = [v for v in usable if "wrong" in v.flags]
        self.contradicting = [v for v in usable if v.consistent is False and is_well_formed(v)]
        self.repetitive = [v for v in usable if "repetition" in v.flags and "wrong" not in v.flags]

    @cached_property
    def given(self) -> list[str]:
        """The answers that the group gives."""
        return given_answers(self.group)

    def lengths_match(self, one: Verdict, other: Verdict) -> bool:
        """Whether the longer completion has at most `length_match` times the tokens of the shorter one."""
        shorter, longer = sorted(len(self.group.completions[v.index].token_ids) for v in (one, other))
        return longer <= self.config.length_match * shorter


def find_candidates(view: GroupView, family: PairFamily) -> Found:
    """All candidates of one family."""
    return {"accuracy": _accuracy, "consistency": _consistency, "reflection": _reflection,
            "repetition": _repetition}[family](view)


def _accuracy(view: GroupView) -> Found:
    if not view.right or not view.wrong:
        return _lacking("no right, consistent and clean completion" if not view.right else "no wrong completion")
    return _combine(view, "accuracy", view.right, view.wrong, gap=ACCURACY_GAP, match=True)


def _consistency(view: GroupView) -> Found:
    """Two rollouts that are both accurate; failing that, one rollout whose reasoning supports the gold answer."""
    if not view.contradicting:
        return _lacking("no inconsistent completion")
    accurate = [verdict for verdict in view.contradicting if "wrong" not in verdict.flags]
    found = _combine(view, "consistency", view.right, accurate, gap=None, match=True)
    if found.candidates:
        return found
    found.candidates = [Candidate("consistency", verdict.index, verdict.index, "answer")
                        for verdict in view.contradicting if "wrong" in verdict.flags and _supports_gold(view, verdict)]
    if not found.candidates and not found.dropped:
        return _lacking("no right, consistent partner, and no reasoning that supports the gold answer")
    return found


def _supports_gold(view: GroupView, verdict: Verdict) -> bool:
    prompt = view.group.prompt
    return verdict.supported_answer is not None and answers_equal(verdict.supported_answer, prompt.gold, prompt)


def _reflection(view: GroupView) -> Found:
    """Rollouts that corrected themselves, and assembled ones; the wrong reasoning must support its wrong answer."""
    given, parsed = view.given, parse_group(view.group)
    wrong = [verdict for verdict in view.wrong if is_well_formed(verdict) and verdict.consistent
             and "repetition" not in verdict.flags and parsed[verdict.index].think]
    right = [verdict for verdict in view.right if parsed[verdict.index].think]
    if not right or not wrong:
        return _lacking("no right, consistent and clean completion" if not right
                        else "no well-formed wrong completion that is consistent with its reasoning")
    reflective = [verdict for verdict in right if reflectiveness(
        parsed[verdict.index].think or "", view.group.prompt, given).reflective]
    found = _combine(view, "reflection", reflective, wrong, gap=ACCURACY_GAP, match=False)
    assembled = _combine(view, "reflection", right, wrong, gap=ACCURACY_GAP, match=False)
    found.candidates += [Candidate("reflection", c.chosen, c.rejected, "assembled") for c in assembled.candidates]
    found.dropped += assembled.dropped
    return found


def _repetition(view: GroupView) -> Found:
    if not view.clean or not view.repetitive:
        return _lacking("no right and clean completion" if not view.clean else "no right but repetitive completion")
    return _combine(view, "repetition", view.clean, view.repetitive, gap=None, match=False)


def _lacking(reason: str) -> Found:
    return Found([], Counter(), reason)


def _combine(view: GroupView, family: PairFamily, chosen: Iterable[Verdict], rejected: Iterable[Verdict], *,
             gap: float | None, match: bool) -> Found:
    """Every combination of whole completions that keeps the accuracy gap and, where asked for, the length match."""
    found = Found([], Counter())
    for better, worse in product(chosen, rejected):
        if gap is not None and better.accuracy - worse.accuracy < gap:
            found.dropped["accuracies too close"] += 1
        elif match and not view.lengths_match(better, worse):
            found.dropped["lengths too different"] += 1
        else:
            found.candidates.append(Candidate(family, better.index, worse.index))
    return found
