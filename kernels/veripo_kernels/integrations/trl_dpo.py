"""TRL's DPOTrainer with log-probs and losses of this package; imported through `trl.py`.

Letters: P pairs, L positions of a row. TRL's rows are all chosen completions, then all rejected ones.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from trl import DPOTrainer

from veripo_kernels.dpo import dpo_loss
from veripo_kernels.integrations.scoring import Scores, ScoringModel, check_model, log_means, mode_of, refuse
from veripo_kernels.options import DivergenceName, PreferenceLoss, PreferenceLossName

_LOSSES: dict[str, PreferenceLossName] = {
    "sigmoid": "sigmoid", "sigmoid_norm": "sigmoid", "hinge": "hinge", "ipo": "ipo", "exo_pair": "exo",
    "nca_pair": "nca", "robust": "robust", "sppo_hard": "sppo", "apo_zero": "apo_zero", "apo_down": "apo_down",
    "bco_pair": "bco", "discopop": "discopop", "aot": "sigmoid", "aot_unpaired": "sigmoid"}
"""Names here of TRL's preference losses; aot is sigmoid on other pairs, and 'sft' one line of `VeripoDPOTrainer`."""

_DIVERGENCES: dict[str, DivergenceName] = {
    "reverse_kl": "reverse_kl", "forward_kl": "forward_kl", "js_divergence": "js", "alpha_divergence": "alpha"}


def preference_options(trainer: Any) -> list[tuple[str, PreferenceLoss | None, float]]:
    """(name, loss, weight) of each of a DPOTrainer's losses, None for 'sft'; ValueError names what cannot be honoured.

    The losses have no ld_alpha: the log-probs that they get are weighted already.
    """
    smoothing, divergence = trainer.label_smoothing, trainer.f_divergence_type
    refuse("f_divergence_type", divergence, divergence not in _DIVERGENCES)
    refuse("beta", trainer.beta, trainer.beta < 0, "it must be 0 or more, or the loss prefers the rejected completion")
    found: list[tuple[str, PreferenceLoss | None, float]] = []
    for name, weight in zip(trainer.loss_types, trainer.loss_weights, strict=True):
        refuse("loss_type", name, name not in _LOSSES and name != "sft")
        smooths = name in ("robust", "exo_pair", "aot", "aot_unpaired")  # TRL's other losses ignore the option
        refuse("label_smoothing", smoothing, smooths and not 0 <= smoothing < 0.5, "it must be in [0, 0.5)")
        found.append((name, None if name == "sft" else PreferenceLoss(
            _LOSSES[name], dpo_beta=trainer.beta, label_smoothing=smoothing if smooths else 0.0,
            length_normalize=name in ("ipo", "sigmoid_norm"), discopop_tau=trainer.args.discopop_tau,
            divergence=_DIVERGENCES[divergence], divergence_alpha=trainer.f_alpha_divergence_coef), weight))
    return found


def tail_weights(kept: torch.Tensor, ld_alpha: float) -> torch.Tensor:
    """Weight [2 P, L - 1] of each token in its completion's sum: ld_alpha beyond the shorter completion of its pair."""
    shorter = kept.sum(1).view(2, -1).amin(0).repeat(2)
    return torch.where(kept.cumsum(1) > shorter[:, None], ld_alpha, 1.0)


