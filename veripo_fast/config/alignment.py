"""Sections of the configuration that say what is learned from pairs and from demonstrations: DPO and SFT."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from veripo_kernels.options import DivergenceName, PreferenceLoss, PreferenceLossName

from veripo_fast.config.checks import as_config_error, check_loss_options, positive, require


@dataclass(frozen=True)
class DpoConfig:
    """Direct preference optimisation; a stage may override any field."""

    loss: PreferenceLossName = "sigmoid"
    """The preference loss; formulas and sources: veripo_kernels.formulas."""
    loss_options: dict[str, Any] = field(default_factory=dict)
    """Other numbers of the loss: discopop_tau (0.05) of discopop."""
    dpo_beta: float = 0.1
    """Strength of the pull towards the reference (VerIPO Table 1: 0.1)."""
    nll_coef: float = 0.0
    """Weight of the negative log-likelihood of the chosen completion."""
    guard: Literal["none", "stop", "nll"] = "none"
    """What is done where chosen completions become less likely than under the reference (chosen_drift below
    -guard_drift), which is said in any case: nothing; end the run; or add guard_nll to nll_coef in the step after."""
    guard_drift: float = 0.2
    """How far their mean log-prob may fall, in nats per token."""
    guard_nll: float = 1.0
    """nll: what is added, as long as they lie so low."""
    length_normalize: bool = False
    """Divide each log-ratio by the number of its tokens."""
    label_smoothing: float = 0.0
    """Probability that a pair is the wrong way round (sigmoid, robust, exo)."""
    ld_alpha: float | None = None
    """Weight of tokens beyond the shorter completion of a pair (LD-DPO); null: 1."""
    divergence: DivergenceName = "reverse_kl"
    """Which divergence from the reference is bounded (f-DPO), where the loss is one of the log-ratios' difference."""
    divergence_alpha: float = 0.5
    """alpha: between forward KL (0) and reverse KL (1)."""
    match: Literal["pairs", "aot", "aot_unpaired"] = "pairs"
    """What is compared: the two completions of a pair; `aot`: the k-th smallest margin of a step with the k-th smallest
    of the reference; `aot_unpaired`: the k-th smallest log-ratio of the chosen with the k-th smallest of the rejected
    (AOT, arXiv 2406.05882), of the step's pairs on a rank. Both need a pass over the step before its update."""
    weights: Literal["none", "wpo"] = "none"
    """`wpo`: a pair weighs as much as the policy would write it now (WPO, arXiv 2406.11827), by exp of the mean over
    the tokens of each side of log p - log sum p^2. It takes two more products with the head."""
    learning_rate: float = 5e-7
    """Peak learning rate (VerIPO Table 1: 5e-7)."""
    pairs_per_step: int = 32
    """Pairs per optimizer step (VerIPO Table 1: 32)."""
    epochs: int = 1
    """Passes over the pairs."""
    max_steps: int | None = None
    """Stop after so many optimizer steps; null: all pairs."""

    def __post_init__(self) -> None:
        positive(self, "dpo_beta", "learning_rate", "pairs_per_step", "epochs", "max_steps", "guard_drift", "guard_nll")
        require(self.guard == "nll" or self.guard_nll == 1.0, f"guard_nll changes nothing while guard is {self.guard}")
        require(self.divergence == "alpha" or self.divergence_alpha == 0.5,
                "divergence_alpha changes nothing unless divergence is alpha")
        require(self.match == "pairs" or (self.loss, self.divergence, self.length_normalize) == (
                    "sigmoid", "reverse_kl", False),
                f"match {self.match} is a loss of sorted differences: it takes loss sigmoid, divergence reverse_kl and "
                "length_normalize false")
        require(self.match == "pairs" or self.weights == "none",
                f"weights {self.weights} are of pairs, which match {self.match} takes apart")
        require(self.match != "aot_unpaired" or self.ld_alpha is None,
                "ld_alpha compares the lengths of a pair, which match aot_unpaired takes apart")
        self.preference_loss()

    def preference_loss(self) -> PreferenceLoss:
        """The loss that these options describe. Raises ConfigError where there is none."""
        check_loss_options(self.loss, self.loss_options, ("discopop_tau",) if self.loss == "discopop" else ())
        with as_config_error():
            return PreferenceLoss(
                self.loss, dpo_beta=self.dpo_beta, label_smoothing=self.label_smoothing,
                length_normalize=self.length_normalize, ld_alpha=self.ld_alpha, nll_coef=self.nll_coef,
                divergence=self.divergence, divergence_alpha=self.divergence_alpha, **self.loss_options)


@dataclass(frozen=True)
class SftConfig:
    """Supervised fine-tuning on demonstrations, as a warm start; a stage may override any field."""

    learning_rate: float = 1e-6
    """Peak learning rate."""
    prompts_per_step: int = 32
    """Prompts per optimizer step, each with all that is demonstrated of it."""
    epochs: int = 1
    """Passes over the prompts (Video-R1: one)."""
    max_steps: int | None = None
    """Stop after so many optimizer steps; null: all prompts."""
    max_completion_tokens: int = 4096
    """A longer answer is left out, and named in skipped.jsonl."""

    def __post_init__(self) -> None:
        positive(self, "learning_rate", "prompts_per_step", "epochs", "max_steps", "max_completion_tokens")
