"""Prompts, updates and comparisons for tests of rollout engines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from tests.support import policies
from veripo_fast.model.packing import pack
from veripo_fast.model.policy import Policy
from veripo_fast.rollout.protocol import Sampling
from veripo_fast.types import LoadedPrompt, RolloutGroup

MEDIA = [[("video", 4, 3, 2)], [], [("image", 2, 2, 3)], [("video", 6, 2, 2), ("image", 2, 3, 3)],
         [("video", 3, 2, 2)], [("video", 4, 2, 3), ("video", 6, 3, 2)]]
"""Of each prompt: a video, text, an image, both, an odd number of frames, two videos."""
GREEDY = Sampling(group_size=2, temperature=0.0, max_new_tokens=12, seed=3)
SAMPLED = Sampling(group_size=4, temperature=1.0, max_new_tokens=12, seed=3)
TRUNCATED = replace(SAMPLED, temperature=0.7, top_p=0.9, top_k=20)


def prompts_of(policy: Policy, media: Sequence[list[tuple[str, int, int, int]]] = MEDIA, seed: int = 0
               ) -> list[LoadedPrompt]:
    """Loaded prompts around random media, with the tower's output of the policy as it is."""
    return [policies.loaded(policy, sizes, seed + number) for number, sizes in enumerate(media)]


def completions(groups: Sequence[RolloutGroup]) -> list[list[tuple[list[int], list[float]]]]:
    """Tokens and log-probs of each completion."""
    return [[(row.token_ids, row.rollout_logprobs) for row in group.completions] for group in groups]


def tokens(groups: Sequence[RolloutGroup]) -> list[list[list[int]]]:
    return [[row.token_ids for row in group.completions] for group in groups]


class Updates:
    """AdamW on the log-probs of what was sampled; one step changes every log-prob by far more than rounding."""

    def __init__(self, policy: Policy, learning_rate: float = 1e-3) -> None:
        self.policy = policy
        self.adamw = torch.optim.AdamW([p for _, p in policy.parameters()], lr=learning_rate)

    def step(self, prompts: Sequence[LoadedPrompt], groups: Sequence[RolloutGroup]) -> None:
        batch = pack([(prompt.encoded, [row.token_ids for row in group.completions])
                      for prompt, group in zip(prompts, groups, strict=True)])
        loss = -self.policy.completion_logprobs(batch, self.policy.features_of(prompts)).mean()
        self.adamw.zero_grad()
        loss.backward()
        self.adamw.step()
        self.policy.version += 1