def sorted_pairs(name: str, sums: torch.Tensor, ref: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which rows are compared with which reference: int64 [P, 2] of TRL's rows, and ref [P, 2].

    AOT (arXiv 2406.05882, eq. 4, 5) compares sorted numbers. A sum only adds up, so that its gradient is that of the
    same losses on rearranged pairs: "aot" gives the pair with the k-th smallest margin the k-th smallest margin of the
    reference, "aot_unpaired" pairs the k-th smallest chosen log-ratio with the k-th smallest rejected one.

    Args:
        sums, ref: [P, 2] log-probs of (chosen, rejected).
    """
    rows = torch.arange(2 * len(sums), device=sums.device).view(2, -1).T
    if name == "aot":
        order = (sums[:, 0] - sums[:, 1]).argsort()
        return rows, torch.empty_like(ref).index_copy(0, order, ref[(ref[:, 0] - ref[:, 1]).argsort()])
    if name == "aot_unpaired":
        order = (sums - ref).argsort(0)
        return rows.gather(0, order), ref.gather(0, order)
    return rows, ref


class VeripoDPOTrainer(DPOTrainer):
    """DPOTrainer with log-probs from `linear_logprobs` and its losses from `dpo_loss`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        preference_options(self)
        check_model(self)

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> Any:
        return super().compute_ref_log_probs(ScoringModel(self, model), inputs)

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        mode = mode_of(self)
        model_inputs = {name: value for name, value in inputs.items()
                        if name not in ("completion_mask", "ref_chosen_logps", "ref_rejected_logps")}
        model_inputs["use_cache"] = False
        routed = {"output_router_logits": True} if self.aux_loss_enabled else {}
        completion_mask = inputs["completion_mask"]
        scoring = ScoringModel(self, model, entropy=True, mean_logits=True, confidence=self.use_weighting)
        labels = inputs["input_ids"].masked_fill(completion_mask == 0, -100)
        scores = scoring(labels=labels, fused_lm_head=True, **model_inputs, **routed)
        kept = completion_mask[:, 1:].bool()
        pairs = len(kept) // 2
        logprobs = scores.log_probs
        if self.ld_alpha is not None:
            logprobs = logprobs * tail_weights(kept, self.ld_alpha)
        sums = logprobs.detach().sum(1).view(2, pairs).T
        if self.precompute_ref_logps:
            ref = torch.stack([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]], 1)
        else:
            ref = torch.stack(self.compute_ref_log_probs(self.ref_model or self.model, inputs), 1)
        ref = ref.to(logprobs)
        weights = None
        if scores.confidence is not None:  # WPO: the pair's probability on the scale of what the policy would sample
            means = scores.confidence.sum(1) / kept.sum(1).clamp(min=1)
            weights = means.view(2, pairs).sum(0).exp()
        loss = logprobs.new_zeros(())
        for name, options, weight in preference_options(self):
            if options is None:
                share = weight if weights is None else weight * weights.mean()
                loss = loss - share * scores.log_probs[:pairs][kept[:pairs]].mean()
            else:
                loss = loss + weight * self._pair_loss(*sorted_pairs(name, sums, ref), logprobs, completion_mask,
                                                       options, weights)
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * scores.aux_loss
            self._metrics[mode]["aux_loss"].append(self.accelerator.gather(scores.aux_loss.detach()).mean().item())
        self._log_preferences(mode, inputs, kept, scores, sums, ref)
        if not return_outputs:
            return loss
        with torch.no_grad():
            return loss, model(**model_inputs)

    def _pair_loss(self, rows: torch.Tensor, ref: torch.Tensor, logprobs: torch.Tensor, completion_mask: torch.Tensor,
                   options: PreferenceLoss, weights: torch.Tensor | None) -> torch.Tensor:
        """Mean loss of the pairs rows [P, 2] of logprobs [2 P, L - 1], with the sums ref [P, 2] of their reference."""
        rows = rows.flatten()
        # a completion cut at its start has no log-prob of its first token: TRL's lengths count it, here a 0 does
        kept = completion_mask[rows].bool()
        cu_seqlens = F.pad(kept.sum(1).cumsum(0), (1, 0)).to(torch.int32)
        return dpo_loss(F.pad(logprobs, (1, 0))[rows][kept], ref, cu_seqlens, loss=options, weights=weights)[0]

    def _log_preferences(self, mode: str, inputs: dict[str, Any], kept: torch.Tensor, scores: Scores,
                         sums: torch.Tensor, ref: torch.Tensor) -> None:
        """TRL's metrics; kept bool [2 P, L - 1], sums and ref [P, 2] of (chosen, rejected)."""
        metrics, pairs = self._metrics[mode], len(kept) // 2
        halves = {"chosen": slice(0, pairs), "rejected": slice(pairs, None)}
        means = {"entropy": scores.entropy.detach()[kept]}
        if scores.mean_logits is not None:
            means |= {f"logits/{name}": scores.mean_logits[half][kept[half]] for name, half in halves.items()}
        log_means(self, mode, means)
        if mode == "train":
            tokens = self.accelerator.reduce(inputs["attention_mask"].sum(), reduction="sum").item()
            self._total_train_tokens += tokens // self._tp_size
        metrics["num_tokens"] = [self._total_train_tokens]
        rewards, sums = self.accelerator.gather((self.beta * (sums - ref), sums))
        for place, name in enumerate(halves):
            metrics[f"rewards/{name}"].append(rewards[:, place].mean().item())
            metrics[f"logps/{name}"].append(sums[:, place].mean().item())
        margins = rewards[:, 0] - rewards[:, 1]
        metrics["rewards/accuracies"].append((margins > 0).float().mean().item())
        metrics["rewards/margins"].append(margins.mean().item())
