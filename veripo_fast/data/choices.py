"""The options of a record, and a gold answer that is one of them.

Options stand in a list, in a mapping of letters, or in a key each (`a0`, `option_b`, `C`). An answer that is an index
counts from where its keys do; else `data.answer_index` says from where, and without it the record is refused.
"""

from __future__ import annotations

import json
import re
import string
from dataclasses import dataclass
from typing import Any

from veripo_fast.data.keys import OPTION_KEYS, KeyPlan
from veripo_fast.data.records import RecordError, short
from veripo_fast.reward.choice_answers import read_choice

MOST_OPTIONS = 26
_CLOSES = {".", ")", ":"}
"""What may stand behind the letter of an option."""


@dataclass(frozen=True, slots=True)
class Options:
    """What a record offers to choose from."""

    texts: tuple[str, ...] = ()
    """Without their letters, when every one carries its own."""
    base: int | None = None
    """What an index among them counts from, when the record's keys say so."""
    numbers: bool = False
    """Whether they are stored as numbers, as an answer of the same kind is then."""


NONE = Options()


def read_options(row: dict[str, Any], plan: KeyPlan) -> Options:
    """The options that a record holds under any known key.

    Raises:
        RecordError: they cannot be understood, lack one in the middle, or two keys disagree.
    """
    given = [(key, row[key]) for key in OPTION_KEYS if row.get(key) not in (None, "", [], {})]
    if plan.option_keys:
        given.append((plan.option_keys[0], [row.get(key) for key in plan.option_keys]))
        _check_consecutive(plan)
    if not given:
        return NONE
    results = [_options(key, value) for key, value in given]
    if len({result.texts for result in results}) > 1:
        raise RecordError(f"names different options under {given[0][0]} and {given[1][0]}")
    return Options(results[0].texts, plan.option_base, results[0].numbers)


def _check_consecutive(plan: KeyPlan) -> None:
    first, last = (re.sub(r".*?(\d+|[A-Za-z])$", r"\1", key).upper() for key in (plan.option_keys[0],
                                                                                 plan.option_keys[-1]))
    span = int(last) - int(first) if last.isdecimal() else ord(last) - ord(first)
    if span + 1 != len(plan.option_keys):
        raise RecordError(f"lacks an option between {plan.option_keys[0]} and {plan.option_keys[-1]}")


def _options(key: str, value: Any) -> Options:
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise RecordError(f"{key} is not valid JSON: {error}") from error
    if isinstance(value, dict):
        value = _of_letters(key, value)
    if not isinstance(value, list):
        raise RecordError(f"{key} must be a list, got {short(value)}")
    while value and value[-1] is None:  # Arrow fills up what other records have more
        value = value[:-1]
    for option in value:
        if isinstance(option, bool) or not isinstance(option, str | int | float) or not str(option).strip():
            raise RecordError(f"{key} must hold texts, got {short(option)} among {len(value)} options")
    if len(value) > MOST_OPTIONS:
        raise RecordError(f"{key} holds {len(value)} options, and letters end at Z, the {MOST_OPTIONS}th")
    texts = tuple([option.strip() if type(option) is str else str(option).strip() for option in value])
    numbers = bool(value) and not any(isinstance(option, str) for option in value)
    return Options(without_letters(texts), None, numbers)


def _of_letters(key: str, value: dict[str, Any]) -> list[Any]:
    """The options of {"A": .., "B": ..}, or of {"text": [..], "label": [..]} (ARC)."""
    if isinstance(value.get("text"), list) and set(value) <= {"text", "label"}:
        labels = value.get("label")
        if labels is not None and list(labels) not in (list(string.ascii_uppercase[:len(labels)]),
                                                       [str(number + 1) for number in range(len(labels))]):
            raise RecordError(f"{key} must be labelled A, B, ..., got {short(labels)}")
        return list(value["text"])
    by_letter = {letter.strip().upper(): text for letter, text in value.items() if text is not None}
    letters = sorted(by_letter)
    if letters != list(string.ascii_uppercase[:len(letters)]) or len(by_letter) < sum(
            text is not None for text in value.values()):
        raise RecordError(f"{key} must be named A, B, C, ... without a gap, got {', '.join(letters)[:80]}")
    return [by_letter[letter] for letter in letters]


def without_letters(texts: tuple[str, ...]) -> tuple[str, ...]:
    """Without their letters, when every one carries its own."""
    if not texts or texts[0][:1] not in "A(" or len(texts) > MOST_OPTIONS:
        return texts
    bare = []
    for letter, text in zip(string.ascii_uppercase, texts, strict=False):
        named = text[1:] if text[:1] == "(" else text
        rest = named[2:].strip()
        if named[:1] != letter or named[1:2] not in _CLOSES or not rest:
            return texts
        bare.append(rest)
    return tuple(bare)


def chosen(gold: str, is_number: bool, options: Options, declared: str | None, answer_index: int | None) -> str:
    """The gold answer of a choice as its letter where it is an index; as it is otherwise.

    Args:
        is_number: whether the record holds it as a number and not as a text.
        declared: the type that the record declares, `choice` or None; others are not asked about here.
        answer_index: what an index counts from (data.answer_index).

    Raises:
        RecordError: it may count from 0 or from 1, is out of range, or is none of the options.
    """
    texts = options.texts
    if len(gold) == 1 and gold in string.ascii_uppercase[:len(texts)]:
        return gold
    names_option = gold in texts and (not is_number or options.numbers)
    if gold.isdecimal() and not names_option:
        base = options.base if options.base is not None else answer_index
        if base is None:
            raise RecordError(f"the answer {gold} may count its options from 0 or from 1: set data.answer_index, or "
                              "give the letter")
        if len(gold) > 2 or not 0 <= int(gold) - base < len(texts):
            raise RecordError(f"the answer {gold[:20]} is no index of {len(texts)} options that count from {base}")
        return string.ascii_uppercase[int(gold) - base]
    if declared is None and read_choice(gold, texts) is None:
        raise RecordError(f"the gold answer {gold[:80]!r} is none of its {len(texts)} options")
    return gold
