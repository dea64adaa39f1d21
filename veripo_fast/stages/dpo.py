"""DPO on verified pairs (arXiv 2305.18290): a pair is a group of two completions that share their prompt.

Reference log-probs are those of the policy at the start of the stage, computed once and stored beside the pairs.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from veripo_kernels import PreferenceLoss, linear_dpo_loss
from veripo_kernels.reference import pair_sums

from veripo_fast.config.schema import Config
from veripo_fast.model.packing import PackedBatch, micro_batches, pack, packed_length
from veripo_fast.model.policy import Policy
from veripo_fast.rollout.store import write_table
from veripo_fast.run.seeds import derive_seed
from veripo_fast.stages.grpo import group_features
from veripo_fast.stages.optimizer import Optimizer
from veripo_fast.types import LoadedPrompt, PreferencePair

PairRow = tuple[LoadedPrompt, PreferencePair]


def pack_pairs(rows: Sequence[PairRow], device: torch.device) -> tuple[PackedBatch, torch.Tensor]:
    """The packed row of (chosen, rejected, chosen, ...), and the loss mask float32 [M] of its completion tokens."""
    batch = pack([(prompt.encoded, [list(pair.chosen_ids), list(pair.rejected_ids)]) for prompt, pair in rows])
    mask = torch.tensor([bit for _, pair in rows for bit in (*pair.chosen_loss_mask, *pair.rejected_loss_mask)],
                        dtype=torch.float32, device=device)
    return batch, mask


def pair_logprobs(policy: Policy, rows: Sequence[PairRow], loss: PreferenceLoss) -> torch.Tensor:
    """Log-probs [B, 2] of (chosen, rejected), summed as the loss sums them."""
    batch, mask = pack_pairs(rows, policy.device)
    logprobs = policy.completion_logprobs(batch, group_features(policy, [prompt for prompt, _ in rows]))
    return pair_sums(logprobs, batch.cu_seqlens.to(policy.device), loss=loss, loss_mask=mask)


def preference_loss(config: Config) -> PreferenceLoss:
    """The loss that a configuration describes."""
    dpo = config.dpo
    return PreferenceLoss(dpo.loss, dpo_beta=dpo.dpo_beta, label_smoothing=dpo.label_smoothing,
                          length_normalize=dpo.length_normalize, ld_alpha=dpo.ld_alpha, nll_coef=dpo.nll_coef)


def pair_length(row: PairRow) -> int:
    """Packed tokens of a pair."""
    return packed_length(row[0].encoded, [row[1].chosen_ids, row[1].rejected_ids])


@torch.no_grad()
def reference_logprobs(policy: Policy, pairs: Sequence[PreferencePair], load: Callable[[Sequence[PreferencePair]],
                       list[PairRow]], config: Config, path: Path, advance: Callable[[int], object]) -> torch.Tensor:
    """Log-probs [pairs, 2] of the policy at the start of the stage, read from `path` when it is there.

    A pair whose media cannot be loaded any more gets NaN.
    """
    if path.is_file():
        return torch.tensor(pq.read_table(path).column("ref_logprobs").to_pylist())
    values = torch.full((len(pairs), 2), float("nan"))
    for start in range(0, len(pairs), config.dpo.pairs_per_step):
        part = pairs[start:start + config.dpo.pairs_per_step]
        rows = load(part)
        places = {id(pair): start + number for number, pair in enumerate(part)}
        for run in micro_batches([pair_length(row) for row in rows], config.optimizer.max_tokens):
            sums = pair_logprobs(policy, [rows[i] for i in run], preference_loss(config))
            for i, value in zip(run, sums.cpu(), strict=True):
                values[places[id(rows[i][1])]] = value
        advance(len(part))
    write_table(pa.table({"ref_logprobs": values.tolist()}), path)
    return values


def step_order(pairs: int, config: Config, seed: int) -> list[list[int]]:
    """Pair numbers of every optimizer step, reshuffled each epoch; the last step of an epoch may be short."""
    steps: list[list[int]] = []
    for epoch in range(config.dpo.epochs):
        order = list(range(pairs))
        random.Random(derive_seed(seed, "pairs", epoch)).shuffle(order)
        size = config.dpo.pairs_per_step
        steps += [order[start:start + size] for start in range(0, pairs, size)]
    return steps[:config.dpo.max_steps]


def dpo_update(policy: Policy, optimizer: Optimizer, rows: Sequence[PairRow], ref_logprobs: torch.Tensor,
               config: Config) -> dict[str, float]:
    """One optimizer step over pairs with their reference log-probs [B, 2]; returns metrics, means over the pairs."""
    metrics = {"loss": 0.0, "preference_accuracy": 0.0, "margin": 0.0, "chosen_logprobs_mean": 0.0,
               "rejected_logprobs_mean": 0.0, "chosen_drift": 0.0}
    for run in micro_batches([pair_length(row) for row in rows], config.optimizer.max_tokens):
        part = _backward(policy, [rows[i] for i in run], ref_logprobs[run].to(policy.device), config, len(rows))
        metrics = {name: value + part[name] for name, value in metrics.items()}
    rate = optimizer.learning_rate()
    norm = optimizer.step(metrics["loss"])
    if norm is None:
        return {"skipped_updates": 1.0, "pairs": float(len(rows))}
    policy.version += 1
    return metrics | {"grad_norm": norm, "learning_rate": rate, "skipped_updates": 0.0, "pairs": float(len(rows))}


def _backward(policy: Policy, rows: Sequence[PairRow], ref: torch.Tensor, config: Config,
              total: int) -> dict[str, float]:
    """Forward and backward of one micro-batch; every metric is its share of the mean over `total` pairs.

    chosen_drift is policy minus reference log-prob of the chosen completion, per token: strongly negative means that
    DPO pushes both sides down and only widens the gap.
    """
    batch, mask = pack_pairs(rows, policy.device)
    hidden = policy.completion_hidden(batch, group_features(policy, [prompt for prompt, _ in rows]))
    loss, metrics, _ = linear_dpo_loss(
        hidden, policy.model.lm_head.weight, batch.targets.to(policy.device), ref, batch.cu_seqlens.to(policy.device),
        loss=preference_loss(config), loss_mask=mask, num_pairs=total)
    loss.backward()
    return {"loss": loss.item(), **{name: value.item() for name, value in metrics.items()}}
