"""The options of a record, and a gold answer that is one of them.

Options stand in a list, in a mapping of letters or numbers, in a list of mappings, in a key each (`a0`, `option_b`,
`C`), in lines of the question, or are the answer among `negative_answers`. An answer that is an index counts from where
its keys do; else `data.answer_index` says from where, and without it the record is refused.
"""

from __future__ import annotations

import ast
import json
import random
import re
import string
from dataclasses import dataclass
from typing import Any

from veripo_fast.data.keys import OPTION_KEYS, KeyPlan
from veripo_fast.data.records import RecordError, short
from veripo_fast.reward.choice_answers import read_choice
from veripo_fast.reward.graders import DECLARED_TYPES
from veripo_fast.reward.select_answers import read_choices

MOST_OPTIONS = 26
_CLOSES = {".", ")", ":"}
"""What may stand behind the letter of an option."""


@dataclass(frozen=True, slots=True)
class Options:
    """What a record offers to choose from."""

    texts: tuple[str, ...] = ()
    """Without their letters, when every one carries its own; once more where they are doubled ("A. A. A dog")."""
    base: int | None = None
    """What an index among them counts from, when the record's keys say so."""
    numbers: bool = False
    """Whether they are stored as numbers, as an answer of the same kind is then."""


NONE = Options()
_LABELS, _TEXTS = ("label", "key", "letter", "id", "index"), ("text", "value", "content", "option")
_LINE = re.compile(r"^[ \t]*(?:\(([A-Z])\)|([A-Z])[.):])[ \t]*(\S.*?)[ \t]*$", re.MULTILINE)
_INLINE = re.compile(r"\(([A-Z])\)\s*")
_LETTERED = re.compile(r"\(?[A-Z]\)?(?:[.):].*)?", re.DOTALL)
LONGEST_QUESTION = 20_000
"""Characters of a question that are searched for options."""
_SHUFFLED = 3
"""Wrong options that SEED-Bench-R1 draws of a record's negative_answers."""


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
    results = [result for key, value in given if (result := _options(key, value)).texts]
    if not results:
        return NONE
    if len({result.texts for result in results}) > 1:
        raise RecordError(f"names different options under {given[0][0]} and {given[1][0]}")
    return Options(results[0].texts, plan.option_base if results[0].base is None else results[0].base,
                   results[0].numbers)


def _check_consecutive(plan: KeyPlan) -> None:
    first, last = (re.sub(r".*?(\d+|[A-Za-z])$", r"\1", key).upper() for key in (plan.option_keys[0],
                                                                                 plan.option_keys[-1]))
    span = int(last) - int(first) if last.isdecimal() else ord(last) - ord(first)
    if span + 1 != len(plan.option_keys):
        raise RecordError(f"lacks an option between {plan.option_keys[0]} and {plan.option_keys[-1]}")


def _options(key: str, value: Any) -> Options:
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        value = _parsed(key, value)
    elif isinstance(value, str) and (listed := options_in_text(value)):
        value = list(listed)
    base = None
    if isinstance(value, dict):
        value, base = _of_mapping(key, value)
    elif isinstance(value, list) and value and all(isinstance(option, dict) for option in value):
        value = _of_mappings(key, value)
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
    return Options(without_letters(texts), base, numbers)


