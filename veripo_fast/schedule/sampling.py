"""What the torch engine holds while it samples, beside weights: the moments of a batch of prompts, from shapes alone.

Prompts run a few at a time into the cache (rollout/torch_engine.py), then one token of every completion at a time. A
layer with a recurrent state keeps that in place of keys and values: of a prompt first, then of every completion.
"""

from __future__ import annotations

from dataclasses import dataclass

from veripo_fast.config.schema import RolloutConfig
from veripo_fast.schedule.activations import layer_working_bytes
from veripo_fast.schedule.layer_bytes import kept_bytes, state_bytes
from veripo_fast.schedule.placement import Owners
from veripo_fast.schedule.shapes import ModelShape
from veripo_fast.schedule.workload import MOST_LOGITS, PREFILL_TOKENS, Workload

HEAP_BLOCK = 32 << 20
"""glibc takes smaller blocks from its heap, where what is kept of a layer pins the free blocks around it."""
DRAWING_BYTES, TRUNCATING_BYTES = 16, 40
"""Per logit while a token is drawn: float32 copies, and for top-k or top-p sorted ones."""
FEWEST_TOKENS = 16
"""That of model/skinny.py."""
MOST_SCORES, MOST_SCORES_ON_GPU = 1 << 20, 1 << 27
"""Those of model/shared_prefix.py."""
STEPPED_STATES = 3
"""States of a layer while it takes in a token, beside those that are kept: decayed, what is written, and new ones."""


@dataclass(frozen=True)
class Batch:
    """Prompts that are sampled together."""

    prompts: int
    completions: int
    """Of each prompt."""
    prompt_tokens: int
    completion_tokens: int

    @classmethod
    def of(cls, work: Workload) -> Batch:
        """Those of a rollout."""
        return cls(work.prompts, work.group_size, work.prompt_tokens, work.completion_tokens)


def moments(shape: ModelShape, batch: Batch, config: RolloutConfig, itemsize: int, on_gpu: bool) -> list[Owners]:
    """Owner -> bytes while prompts run, while tokens are drawn, and while they run through a recurrent layer."""
    layers = max(shape.attending, 1)
    tokens, rows = batch.prompts * batch.prompt_tokens, batch.prompts * batch.completions
    token_cache = 2 * shape.keys * shape.attending * itemsize
    together = max(min(PREFILL_TOKENS // batch.prompt_tokens, batch.prompts), 1)
    working = layer_working_bytes(shape, [(together, batch.prompt_tokens)], itemsize)
    run = together * batch.prompt_tokens
    in_heap = not on_gpu and run * max(shape.intermediate, shape.hidden) * itemsize < HEAP_BLOCK
    recurrent = shape.delta.layers * kept_bytes(shape.delta, itemsize) if shape.delta else 0
    prefill = {"prompt cache": tokens * token_cache, "recurrent states": batch.prompts * recurrent,
               "allocator": working if in_heap else 0, "activations": working + run * shape.hidden * itemsize}
    copied = (layers + 1) * token_cache // layers  # when prompts end
    decode = {"prompt cache": tokens * copied, "completion cache": rows * batch.completion_tokens * copied,
              "recurrent states": rows * recurrent, "draws": rows * batch.completion_tokens * (8 + 8 + 4)}
    if not on_gpu and itemsize == 4 and batch.completion_tokens >= FEWEST_TOKENS:
        decode["reordered weights"] = _linear_numbers(shape) * itemsize
    most = MOST_SCORES_ON_GPU if on_gpu else MOST_SCORES
    pairs = batch.completions * shape.heads * (batch.prompt_tokens + batch.completion_tokens)
    scores = max(min(batch.prompts * pairs, most), pairs) * 4 * 4
    drawn = {**decode, "logits": logits_bytes(shape, config, rows), "attention scores": scores}
    if not shape.delta:
        return [prefill, drawn]
    stepping = rows * STEPPED_STATES * state_bytes(shape.delta)
    return [prefill, drawn, {**decode, "recurrent states": rows * recurrent + stepping}]


def _linear_numbers(shape: ModelShape) -> int:
    """Weights of linear layers, with the head: an embedding of its own, and experts, are none."""
    experts = shape.experts
    mixtures = experts.layers * experts.experts * 3 * shape.hidden * experts.intermediate if experts else 0
    return shape.language_numbers - mixtures - (0 if shape.tied else shape.head_numbers)


def logits_bytes(shape: ModelShape, config: RolloutConfig, rows: int) -> int:
    """With what is made of them while tokens are drawn."""
    truncated = config.top_k > 0 or config.top_p < 1
    return max(min(rows * shape.vocabulary, MOST_LOGITS), shape.vocabulary) * (
        TRUNCATING_BYTES if truncated else DRAWING_BYTES)
