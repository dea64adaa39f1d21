"""A small language model that can judge: a Llama with a tokenizer and a chat template, taught in seconds.

It reports the last letter or number that the reasoning names, and "none" where it names none, on the texts that the
verifier really sends.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from tests.support import runs
from tests.support.verifier_groups import prompt
from veripo_fast.types import Prompt
from veripo_fast.verifier.judge_reading import messages_of

TEMPLATE = ("{%- for message in messages -%}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + "
            "'<|im_end|>\\n' }}{%- endfor -%}"
            "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}")
THINKS = {"A": "I see it go left", "B": "I see it go right", "C": "It climbs, so up", "none": "Hard to say"}
"""What the model learned to read out of each reasoning about `prompt()`."""


def reply(supported: str) -> str:
    return json.dumps({"supported_answer": supported})


@cache
def judge_folder() -> Path:
    """The folder of the model, made once for all processes of a test run."""
    with runs.made_once("judge") as (path, new):
        if new:
            _make(path, [(prompt(), think, answer) for answer, think in THINKS.items()])
    return path


def _make(path: Path, items: Sequence[tuple[Prompt, str, str]]) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    chats = [(messages_of(to, think), reply(answer)) for to, think, answer in items]
    tokenizer = _tokenizer([message["content"] for messages, _ in chats for message in messages] * 4
                           + [text for _, text in chats] * 20)
    rows = []
    for messages, text in chats:
        asked = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True),
                          add_special_tokens=False)["input_ids"]
        rows.append((asked, tokenizer(text + "<|im_end|>", add_special_tokens=False)["input_ids"]))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=2048, initializer_range=0.08,
            tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None))
        _teach(model, rows)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def _teach(model: Any, rows: Sequence[tuple[list[int], list[int]]]) -> None:
    """All rows in one padded batch, until the replies are known by heart."""
    width = max(len(asked) + len(answer) for asked, answer in rows)
    ids, labels = torch.zeros(len(rows), width, dtype=torch.long), torch.full((len(rows), width), -100)
    for row, (asked, answer) in enumerate(rows):
        whole = [*asked, *answer]
        ids[row, :len(whole)] = torch.tensor(whole)
        labels[row, len(asked):len(whole)] = torch.tensor(answer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(300):
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = 1e-2 * min(1.0, (step + 1) / 10)
        optimizer.step()
        if float(loss.detach()) < 0.005:
            return
    raise AssertionError(f"the judge did not learn its texts: {float(loss.detach())}")


def _tokenizer(texts: Sequence[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>",
                                   chat_template=TEMPLATE, model_max_length=2048)


def spoiled(folder: Path, into: Path, without: str = "", **config: object) -> Path:
    """The folder copied by links, without the files of a pattern and with other entries in config.json."""
    into.mkdir()
    for file in folder.iterdir():
        if not (without and file.match(without)):
            os.link(file, into / file.name)
    if config:
        text = json.loads((folder / "config.json").read_text()) | config
        (into / "config.json").unlink()
        (into / "config.json").write_text(json.dumps(text))
    return into
