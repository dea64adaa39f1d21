"""The reward of a completion: typed accuracy in [0, 1] and format in {0, 1}. Training and evaluation share it.

A gold answer that cannot be read never scores: `check_gold` refuses it when the data is loaded, and `score` gives 0.
What a completion is rewarded for besides is in columns.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from veripo_fast.config.objectives import RewardConfig
from veripo_fast.errors import DataError
from veripo_fast.reward.answers import normalise_text, words
from veripo_fast.reward.choice_answers import read_choice
from veripo_fast.reward.math_answers import math_equal, math_parses
from veripo_fast.reward.math_text import constant_sides
from veripo_fast.reward.number_answers import Number, read_number
from veripo_fast.reward.spans import Parsed, parse_completion
from veripo_fast.reward.units import in_unit
from veripo_fast.types import ProblemType, Prompt, RolloutGroup

_FLOAT_SLACK = 1e-9
_SAME_ESTIMATE = 0.05
_LONGEST_TEXT = 512


@dataclass(frozen=True)
class Score:
    """What every completion is scored for."""

    accuracy: float
    """0 to 1."""
    format: float
    """0 or 1."""


def score(text: str, prompt: Prompt, config: RewardConfig, think_opened: bool = False) -> Score:
    """Score a completion text against the prompt's gold answer; without an answer span accuracy is 0.

    `think_opened` is that of the completion's `RolloutGroup`.
    """
    return parsed_score(parse_completion(text, think_opened, prompt.form), prompt, config)


def parsed_score(parsed: Parsed, prompt: Prompt, config: RewardConfig) -> Score:
    """Score the spans of a completion; without an answer accuracy is 0."""
    accuracy = 0.0 if parsed.answer is None else answer_accuracy(parsed.answer, prompt, config.number_tolerance)
    return Score(accuracy, float(parsed.format_ok))


def scores_of(group: RolloutGroup, name: Literal["accuracy", "format", "reward", "advantage"]) -> list[float]:
    """One score of every completion of a group.

    Raises:
        ValueError: a completion is not scored.
    """
    scores = [getattr(completion, name) for completion in group.completions]
    if None in scores:
        raise ValueError(f"completion {scores.index(None)} of prompt {group.prompt.prompt_id} has no {name}: "
                         "it is not scored")
    return scores


def answer_accuracy(answer: str, prompt: Prompt, number_tolerance: float) -> float:
    """Accuracy in [0, 1] of the content of an answer span.

    choice: the letter agrees. number: within a relative tolerance (gold 0: exactly). estimate: `mra`. math: the same
    expression. text: `text_accuracy`. Numbers with units are compared as quantities: 250 cm is 2.5 m, 2.5 km is not.
    """
    gold = prompt.gold
    if prompt.problem_type == "choice":
        return float(_known_and_equal(read_choice(answer, prompt.options), read_choice(gold, prompt.options)))
    if prompt.problem_type == "text":
        return text_accuracy(answer, gold)
    if prompt.problem_type == "math":
        return float(_same_math(answer, gold, number_tolerance))
    pair = _comparable(read_number(answer), read_number(gold))
    if pair is None:
        return 0.0
    return float(_close(*pair, number_tolerance)) if prompt.problem_type == "number" else mra(*pair)


def _known_and_equal(one: str | None, other: str | None) -> bool:
    return one is not None and one == other


def _comparable(answer: Number | None, gold: Number | None) -> tuple[float, float] | None:
    """The (answer, gold) values to compare, in the gold's unit; None when they measure different things.

    `4%` is 0.04 and nothing else. For a gold of 50 %, a bare 0.5 is a share and a bare 50 means percent.
    """
    if answer is None or gold is None:
        return None
    value = in_unit(answer.value, answer.unit, gold.unit)
    if value is None:
        return None
    if answer.percent == gold.percent:
        return value, gold.value
    if answer.percent:
        return value / 100, gold.value
    return value, gold.value / 100 if abs(value) <= 1 else gold.value


def _close(value: float, wanted: float, tolerance: float) -> bool:
    return abs(value - wanted) <= tolerance * abs(wanted) * (1 + _FLOAT_SLACK)


def mra(prediction: float, gold: float) -> float:
    """Mean Relative Accuracy (Yang et al. 2024, VSI-Bench): the share of the thresholds .50, .55, ..., .95 for which
    |prediction - gold| / |gold| <= 1 - threshold, robust to float rounding.

    Relative errors of 0.05, 0.10, 0.20, 0.30, 0.50 and 0.51 give 1.0, 0.9, 0.7, 0.5, 0.1 and 0. A gold of 0 counts
    exact predictions only; a prediction or gold that is not finite gives 0.
    """
    if not (math.isfinite(prediction) and math.isfinite(gold)):
        return 0.0
    if gold == 0:
        return float(prediction == 0)
    error = abs(prediction - gold) / abs(gold)
    return sum(error <= step / 20 + _FLOAT_SLACK for step in range(1, 11)) / 10


def text_accuracy(answer: str, gold: str) -> float:
    """1 for the same normalised text; otherwise the F1 of the longest common word subsequence (Lin 2004, ROUGE-L).

    The order of words counts, so "dog bites man" is not "man bites dog"; extra words cost precision, so listing
    everything does not pay. An answer above 512 words keeps its first 512 and its real length.
    """
    given, wanted = words(answer), words(gold)
    if not wanted:
        return 0.0
    if normalise_text(answer) == normalise_text(gold):
        return 1.0
    common = _common_subsequence(given[:_LONGEST_TEXT], wanted[:_LONGEST_TEXT])
    return 2 * common / (len(given) + len(wanted))


def _common_subsequence(one: Sequence[str], other: Sequence[str]) -> int:
    row = [0] * (len(other) + 1)
    for word in one:
        diagonal = 0
        for column, candidate in enumerate(other, start=1):
            above = row[column]
            row[column] = diagonal + 1 if word == candidate else max(above, row[column - 1])
            diagonal = above
    return row[-1]


_PLAIN_NUMBER = re.compile(r"\s*\$?\s*[-+]?(?:\d+\.?\d*|\.\d+)\s*\$?\s*")


def _same_math(answer: str, gold: str, tolerance: float) -> bool:
    """Golds that are words or numbers need little computer algebra: `Paris` is not the product P a r i s."""
    if len(gold) > 1 and gold.replace(" ", "").isalpha():
        return normalise_text(answer) == normalise_text(gold) != ""
    wanted = read_number(gold)
    if wanted is None:
        return math_equal(answer, gold)
    given = read_number(answer)
    if given is not None:
        pair = _comparable(given, wanted)
        return pair is not None and _close(*pair, tolerance)
    sides = constant_sides(answer)
    return bool(sides) and all(math_equal(side, gold) for side in sides)


def answers_equal(one: str, other: str, prompt: Prompt, number_tolerance: float = 1e-6) -> bool:
    """Whether two answers to the prompt say the same; neither need be the gold.

    Estimates are the same within 5 % (the tightest threshold of `mra`), texts when they are equal after normalising.
    """
    if prompt.problem_type == "choice":
        return _known_and_equal(read_choice(one, prompt.options), read_choice(other, prompt.options))
    if prompt.problem_type == "text":
        return normalise_text(one) == normalise_text(other) != ""
    if prompt.problem_type == "math":
        return _same_math(one, other, number_tolerance)
    tolerance = _SAME_ESTIMATE if prompt.problem_type == "estimate" else number_tolerance
    pair = _comparable(read_number(one), read_number(other))
    return pair is not None and _close(*pair, tolerance)


def check_gold(prompt: Prompt) -> None:
    """Refuse a gold answer that cannot be read as its problem type.

    Raises:
        DataError: naming the prompt, the gold and the type.
    """
    readable = {
        "choice": lambda gold: read_choice(gold, prompt.options) is not None,
        "number": lambda gold: read_number(gold) is not None,
        "estimate": lambda gold: read_number(gold) is not None,
        "math": lambda gold: bool(_PLAIN_NUMBER.fullmatch(gold)) or math_parses(gold),
        "text": lambda gold: normalise_text(gold) != "",
    }
    if not readable[prompt.problem_type](prompt.gold):
        among = f" with {len(prompt.options)} options" if prompt.options else ""
        raise DataError(f"prompt {prompt.prompt_id!r}: the gold answer {prompt.gold!r} cannot be read as "
                        f"{prompt.problem_type}{among}; correct it or its problem_type, or leave the record out")


_DECLARED: dict[str, ProblemType] = {
    "multiple choice": "choice", "choice": "choice", "mcq": "choice", "mc": "choice",
    "numerical": "number", "number": "number",
    "regression": "estimate", "estimate": "estimate",
    "math": "math",
    "ocr": "text", "free form": "text", "open ended": "text", "text": "text",
}
DECLARED_TYPES: Mapping[str, ProblemType] = _DECLARED
"""The names of problem_type that are known: in lower case, with blanks between their words."""
_SINGLE_LETTER = re.compile(r"\s*\(?[A-J]\)?\.?\s*")
_MATHS = re.compile(r"\\[A-Za-z]+|\^|\$|\d\s*[-+*/=]\s*[\dA-Za-z(]")


def infer_problem_type(declared: str | None, gold: str, options: Sequence[str]) -> ProblemType:
    r"""The type of a record from its declared problem_type (Video-R1's names and ours), or else from gold and options.

    A declared `numerical` whose gold is no plain number ($2\sqrt{3}$), or `free-form` whose gold is an expression, is
    math. Unknown or absent names: choice when options or a lone letter say so, then number, math, text.
    """
    name = re.sub(r"[\s_-]+", " ", declared or "").strip().lower()
    expression = bool(_MATHS.search(gold)) and read_number(gold) is None and math_parses(gold)
    if expression and name in ("numerical", "number", "free form", "open ended"):
        return "math"
    if name in _DECLARED:
        return _DECLARED[name]
    if read_choice(gold, options) is not None and (options or _SINGLE_LETTER.fullmatch(gold)):
        return "choice"
    if _is_number(gold):
        return "number"
    return "math" if expression else "text"


def _is_number(gold: str) -> bool:
    """A number and little else: `3`, `2.5 m`, `two`, but not `3 red balls`."""
    number = read_number(gold)
    return number is not None and len(gold.split()) <= 2 + number.word.count(" ")
