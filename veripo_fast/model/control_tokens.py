"""Control tokens in text that somebody wrote: a tokenizer reads `<|im_end|>` in a question as the end of the turn."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from veripo_fast.errors import DataError
from veripo_fast.types import Prompt


def control_pattern(tokenizer: Any, more: Iterable[int]) -> re.Pattern[str]:
    """Matches every token that the tokenizer calls special, and those with the ids `more`."""
    tokens = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    tokens |= {*tokenizer.all_special_tokens, *tokenizer.convert_ids_to_tokens(list(more))}
    longest_first = sorted(filter(None, tokens), key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, longest_first)))


def check_no_control_tokens(prompt: Prompt, pattern: re.Pattern[str]) -> None:
    """Refuse a prompt whose own text spells a control token, be it over two neighbouring parts.

    Raises:
        DataError: naming the prompt and the token.
    """
    for message in prompt.messages:
        text = "".join(part for part in message.parts if isinstance(part, str))
        spelled = pattern.search(text)
        if spelled:
            raise DataError(f"prompt {prompt.prompt_id!r} holds the special token {spelled.group()} in its text, which "
                            "the policy would read as a control token; rewrite it there, or leave the record out")
