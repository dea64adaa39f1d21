"""TRL's GRPOTrainer and DPOTrainer with these losses, by overriding methods on a subclass; written against TRL 1.16.

    from trl import GRPOConfig, GRPOTrainer
    from veripo_kernels.integrations.trl import use_veripo_losses
    trainer_class = use_veripo_losses(GRPOTrainer)  # or DPOTrainer, or a subclass of either
    trainer = trainer_class(model, reward_funcs, GRPOConfig("run"), train_dataset)
    trainer.train()

Log-probs come from `linear_logprobs`, losses from `grpo_loss` and `dpo_loss` on packed lengths. TRL's options keep
their meaning; one that these losses do not have raises ValueError at construction. Metrics are TRL's, but for DPO's
mean_token_accuracy (it needs an argmax over the vocabulary) and, under a softcap, its logits/*: not logged.

Letters: B rows (of DPO: pairs), S completions, C tokens of the longest, M tokens of all in the loss.
"""

from __future__ import annotations

import inspect
import math
import warnings
from typing import Any

import torch
import torch.nn.functional as F

from veripo_kernels import formulas, reference
from veripo_kernels.dpo import dpo_loss
from veripo_kernels.grpo import grpo_loss
from veripo_kernels.integrations.scoring import Scores, ScoringModel, check_model, refuse
from veripo_kernels.options import Aggregation, PolicyLoss, PreferenceLoss, PreferenceLossName

try:
    import trl
    from packaging.version import Version
    from trl import DPOTrainer, GRPOConfig, GRPOTrainer
except ImportError as error:
    raise ImportError("veripo_kernels.integrations.trl needs TRL 1.16 or later: pip install 'trl>=1.16'") from error

if Version(trl.__version__) < Version("1.16"):
    raise ImportError(f"veripo_kernels.integrations.trl needs TRL 1.16 or later, found {trl.__version__}: "
                      "pip install 'trl>=1.16'")
if Version(trl.__version__) >= Version("1.17"):
    warnings.warn(f"veripo_kernels.integrations.trl was written against TRL 1.16 and knows no newer options; found "
                  f"{trl.__version__}", stacklevel=2)

_AGGREGATIONS: dict[str, Aggregation] = {
    "grpo": "sequence", "sapo": "sequence", "bnpo": "token", "dapo": "token", "cispo": "token", "dr_grpo": "constant"}
"""How TRL weighs tokens under each of its policy losses."""

_PREFERENCE_LOSSES: dict[str, PreferenceLossName] = {
    "sigmoid": "sigmoid", "sigmoid_norm": "sigmoid", "hinge": "hinge", "ipo": "ipo", "exo_pair": "exo",
    "nca_pair": "nca", "robust": "robust", "sppo_hard": "sppo", "apo_zero": "apo_zero", "apo_down": "apo_down"}
"""Names here of TRL's preference losses; its 'sft' is one line of `VeripoDPOTrainer`."""

_SCORED_INPUTS = frozenset(inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters)


def use_veripo_losses(trainer_class: type) -> type:
    """A subclass of a TRL trainer class that computes log-probs and losses with this package.

    Args:
        trainer_class: GRPOTrainer, DPOTrainer or a subclass, whose methods stay in front: its super() reaches these.

    Raises:
        TypeError: another class. ValueError: a subclass whose `_compute_loss` never calls super().
    """
    for base, ours in ((GRPOTrainer, VeripoGRPOTrainer), (DPOTrainer, VeripoDPOTrainer)):
        if issubclass(trainer_class, ours):
            return trainer_class
        if trainer_class is base:
            return ours
        if issubclass(trainer_class, base):
            _check_overrides(trainer_class, base)
            return type(f"Veripo{trainer_class.__name__}", (trainer_class, ours),
                        {"__module__": trainer_class.__module__})
    raise TypeError(f"trainer_class must be GRPOTrainer, DPOTrainer or a subclass, got {trainer_class.__name__}")


def _check_overrides(trainer_class: type, base: type) -> None:
    for owner in trainer_class.__mro__[:trainer_class.__mro__.index(base)]:
        method = vars(owner).get("_compute_loss")
        if method is not None and "__class__" not in inspect.unwrap(method).__code__.co_freevars:  # what super() reads
            raise ValueError(f"{owner.__name__}._compute_loss replaces TRL's loss without super(): it would run "
                             "instead of these losses")


def mode_of(trainer: Any) -> str:
    """The half of TRL's metrics that a loss belongs to."""
    return "train" if trainer.model.training else "eval"


