"""The table from problem type to grader, and what a record's own name for its type means.

A grader gives an answer span a score in [0, 1], says whether two answers say the same, and whether it can read a gold.
It never raises over an answer. The functions themselves stand in the files of their types, and can be called alone.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from veripo_fast.errors import DataError
from veripo_fast.reward.answers import normalise_text
from veripo_fast.reward.box_answers import box_accuracy, boxes_accuracy, read_boxes
from veripo_fast.reward.choice_answers import read_choice
from veripo_fast.reward.math_answers import math_equal, math_parses
from veripo_fast.reward.math_text import constant_sides
from veripo_fast.reward.number_answers import read_number
from veripo_fast.reward.physical import quantity_accuracy, read_quantity
from veripo_fast.reward.quantities import (
    close,
    comparable,
    estimate_accuracy,
    is_number,
    number_accuracy,
    rounded_accuracy,
    values_to_compare,
)
from veripo_fast.reward.select_answers import (
    boolean_accuracy,
    multi_select_accuracy,
    read_boolean,
    read_choices,
    soft_select_accuracy,
)
from veripo_fast.reward.text_grades import ocr_accuracy, rouge_accuracy, rouge_reads, same_words, text_accuracy
from veripo_fast.reward.time_answers import read_spans, read_time, time_span_accuracy, timestamp_accuracy
from veripo_fast.types import ProblemType, Prompt

_SAME_ESTIMATE = 0.05
_SAME_REGION = 0.95
_SAME_SECONDS = 0.5
_PLAIN_NUMBER = re.compile(r"\s*\$?\s*[-+]?(?:\d+\.?\d*|\.\d+)\s*\$?\s*")


def choice_accuracy(answer: str, gold: str, options: Sequence[str] = ()) -> float:
    """1 for the letter (or the text) of the gold's choice, else 0; for a gold of several letters, all of them."""
    letter = read_choice(gold, options)
    if letter is None:
        return multi_select_accuracy(answer, gold, options)
    return float(read_choice(answer, options) == letter)


def math_accuracy(answer: str, gold: str, tolerance: float = 1e-6) -> float:
    """1 for the gold's expression, else 0; a gold that is a number admits a relative tolerance."""
    return float(_same_math(answer, gold, tolerance))


def _same_math(answer: str, gold: str, tolerance: float) -> bool:
    """Golds that are words or numbers need little computer algebra: `Paris` is not the product P a r i s."""
    if len(gold) > 1 and gold.replace(" ", "").isalpha():
        return normalise_text(answer) == normalise_text(gold) != ""
    wanted = read_number(gold)
    if wanted is None:
        return math_equal(answer, gold)
    given = read_number(answer)
    if given is not None:
        pair = values_to_compare(given, wanted)
        return pair is not None and close(*pair, tolerance)
    sides = constant_sides(answer)
    return bool(sides) and all(math_equal(side, gold) for side in sides)


def _same_choices(one: str, other: str, options: Sequence[str]) -> bool:
    named = read_choice(one, options)
    return multi_select_accuracy(one, other, options) == 1 if named is None else named == read_choice(other, options)


def _same_value(one: str, other: str, tolerance: float) -> bool:
    pair = comparable(one, other)
    return pair is not None and close(*pair, tolerance)


def _same_texts(one: str, other: str) -> bool:
    return normalise_text(one) == normalise_text(other) != ""


@dataclass(frozen=True)
class Grader:
    """What a problem type means."""

    accuracy: Callable[[str, str, Sequence[str], float], float]
    """(answer, gold, options, tolerance of numbers) -> score in [0, 1]."""
    same: Callable[[str, str, Sequence[str], float], bool]
    """(one answer, another, options, tolerance of numbers) -> whether they say the same."""
    reads: Callable[[str, Sequence[str]], bool]
    """(gold, options) -> whether the gold can be read."""


