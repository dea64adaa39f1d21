"""Engines that answer plain text with a language model that is not the policy: what a judge in this process runs on.

Greedy, token ids in and out. An engine lives for one job, while the policy's own engine sleeps, and its memory is free
again when it is closed. That is also what vLLM asks for: its sleep mode serves one engine of a process, so a second one
is made and ended instead of put to sleep.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch

from veripo_fast.model.checkpoint_files import load_weights
from veripo_fast.run.memory import return_all_freed_memory
from veripo_fast.schedule.judge import BATCH_TOKENS

Tokens: TypeAlias = list[int]


class TextEngine(Protocol):
    """Completes token ids."""

    def generate(self, prompts: Sequence[Tokens], max_new_tokens: int, end_ids: Sequence[int],
                 pause: Callable[[], None]) -> Iterator[tuple[int, Tokens]]:
        """Number of a prompt and the most likely completion of it without the end token, as they are finished; `pause`
        is called again and again meanwhile."""
        ...

    def close(self) -> None:
        """Give the memory back; the engine is not used again."""
        ...


class TorchTexts:
    """By `generate` of transformers, in batches of `BATCH_TOKENS`."""

    def __init__(self, folder: Path, dtype: str, device: torch.device) -> None:
        from transformers import AutoModelForCausalLM

        self.device = device
        self.model: Any = load_weights(AutoModelForCausalLM, folder, dtype).to(device).eval()

    @torch.no_grad()
    def generate(self, prompts: Sequence[Tokens], max_new_tokens: int, end_ids: Sequence[int],
                 pause: Callable[[], None]) -> Iterator[tuple[int, Tokens]]:
        """See `TextEngine`. Prompts of like length share a batch, padded on the left."""
        from transformers import GenerationConfig

        settings = GenerationConfig(do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=list(end_ids),
                                    pad_token_id=end_ids[0])
        for numbers in batches([len(prompt) + max_new_tokens for prompt in prompts], BATCH_TOKENS):
            pause()
            width = max(len(prompts[number]) for number in numbers)
            ids = torch.full((len(numbers), width), end_ids[0])
            mask = torch.zeros_like(ids)
            for row, number in enumerate(numbers):
                own = prompts[number]
                ids[row, width - len(own):], mask[row, width - len(own):] = torch.tensor(own), 1
            written = self.model.generate(input_ids=ids.to(self.device), attention_mask=mask.to(self.device),
                                          generation_config=settings)[:, width:].tolist()
            for number, tokens in zip(numbers, written, strict=True):
                yield number, until_end(tokens, end_ids)

    def close(self) -> None:
        """See `TextEngine`."""
        self.model = None
        return_all_freed_memory(self.device)


def batches(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Numbers of each batch, by falling length: padded, a batch has `limit` tokens at most, or one longer prompt."""
    made: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        if made and lengths[made[-1][0]] * (len(made[-1]) + 1) <= limit:
            made[-1].append(number)
        else:
            made.append([number])
    return made


def until_end(tokens: Sequence[int], end_ids: Sequence[int]) -> Tokens:
    """The tokens before the first end token."""
    ends = [place for place, token in enumerate(tokens) if token in end_ids]
    return list(tokens[:ends[0]] if ends else tokens)
