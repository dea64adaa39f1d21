"""How a question is put to the policy: its options by letter, an instruction around it, a system prompt before it.

What `data` says holds for all records, `data.by_source` for those of a data_source. A template is chosen by source and
problem type, never by the gold answer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from veripo_fast.config.inputs import DEFAULT_INSTRUCTION, DataConfig
from veripo_fast.errors import TrainingError
from veripo_fast.recipes.own import described, own_function
from veripo_fast.recipes.view import Question
from veripo_fast.types import Form, Message, ProblemType

KINDS: dict[ProblemType, str] = {
    "choice": "letter", "multi_select": "letters of all right options", "soft_select": "letters of all right options",
    "boolean": "answer Yes or No", "number": "number", "rounded": "number", "estimate": "number",
    "quantity": "number with its unit", "math": "result", "text": "answer", "rouge": "answer",
    "ocr": "text as written", "time_span": "seconds as START to END", "timestamp": "time in seconds",
    "box": "box [left, top, right, bottom]", "boxes": "boxes [left, top, right, bottom]"}
"""What {kind} in an instruction stands for."""
INSTRUCTIONS: dict[ProblemType, str] = {
    name: DEFAULT_INSTRUCTION.replace("{kind}", kind) for name, kind in KINDS.items()}
"""What the default instruction adds to a question."""
_PLACEHOLDER = re.compile(r"\{(kind|question)\}")


class Wording:
    """How the questions of one data source are put.

    Args:
        config: of that source.
    """

    def __init__(self, config: DataConfig) -> None:
        self._config = config
        self._own: Callable[..., Any] | None = own_function(config.template) if config.own_templates() else None
        self.opening = "\\boxed" if "boxed" in config.tags else "<answer>"
        """What an answer begins with."""
        self.form = Form(config.tags, config.pattern)
        self.adds_lines = self._own is None and not config.system and "{question}" not in config.instruction
        """Whether all that is done is to put lines behind the question."""

    def put(self, messages: tuple[Message, ...], question: Question, instruct: bool = True) -> tuple[Message, ...]:
        """The turns of a record with the question worded; `question.text` is the last text of the last turn.

        Args:
            instruct: whether the instruction is wanted. A template of the user's has the question all the same.

        Raises:
            TrainingError: the user's template failed.
        """
        text = "\n".join([part for message in messages for part in message.parts if type(part) is str])
        lines = _option_lines(text, question.options)
        instruction = self._config.instruction
        if self._own is not None:
            messages = _with_last_text(messages, self._worded(self._own, question))
        elif instruct and self._config.template == "instruct" and "{question}" in instruction:
            whole = "\n".join([question.text, *lines] if question.text else lines)
            values = {"kind": KINDS[question.problem_type], "question": whole}
            messages = _with_last_text(messages, _PLACEHOLDER.sub(lambda match: values[match[1]], instruction))
        else:
            wanted = self._instruction(text, question.problem_type) if instruct else []
            messages = _with_lines(messages, [*lines, *wanted])
        if self._config.system and messages[0].role != "system":
            messages = (Message("system", (self._config.system,)), *messages)
        return messages

    def lines(self, text: str, options: Sequence[str], problem_type: ProblemType) -> list[str]:
        """What is put behind a question where that is all."""
        return [*_option_lines(text, options), *self._instruction(text, problem_type)]

    def _instruction(self, text: str, problem_type: ProblemType) -> list[str]:
        if self._config.template != "instruct" or self.opening in text:
            return []
        return [self._config.instruction.replace("{kind}", KINDS[problem_type])]

    def _worded(self, function: Callable[..., Any], question: Question) -> str:
        name = f"template {self._config.template}, on a question of {question.data_source or 'no data_source'},"
        try:
            text = function(question)
        except Exception as error:  # of whatever a user's function does
            raise TrainingError(f"{name} failed: {described(error)}; the question is {question.text!r:.120}") from error
        if not isinstance(text, str) or not text:
            raise TrainingError(f"{name} returned {text!r:.60}; it must return a text")
        return text


class Wordings:
    """The wording of each data source."""

    def __init__(self, config: DataConfig) -> None:
        self._other = Wording(config.for_source(""))
        self._by_source: Mapping[str, Wording] = {
            entry.source: Wording(config.for_source(entry.source)) for entry in config.by_source}

    def of(self, source: str) -> Wording:
        """That of a data source."""
        return self._by_source.get(source, self._other)


def question_text(text: str, options: Sequence[str], problem_type: ProblemType) -> str:
    """The question as the policy reads it by default: its options by letter unless it names them already, then the
    instruction unless it asks for <answer> by itself."""
    return "\n".join([text, *Wording(DataConfig()).lines(text, options, problem_type)])


def _option_lines(text: str, options: Sequence[str]) -> list[str]:
    if _holds_options(text, options):
        return []
    return [f"{chr(65 + number)}. {option}" for number, option in enumerate(options)]


def _with_lines(messages: tuple[Message, ...], lines: list[str]) -> tuple[Message, ...]:
    """The lines put at the end of the last turn."""
    if not lines:
        return messages
    parts = messages[-1].parts
    text = "\n".join(lines)
    last = parts[-1]
    ended = (*parts[:-1], f"{last}\n{text}") if isinstance(last, str) else (*parts, text)
    return (*messages[:-1], Message("user", ended))


def last_text(messages: tuple[Message, ...]) -> str:
    """The text that the last turn ends with; empty where it ends with a medium."""
    last = messages[-1].parts[-1]
    return last if isinstance(last, str) else ""


def _with_last_text(messages: tuple[Message, ...], text: str) -> tuple[Message, ...]:
    parts = messages[-1].parts
    kept = parts[:-1] if isinstance(parts[-1], str) else parts
    return (*messages[:-1], Message("user", (*kept, text)))


def _holds_options(text: str, options: Sequence[str]) -> bool:
    """Whether the text names every option with its letter; true without options."""
    for option in options:
        if option not in text:
            return False
    return all(_named_option(number, option).search(text) for number, option in enumerate(options))


@lru_cache(maxsize=4096)
def _named_option(number: int, option: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w)\(?{chr(65 + number)}[.):]?\s*{re.escape(option)}")
