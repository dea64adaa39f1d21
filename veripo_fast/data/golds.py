"""The gold answer of a record: a text or a number, or a list, a mapping or a truth value where its type has such."""

from __future__ import annotations

import json
import re
import string
from collections.abc import Sequence
from typing import Any, NamedTuple

from veripo_fast.data.keys import GOLD_KEYS, INDEX_KEYS
from veripo_fast.data.records import RecordError, short
from veripo_fast.reward.graders import DECLARED_TYPES

TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_STRUCTURED = ("time_span", "timestamp", "box", "boxes")
_SELECTED = (None, "choice", "multi_select", "soft_select")


class Gold(NamedTuple):
    """What a record says the answer is."""

    text: str
    is_number: bool
    """Whether it is stored as a number, as an index is."""
    base: int | None = None
    """What an index counts from, when its key says so."""
    declared: str | None = None
    """Type of the record, declared or seen by the kind of value."""
    listed: bool = False
    """Whether it is several choices, as a list in JSON."""


def read_gold(row: dict[str, Any], closing: str, declared: str | None, has_options: bool) -> Gold:
    """The gold answer of a record.

    Args:
        closing: text of a closing assistant turn, or empty.
        declared: the type that the record declares, as `DECLARED_TYPES` names it.

    Raises:
        RecordError: there is none, or its value cannot be one of its type.
    """
    values = [(row.get(key), INDEX_KEYS.get(key)) for key in GOLD_KEYS]
    values += [(_nested(row, "reward_model", "ground_truth"), None), (_nested(row, "extra_info", "answer"), None),
               (closing, None)]
    if row.get("query"):
        values.append((row.get("response"), None))
    for value, _ in values:
        if isinstance(value, str) and "<answer>" in value and (tagged := TAGGED.search(value)):
            return Gold(tagged[1].strip(), False, None, declared)
    value, base = next(((value, base) for value, base in values if value not in (None, "")), ("", None))
    if isinstance(value, bool) and _kind(declared) in (None, "boolean"):
        return Gold("Yes" if value else "No", False, None, "boolean")
    if isinstance(value, list) and _lists_choices(value, declared, has_options):
        return Gold(_listed(value), False, base, declared, True)
    text = _text(value, declared)
    if not text:
        raise RecordError(f"has no gold answer: none of {', '.join(GOLD_KEYS)}, reward_model.ground_truth has a value")
    single = value[0] if isinstance(value, list) and len(value) == 1 else value
    return Gold(text, isinstance(single, int | float), base, declared)


def _kind(declared: str | None) -> str | None:
    return DECLARED_TYPES.get(declared) if declared else None


def _lists_choices(value: list[Any], declared: str | None, has_options: bool) -> bool:
    kind = _kind(declared)
    several = len(value) > (0 if kind in ("multi_select", "soft_select") else 1)
    return several and kind in _SELECTED and (has_options or kind is not None)


def _text(value: Any, declared: str | None) -> str:
    if _kind(declared) in _STRUCTURED and isinstance(value, list | dict) and value:
        return json.dumps(value)
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, float) and value.is_integer():  # Arrow turns whole numbers into floats beside missing ones
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise RecordError(f"the gold answer must be a text or a number, got {short(value)}")
    return str(value).strip()


def _listed(value: list[Any]) -> str:
    """Choices of which several are right, as JSON."""
    if not all(isinstance(part, str) or (isinstance(part, int) and not isinstance(part, bool)) for part in value):
        raise RecordError(f"the gold answer must list texts or numbers, got {short(value)}")
    return json.dumps(value, ensure_ascii=False)


def letters_of(gold: str, texts: Sequence[str], base: int | None) -> str:
    """The letters of a list of indices; the gold as it is when it is another list.

    Raises:
        RecordError: it may count from 0 or from 1, or an index is out of range.
    """
    indices = json.loads(gold)
    if not texts or not all(isinstance(index, int) for index in indices):
        return gold
    if base is None:
        raise RecordError(f"the answer {gold[:80]} may count its options from 0 or from 1: set data.answer_index, or "
                          "give the letters")
    if not all(0 <= index - base < len(texts) for index in indices):
        raise RecordError(f"the answer {gold[:80]} holds an index that is none of {len(texts)} options from {base} on")
    return ", ".join(string.ascii_uppercase[index - base] for index in indices)


def _nested(row: dict[str, Any], outer: str, inner: str) -> Any:
    value = row.get(outer)
    return value.get(inner) if isinstance(value, dict) else None
