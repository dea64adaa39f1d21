"""Whether a completion's reasoning ends in the answer that is given, by rules on the text (in the spirit of TACO)."""

from __future__ import annotations

import math
import re

from veripo_fast.recipes.boxes import iou
from veripo_fast.recipes.view import Column, CompletionView, PromptView

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_LETTER = re.compile(r"\b[A-J]\b")


def agreement(asked: PromptView) -> Column:
    """How well the think span agrees with the answer, in [0, 1]; 0 where one of them is missing.

    Boxes: intersection over union of the last box in both. Other types: 1 where the last letter of a choice, the last
    number, or the text of the answer stands in the think span as the last one of its kind.
    """
    return [_agrees(completion, asked.prompt.problem_type) for completion in asked.completions]


def _agrees(completion: CompletionView, kind: str) -> float:
    think, answer = completion.think, completion.answer
    if think is None or answer is None:
        return 0.0
    if kind in ("box", "boxes"):
        thought, given = _last_box(think), _last_box(answer)
        return iou(thought, given) if thought and given else 0.0
    if kind == "choice":
        return float(_last(_LETTER, think) is not None and _last(_LETTER, think) == _last(_LETTER, answer))
    if kind in ("number", "rounded", "estimate", "quantity", "timestamp"):
        one, other = _last(_NUMBER, think), _last(_NUMBER, answer)
        return float(one is not None and other is not None and float(one) == float(other))
    return float(" ".join(answer.lower().split()) in " ".join(think.lower().split()))


def _last(pattern: re.Pattern[str], text: str) -> str | None:
    found = pattern.findall(text)
    return found[-1] if found else None


def _last_box(text: str) -> tuple[float, ...] | None:
    numbers = [float(number) for number in _NUMBER.findall(text)][-4:]
    return tuple(numbers) if len(numbers) == 4 and all(map(math.isfinite, numbers)) else None