def log_means(trainer: Any, mode: str, values: dict[str, torch.Tensor]) -> None:
    """Logs the mean over all processes of each vector, weighted by its length, after one reduction."""
    sums = torch.stack([value.sum(dtype=torch.float32) for value in values.values()])
    counts = sums.new_tensor([len(value) for value in values.values()])
    sums, counts = trainer.accelerator.reduce(torch.stack([sums, counts]), reduction="sum")
    for name, mean in zip(values, (sums / counts.clamp(min=1)).tolist(), strict=True):
        trainer._metrics[mode][name].append(mean)


# -- GRPO ------------------------------------------------------------------------------------------------------------


def policy_options(trainer: Any) -> PolicyLoss:
    """The loss that a GRPOTrainer's options describe; ValueError names the option that cannot be honoured."""
    args, name, high, level = trainer.args, trainer.loss_type, trainer.epsilon_high, trainer.importance_sampling_level
    clips = name not in ("cispo", "sapo")
    refuse("loss_type", name, name not in _AGGREGATIONS)
    refuse("importance_sampling_level", level, level != "token" and not (level == "sequence" and clips),
           "it must be 'token', or 'sequence' with a clipped loss")
    threshold = trainer.off_policy_mask_threshold
    refuse("off_policy_mask_threshold", threshold, threshold is not None)
    refuse("top_entropy_quantile", trainer.top_entropy_quantile, trainer.top_entropy_quantile < 1)
    refuse("use_adaptive_entropy", trainer.use_adaptive_entropy, trainer.use_adaptive_entropy)
    refuse("epsilon", trainer.epsilon_low, clips and not 0 <= trainer.epsilon_low <= 1, "it must be in [0, 1]")
    refuse("epsilon_high", high, high < (1 if name == "cispo" else 0), "it must be at least 0, with cispo at least 1")
    refuse("delta", args.delta, clips and args.delta is not None and args.delta <= 1 + high,
           f"it must be above 1 + epsilon_high = {1 + high}")
    floor, cap = trainer.vllm_importance_sampling_clip_min, trainer.vllm_importance_sampling_clip_max
    return PolicyLoss(
        "gspo" if level == "sequence" else name, aggregation=_AGGREGATIONS[name],
        constant_length=trainer.max_completion_length, clip_low=trainer.epsilon_low if clips else 0.0,
        clip_high=high - 1 if name == "cispo" else high, dual_clip=args.delta if clips else None,
        sapo_temperature_pos=args.sapo_temperature_pos, sapo_temperature_neg=args.sapo_temperature_neg,
        kl_coef=0.0 if args.use_bias_correction_kl else trainer.beta, importance=trainer.vllm_importance_sampling_mode,
        importance_floor=0.0 if floor is None else floor, importance_cap=math.inf if cap is None else cap)


def importance_ratio(log_ratio: torch.Tensor, cu_seqlens: torch.Tensor, *, level: str) -> torch.Tensor:
    """exp(policy - old) of log_ratio [M]: [M]; level "sequence" puts the geometric mean of a completion at its tokens,
    "completion" gives it once, [S]."""
    if level == "token":
        return log_ratio.exp()
    ratio = (reference.sequence_sums(log_ratio, cu_seqlens) / cu_seqlens.diff().clamp(min=1)).exp()
    return ratio if level == "completion" else ratio[reference.sequence_index(cu_seqlens, len(log_ratio))]


