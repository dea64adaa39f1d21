"""What every judge is: it says which answer a reasoning supports, without ever seeing the gold answer."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from veripo_fast.reward.choice_answers import letters, read_choice
from veripo_fast.reward.score import answers_equal
from veripo_fast.reward.spans import parse_group
from veripo_fast.types import Prompt, RolloutGroup

Progress: TypeAlias = Callable[[int], None]
"""Called with the number of completions judged since the last call."""


@dataclass(frozen=True)
class Judgement:
    """What a judge says of one completion."""

    consistent: bool | None
    """Whether the answer is what the reasoning supports; None: no verdict (no conclusion, no answer, no reply)."""
    supported_answer: str | None
    """The answer that the reasoning supports: a letter for choices, else as written; None when there is none."""
    score: float | None
    """The judge's own number, if it has one."""
    why: str = field(default="", compare=False)
    """Why there is no verdict, in two words; empty when there is one."""


NO_JUDGEMENT = Judgement(None, None, None, "not judged")
"""Of a completion without a reasoning or an answer that could be compared."""
NO_REPLY = Judgement(None, None, None, "no reply")
"""The judge was asked, and its reply was missing or could not be read."""


class Judge(Protocol):
    """Reads groups of completions."""

    def judge(self, groups: list[RolloutGroup], progress: Progress) -> list[list[Judgement]]:
        """One judgement per completion, in the order of `groups` and of their completions."""
        ...


def no_progress(completions: int) -> None:
    """A progress callback that shows nothing."""


def compare(supported: str | None, answer: str | None, prompt: Prompt, score: float | None = None) -> Judgement:
    """The judgement that follows from the supported answer; an answer that cannot be read contradicts nothing."""
    if supported is None or answer is None:
        return Judgement(None, supported, score, "no conclusion" if supported is None else "no answer")
    if answers_equal(supported, answer, prompt):
        return Judgement(True, supported, score)
    if answers_equal(answer, answer, prompt):
        return Judgement(False, supported, score)
    return Judgement(None, supported, score, "unreadable answer")


def given_answers(group: RolloutGroup) -> list[str]:
    """The distinct answers inside a group, in order, equal ones once; for choices the letters of all options."""
    prompt = group.prompt
    answers = [parsed.answer for parsed in parse_group(group) if parsed.answer is not None]
    if prompt.problem_type == "choice":
        named = {read_choice(answer, prompt.options) for answer in answers}
        return [letter for letter in letters(prompt.options) if prompt.options or letter in named]
    distinct: list[str] = []
    for answer in answers:
        if not any(answers_equal(answer, other, prompt) for other in distinct):
            distinct.append(answer)
    return distinct


def distinct_groups(groups: list[RolloutGroup]) -> tuple[list[RolloutGroup], list[list[tuple[int, int]]]]:
    """Each prompt once, with each of its completion texts once, so that nothing is judged twice.

    Returns:
        The reduced groups, and for every completion of `groups` its (group, completion) indices among them.
    """
    reduced: list[RolloutGroup] = []
    places: dict[Hashable, int] = {}
    seen: dict[tuple[int, str], int] = {}
    where: list[list[tuple[int, int]]] = []
    for group in groups:
        number = places.setdefault((group.prompt, group.think_opened), len(reduced))
        if number == len(reduced):
            reduced.append(RolloutGroup(group.prompt, [], group.think_opened))
        unique = reduced[number].completions
        where.append([])
        for completion in group.completions:
            index = seen.setdefault((number, completion.text), len(unique))
            if index == len(unique):
                unique.append(completion)
            where[-1].append((number, index))
    return reduced, where


def judge_distinct(judge: Judge, groups: list[RolloutGroup], progress: Progress) -> list[list[Judgement]]:
    """`judge.judge`, but each distinct completion once; progress counts the repeated ones at the end."""
    reduced, where = distinct_groups(groups)
    judged = judge.judge(reduced, progress)
    progress(sum(map(len, where)) - sum(len(group.completions) for group in reduced))
    return [[judged[number][index] for number, index in places] for places in where]
