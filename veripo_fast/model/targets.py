"""What an assistant answers, as completion tokens with a mask of those that are learnt.

The first answer is cut from its prompt where a rollout's completion begins, so a policy is taught to write exactly what
it is asked to sample. In a chat of several turns the template's text between two answers is read, not learnt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from veripo_fast.errors import DataError
from veripo_fast.model.encoding import PromptEncoder
from veripo_fast.types import Message, Prompt


class Target(NamedTuple):
    """A completion to learn."""

    token_ids: list[int]
    learnt: list[int]
    """1 on tokens that enter the loss: those of the answers, and the end of turn behind each."""


def target_of(encoder: PromptEncoder, prompt: Prompt, turns: Sequence[Message]) -> Target:
    """The tokens of `turns`, which begin and end with the assistant's.

    Where the chat template opens `<think>` itself, the answer is taken from behind its opening tag.

    Raises:
        DataError: the template opens `<think>` and an answer does not think, it rewrites an answer once another follows
            (templates of thinking models leave reasoning out of earlier turns), or it refuses the chat.
    """
    ids: list[int] = []
    learnt: list[int] = []
    before = encoder.chat_text(prompt)
    ending = encoder.tokenizer.convert_ids_to_tokens(encoder.eos_id)
    for number in range(0, len(turns), 2):
        answer = _written(encoder, "".join(str(part) for part in turns[number].parts))
        own = [*encoder.encode_completion(answer), encoder.eos_id]
        ids += own
        learnt += [1] * len(own)
        if number + 1 < len(turns):
            chat = Prompt(prompt.prompt_id, (*prompt.messages, *turns[:number + 2]), prompt.problem_type, prompt.gold)
            after = encoder.chat_text(chat)
            if not after.startswith(f"{before}{answer}{ending}"):
                raise DataError("the chat template rewrites an answer once another one follows, so only chats of one "
                                "answer can be learnt with it")
            between = encoder.tokenizer(after[len(before) + len(answer) + len(ending):], add_special_tokens=False)
            ids += between["input_ids"]
            learnt += [0] * len(between["input_ids"])
            before = after
    return Target(ids, learnt)


def _written(encoder: PromptEncoder, answer: str) -> str:
    """The part of an answer that the policy itself writes."""
    if not encoder.opens_think:
        return answer
    if not answer.startswith("<think>"):
        raise DataError("the chat template opens <think>, and the answer to learn does not begin with it")
    return answer.removeprefix("<think>").lstrip("\n")
