r"""Reading completions: the spans that its form names, and whether it is well formed.

`<think>...</think> <answer>...</answer>` is the default form; another one names other tags, or `boxed` for an answer in
\boxed{...}. Nothing here needs torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from veripo_fast.types import THINK_ANSWER, Form, RolloutGroup

_BOXED = "\\boxed{"
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)


@dataclass(frozen=True)
class Parsed:
    """The spans of a completion, white space stripped."""

    think: str | None
    """None when <think> and </think> do not each occur once in that order, or when nothing lies between them."""
    answer: str | None
    """The same of <answer> and </answer>, or of the one \\boxed{} behind the think span."""
    format_ok: bool
    """Whether the whole completion has the form that is asked for."""
    spans: Mapping[str, str | None]
    """Every span by the name of its tag, those two included."""


class _Place(NamedTuple):
    """Where a span stands, and where its content does."""

    start: int
    content: int
    content_end: int
    end: int


def parse_group(group: RolloutGroup) -> list[Parsed]:
    """The parsed completions of a group."""
    form = group.prompt.form
    return [parse_completion(completion.text, group.think_opened, form) for completion in group.completions]


def parse_completion(text: str, think_opened: bool = False, form: Form = THINK_ANSWER) -> Parsed:
    r"""Read the spans of a form; with `think_opened` the prompt wrote `<think>` already.

    format_ok: the tags of each span occur exactly once, no span is empty, and only white space lies between one span
    and the next. New lines are allowed everywhere, and so is text before the first span and behind the last (it is
    never scored). Two answer spans are no answer at all: hedging does not pay. Before \boxed{} any text may stand. A
    form with a pattern asks for that instead of the order of its spans.
    """
    names = _names(form)
    if think_opened and "think" in names:
        text = "<think>\n" + text
    places = _places(text, tuple(names))
    spans = {name: None if place is None else text[place.content:place.content_end].strip() or None
             for name, place in places.items()}
    whole = all(spans[name] is not None or (optional and not _occurs(text, name)) for name, optional in names.items())
    if whole and form.pattern:
        whole = re.fullmatch(form.pattern, text, re.DOTALL) is not None
    elif whole:
        whole = _in_order(text, {name: place for name, place in places.items() if place is not None})
    return Parsed(spans.get("think"), spans[answer_tag(form)], whole, spans)


def answer_tag(form: Form) -> str:
    """The name of the span that holds the answer."""
    return "answer" if "answer" in _names(form) else "boxed"


def answer_closing(form: Form) -> str:
    """What ends the answer span."""
    return "</answer>" if answer_tag(form) == "answer" else "}"


def answer_prefix(text: str, form: Form = THINK_ANSWER) -> str | None:
    """The completion up to the first character of its answer, or None when `parse_completion` finds no answer.

    It holds what the policy wrote and nothing of the prompt, whichever of the two opened the think span.
    """
    if parse_completion(text, form=form).answer is None:
        return None
    start = _answer_place(text, form).content
    return text[:start] + re.match(r"\s*", text[start:]).group()  # type: ignore[union-attr]


def answer_bounds(text: str, form: Form = THINK_ANSWER) -> tuple[int, int] | None:
    """Where the answer of a completion begins and ends, white space around it left out; None without an answer."""
    prefix, answer = answer_prefix(text, form), parse_completion(text, form=form).answer
    return None if prefix is None or answer is None else (len(prefix), len(prefix) + len(answer))


def answer_end(text: str, form: Form) -> int:
    """Where the answer span of a completion that has one ends, its closing included."""
    return _answer_place(text, form).end


def _answer_place(text: str, form: Form) -> _Place:
    place = _places(text, tuple(_names(form)))[answer_tag(form)]
    assert place is not None
    return place


@lru_cache(maxsize=64)
def _names(form: Form) -> dict[str, bool]:
    """Name of each tag in order -> whether it may be absent."""
    return {tag.removesuffix("?"): tag.endswith("?") for tag in form.tags}


def _places(text: str, names: tuple[str, ...]) -> dict[str, _Place | None]:
    """Where each span stands; None where its tags do not occur exactly once in order."""
    places = {name: _tagged(text, f"<{name}>", f"</{name}>") for name in names if name != "boxed"}
    if "boxed" in names:
        thought = places.get("think")
        places["boxed"] = _boxed(text, 0 if thought is None else thought.end)
    return {name: places[name] for name in names}


def _tagged(text: str, opening: str, closing: str) -> _Place | None:
    if text.count(opening) != 1 or text.count(closing) != 1:
        return None
    start, end = text.index(opening), text.index(closing)
    return None if end < start else _Place(start, start + len(opening), end, end + len(closing))


def _boxed(text: str, behind: int) -> _Place | None:
    """The one boxed answer behind the think span, to the brace that closes it."""
    if text.count(_BOXED, behind) != 1:
        return None
    start = text.index(_BOXED, behind)
    content, depth = start + len(_BOXED), 1
    for match in _BRACE.finditer(text, content):
        depth += {"{": 1, "}": -1}.get(match.group(), 0)
        if depth == 0:
            return _Place(start, content, match.start(), match.end())
    return None


def _occurs(text: str, name: str) -> bool:
    return f"<{name}>" in text or f"</{name}>" in text


def _in_order(text: str, places: Mapping[str, _Place]) -> bool:
    behind: int | None = None
    for name, place in places.items():
        if behind is not None and (place.start < behind or (name != "boxed" and text[behind:place.start].strip())):
            return False
        behind = place.end
    return True
