"""How large an engine may be: context, batch, and the memory of its key/value cache, checked before it starts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from veripo_fast.config.load import apply_overrides
from veripo_fast.config.schema import Config
from veripo_fast.distributed.backend import whole_shape
from veripo_fast.errors import ConfigError, TrainingError
from veripo_fast.model.policy import Policy
from veripo_fast.run.memory import free_bytes, total_bytes
from veripo_fast.text import memory

_BYTES = {torch.float32: 4, torch.bfloat16: 2}
_SMALLEST_BATCH = 8192
"""Tokens per forward pass of an engine, unless a prompt is longer."""
_BLOCK = 128
"""Tokens in a block of the key/value cache on a CPU, the largest there are."""


@dataclass(frozen=True)
class EngineLimits:
    """What an engine is built for."""

    context_tokens: int
    """Longest prompt with its completion."""
    batched_tokens: int
    """Most tokens of one forward pass; also what the media of one prompt may have."""
    sequences: int
    """Completions that are sampled together."""
    kv_cache_bytes: int

    def check(self, prompt_tokens: Sequence[int], max_new_tokens: int) -> None:
        """Raise TrainingError when a prompt does not fit."""
        if max(prompt_tokens) + max_new_tokens > self.context_tokens:
            raise TrainingError(
                f"a prompt of {max(prompt_tokens)} tokens with a completion of {max_new_tokens} does not fit into the "
                f"engine's context of {self.context_tokens}: data.max_prompt_tokens + rollout.max_new_tokens, or what "
                "the model has positions for. Lower data.max_prompt_tokens, and such prompts are skipped, or "
                "video.max_frames or video.max_pixels")


def limits_of(config: Config, policy: Policy) -> EngineLimits:
    """Limits that every stage and evaluation of a run fit into.

    Raises:
        ConfigError: the memory is too small, with the number and the option to change.
    """
    rollouts = [config.rollout, *(apply_overrides(config, stage.set).rollout for stage in config.stages)]
    longest = max(rollout.max_new_tokens for rollout in rollouts)
    positions = policy.model.config.get_text_config().max_position_embeddings
    if longest >= positions:
        raise ConfigError(f"rollout.max_new_tokens {longest} leaves no room for a prompt: the model has {positions} "
                          "positions")
    context = min(config.data.max_prompt_tokens + longest, positions)
    block, held = block_tokens(policy), _recurrent_blocks(policy)
    least = kv_bytes_per_token(policy) * (-(-context // block) + 1 + held) * block
    asked = config.rollout.kv_cache_gb
    wanted = int(asked * 2 ** 30) if asked else max(default_cache_bytes(policy.device), least)
    if wanted < least:
        raise ConfigError(
            f"rollout.kv_cache_gb {asked:g} is too small: one prompt of {context} tokens "
            f"(data.max_prompt_tokens + rollout.max_new_tokens) takes {least / 2 ** 30:.2f} GiB; raise it, or lower "
            "data.max_prompt_tokens")
    free = free_bytes(policy.device)
    needed = wanted + engine_weight_bytes(policy) // config.rollout.tensor_parallel
    if needed > free:
        raise ConfigError(
            f"rollout.engine vllm needs {memory(needed)} of memory ({memory(needed - wanted)} of weights while it "
            f"starts, {memory(wanted)} of key/value cache) and {memory(free)} are free on {policy.device}; lower "
            "rollout.kv_cache_gb or data.max_prompt_tokens, or take a smaller model")
    sequences = config.rollout.max_sequences
    return EngineLimits(context, max(_SMALLEST_BATCH, context, sequences), sequences, wanted)


def kv_bytes_per_token(policy: Policy) -> int:
    """Keys and values of one token in all layers that attend, in the dtype of the weights."""
    text = policy.model.config.get_text_config()
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(2 * _attending(policy) * text.num_key_value_heads * head * _BYTES[policy.model.dtype])


def state_bytes(policy: Policy) -> int:
    """What a recurrent layer holds for a sequence: a state in float32, and the last inputs of its convolution."""
    text, itemsize = policy.model.config.get_text_config(), _BYTES[policy.model.dtype]
    keys = text.linear_num_key_heads * text.linear_key_head_dim
    values = text.linear_num_value_heads * text.linear_value_head_dim
    return int(values * text.linear_key_head_dim * 4
               + (2 * keys + values) * (text.linear_conv_kernel_dim - 1) * itemsize)


def block_tokens(policy: Policy) -> int:
    """Tokens in a block of the cache: the keys and values of a layer take at least what a recurrent layer holds."""
    if not policy.encoder.family.delta_class:
        return _BLOCK
    of_layer = kv_bytes_per_token(policy) // _attending(policy)
    return -(-state_bytes(policy) // (of_layer * _BLOCK)) * _BLOCK


def _recurrent_blocks(policy: Policy) -> int:
    """Blocks of all attending layers that the recurrent layers take for a sequence: two each, one to copy from."""
    if not policy.encoder.family.delta_class:
        return 0
    others = policy.model.config.get_text_config().num_hidden_layers - _attending(policy)
    return 2 * -(-others // _attending(policy))


def _attending(policy: Policy) -> int:
    """Layers that attend."""
    text = policy.model.config.get_text_config()
    return int(text.layer_types.count("full_attention") if policy.encoder.family.delta_class
               else text.num_hidden_layers)


def engine_weight_bytes(policy: Policy) -> int:
    """Weights of the engine, its tower included, which it allocates while it starts."""
    return sum(math.prod(whole_shape(parameter)) * parameter.element_size() for parameter in policy.model.parameters())


def default_cache_bytes(device: torch.device) -> int:
    """A quarter of a GPU's memory, which sleep gives back while the trainer works; 1 GiB on a CPU."""
    if device.type == "cuda":
        return total_bytes(device) // 4
    return 2 ** 30
