"""vLLM's output of a prompt -> a rollout group."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from veripo_fast.errors import TrainingError
from veripo_fast.model.policy import Policy
from veripo_fast.model.replay import stored
from veripo_fast.rollout.protocol import Sampling, not_finite
from veripo_fast.types import Completion, LoadedPrompt, RolloutGroup


def group_of(item: LoadedPrompt, output: Any, sampling: Sampling, policy: Policy, *, experts: bool = False
             ) -> RolloutGroup:
    """The completions of a prompt in the order of their seeds; a greedy one is repeated.

    Args:
        experts: whether the engine was asked which experts it chose. Those of the prompt are taken of the first
            completion; others that read the end of it for themselves may have parted from it in a tie.

    Raises:
        TrainingError: log-probs are not finite, a token was written that may not be, the engine read another prompt
            than it was given, or does not tell its experts.
    """
    _check_prompt(item.encoded.token_ids.tolist(), list(output.prompt_token_ids), policy)
    rows = sorted(output.outputs, key=lambda row: row.index)
    completions = [_completion(row, policy) for row in rows]
    of_prompt: bytes | None = None
    if experts:
        prompt = len(item.encoded.token_ids)
        chosen = [_experts(row, prompt, policy) for row in rows]
        of_prompt = stored(chosen[0][:prompt])
        completions = [replace(completion, experts=stored(one[prompt:]))
                       for completion, one in zip(completions, chosen, strict=True)]
    if sampling.temperature == 0:
        first = completions[0]
        completions = [replace(first, token_ids=list(first.token_ids), rollout_logprobs=list(first.rollout_logprobs))
                       for _ in range(sampling.group_size)]
    return RolloutGroup(item.prompt, completions, policy.encoder.opens_think, prompt_experts=of_prompt)


def _experts(row: Any, prompt: int, policy: Policy) -> np.ndarray:
    """Integers [P + R - 1, layers with experts, k] of what the engine gives for every decoder layer."""
    routers = policy.routers
    assert routers is not None
    layers = policy.num_layers
    expected = (prompt + len(row.token_ids) - 1, layers, routers.top_k)
    given = None if row.routed_experts is None else tuple(row.routed_experts.shape)
    if given != expected:
        raise TrainingError(f"the engine gave experts of the shape {given} where {expected} were asked for (tokens "
                            "read, layers, experts of a token); set rollout.router_replay to false")
    chosen: np.ndarray = row.routed_experts[:, list(routers.layers)]
    silent = [number for number, column in zip(routers.layers, chosen.swapaxes(0, 1), strict=True) if column.max() < 0]
    if silent:
        raise TrainingError(f"the engine does not tell which experts layer {', '.join(map(str, silent))} chose; set "
                            "rollout.router_replay to false")
    return chosen


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
