"""Who trains on which group, and how loaded prompts get there.

All ranks know the groups of a step, because they are small, so each decides alike who trains on which. Only then a
loaded prompt moves, and only to a rank that does not hold it.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from veripo_fast.distributed.balance import deal, idle_share
from veripo_fast.distributed.flops import ModelCost, group_flops
from veripo_fast.distributed.world import World
from veripo_fast.model.policy import Policy
from veripo_fast.types import LoadedPrompt, RolloutGroup, VisionFeatures


class Dealer:
    """Deals groups to the ranks that train on them, by what they cost.

    Args:
        cost: of the policy's shape. device: where the policy is.
    """

    def __init__(self, cost: ModelCost, world: World, device: torch.device) -> None:
        self.cost = cost
        self.world = world
        self.device = device
        self.idle_shares: list[float] = []
        """Mean over the ranks of each update since `idle_share`."""

    @classmethod
    def of(cls, policy: Policy, world: World) -> Dealer:
        """For the groups of a policy."""
        cost = replace(policy.text_cost, tower=None if policy.frozen_vision else policy.cost)
        return cls(cost, world, policy.device)

    def deal(self, prompts: Sequence[LoadedPrompt | None], groups: Sequence[RolloutGroup], numbers: Sequence[int]
             ) -> dict[int, LoadedPrompt]:
        """The prompts of the groups that this rank trains on, by their place in `groups`. Collective.

        Args:
            prompts: what this rank has loaded of them; None: another rank has.
            numbers: the places to deal; the same on all ranks.
        """
        if self.world.size == 1:
            return {number: prompt for number in numbers if (prompt := prompts[number]) is not None}
        sizes = self._sizes(prompts)
        costs = [group_flops(self.cost, sizes[number].tokens, [len(c.token_ids) for c in groups[number].completions],
                             sizes[number].grid_thw) for number in numbers]
        dealt = deal(costs, self.world.size, [sizes[number].ranks[0] for number in numbers])
        self.idle_shares.append(statistics.fmean(idle_share(costs, dealt)))
        takers = {numbers[index]: rank for rank, part in enumerate(dealt) for index in part}
        return self._moved(prompts, sizes, takers)

    def idle_share(self) -> dict[str, float]:
        """As a metric, of the updates since the last call; nothing where there is one rank."""
        shares, self.idle_shares = self.idle_shares, []
        return {"idle_share": statistics.fmean(shares)} if shares else {}

    def _sizes(self, prompts: Sequence[LoadedPrompt | None]) -> dict[int, _Size]:
        """Of each prompt that any rank has loaded."""
        own = {number: _Size.of(prompt, self.world.rank) for number, prompt in enumerate(prompts)
               if prompt is not None}
        sizes: dict[int, _Size] = {}
        for part in self.world.gather(own):
            for number, size in part.items():
                known = sizes.get(number)
                sizes[number] = size if known is None else replace(known, ranks=known.ranks + size.ranks)
        return sizes

    def _moved(self, prompts: Sequence[LoadedPrompt | None], sizes: Mapping[int, _Size], takers: Mapping[int, int]
               ) -> dict[int, LoadedPrompt]:
        """The prompts that this rank takes, after all of them have moved, in the order of their numbers."""
        own: dict[int, LoadedPrompt] = {}
        for number in sorted(takers):
            prompt, taker, holders = prompts[number], takers[number], sizes[number].ranks
            if taker in holders:
                if prompt is not None and taker == self.world.rank:
                    own[number] = prompt
                continue
            sent = None
            if prompt is not None and holders[0] == self.world.rank:
                sent = _moved_to(prompt, torch.device("cpu"))
            came = self.world.move(sent, holders[0], taker)
            if came is not None:
                own[number] = _moved_to(came, self.device)
        return own


@dataclass(frozen=True)
class _Size:
    """Who has loaded a prompt, and what its cost depends on."""

    ranks: tuple[int, ...]
    """Several where ranks share an engine."""
    tokens: int
    grid_thw: list[list[int]]

    @classmethod
    def of(cls, prompt: LoadedPrompt, rank: int) -> _Size:
        media = prompt.encoded.media
        return cls((rank,), len(prompt.encoded.token_ids), [] if media is None else media.grid_thw.tolist())


def _moved_to(prompt: LoadedPrompt, device: torch.device) -> LoadedPrompt:
    features = prompt.features
    if features is None:
        return prompt
    return replace(prompt, features=VisionFeatures(features.embeddings.to(device), tuple(
        level.to(device) for level in features.deepstack)))
