"""Clip-Cov and KL-Cov (arXiv 2505.22617): tokens that would lower the entropy most are left out, or pulled back.

The covariance of a token is (log-prob - mean) * (advantage - mean), the means over all tokens of the update. In the
authors' code the means and the choice are of a micro-batch, which the size of a micro-batch changes; here they are of
the update on all ranks, over the groups with a signal. Before the policy has moved its log-probs are the engine's;
later updates cost a pass for them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from veripo_fast.config.objectives import GrpoConfig
from veripo_fast.distributed.shares import gathered
from veripo_fast.distributed.world import World
from veripo_fast.model.policy import Policy
from veripo_fast.reward.groups import has_signal
from veripo_fast.reward.score import scores_of
from veripo_fast.run.seeds import derive_seed
from veripo_fast.stages.update_rows import UpdateRow, logprobs_of
from veripo_fast.types import RolloutGroup


def covariances(logprobs: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    """(log-prob - mean) * (advantage - mean) of N tokens, float64 [N]."""
    return (logprobs - logprobs.mean()) * (advantages - advantages.mean())


def left_out(covariance: torch.Tensor, unclipped: torch.Tensor, share: float, low: float, high: float, seed: int
             ) -> torch.Tensor:
    """Clip-Cov: bool [N], true for share * N tokens, at least one, drawn among those whose covariance lies
    between `low` and `high` and whose gradient the clip has left (`unclipped` bool [N])."""
    candidates = ((covariance > low) & (covariance < high) & unclipped).nonzero()[:, 0].tolist()
    count = min(max(int(share * len(covariance)), 1), len(candidates))
    chosen = torch.zeros(len(covariance), dtype=torch.bool)
    chosen[random.Random(seed).sample(candidates, count)] = True
    return chosen


def pulled_back(covariance: torch.Tensor, share: float) -> torch.Tensor:
    """KL-Cov: bool [N], true for the share * N tokens, at least one, with the largest covariance."""
    chosen = torch.zeros(len(covariance), dtype=torch.bool)
    order = covariance.argsort(descending=True, stable=True)
    chosen[order[:max(int(share * len(covariance)), 1)]] = True
    return chosen


class TokenChoice:
    """Chooses tokens of each update of a stage as `grpo.tokens.covariance` says.

    Args:
        seed: of the stage. With the policy's version it gives what is drawn, so that a resumed run draws the same.
    """

    def __init__(self, policy: Policy, config: GrpoConfig, temperature: float, world: World, seed: int) -> None:
        self.policy, self.config, self.temperature = policy, config, temperature
        self.world, self.seed = world, seed

    def marked(self, part: Sequence[RolloutGroup], own: list[UpdateRow], fresh: bool) -> list[UpdateRow]:
        """This rank's rows of an update with the tokens that are chosen. Collective.

        Args:
            part: the groups of the update on all ranks. fresh: the policy has taken no step since the rollout.
        """
        if self.config.tokens.covariance == "none":
            return own
        places = {id(group): place for place, group in enumerate(part)}
        known = {place: (_of_rollout(group), _of_rollout(group)) for place, group in enumerate(part)
                 if has_signal(group)}
        if not known:
            return own
        if not fresh:
            now = logprobs_of(self.policy, own, self.temperature, self.world)
            known = gathered({places[id(row.group)]: (logprobs.cpu().double(), _old(row))
                              for row, logprobs in zip(own, now, strict=True)}, self.world)
        chosen = self._chosen([part[place] for place in known], *map(torch.cat, zip(*known.values(), strict=True)))
        marks = dict(zip(known, chosen.split([len(now) for now, _ in known.values()]), strict=True))
        return [self._with(row, marks[places[id(row.group)]]) for row in own]

    def _chosen(self, groups: Sequence[RolloutGroup], logprobs: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
        """bool [N] of the tokens of some groups in a row, with log-probs and old ones float64 [N]."""
        tokens = self.config.tokens
        values = [value for group in groups for value in scores_of(group, "advantage")]
        lengths = [len(row.token_ids) for group in groups for row in group.completions]
        advantages = torch.tensor(values, dtype=torch.float64).repeat_interleave(torch.tensor(lengths))
        covariance = covariances(logprobs, advantages)
        if tokens.covariance == "kl":
            return pulled_back(covariance, tokens.covariance_share)
        ratio = (logprobs - old).exp()
        clipped = torch.where(advantages > 0, ratio > 1 + self.config.clip_high, ratio < 1 - self.config.clip_low)
        return left_out(covariance, ~clipped, tokens.covariance_share, *tokens.covariance_range,
                        derive_seed(self.seed, "covariance", self.policy.version))

    def _with(self, row: UpdateRow, chosen: torch.Tensor) -> UpdateRow:
        marks = chosen.to(self.policy.device, torch.float32)
        return row._replace(pulled=marks) if self.config.tokens.covariance == "kl" else row._replace(kept=1 - marks)


def _of_rollout(group: RolloutGroup) -> torch.Tensor:
    """The engine's log-probs, float64 [tokens of the group]."""
    return torch.tensor([value for row in group.completions for value in row.rollout_logprobs], dtype=torch.float64)


def _old(row: UpdateRow) -> torch.Tensor:
    return _of_rollout(row.group) if row.old_logprobs is None else row.old_logprobs.cpu().double()
