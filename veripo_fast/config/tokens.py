"""The section `grpo.tokens`: how much single tokens of a completion count in the policy loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from veripo_kernels.options import PolicyLoss

from veripo_fast.config.checks import require


@dataclass(frozen=True)
class TokensConfig:
    """What a token counts in the policy loss, beside the advantage of its completion. KL and entropy bonus are not
    weighted."""

    weights: Literal["none", "divergence"] = "none"
    """`divergence`: the more the completions of a group differ at a position, the more their tokens count there
    (TW-GRPO; veripo_kernels.divergence). It takes two more products with the head."""
    largest_weight: float = 1.7
    """Weight of the position where they differ most (TW-GRPO: 1.7); it is 1 where they differ least."""

    def __post_init__(self) -> None:
        require(self.weights != "none" or self.largest_weight == 1.7,
                "largest_weight changes nothing while weights is none")
        require(self.largest_weight > 1, f"largest_weight must be greater than 1, got {self.largest_weight}")

    @property
    def weight_by_divergence(self) -> float | None:
        """The largest weight; None: tokens are not weighted."""
        return None if self.weights == "none" else self.largest_weight


def check_tokens(tokens: TokensConfig, loss: PolicyLoss) -> None:
    """ConfigError where tokens are told apart, and the loss has one ratio for all tokens of a completion."""
    require(not loss.by_sequence or tokens == TokensConfig(),
            f"tokens tells the tokens of a completion apart, and loss {loss.loss} has one ratio for all of them; take "
            "a loss of single tokens such as grpo or dapo")
