"""What a loss is made of: two frozen descriptions that the public ops, the definitions and the trainer share."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

AdvantageKind = Literal["std", "no_std", "leave_one_out", "batch_std"]
Aggregation = Literal["sequence", "token", "constant"]
PolicyLossName = Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "gspo", "gspo_token", "gmpo", "luspo",
                         "vespo", "cispo_sequence", "sapo_sequence", "gpg"]
PreferenceLossName = Literal["sigmoid", "ipo", "hinge", "robust", "exo", "nca", "apo_zero", "apo_down", "sppo", "bco",
                             "discopop"]
DivergenceName = Literal["reverse_kl", "forward_kl", "js", "alpha"]
KlKind = Literal["k1", "k2", "k3"]
AdvantagesPer = Literal["sequence", "token"]
Importance = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]

_AGGREGATION: dict[str, Aggregation] = {
    "grpo": "sequence", "bnpo": "token", "dr_grpo": "constant", "dapo": "token", "cispo": "token", "sapo": "sequence",
    "gspo": "sequence", "gspo_token": "sequence", "gmpo": "sequence", "luspo": "constant", "vespo": "token",
    "cispo_sequence": "token", "sapo_sequence": "sequence", "gpg": "token"}
_SURROGATE: dict[str, str] = dict.fromkeys(("grpo", "bnpo", "dr_grpo", "dapo"), "clip") | {"luspo": "gspo"}
_BY_SEQUENCE = ("gspo", "gspo_token", "gmpo", "vespo", "cispo_sequence", "sapo_sequence")
_DIVERGES = ("sigmoid", "ipo", "hinge", "robust", "exo", "discopop")  # elsewhere f-DPO's unknown factor does not cancel

NO_DUAL_CLIP = 1e30


@dataclass(frozen=True)
class PolicyLoss:
    """A loss of the GRPO family. The name decides the surrogate and how tokens are weighted.

    | name | surrogate per token | weights |
    |---|---|---|
    | grpo (arXiv 2402.03300) | clipped ratio | sequence |
    | bnpo, dapo (2503.14476) | clipped ratio | token |
    | dr_grpo (2503.20783) | clipped ratio | constant |
    | cispo (2506.13585) | ratio cut at 1 + clip_high, without gradient, times the log-prob | token |
    | sapo (2511.20347) | sigmoid gate | sequence |
    | gspo (2507.18071) | clipped ratio of the sequence (geometric mean of its tokens) | sequence |
    | gspo_token (2507.18071, eq. 13) | the same value, its gradient token by token | sequence |
    | gmpo (2507.20673) | geometric mean of clipped token ratios | sequence |
    | luspo (2602.05261) | that of gspo | constant, 1: sum over tokens, mean over completions |
    | vespo (2602.10693) | gamma weight of the completion's ratio, without gradient, times the log-prob | token |
    | cispo_sequence, sapo_sequence | of the ratio of the sequence, as gspo's | token, sequence |
    | gpg (2504.02546) | the log-prob, without a ratio | token |

    bnpo and dapo differ only in the token count that callers give: of the micro-batch, or of the whole step.
    """

    loss: PolicyLossName = "grpo"
    aggregation: Aggregation | None = None
    """sequence: mean per completion, then over completions; token: mean over tokens; constant: sum over tokens divided
    by completions times `constant_length`. None is the loss's own."""
    constant_length: int | None = None
    clip_low: float = 0.2
    """The ratio is kept above 1 - clip_low; 1 or more: no bound."""
    clip_high: float = 0.2
    """The ratio is kept below 1 + clip_high, at least -1 (cispo: the cut; there 4 is a usual value)."""
    dual_clip: float | None = None
    """Bounds the loss of a negative advantage at dual_clip times it; at least 1 + clip_high."""
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0
    kl_coef: float = 0.0
    """Weight of the KL to the reference, added token by token; needs ref_logprobs."""
    kl_kind: KlKind = "k3"
    importance: Importance = "token_truncate"
    """What is done with exp(old - rollout) per token, or of the whole completion, outside [floor, cap]: moved to the
    bound, or the loss (not the KL) dropped. Only with rollout_logprobs."""
    importance_floor: float = 0.0
    importance_cap: float = 2.0
    entropy_coef: float = 0.0
    """Weight of the entropy bonus, with the weights of the tokens; needs entropy."""
    squared_coef: float = 0.0
    """Weight of half the squared log-ratio of a completion, the sum over its tokens (Kimi k1.5: tau), divided among
    them; importance weights leave it alone."""

    def __post_init__(self) -> None:
        for name, kind in (("loss", PolicyLossName), ("kl_kind", KlKind), ("importance", Importance)):
            _one_of(name, getattr(self, name), get_args(kind))
        if self.aggregation is not None:
            _one_of("aggregation", self.aggregation, get_args(Aggregation))
        if self.weighting == "constant" and not self.length:
            raise ValueError(f"loss '{self.loss}' with aggregation 'constant' needs constant_length")
        check_counts(constant_length=self.constant_length)
        if self.dual_clip is not None and self.dual_clip < 1 + self.clip_high:
            raise ValueError(f"dual_clip must be at least 1 + clip_high = {1 + self.clip_high:g}, got "
                             f"{self.dual_clip}")
        for name, least in (("clip_low", 0), ("clip_high", -1), ("kl_coef", 0), ("squared_coef", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be {least} or larger, got {getattr(self, name)}")

    @property
    def weighting(self) -> Aggregation:
        return self.aggregation or _AGGREGATION[self.loss]

    @property
    def surrogate(self) -> str:
        """clip, cispo, sapo, gspo, gspo_token, gmpo, vespo, cispo_sequence, sapo_sequence or gpg."""
        return _SURROGATE.get(self.loss, self.loss)

    @property
    def length(self) -> int | None:
        """What `constant` weights divide by; luspo's own is 1."""
        return 1 if self.loss == "luspo" and self.aggregation is None else self.constant_length

    @property
    def by_sequence(self) -> bool:
        """Whether the ratio is one of the whole completion."""
        return self.surrogate in _BY_SEQUENCE

    @property
    def couples_tokens(self) -> bool:
        """Whether the gradient of a token depends on the other tokens of its completion."""
        return self.by_sequence or self.importance.startswith("sequence") or self.squared_coef != 0

    @property
    def dual(self) -> float:
        return NO_DUAL_CLIP if self.dual_clip is None else self.dual_clip

    @property
    def log_clip(self) -> tuple[float, float]:
        """The clip as bounds of the log-ratio."""
        return log_bounds(self.clip_low, self.clip_high)


@dataclass(frozen=True)
class PreferenceLoss:
    """A loss on pairs; formulas and sources: `formulas.preference_loss`."""

    loss: PreferenceLossName = "sigmoid"
    dpo_beta: float = 0.1
    label_smoothing: float = 0.0
    """Probability that a label is flipped (sigmoid, robust; exo needs one above 0)."""
    length_normalize: bool = False
    """Log-ratios per token. TRL's ipo always does so."""
    ld_alpha: float | None = None
    """Weight of the tokens beyond the shorter completion of the pair (LD-DPO, arXiv 2409.06411); None is 1."""
    nll_coef: float = 0.0
    """Weight of the negative log-prob per token of the chosen completion (arXiv 2404.19733, eq. 1)."""
    discopop_tau: float = 0.05
    divergence: DivergenceName = "reverse_kl"
    """f-DPO: `formulas.divergence_score` of the log-ratios instead of these, where the loss is one of their difference.
    js: Jensen-Shannon; alpha: the family of reverse (1) and forward (0) KL."""
    divergence_alpha: float = 0.5

    def __post_init__(self) -> None:
        _one_of("loss", self.loss, get_args(PreferenceLossName))
        _one_of("divergence", self.divergence, get_args(DivergenceName))
        if self.divergence != "reverse_kl" and self.loss not in _DIVERGES:
            raise ValueError(f"loss '{self.loss}' has no divergence '{self.divergence}': it is not one of a difference")
        if self.discopop_tau <= 0:
            raise ValueError(f"discopop_tau must be above 0, got {self.discopop_tau}")
        if self.dpo_beta < 0:
            raise ValueError(f"dpo_beta must be 0 or larger, got {self.dpo_beta}")
        if self.dpo_beta == 0 and self.loss in ("ipo", "sppo"):
            raise ValueError(f"loss '{self.loss}' divides by dpo_beta: it must be above 0")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing must be in [0, 0.5), got {self.label_smoothing}")
        if self.nll_coef < 0:
            raise ValueError(f"nll_coef must be 0 or larger, got {self.nll_coef}")
        if self.ld_alpha is not None and not 0 <= self.ld_alpha <= 1:
            raise ValueError(f"ld_alpha must be in [0, 1], got {self.ld_alpha}")
        if self.loss == "exo" and self.label_smoothing == 0:
            raise ValueError("loss 'exo' needs label_smoothing above 0")
        if self.label_smoothing and self.loss not in ("sigmoid", "robust", "exo"):
            raise ValueError(f"loss '{self.loss}' does not use label_smoothing, got {self.label_smoothing}")

    @property
    def score(self) -> DivergenceName:
        """The divergence; alpha's limit at 1 is reverse_kl."""
        near = self.divergence == "alpha" and abs(self.divergence_alpha - 1) < 1e-6
        return "reverse_kl" if near else self.divergence

    @property
    def tail_weight(self) -> float:
        return 1.0 if self.ld_alpha is None else self.ld_alpha


def log_bounds(clip_low: float, clip_high: float) -> tuple[float, float]:
    """Logarithms of 1 - clip_low and 1 + clip_high."""
    return (math.log(1 - clip_low) if clip_low < 1 else -math.inf,
            math.log1p(clip_high) if clip_high > -1 else -math.inf)


def as_policy_loss(loss: PolicyLoss | str) -> PolicyLoss:
    """A name stands for the loss with its defaults."""
    return PolicyLoss(loss) if isinstance(loss, str) else loss  # type: ignore[arg-type]


def as_preference_loss(loss: PreferenceLoss | str) -> PreferenceLoss:
    """A name stands for the loss with its defaults."""
    return PreferenceLoss(loss) if isinstance(loss, str) else loss  # type: ignore[arg-type]


def check_counts(**counts: int | None) -> None:
    """Counts that a loss is divided by, None where nobody gives one: a negative one would turn its sign."""
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
