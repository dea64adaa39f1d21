"""The section `grpo.tokens`: how much single tokens of a completion count in the policy loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from veripo_kernels.options import PolicyLoss

from veripo_fast.config.checks import positive, require


@dataclass(frozen=True)
class TokensConfig:
    """What a token counts in the policy loss, beside the advantage of its completion. KL and entropy bonus are not
    weighted."""

    weights: Literal["none", "divergence"] = "none"
    """`divergence`: the more the completions of a group differ at a position, the more their tokens count there
    (TW-GRPO; veripo_kernels.divergence). It takes two more products with the head."""
    largest_weight: float = 1.7
    """Weight of the position where they differ most (TW-GRPO: 1.7); it is 1 where they differ least."""
    covariance: Literal["none", "clip", "kl"] = "none"
    """Of tokens whose log-prob and advantage both lie above, or both below the means of an update, which lower the
    entropy: `clip` leaves some out of the policy loss, by chance (Clip-Cov); `kl` adds the absolute log-ratio to the
    rollout of those with the largest product (KL-Cov). Updates behind the first of a rollout batch cost a pass more."""
    covariance_share: float = 0.0002
    """How many, as a share of the tokens of an update, at least one (Clip-Cov: 2e-4)."""
    covariance_range: tuple[float, float] = (1.0, 5.0)
    """clip: the product of such a token's distances from both means lies between these."""
    covariance_coef: float = 1.0
    """kl: weight of the absolute log-ratio."""

    def __post_init__(self) -> None:
        require(self.weights != "none" or self.largest_weight == 1.7,
                "largest_weight changes nothing while weights is none")
        for name, kinds in (("covariance_share", ("clip", "kl")), ("covariance_range", ("clip",)),
                            ("covariance_coef", ("kl",))):
            require(self.covariance in kinds or getattr(self, name) == getattr(TokensConfig, name),
                    f"{name} changes nothing while covariance is {self.covariance}")
        positive(self, "covariance_coef")
        require(0 < self.covariance_share <= 1,
                f"covariance_share must be greater than 0 and at most 1, got {self.covariance_share}")
        require(self.covariance_range[0] < self.covariance_range[1],
                f"covariance_range must be two numbers, the smaller first, got {list(self.covariance_range)}")
        require(self.largest_weight > 1, f"largest_weight must be greater than 1, got {self.largest_weight}")

    @property
    def weight_by_divergence(self) -> float | None:
        """The largest weight; None: tokens are not weighted."""
        return None if self.weights == "none" else self.largest_weight


def check_tokens(tokens: TokensConfig, loss: PolicyLoss, updates_per_rollout: int) -> None:
    """ConfigError where tokens are told apart, and the loss has one ratio for all tokens of a completion; or where they
    are pulled back to a policy that is the same."""
    require(tokens.covariance != "kl" or updates_per_rollout > 1, "tokens.covariance kl changes nothing while "
            "updates_per_rollout is 1: the policy has not moved yet when it is updated")
    require(not loss.by_sequence or tokens == TokensConfig(),
            f"tokens tells the tokens of a completion apart, and loss {loss.loss} has one ratio for all of them; take "
            "a loss of single tokens such as grpo or dapo")
