"""What an update of a GRPO stage takes of each group, and log-probs of the policy on it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from veripo_fast.config.tokens import TokensConfig
from veripo_fast.distributed.shares import padded
from veripo_fast.distributed.world import World
from veripo_fast.model.policy import Policy
from veripo_fast.model.replay import pack_rollouts
from veripo_fast.model.token_inputs import TokenInputs
from veripo_fast.types import LoadedPrompt, RolloutGroup


class UpdateRow(NamedTuple):
    """A prompt with its rewarded group, as an update takes it; tensors are float32 [tokens of the group]."""

    prompt: LoadedPrompt
    group: RolloutGroup
    old_logprobs: torch.Tensor | None = None
    """The trainer's at the weights of the rollout, where they were computed."""
    kept: torch.Tensor | None = None
    """0 on tokens that the policy loss leaves out, else 1; None: it takes all."""
    pulled: torch.Tensor | None = None
    """1 on tokens that are pulled back to the rollout, else 0; None: none is."""


@torch.no_grad()
def logprobs_of(policy: Policy, rows: Sequence[UpdateRow], temperature: float, world: World) -> list[torch.Tensor]:
    """The policy's log-probs of each row's completion tokens, float32 [tokens of the group]. Collective."""
    known: list[torch.Tensor] = []
    for row in padded(rows, world):
        if row is None:
            policy.idle()
            continue
        batch = pack_rollouts([(row.prompt.encoded, row.group)], policy.routers)
        known.append(policy.completion_logprobs(batch, [row.prompt.features], temperature=temperature))
    return known


def joined(parts: Sequence[torch.Tensor | None], otherwise: torch.Tensor | None) -> torch.Tensor | None:
    """Values of several groups in a row; `otherwise` where there are none."""
    known = [part for part in parts if part is not None]
    return torch.cat(known) if known else otherwise


def token_inputs(rows: Sequence[UpdateRow], config: TokensConfig) -> TokenInputs | None:
    """What the tokens of some rows count in a loss; None: all the same."""
    if config == TokensConfig():
        return None
    return TokenInputs(tuple(len(row.group.completions) for row in rows), config.weight_by_divergence,
                       joined([row.kept for row in rows], None), joined([row.pulled for row in rows], None),
                       config.covariance_coef)
