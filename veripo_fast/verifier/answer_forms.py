"""In which form a policy writes an answer: by letter, by the option's text, as `B. text`, and with what around it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from veripo_fast.reward.choice_answers import letters, read_choice
from veripo_fast.types import Prompt

_LETTER, _TEXT = "\x00", "\x01"
"""Where a form holds the letter and the option's text; no completion holds them, because `clean` drops controls."""
_MOST_AROUND = 24
"""Characters of a form beside letter and text: `The answer is (B).` is a form, a sentence of its own is none."""
_MOST_FORMS = 3
_USUAL = (_LETTER, _TEXT, f"{_LETTER}. {_TEXT}")


def answer_forms(prompt: Prompt, answers: Sequence[str]) -> list[str]:
    """The forms in which the answers to one prompt are written, the most frequent first, three at most.

    Of open questions an answer is its own form. Where no answer of a choice has a form, the three usual ones.
    """
    if prompt.problem_type != "choice":
        return [_TEXT]
    counts = Counter(form for answer in answers if (form := _form(answer, prompt)) is not None)
    return [form for form, _ in counts.most_common(_MOST_FORMS)] or [*_USUAL[:1 if not prompt.options else None]]


def written_as(form: str, candidate: str, prompt: Prompt) -> str:
    """A candidate (an option's letter, or an open answer) in this form."""
    if prompt.problem_type != "choice" or not prompt.options:
        return form.replace(_TEXT, candidate).replace(_LETTER, candidate)
    text = prompt.options[letters(prompt.options).index(candidate)]
    return form.replace(_LETTER, candidate).replace(_TEXT, text)


def _form(answer: str, prompt: Prompt) -> str | None:
    """The answer with marks in place of its letter and its option's text; None when it has neither, or much more."""
    letter = read_choice(answer, prompt.options)
    if letter is None:
        return None
    form, text = answer, ""
    if prompt.options:
        text = prompt.options[letters(prompt.options).index(letter)]
        start = form.casefold().rfind(text.casefold()) if len(text) > 1 else -1
        if start >= 0:
            form = form[:start] + _TEXT + form[start + len(text):]
    alone = [index for index, character in enumerate(form) if character.upper() == letter
             and not form[index - 1:index].isalnum() and not form[index + 1:index + 2].isalnum()]
    if alone:
        form = form[:alone[0]] + _LETTER + form[alone[0] + 1:]
    around = len(form) - form.count(_TEXT) - form.count(_LETTER)
    return form if form.count(_TEXT) + form.count(_LETTER) and around <= _MOST_AROUND else None
