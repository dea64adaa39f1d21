"""Engines that answer plain text with a language model that is not the policy: what a judge in this process runs on.

Greedy, token ids in and out. An engine lives for one job, while the policy's own engine sleeps, and its memory is free
again when it is closed. That is also what vLLM asks for: its sleep mode serves one engine of a process, so a second one
is made and ended instead of put to sleep.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch

from veripo_fast.config.schema import Config
from veripo_fast.errors import ConfigError
from veripo_fast.model.checkpoint_files import load_weights, resolve_device
from veripo_fast.rollout.limits import default_cache_bytes
from veripo_fast.run.memory import free_bytes, return_freed_memory
from veripo_fast.schedule.judge import BATCH_TOKENS, JudgeShape, judging_owners, read_judge
from veripo_fast.text import memory

BLOCK_TOKENS = 128
"""In a block of vLLM's key/value cache, at most."""
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


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class LocalTexts:
    """Makes the engine of a judge in this process when there is something to ask."""

    config: Config
    """With the overrides of the stage."""
    together: bool = False
    """Whether several ranks make theirs at the same time, which vLLM asks of the ranks of a process group."""
    before: Callable[[], None] = _nothing
    """Makes room: the policy's engine sleeps."""

    def context_tokens(self) -> int:
        """Of the longest prompt with its completion."""
        return context_of(self.config, read_judge(Path(self.config.verifier.llm_path)))

    def make(self, context_tokens: int, prompts: int) -> TextEngine:
        """See `make_texts`; ranks make engines of one size, because vLLM gives all of them the smallest cache."""
        self.before()
        if self.together:
            context_tokens, prompts = self.context_tokens(), self.config.rollout.max_sequences
        return make_texts(self.config, context_tokens, prompts)


def make_texts(config: Config, context_tokens: int, prompts: int) -> TextEngine:
    """An engine of the model in `verifier.llm_path`, by vLLM where the rollouts are, else by transformers.

    Args:
        config: with the overrides of the stage.
        context_tokens: of the longest prompt with its completion.
        prompts: how many there will be.

    Raises:
        ConfigError: the memory that is free now is too small.
        CheckpointError: the folder cannot be loaded.
    """
    folder, device = Path(config.verifier.llm_path), resolve_device(config.model.device)
    shape, dtype = read_judge(folder), getattr(torch, config.model.dtype)
    if config.rollout.engine == "torch":
        _check_room(judging_owners(shape, dtype.itemsize, 0), device, folder)
        return TorchTexts(folder, config.model.dtype, device)
    from veripo_fast.rollout.texts_vllm import VllmTexts

    sequences = min(config.rollout.max_sequences, prompts)
    cache = cache_bytes(config, shape, dtype.itemsize, context_tokens, sequences, device)
    _check_room(judging_owners(shape, dtype.itemsize, cache), device, folder)
    return VllmTexts(folder, dtype, context_tokens, sequences, cache, device)


def context_of(config: Config, shape: JudgeShape) -> int:
    """Tokens of the longest prompt with its completion that the model of `verifier.llm_path` can take here."""
    itemsize = getattr(torch, config.model.dtype).itemsize
    if config.rollout.engine == "torch":
        return shape.positions
    blocks = _cache_limit(config) // (shape.cache_bytes_per_token(itemsize) * BLOCK_TOKENS)
    return min(shape.positions, max(blocks - 1, 0) * BLOCK_TOKENS)


def cache_bytes(config: Config, shape: JudgeShape, itemsize: int, context_tokens: int, sequences: int,
                device: torch.device) -> int:
    """Of a vLLM engine's key/value cache: what the sequences can fill, within the limit of the policy's engine."""
    each = (-(-context_tokens // BLOCK_TOKENS) + 1) * BLOCK_TOKENS * shape.cache_bytes_per_token(itemsize)
    return min(each * sequences, _cache_limit(config))


def _cache_limit(config: Config) -> int:
    return int(config.rollout.kv_cache_gb * 2 ** 30) or default_cache_bytes(resolve_device(config.model.device))


def _check_room(owners: dict[str, int], device: torch.device, folder: Path) -> None:
    needed, free = sum(owners.values()), free_bytes(device)
    if needed > free:
        largest = max(owners, key=lambda owner: owners[owner])
        raise ConfigError(
            f"the judge {folder} needs {memory(needed)} of memory and {memory(free)} are free on {device}; most of it, "
            f"{memory(owners[largest])}, is {largest}: take a smaller judge (verifier.llm_path), lower "
            "rollout.kv_cache_gb, or take verifier.judge endpoint")


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
        give_back(self.device)


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


def give_back(device: torch.device) -> None:
    """Let the system have the memory of a model that was dropped."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return_freed_memory()
