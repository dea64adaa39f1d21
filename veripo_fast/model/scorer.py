"""Log-probabilities of given answers: what the likelihood judge asks a policy for."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from veripo_fast.model.packing import pack
from veripo_fast.model.policy import Policy
from veripo_fast.types import Prompt

if TYPE_CHECKING:
    from veripo_fast.types import LoadedPrompt


def answer_scorer(policy: Policy, load: Callable[[Prompt], LoadedPrompt]
                  ) -> Callable[[Prompt, list[str], list[str]], list[float]]:
    """Log-probability of continuations of a prompt, for the likelihood judge; `load` brings the prompt's media.

    The returned function takes a prompt, prefixes (what the policy wrote so far) and as many continuations, and gives
    for each pair the sum over the continuation's tokens of log p(token | prompt, prefix, tokens before), in nats.
    """

    @torch.no_grad()
    def score(prompt: Prompt, prefixes: list[str], continuations: list[str]) -> list[float]:
        encode = policy.encoder.encode_completion
        loaded = load(prompt)
        pairs = [(encode(prefix), encode(continuation))
                 for prefix, continuation in zip(prefixes, continuations, strict=True)]
        batch = pack([(loaded.encoded, [before + after for before, after in pairs])])
        logprobs = policy.completion_logprobs(batch, [loaded.features]).split(batch.cu_seqlens.diff().tolist())
        return [float(row[len(before):].sum()) for row, (before, _) in zip(logprobs, pairs, strict=True)]

    return score
