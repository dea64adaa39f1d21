"""Preference pairs with their loaded prompts, packed for a forward pass, and their log-probs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from veripo_kernels import PreferenceLoss
from veripo_kernels.reference import pair_sums

from veripo_fast.distributed.shares import padded
from veripo_fast.distributed.world import World
from veripo_fast.model.packing import PackedBatch, micro_batches, pack, packed_length
from veripo_fast.model.policy import Policy
from veripo_fast.stages.reference import Reference
from veripo_fast.types import EncodedPrompt, LoadedPrompt, PreferencePair


class PairRow(NamedTuple):
    """A pair with its loaded prompt."""

    number: int
    """Its place among the pairs of the stage, as pairs.parquet holds them."""
    prompt: LoadedPrompt
    pair: PreferencePair
    other: LoadedPrompt | None = None
    """The prompt of the rejected completion where it is another one (`dpo.match` aot_unpaired)."""


def _packed_groups(row: PairRow) -> list[tuple[EncodedPrompt, list[Sequence[int]]]]:
    chosen, rejected = list(row.pair.chosen_ids), list(row.pair.rejected_ids)
    if row.other is None:
        return [(row.prompt.encoded, [chosen, rejected])]
    return [(row.prompt.encoded, [chosen]), (row.other.encoded, [rejected])]


def prompts_of(rows: Sequence[PairRow]) -> list[LoadedPrompt]:
    """Their prompts, as `pack_pairs` packs them."""
    return [prompt for row in rows for prompt in (row.prompt, row.other) if prompt is not None]


def pack_pairs(rows: Sequence[PairRow], device: torch.device) -> tuple[PackedBatch, torch.Tensor]:
    """The packed row of (chosen, rejected, chosen, ...), and the loss mask float32 [M] of its completion tokens."""
    batch = pack([group for row in rows for group in _packed_groups(row)])
    bits: list[int] = []
    for row in rows:
        bits += [*row.pair.chosen_loss_mask, *row.pair.rejected_loss_mask]
    return batch, torch.tensor(bits, dtype=torch.float32, device=device)


def pair_length(row: PairRow) -> int:
    """Packed tokens of a pair."""
    return sum(packed_length(prompt, completions) for prompt, completions in _packed_groups(row))


def pair_logprobs(policy: Reference, rows: Sequence[PairRow], loss: PreferenceLoss) -> torch.Tensor:
    """Log-probs [B, 2] of (chosen, rejected), summed as the loss sums them."""
    batch, mask = pack_pairs(rows, policy.device)
    logprobs = policy.completion_logprobs(batch, policy.features_of(prompts_of(rows)))
    return pair_sums(logprobs, batch.cu_seqlens.to(policy.device), loss=loss, loss_mask=mask)


@torch.no_grad()
def all_pair_logprobs(policy: Policy, rows: Sequence[PairRow], loss: PreferenceLoss, max_tokens: int, world: World
                      ) -> torch.Tensor:
    """`pair_logprobs` [B, 2] of this rank's rows in micro-batches, float32 on the CPU. Collective."""
    sums = torch.empty(len(rows), 2)
    for part in padded(micro_batches([pair_length(row) for row in rows], max_tokens), world):
        if part is None:
            policy.idle()
            continue
        sums[part] = pair_logprobs(policy, [rows[i] for i in part], loss).float().cpu()
    return sums