GRADERS: Mapping[ProblemType, Grader] = {
    "choice": Grader(lambda answer, gold, options, _: choice_accuracy(answer, gold, options),
                     lambda one, other, options, _: _same_choices(one, other, options),
                     lambda gold, options: read_choices(gold, options) is not None),
    "multi_select": Grader(lambda answer, gold, options, _: multi_select_accuracy(answer, gold, options),
                           lambda one, other, options, _: multi_select_accuracy(one, other, options) == 1,
                           lambda gold, options: read_choices(gold, options) is not None),
    "soft_select": Grader(lambda answer, gold, options, _: soft_select_accuracy(answer, gold, options),
                          lambda one, other, options, _: multi_select_accuracy(one, other, options) == 1,
                          lambda gold, options: read_choices(gold, options) is not None),
    "boolean": Grader(lambda answer, gold, *_: boolean_accuracy(answer, gold),
                      lambda one, other, *_: boolean_accuracy(one, other) == 1,
                      lambda gold, _: read_boolean(gold) is not None),
    "number": Grader(lambda answer, gold, _, tolerance: number_accuracy(answer, gold, tolerance),
                     lambda one, other, _, tolerance: _same_value(one, other, tolerance),
                     lambda gold, _: is_number(gold)),
    "rounded": Grader(lambda answer, gold, _, tolerance: rounded_accuracy(answer, gold, tolerance),
                      lambda one, other, _, tolerance: rounded_accuracy(one, other, tolerance) == 1,
                      lambda gold, _: is_number(gold)),
    "quantity": Grader(lambda answer, gold, _, tolerance: quantity_accuracy(answer, gold, tolerance),
                       lambda one, other, _, tolerance: quantity_accuracy(one, other, tolerance) == 1,
                       lambda gold, _: read_quantity(gold) is not None),
    "estimate": Grader(lambda answer, gold, *_: estimate_accuracy(answer, gold),
                       lambda one, other, *_: _same_value(one, other, _SAME_ESTIMATE),
                       lambda gold, _: is_number(gold)),
    "math": Grader(lambda answer, gold, _, tolerance: math_accuracy(answer, gold, tolerance),
                   lambda one, other, _, tolerance: _same_math(one, other, tolerance),
                   lambda gold, _: bool(_PLAIN_NUMBER.fullmatch(gold)) or math_parses(gold)),
    "text": Grader(lambda answer, gold, *_: text_accuracy(answer, gold),
                   lambda one, other, *_: _same_texts(one, other),
                   lambda gold, _: normalise_text(gold) != ""),
    "ocr": Grader(lambda answer, gold, *_: ocr_accuracy(answer, gold),
                  lambda one, other, *_: same_words(one, other),
                  lambda gold, _: same_words(gold, gold)),
    "rouge": Grader(lambda answer, gold, *_: rouge_accuracy(answer, gold),
                    lambda one, other, *_: _same_texts(one, other),
                    lambda gold, _: rouge_reads(gold)),
    "time_span": Grader(lambda answer, gold, *_: time_span_accuracy(answer, gold),
                        lambda one, other, *_: time_span_accuracy(one, other) >= _SAME_REGION,
                        lambda gold, _: bool(read_spans(gold))),
    "timestamp": Grader(lambda answer, gold, *_: timestamp_accuracy(answer, gold),
                        lambda one, other, *_: _same_times(one, other),
                        lambda gold, _: read_time(gold) is not None),
    "box": Grader(lambda answer, gold, *_: box_accuracy(answer, gold),
                  lambda one, other, *_: box_accuracy(one, other) >= _SAME_REGION,
                  lambda gold, _: len(read_boxes(gold)) == 1),
    "boxes": Grader(lambda answer, gold, *_: boxes_accuracy(answer, gold),
                    lambda one, other, *_: boxes_accuracy(one, other) >= _SAME_REGION,
                    lambda gold, _: bool(read_boxes(gold))),
}
"""What grades each problem type."""


def _same_times(one: str, other: str) -> bool:
    first, second = read_time(one), read_time(other)
    return first is not None and second is not None and abs(first - second) <= _SAME_SECONDS


def answer_accuracy(answer: str, prompt: Prompt, number_tolerance: float) -> float:
    """Accuracy in [0, 1] of the content of an answer span, by the grader of the prompt's type."""
    return GRADERS[prompt.problem_type].accuracy(answer, prompt.gold, prompt.options, number_tolerance)


