"""Data files -> demonstrations: a prompt with what the policy learns to write.

A demonstration is read from the first that a record has:

    process + solution     Video-R1-CoT-165k: `<think>...</think>` in one key, `<answer>...</answer>` in the other
    solution | answer      where it holds a whole completion with `<think>`
    the last chat turn     messages, conversations (LLaVA, ShareGPT), prompt as a list: the assistant's
    response               beside query (ms-swift)

A record that says only what the right answer is holds nothing to imitate, and is skipped. In a chat of several turns
every answer of the assistant behind the last medium is learnt, and what stands before is read. The instruction of
`data` is added to a question whose one answer holds the tag of an answer.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from veripo_fast.config.inputs import DataConfig
from veripo_fast.data.keys import KeyPlan
from veripo_fast.data.layouts import plain_text, read_record, turns_of
from veripo_fast.data.places import MediaPlaces
from veripo_fast.data.prompts import Reading, load_by, name_of, type_of
from veripo_fast.data.records import RecordError
from veripo_fast.data.skipped import Skipped
from veripo_fast.data.wording import last_text
from veripo_fast.recipes.view import Question
from veripo_fast.text import plural
from veripo_fast.types import Message, Prompt

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Demonstration:
    """What an assistant answers to a prompt.

    `turns` begin and end with the assistant's; the user's between them are text.
    """

    turns: tuple[Message, ...]

    @property
    def answers(self) -> int:
        """How many turns are learnt."""
        return sum(turn.role == "assistant" for turn in self.turns)


@dataclass(frozen=True)
class Demonstrated:
    """A prompt with all that is shown of it, in the order of the files."""

    prompt: Prompt
    demonstrations: tuple[Demonstration, ...]


def load_demonstrations(files: Sequence[str], config: DataConfig) -> tuple[list[Demonstrated], list[Skipped]]:
    """Read data files in order; records with the same question about the same media become one.

    Returns:
        prompts with unique ids, and what was skipped.

    Raises:
        DataError: a file is missing or unreadable as a whole, or no record can be used.
    """
    reading = _Demonstrations(config)
    prompts, skipped = load_by(reading, files)
    if reading.only_read:
        log.info("%s before a later medium or in a history: read, not learnt", plural(reading.only_read, "answer"))
    first: dict[tuple[Message, ...], Prompt] = {}
    shown: dict[str, list[Demonstration]] = {}
    for prompt in prompts:
        known = first.setdefault(prompt.messages, prompt)
        shown.setdefault(known.prompt_id, []).append(reading.shown[prompt.prompt_id])
    return [Demonstrated(prompt, tuple(shown[prompt.prompt_id])) for prompt in first.values()], skipped


class _Demonstrations(Reading):
    """Reads prompts, and keeps by prompt id what is shown of each."""

    def __init__(self, config: DataConfig) -> None:
        super().__init__(config)
        self.shown: dict[str, Demonstration] = {}
        self.only_read = 0
        """Answers that are part of a prompt."""

    def prompt_of(self, row: dict[str, Any], plan: KeyPlan, places: MediaPlaces, where: str, side: str) -> Prompt:
        record = read_record(row, plan, places, self.config)
        text = demonstrated_text(row)
        context, turns = _split(record.messages)
        self.only_read += sum(message.role == "assistant" for message in context)
        wording, problem_type = self.wordings.of(record.data_source), type_of(record)
        asked = not turns and wording.opening in text  # else the instruction would ask for what is not shown
        question = Question(last_text(context), record.options, problem_type, record.data_source,
                            json.loads(side) if side else {})
        prompt = Prompt(self.unique(name_of(record, where)), wording.put(context, question, instruct=asked),
                        problem_type, record.gold, record.options, record.data_source, wording.form, side)
        self.shown[prompt.prompt_id] = Demonstration((*turns, Message("assistant", (text,))))
        return prompt


def demonstrated_text(row: dict[str, Any]) -> str:
    """The last answer that a record shows. Raises RecordError where it shows none."""
    solution = next((row[key] for key in ("solution", "answer") if isinstance(row.get(key), str)), "")
    if row.get("process"):
        if not isinstance(row["process"], str):
            raise RecordError(f"process must be a text, got {type(row['process']).__name__}")
        return f"{row['process'].strip()}\n{solution.strip()}".strip()
    if "<think>" in solution:
        return solution.strip()
    last = turns_of(row)[-1]
    text = plain_text(last["content"]) if last["role"] == "assistant" else ""
    if not text and row.get("query") and isinstance(row.get("response"), str):
        text = row["response"]
    if not text.strip():
        raise RecordError("shows no answer to learn: it has neither process, nor <think> in its solution, nor a last "
                          "turn of the assistant")
    return text.strip()


def _split(messages: tuple[Message, ...]) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    """What is read, up to a question, and the turns behind it: the first answer after the last medium begins them."""
    behind = max((number for number, message in enumerate(messages)
                  if any(not isinstance(part, str) for part in message.parts)), default=-1)
    cut = next((number for number, message in enumerate(messages)
                if number > behind and message.role == "assistant"), len(messages))
    roles = [message.role for message in messages[cut - 1:]]
    if roles != [("user", "assistant")[number % 2] for number in range(len(roles))]:
        raise RecordError("the turns of user and assistant do not alternate")
    return messages[:cut], messages[cut:]
