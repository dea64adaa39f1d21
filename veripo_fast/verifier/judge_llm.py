"""The judge `llm`: the model that reads runs in this process, from a folder, while the policy's engine sleeps."""

from __future__ import annotations

import hashlib
import re
from contextlib import closing
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from veripo_fast.config.objectives import VerifierConfig
from veripo_fast.errors import CheckpointError
from veripo_fast.model.checkpoint_files import UNUSABLE
from veripo_fast.rollout.local_texts import LocalTexts
from veripo_fast.run.inputs import file_fingerprint, model_files
from veripo_fast.run.weight_files import read_json
from veripo_fast.text import plural, printable
from veripo_fast.verifier.judge_reading import MAX_REPLY_TOKENS, Item, NoReply, ReadingJudge, Replies, messages_of
from veripo_fast.verifier.judges import Progress

_MARKS = {"system": "VERIPO-SYSTEM-TEXT", "user": "VERIPO-USER-TEXT"}


class LlmJudge(ReadingJudge):
    """Asks a language model through an engine that lives as long as the asking.

    Args:
        texts: makes the engine.

    Raises:
        CheckpointError: the folder's tokenizer or chat template cannot be used.
    """

    def __init__(self, config: VerifierConfig, texts: LocalTexts, cache_path: Path | None = None) -> None:
        self.folder = Path(config.llm_path)
        super().__init__(f"llm {_fingerprint(self.folder)}", cache_path, config.llm_max_failures)
        self._config = config
        self._texts = texts
        self._context_tokens = texts.context_tokens()
        self.chat = Chat(self.folder)

    def _replies(self, items: list[Item], progress: Progress) -> Replies:
        asked: list[tuple[Item, list[int]]] = []
        for item in items:
            ids = self.chat.encode(*messages_of(*item))
            if len(ids) + MAX_REPLY_TOKENS > self._context_tokens:
                yield item, NoReply(f"question and reasoning are {plural(len(ids), 'token')}, and with a reply of "
                                    f"{MAX_REPLY_TOKENS} the judge takes {self._context_tokens}")
            else:
                asked.append((item, ids))
        if not asked and not self._texts.together:
            return
        longest = max((len(ids) for _, ids in asked), default=1)
        with closing(self._texts.make(longest + MAX_REPLY_TOKENS, len(asked))) as engine:
            replies = engine.generate([ids for _, ids in asked], MAX_REPLY_TOKENS, self.chat.end_ids,
                                      lambda: progress(0))
            for number, tokens in replies:
                yield asked[number][0], self.chat.tokenizer.decode(tokens, skip_special_tokens=True)

    def _shown(self, text: str) -> str:
        return printable(text)

    def too_many(self, failed: str, last: NoReply) -> str:
        return (f"the judge {self.folder} gave no verdict for {failed} (llm_max_failures is "
                f"{self._config.llm_max_failures:g}); the last problem was: {last}; take a model that follows "
                "instructions better (verifier.llm_path), or another verifier.judge")


class Chat:
    """A folder's tokenizer with its chat template; what is put into the template is text, whatever it spells."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            self._pieces = self._rendered(_MARKS)
            self.takes_system = len(self._pieces) == 3
            """Whether its template shows a system message; else the user's begins with it."""
            if not self.takes_system:
                self._pieces = self._rendered({"user": _MARKS["user"]})
        except (TemplateError, *UNUSABLE) as error:
            raise CheckpointError(f"the tokenizer or chat template of the judge {folder} cannot be used: "
                                  f"{str(error) or type(error).__name__}") from error
        if len(self._pieces) != 2 + self.takes_system:
            raise CheckpointError(f"the chat template of the judge {folder} does not show a user's message once")
        self.end_ids = _end_ids(folder, self.tokenizer)

    def encode(self, system: dict[str, str], user: dict[str, str]) -> list[int]:
        """Token ids of the two messages; special tokens that they spell are plain text."""
        texts = [system["content"], user["content"]]
        if not self.takes_system:
            texts = ["\n\n".join(texts)]
        ids = self._ids(self._pieces[0])
        for text, behind in zip(texts, self._pieces[1:], strict=True):
            ids += [*self._ids(text, plain=True), *self._ids(behind)]
        return ids

    def _rendered(self, marks: dict[str, str]) -> list[str]:
        """The template's text around messages; empty where it refuses a system message, as some do."""
        messages = [{"role": role, "content": mark} for role, mark in marks.items()]
        try:
            text: str = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True,
                                                           enable_thinking=False)
        except TemplateError:
            if "system" in marks:
                return []
            raise
        return re.split("|".join(marks.values()), text)

    def _ids(self, text: str, plain: bool = False) -> list[int]:
        text = text.encode("utf-8", "replace").decode()  # half a character of a completion is no text
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, split_special_tokens=plain)["input_ids"]
        return ids


def _end_ids(folder: Path, tokenizer: Any) -> list[int]:
    """Every token that ends a reply. Raises CheckpointError when none is known."""
    found = [tokenizer.eos_token_id]
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            value = read_json(folder / name).get("eos_token_id")
            found += value if isinstance(value, list) else [value]
    ids = list(dict.fromkeys(value for value in found if isinstance(value, int)))
    if not ids:
        raise CheckpointError(f"no file of the judge {folder} names a token that ends a reply (eos_token_id)")
    return ids


def _fingerprint(folder: Path) -> str:
    """Of all files that decide what the model is, so that verdicts of another one are not taken for its own."""
    text = "\0".join(f"{path.name} {file_fingerprint(path)}" for path in model_files(folder))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