class VeripoGRPOTrainer(GRPOTrainer):
    """GRPOTrainer with log-probs from `linear_logprobs` and its loss from `grpo_loss`."""

    args: GRPOConfig

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        policy_options(self)
        check_model(self)

    def _get_per_token_logps_and_entropies(self, model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor,
                                           logits_to_keep: int, batch_size: int | None = None,
                                           compute_entropy: bool = False, **kwargs: Any) -> Any:
        scoring = ScoringModel(self, model, temperature=self.temperature, entropy=compute_entropy)
        return super()._get_per_token_logps_and_entropies(
            scoring, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy, **kwargs)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        mode, metrics = mode_of(self), self._metrics[mode_of(self)]
        kept = (inputs["completion_mask"] * inputs.get("tool_mask", 1)).bool()
        logprobs, entropy, aux_loss = self._get_per_token_logps_and_entropies(
            model, torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1), kept.shape[1], compute_entropy=True,
            compute_aux_loss=self.aux_loss_enabled,
            **{name: value for name, value in inputs.items() if name in _SCORED_INPUTS})
        loss, values = self._policy_loss(inputs, kept, logprobs)
        accumulation = self.current_gradient_accumulation_steps if mode == "train" else 1
        if self._counts_step_tokens:
            loss = loss / self._step_tokens(inputs["num_items_in_batch"])
        policy_loss = loss.detach()
        if not self._counts_step_tokens:
            loss = loss / accumulation
        entropy = entropy[kept] if self._entropy_bonus_enabled else entropy[kept].detach()
        if self._entropy_bonus_enabled:  # over tokens whatever the loss's own weights, as in TRL
            loss = loss - self.entropy_coef * entropy.sum() / max(len(entropy), 1) / accumulation
            metrics["policy_loss"].append(self.accelerator.gather(policy_loss).nanmean().item())
            if mode == "train" and self.accelerator.sync_gradients:
                metrics["entropy_coef"].append(self.entropy_coef)
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * aux_loss / accumulation
            metrics["aux_loss"].append(self.accelerator.gather(aux_loss.detach()).mean().item())
        log_means(self, mode, {"entropy": entropy.detach(), **values})
        return loss

    @property
    def _counts_step_tokens(self) -> bool:
        return self.loss_type in ("dapo", "cispo")

    def _step_tokens(self, num_items_in_batch: torch.Tensor) -> torch.Tensor:
        """Tokens of an optimizer step per process, from those of the generation batch of all processes."""
        tokens = num_items_in_batch.clamp(min=1) / self.accelerator.num_processes
        if mode_of(self) == "eval":
            return tokens
        return tokens * self.current_gradient_accumulation_steps / self.args.steps_per_generation

    def _policy_loss(self, inputs: dict[str, Any], kept: torch.Tensor, logprobs: torch.Tensor,
                     ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss of the micro-batch (not yet divided where TRL divides by the tokens of the step), and values to log.

        Args:
            kept: bool [S, C]. logprobs: [S, C] with gradient.
        """
        options = policy_options(self)
        cu_seqlens = F.pad(kept.sum(1).cumsum(0), (1, 0)).to(torch.int32)

        def pack(name: str, wanted: bool = True) -> torch.Tensor | None:
            return inputs[name][kept] if wanted and inputs.get(name) is not None else None

        policy, old, ref = logprobs[kept], pack("old_per_token_logps"), pack("ref_per_token_logps", self.beta != 0)
        if not len(policy):  # a zero that is connected to the model
            return logprobs.sum(), self._measure(inputs, kept, cu_seqlens, policy.detach(), policy.detach())
        advantages = inputs["advantages"].reshape(len(kept), -1).expand_as(kept)[kept]
        num_tokens = 1 if self._counts_step_tokens else None
        corrected = self.use_vllm and self.vllm_importance_sampling_correction
        loss, _ = grpo_loss(
            policy, old, advantages, cu_seqlens, loss=options, num_tokens=num_tokens, advantages_per="token",
            ref_logprobs=ref if options.kl_coef else None,
            rollout_logprobs=pack("sampling_per_token_logps", corrected))
        log_ratio = policy - (policy.detach() if old is None else old)
        kl = policy.new_zeros(0) if ref is None else formulas.kl_penalty(policy, ref, "k3")[0]
        if ref is not None and self.args.use_bias_correction_kl:  # weighs the KL too: not a term of grpo_loss
            kl = kl * importance_ratio(log_ratio, cu_seqlens, level=self.importance_sampling_level)
            weights = reference.token_weights(cu_seqlens, torch.ones_like(kl), options, num_tokens=num_tokens)
            loss = loss + self.beta * (weights * kl).sum()
        return loss, self._measure(inputs, kept, cu_seqlens, log_ratio.detach(), kl.detach())

    def _measure(self, inputs: dict[str, Any], kept: torch.Tensor, cu_seqlens: torch.Tensor, log_ratio: torch.Tensor,
                 kl: torch.Tensor) -> dict[str, torch.Tensor]:
        """Values of TRL's metrics that are means: one per token, or one per completion where its ratio is one."""
        values = {"kl": kl} if self.beta != 0 else {}
        if self.loss_type == "sapo":
            return values
        level, advantages = self.importance_sampling_level, inputs["advantages"]
        ratio = importance_ratio(log_ratio, cu_seqlens, level=level)
        per_token = level == "token" or advantages.numel() != len(kept)
        if not per_token:
            ratio = importance_ratio(log_ratio, cu_seqlens, level="completion")
        advantages = advantages.reshape(len(kept), -1).expand_as(kept)[kept] if per_token else advantages.view(-1)
        if self.loss_type == "cispo":
            return {**values, "cispo_clip_ratio": (ratio > self.epsilon_high) & (advantages > 0)}
        low = (ratio < 1 - self.epsilon_low) & (advantages < 0)
        high = (ratio > 1 + self.epsilon_high) & (advantages > 0)
        shares = torch.stack([low, high]).float()
        if per_token:
            shares = torch.stack([reference.sequence_sums(share, cu_seqlens) for share in shares]) / cu_seqlens.diff()
        shares = self.accelerator.gather(shares.T.contiguous())
        shares = shares[~shares.isnan().any(1)]  # completions without tokens
        if len(shares):
            metrics = self._metrics[mode_of(self)]
            metrics["clip_ratio/low_min"].append(shares[:, 0].min().item())
            metrics["clip_ratio/high_max"].append(shares[:, 1].max().item())
        return {**values, "clip_ratio/low_mean": low, "clip_ratio/high_mean": high,
                "clip_ratio/region_mean": low | high}


# -- DPO -------------------------------------------------------------------------------------------------------------


def preference_options(trainer: Any) -> list[tuple[PreferenceLoss | None, float]]:
    """(loss, weight) of each of a DPOTrainer's losses, None for 'sft'; ValueError names what cannot be honoured."""
    smoothing = trainer.label_smoothing
    refuse("f_divergence_type", trainer.f_divergence_type, trainer.f_divergence_type != "reverse_kl")
    refuse("use_weighting", trainer.use_weighting, trainer.use_weighting)
    refuse("beta", trainer.beta, trainer.beta <= 0, "it must be above 0")
    found: list[tuple[PreferenceLoss | None, float]] = []
    for name, weight in zip(trainer.loss_types, trainer.loss_weights, strict=True):
        refuse("loss_type", name, name not in _PREFERENCE_LOSSES and name != "sft")
        smooths = name in ("robust", "exo_pair")  # TRL's other losses ignore the option
        refuse("label_smoothing", smoothing, smooths and not 0 <= smoothing < 0.5, "it must be in [0, 0.5)")
        found.append((None if name == "sft" else PreferenceLoss(
            _PREFERENCE_LOSSES[name], dpo_beta=trainer.beta, label_smoothing=smoothing if smooths else 0.0,
            length_normalize=name in ("ipo", "sigmoid_norm"), ld_alpha=trainer.ld_alpha), weight))
    normalized = any(loss is not None and loss.length_normalize for loss, _ in found)
    refuse("truncation_mode", trainer.args.truncation_mode, normalized and trainer.args.truncation_mode == "keep_end",
           "the length of a completion cut at its start is another one in TRL")
    return found


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
        scoring = ScoringModel(self, model, entropy=True, mean_logits=True)
        labels = inputs["input_ids"].masked_fill(completion_mask == 0, -100)
        scores = scoring(labels=labels, fused_lm_head=True, **model_inputs, **routed)
        kept = completion_mask[:, 1:].bool()
        pairs = len(kept) // 2  # TRL's rows: all chosen ones, then all rejected ones
        alternate = torch.arange(2 * pairs, device=kept.device).view(2, pairs).T.flatten()
        cu_seqlens = F.pad(kept[alternate].sum(1).cumsum(0), (1, 0)).to(torch.int32)
        policy = scores.log_probs[alternate][kept[alternate]]
        if self.precompute_ref_logps:
            ref = torch.stack([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]], 1)
        else:
            ref = torch.stack(self.compute_ref_log_probs(self.ref_model or self.model, inputs), 1)
        ref = ref.to(policy)
        loss = policy.new_zeros(())
        for options, weight in preference_options(self):
            if options is None:
                loss = loss - weight * scores.log_probs[:pairs][kept[:pairs]].mean()
            else:
                loss = loss + weight * dpo_loss(policy, ref, cu_seqlens, loss=options)[0]
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * scores.aux_loss
            self._metrics[mode]["aux_loss"].append(self.accelerator.gather(scores.aux_loss.detach()).mean().item())
        sums = reference.pair_sums(policy.detach(), cu_seqlens, loss=PreferenceLoss(ld_alpha=self.ld_alpha))
        self._log_preferences(mode, inputs, kept, scores, sums, ref)
        if not return_outputs:
            return loss
        with torch.no_grad():
            return loss, model(**model_inputs)

    def _log_preferences(self, mode: str, inputs: dict[str, Any], kept: torch.Tensor, scores: Scores,
                         sums: torch.Tensor, ref: torch.Tensor) -> None:
        """TRL's metrics; kept bool [2 B, L - 1], sums and ref [B, 2] of (chosen, rejected)."""
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
