"""Weights of preference pairs by how likely the policy would write them now (WPO, arXiv 2406.11827).

Letters: M completion tokens, B pairs, D hidden, V vocabulary.
"""

from __future__ import annotations

import torch
from veripo_kernels import linear_logprobs
from veripo_kernels.reference import sequence_sums


@torch.no_grad()
def confidence_weights(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, cu_seqlens: torch.Tensor,
                       loss_mask: torch.Tensor) -> torch.Tensor:
    """float32 [B]: for both completions of a pair exp of the mean over their tokens of log p - log sum p^2, the sum
    over the vocabulary, multiplied (eq. 2 with the alignment of sampled probabilities, as in TRL).

    Two products with the head, without a gradient: log sum p^2 is 2 log p less the log-prob at half the temperature.

    Args:
        hidden: [M, D]. head: [V, D]. targets: int64 [M]. cu_seqlens: int64 [2 B + 1]. loss_mask: float32 [M].
    """
    hidden, head = hidden.detach(), head.detach()
    aligned = (linear_logprobs(hidden, head, targets, temperature=0.5) - linear_logprobs(hidden, head, targets))
    kept = torch.where(loss_mask != 0, aligned * loss_mask, 0)
    means = sequence_sums(kept, cu_seqlens) / sequence_sums(loss_mask, cu_seqlens).clamp(min=1)
    return means.view(-1, 2).sum(1).exp()
