"""Two samples of a step as a table on the terminal: the completions with the highest and the lowest reward."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Literal

from veripo_fast.reward.score import scores_of
from veripo_fast.text import number, one_line
from veripo_fast.types import RolloutGroup

WIDTH, MOST_LINES = 100, 4
"""Characters of a line, and lines of a text."""
SCORES: tuple[Literal["reward", "accuracy", "format"], ...] = ("reward", "accuracy", "format")
Sample = tuple[RolloutGroup, int]
"""A group, and the number of a completion in it."""


def samples_of(groups: Sequence[RolloutGroup]) -> list[Sample]:
    """The first completion with the highest reward, and the first one with the lowest; one where they are the same."""
    every = [(scores_of(group, "reward")[number], group, number) for group in groups
             for number in range(len(group.completions))]
    if not every:
        return []
    best = max(every, key=lambda item: item[0])
    worst = min(every, key=lambda item: item[0])
    chosen = [best] if best is worst else [best, worst]
    return [(group, number) for _, group, number in chosen]


def table(title: str, groups: Sequence[RolloutGroup]) -> str:
    """The samples of a step in lines that every terminal shows: what others wrote is made printable."""
    rule = "+" + "-" * 12 + "+" + "-" * (WIDTH + 2) + "+"
    lines = [title, rule]
    for group, index in samples_of(groups):
        completion = group.completions[index]
        scores = ", ".join(f"{name} {number(scores_of(group, name)[index])}" for name in SCORES)
        rows = [("question", _question(group)), ("gold", group.prompt.gold), ("completion", completion.text),
                ("scores", f"{scores}; {len(completion.token_ids)} tokens, {completion.finish_reason}")]
        for name, text in rows:
            lines += _cells(name, text)
        lines.append(rule)
    return "\n".join(lines)


def _question(group: RolloutGroup) -> str:
    """The text of the last message; media are left out."""
    return " ".join(part for part in group.prompt.messages[-1].parts if isinstance(part, str))


def _cells(name: str, text: str) -> list[str]:
    wrapped = textwrap.wrap(one_line(text), WIDTH, max_lines=MOST_LINES, placeholder=" ...") or [""]
    return [f"| {name if first else '':<10} | {line:<{WIDTH}} |" for first, line in
            zip([True] + [False] * len(wrapped), wrapped, strict=False)]
