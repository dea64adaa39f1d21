"""AOT (arXiv 2406.05882): the sorted margins or log-ratios of a step are compared, in place of the sides of each pair.

A sum over sorted numbers only adds up, so that it is the loss of the same completions in other pairs, or with other
numbers of the reference. These are found before the update, from log-probs of the policy as it is then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from veripo_fast.config.schema import Config
from veripo_fast.distributed.shares import gathered
from veripo_fast.distributed.world import World
from veripo_fast.model.policy import Policy
from veripo_fast.stages.pair_rows import PairRow, all_pair_logprobs


def matched(policy: Policy, rows: Sequence[PairRow], ref_logprobs: torch.Tensor, config: Config, world: World
            ) -> tuple[Sequence[PairRow], torch.Tensor]:
    """This rank's pairs of a step and their reference log-probs [B, 2] as `dpo.match` compares them. Collective."""
    if config.dpo.match == "pairs":
        return rows, ref_logprobs
    sums = all_pair_logprobs(policy, rows, config.dpo.preference_loss(), config.optimizer.max_tokens, world)
    if config.dpo.match == "aot":
        return rows, by_margins(rows, sums, ref_logprobs, world)
    return by_ratios(rows, sums, ref_logprobs)


def by_margins(rows: Sequence[PairRow], sums: torch.Tensor, ref: torch.Tensor, world: World) -> torch.Tensor:
    """Reference log-probs [B, 2] with which the loss of each pair is that of `aot`. Collective.

    The pair with the k-th smallest margin log p(chosen) - log p(rejected) of all ranks gets the k-th smallest margin of
    the reference. The chosen side keeps its own number, so that its drift is told as it is.

    Args:
        sums, ref: [B, 2] log-probs of (chosen, rejected) under the policy and the reference.
    """
    margins = torch.stack([sums[:, 0] - sums[:, 1], ref[:, 0] - ref[:, 1]], 1).double()
    everyone = gathered({row.number: own for row, own in zip(rows, margins.tolist(), strict=True)}, world)
    places = {number: place for place, number in enumerate(everyone)}
    table = torch.tensor(list(everyone.values()), dtype=torch.float64).view(-1, 2)
    given = torch.empty(len(table), dtype=torch.float64)
    given[table[:, 0].argsort(stable=True)] = table[:, 1].sort().values
    own = given[torch.tensor([places[row.number] for row in rows], dtype=torch.long)]
    return torch.stack([ref[:, 0], (ref[:, 0].double() - own).to(ref.dtype)], 1)


def by_ratios(rows: Sequence[PairRow], sums: torch.Tensor, ref: torch.Tensor) -> tuple[list[PairRow], torch.Tensor]:
    """The completions of some pairs in other pairs, and their reference log-probs [B, 2], as `aot_unpaired` compares
    them: the k-th smallest log-ratio of the chosen with the k-th smallest of the rejected.

    Args:
        sums, ref: as in `by_margins`.
    """
    order = (sums - ref).argsort(dim=0, stable=True)
    return [_recombined(rows[up], rows[down]) for up, down in order.tolist()], ref.gather(0, order)


def _recombined(up: PairRow, down: PairRow) -> PairRow:
    """The chosen side of one pair and the rejected one of another."""
    pair = replace(up.pair, rejected_ids=down.pair.rejected_ids, rejected_loss_mask=down.pair.rejected_loss_mask,
                   rejected_text=down.pair.rejected_text, rejected_index=down.pair.rejected_index)
    return PairRow(up.number, up.prompt, pair, None if down.prompt is up.prompt else down.prompt)
