"""What single tokens of a micro-batch count in a policy loss (`grpo.tokens`).

Letters: M completion tokens, N completions, D hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from veripo_kernels import PolicyLoss, linear_logprobs
from veripo_kernels.divergence import divergence_weights, linear_group_divergence
from veripo_kernels.reference import sequence_index, token_weights


@dataclass(frozen=True)
class TokenInputs:
    """Factors of the advantages of tokens, and which tokens are pulled back to the old policy."""

    sizes: tuple[int, ...]
    """Completions of each group."""
    largest_weight: float | None = None
    """Tokens are weighted by `veripo_kernels.divergence`, up to this; None: they are not."""
    kept: torch.Tensor | None = None
    """float32 [M]: 0 on tokens that the policy loss leaves out, else 1."""
    pulled: torch.Tensor | None = None
    """float32 [M]: 1 on tokens that are pulled back, else 0."""
    pull_coef: float = 1.0
    """Weight of |log-ratio| of these."""

    def advantages(self, advantages: torch.Tensor, hidden: torch.Tensor, head: torch.Tensor, cu_seqlens: torch.Tensor,
                   temperature: float) -> torch.Tensor:
        """Advantages of tokens [M] from those of their completions [N]; hidden [M, D] and head [V, D] get no gradient.
        """
        spread = advantages[sequence_index(cu_seqlens, len(hidden))]
        if self.largest_weight is not None:
            groups = torch.tensor([0, *self.sizes], device=cu_seqlens.device).cumsum(0)
            divergence = linear_group_divergence(hidden.detach(), head.detach(), cu_seqlens, groups,
                                                 temperature=temperature)
            spread = spread * divergence_weights(divergence, cu_seqlens, groups, largest=self.largest_weight)
        return spread if self.kept is None else spread * self.kept

    def pull(self, hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, old_logprobs: torch.Tensor | None,
             cu_seqlens: torch.Tensor, loss: PolicyLoss, *, temperature: float, num_sequences: int, num_tokens: int
             ) -> torch.Tensor | None:
        """Weighted sum [] of |log-ratio| over the tokens that are pulled back (KL-Cov, arXiv 2505.22617), with
        a gradient; None where there are none, and where the policy has not moved.

        Only their rows go through the head once more.
        """
        if self.pulled is None or old_logprobs is None:
            return None
        rows = self.pulled.nonzero()[:, 0]
        if not len(rows):
            return None
        weights = token_weights(cu_seqlens, torch.ones_like(self.pulled), loss, num_sequences=num_sequences,
                                num_tokens=num_tokens)[rows]
        logprobs = linear_logprobs(hidden[rows], head, targets[rows], temperature=temperature)
        return self.pull_coef * (weights * (logprobs - old_logprobs[rows]).abs()).sum()