def _parsed(key: str, value: str) -> Any:
    """A list or a mapping that is written as a text, in JSON or as Python prints it (MMMU)."""
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        try:
            return ast.literal_eval(value.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise RecordError(f"{key} is not valid JSON: {error}") from error


def _of_mappings(key: str, value: list[dict[str, Any]]) -> list[Any]:
    """The options of [{"label": "A", "text": ..}, ..], in their order."""
    texts = []
    for number, option in enumerate(value):
        label = next((option[name] for name in _LABELS if name in option), None)
        held = [option[name] for name in _TEXTS if name in option]
        letter = string.ascii_uppercase[number:number + 1]
        if len(held) != 1 or len(option) > 2 or (label is not None and str(label).strip(" ().").upper() != letter):
            raise RecordError(f"{key} must hold texts, or mappings of label ({letter}) and text, got {short(option)}")
        texts.append(held[0])
    return texts


def _of_mapping(key: str, value: dict[str, Any]) -> tuple[list[Any], int | None]:
    """The options of {"A": .., "B": ..} or {"0": .., "1": ..}, and what their numbers count from."""
    if value and all(str(label).isdecimal() and len(str(label)) < 3 for label in value):
        numbered = {int(label): text for label, text in value.items() if text is not None}
        base = min(numbered, default=0)
        if base > 1 or sorted(numbered) != list(range(base, base + len(numbered))):
            names = ", ".join(map(str, value))[:80]
            raise RecordError(f"{key} must be numbered from 0 or 1 without a gap, got {names}")
        return [numbered[number] for number in sorted(numbered)], base
    if all(text in (None, "") for text in value.values()):  # MMVU writes five empty ones where a question has none
        return [], None
    return _of_letters(key, value), None


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
    """Without their letters, when every one carries its own; once more where they are doubled ("A. A. A dog")."""
    if not texts or texts[0][:1] not in "A(" or len(texts) > MOST_OPTIONS:
        return texts
    bare = []
    for letter, text in zip(string.ascii_uppercase, texts, strict=False):
        named = text[1:] if text[:1] == "(" else text
        rest = named[2:].strip()
        if named[:1] != letter or named[1:2] not in _CLOSES or not rest:
            return texts
        bare.append(rest)
    return without_letters(tuple(bare))


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
    if declared is None and read_choice(gold, texts) is None and read_choices(gold, texts) is None:
        raise RecordError(f"the gold answer {gold[:80]!r} is none of its {len(texts)} options")
    return gold


# -- options that no key names ----------------------------------------------------------------------------------------


def options_in_text(text: str) -> tuple[str, ...]:
    """The options that a text lists by letter, a line each (`A. cat`, `(B) dog`), or in one line as `(A) cat (B) dog`.

    The last list counts, as a question may quote another one. Empty where there are fewer than two, or two are alike.
    """
    if len(text) > LONGEST_QUESTION:
        return ()
    texts: list[str] = []
    lists = [texts]
    for match in _LINE.finditer(text):
        letter = match[1] or match[2]
        if letter == "A":
            texts = []
            lists.append(texts)
        if letter == string.ascii_uppercase[len(texts):len(texts) + 1]:
            texts.append(match[3])
    texts = next((found for found in reversed(lists) if len(found) > 1), [])
    if not texts:
        line = next((line for line in reversed(text.splitlines()) if "(A)" in line), "")
        parts = _INLINE.split(line[line.rfind("(A)"):])
        if parts[1::2] == list(string.ascii_uppercase[:len(parts) // 2]):
            texts = [part.strip(" ,;") for part in parts[2::2]]
    alike = len({option.casefold() for option in texts}) < len(texts)
    return () if len(texts) < 2 or alike or not all(texts) else tuple(texts)


def options_of_question(_: dict[str, Any], text: str, gold: str, declared: str | None) -> Options:
    """The options that stand in the question, when the record is a choice and its gold is among them.

    Args:
        declared: the type that the record declares; without one, a gold that begins with a letter is a choice.
    """
    if declared is None:
        asked = len(gold) < 200 and _LETTERED.fullmatch(gold) is not None
    else:
        asked = DECLARED_TYPES.get(declared) in ("choice", "multi_select", "soft_select")
    texts = without_letters(options_in_text(text)) if asked and "A" in text and "B" in text else ()
    return Options(texts) if texts and read_choices(gold, texts) else NONE


def shuffled_options(row: dict[str, Any], text: str, gold: str, declared: str | None) -> Options:
    """The gold among three of `negative_answers` (SEED-Bench-R1), in an order that the question alone decides.

    Raises:
        RecordError: there are none, or they are no texts.
    """
    wrong = row.get("negative_answers")
    if not wrong or declared not in (None, "choice"):
        return NONE
    if not isinstance(wrong, list) or not all(isinstance(option, str) and option.strip() for option in wrong):
        raise RecordError(f"negative_answers must be a list of texts, got {short(wrong)}")
    others = list(dict.fromkeys(option.strip() for option in wrong if option.strip() != gold))
    dice = random.Random(f"{text}\n{gold}")
    texts = [gold, *dice.sample(others, min(_SHUFFLED, len(others)))]
    dice.shuffle(texts)
    return Options(tuple(texts))
