"""vLLM's output of a prompt -> a rollout group."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from veripo_fast.errors import TrainingError
from veripo_fast.model.policy import Policy
from veripo_fast.rollout.protocol import Sampling, not_finite
from veripo_fast.types import Completion, LoadedPrompt, RolloutGroup


def group_of(item: LoadedPrompt, output: Any, sampling: Sampling, policy: Policy) -> RolloutGroup:
    """The completions of a prompt in the order of their seeds; a greedy one is repeated.

    Raises:
        TrainingError: log-probs are not finite, a token was written that may not be, or the engine read another prompt
            than it was given.
    """
    _check_prompt(item.encoded.token_ids.tolist(), list(output.prompt_token_ids), policy)
    completions = [_completion(row, policy) for row in sorted(output.outputs, key=lambda row: row.index)]
    if sampling.temperature == 0:
        first = completions[0]
        completions = [replace(first, token_ids=list(first.token_ids), rollout_logprobs=list(first.rollout_logprobs))
                       for _ in range(sampling.group_size)]
    return RolloutGroup(item.prompt, completions, policy.encoder.opens_think)


def _completion(row: Any, policy: Policy) -> Completion:
    ids = list(row.token_ids)
    logprobs = [float(step[token].logprob) for token, step in zip(ids, row.logprobs, strict=True)]
    if not all(map(math.isfinite, logprobs)):
        raise not_finite(policy.version)
    if not set(ids).isdisjoint(policy.encoder.banned_ids):
        raise TrainingError("the engine wrote a token that may not be written: over the temperature its logit lies 100 "
                            "above all others; rollout.temperature is far too low, or the policy has collapsed")
    return Completion(
        token_ids=ids, text=policy.encoder.decode_completion(ids), rollout_logprobs=logprobs,
        finish_reason="stop" if ids[-1] in policy.encoder.end_ids else "length", policy_version=policy.version)


def _check_prompt(given: list[int], read: list[int], policy: Policy) -> None:
    """The engine expands no pads and adds no tokens; versions of vLLM differ in what they do with text."""
    if given == read:
        return
    index = next((i for i, (one, other) in enumerate(zip(given, read, strict=False)) if one != other),
                 min(len(given), len(read)))
    decode = policy.encoder.tokenizer.decode
    raise TrainingError(f"the engine read a prompt of {len(read)} tokens where {len(given)} were given; the first that "
                        f"differs is number {index}: {decode(read[index:index + 4])!r} after "
                        f"{decode(read[:index][-8:])!r}, and not {decode(given[index:index + 4])!r}")
