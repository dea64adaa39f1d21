"""Other wordings of a question, from a list that its record holds (`plan.wordings`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from veripo_fast.config.plans import PlanConfig
from veripo_fast.errors import DataError
from veripo_fast.recipes.view import side_of
from veripo_fast.types import Message, Prompt


def worded(prompts: Sequence[Prompt], plan: PlanConfig) -> list[Prompt]:
    """Each prompt with its other wordings behind it, `plan.wordings` in all: the first ones of the record's list.

    Raises:
        DataError: a record has too few, or its question does not stand in the prompt, by name.
    """
    return [wording for prompt in prompts for wording in _wordings(prompt, plan)]


def _wordings(prompt: Prompt, plan: PlanConfig) -> list[Prompt]:
    side = side_of(prompt)
    question, texts = side.get(plan.question_key), side.get(plan.wordings_key)
    if not isinstance(question, str) or not question:
        raise DataError(f"prompt {prompt.prompt_id}: plan.question_key {plan.question_key} is no text of its record")
    needed = plan.wordings - 1
    if not isinstance(texts, list) or len(texts) < needed or not all(isinstance(text, str) and text for text in texts):
        raise DataError(f"prompt {prompt.prompt_id}: plan.wordings {plan.wordings} needs {needed} texts under "
                        f"{plan.wordings_key} of its record")
    return [prompt, *(_reworded(prompt, question, text, number) for number, text in enumerate(texts[:needed], 1))]


def _reworded(prompt: Prompt, question: str, text: str, number: int) -> Prompt:
    """The prompt with another text in place of its question, and a name of its own."""
    question = question.strip()
    places = [part.count(question) for message in prompt.messages for part in message.parts if isinstance(part, str)]
    if sum(places) != 1:
        raise DataError(f"prompt {prompt.prompt_id}: its question stands {sum(places)} times in what the policy reads, "
                        "so that no other wording can take its place; plan.question_key names its text")
    messages = tuple(Message(message.role, tuple(
        part.replace(question, text) if isinstance(part, str) else part for part in message.parts))
        for message in prompt.messages)
    return replace(prompt, prompt_id=f"{prompt.prompt_id}/wording-{number}", messages=messages)