def answers_equal(one: str, other: str, prompt: Prompt, number_tolerance: float = 1e-6) -> bool:
    """Whether two answers to the prompt say the same; neither need be the gold.

    Estimates are the same within 5 % (the tightest threshold of `mra`), spans and boxes from an IoU of 0.95, times
    within half a second, texts when they are equal after normalising.
    """
    return GRADERS[prompt.problem_type].same(one, other, prompt.options, number_tolerance)


def check_gold(prompt: Prompt) -> None:
    """Refuse a gold answer that cannot be read as its problem type.

    Raises:
        DataError: naming the prompt, the gold and the type.
        UserError: the type needs a package that is not installed.
    """
    if not GRADERS[prompt.problem_type].reads(prompt.gold, prompt.options):
        among = f" with {len(prompt.options)} options" if prompt.options else ""
        raise DataError(f"prompt {prompt.prompt_id!r}: the gold answer {prompt.gold[:200]!r} cannot be read as "
                        f"{prompt.problem_type}{among}; correct it or its problem_type, or leave the record out")


_DECLARED: dict[str, ProblemType] = {
    "multiple choice": "choice", "choice": "choice", "mcq": "choice", "mc": "choice",
    "multi select": "multi_select", "multiple select": "multi_select", "soft select": "soft_select",
    "boolean": "boolean", "yes no": "boolean", "true false": "boolean",
    "numerical": "number", "number": "number", "rounded": "rounded", "quantity": "quantity",
    "regression": "estimate", "estimate": "estimate",
    "math": "math",
    "ocr": "ocr", "rouge": "rouge", "free form": "text", "open ended": "text", "text": "text",
    "temporal grounding": "time_span", "time span": "time_span", "timestamp": "timestamp",
    "spatial grounding": "box", "box": "box", "boxes": "boxes",
}
DECLARED_TYPES: Mapping[str, ProblemType] = _DECLARED
"""The names of problem_type that are known: in lower case, with blanks between their words."""
_SINGLE_LETTER = re.compile(r"\s*\(?[A-J]\)?\.?\s*")
_MATHS = re.compile(r"\\[A-Za-z]+|\^|\$|\d\s*[-+*/=]\s*[\dA-Za-z(]")


def type_name(declared: str) -> str:
    """A declared problem_type as `DECLARED_TYPES` spells it."""
    return re.sub(r"[\s_/-]+", " ", declared).strip().lower()


def nearest_type(declared: str) -> str:
    """The known name that a declared problem_type resembles most, or an empty text."""
    return next(iter(difflib.get_close_matches(type_name(declared[:80]), DECLARED_TYPES, 1, 0.6)), "")


def infer_problem_type(declared: str | None, gold: str, options: Sequence[str]) -> ProblemType:
    r"""The type of a record from its declared problem_type (Video-R1's and OneThinker's names and ours), or else from
    gold and options.

    A declared `numerical` whose gold is no plain number ($2\sqrt{3}$), or `free-form` whose gold is an expression, is
    math; a choice whose gold is several letters is multi_select. Unknown or absent names: choice when options or a lone
    letter say so, then number, math, text.
    """
    name = type_name(declared or "")
    expression = bool(_MATHS.search(gold)) and read_number(gold) is None and math_parses(gold)
    if expression and name in ("numerical", "number", "free form", "open ended"):
        return "math"
    if name in _DECLARED:
        return "multi_select" if _DECLARED[name] == "choice" and _names_several(gold, options) else _DECLARED[name]
    if read_choice(gold, options) is not None and (options or _SINGLE_LETTER.fullmatch(gold)):
        return "choice"
    if options and _names_several(gold, options):
        return "multi_select"
    if _is_number(gold):
        return "number"
    return "math" if expression else "text"


def _names_several(gold: str, options: Sequence[str]) -> bool:
    return len(gold) > 1 and read_choice(gold, options) is None and len(read_choices(gold, options) or ()) > 1


def _is_number(gold: str) -> bool:
    """A number and little else: `3`, `2.5 m`, `two`, but not `3 red balls`."""
    number = read_number(gold)
    return number is not None and len(gold.split()) <= 2 + number.word.count(" ")
