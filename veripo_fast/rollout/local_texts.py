"""Which engine runs a judge in this process, how large it is, and whether there is room for it now."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from veripo_fast.config.schema import Config
from veripo_fast.errors import ConfigError
from veripo_fast.model.checkpoint_files import resolve_device
from veripo_fast.rollout.limits import default_cache_bytes
from veripo_fast.rollout.texts import TextEngine, TorchTexts
from veripo_fast.run.memory import free_bytes
from veripo_fast.schedule.judge import JudgeShape, judging_owners, read_judge
from veripo_fast.text import memory

BLOCK_TOKENS = 128
"""In a block of vLLM's key/value cache, at most."""


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
