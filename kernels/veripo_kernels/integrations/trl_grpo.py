"""TRL's GRPOTrainer with log-probs and losses of this package; imported through `trl.py`.

Letters: S completions, C tokens of the longest, M tokens of all in the loss.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
import torch.nn.functional as F
from trl import GRPOConfig, GRPOTrainer

from veripo_kernels import formulas, reference
from veripo_kernels.grpo import grpo_loss
from veripo_kernels.integrations.scoring import ScoringModel, check_model, log_means, mode_of, refuse
from veripo_kernels.options import Aggregation, PolicyLoss, PolicyLossName

_AGGREGATIONS: dict[str, Aggregation] = {
    "grpo": "sequence", "sapo": "sequence", "bnpo": "token", "dapo": "token", "cispo": "token", "vespo": "token",
    "dr_grpo": "constant", "luspo": "constant"}
"""How TRL weighs tokens under each of its policy losses; luspo's constant is 1."""

_BY_SEQUENCE: dict[str, PolicyLossName] = {"cispo": "cispo_sequence", "sapo": "sapo_sequence", "vespo": "vespo"}
"""Names here of TRL's losses under importance_sampling_level "sequence"; the others clip, as gspo does."""

_CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
_SCORED_INPUTS = frozenset(inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters)


def policy_options(trainer: Any) -> PolicyLoss:
    """The loss that a GRPOTrainer's options describe; ValueError names the option that cannot be honoured."""
    args, name, low, high = trainer.args, trainer.loss_type, trainer.epsilon_low, trainer.epsilon_high
    clips = name in _CLIPPED
    refuse("loss_type", name, name not in _AGGREGATIONS)
    bounds = {"epsilon": (low, clips), "epsilon_high": (high, clips or name == "cispo"),
              "delta": (args.delta, clips and args.delta is not None)}
    for option, (bound, used) in bounds.items():
        refuse(option, bound, used and bound < 0, "a bound of the ratio must be at least 0")
    by_sequence = trainer.importance_sampling_level == "sequence"
    dual = args.delta if clips else None
    if dual is not None and dual <= 1 + high:  # TRL's delta then bounds positive advantages, and epsilon_high negative
        high, dual = dual - 1, 1 + high
    floor, cap = trainer.vllm_importance_sampling_clip_min, trainer.vllm_importance_sampling_clip_max
    loss: PolicyLossName = "grpo" if name == "luspo" else name
    if by_sequence:
        loss = _BY_SEQUENCE.get(name, "gspo")
    return PolicyLoss(
        loss, aggregation=_AGGREGATIONS[name], constant_length=1 if name == "luspo" else trainer.max_completion_length,
        clip_low=low if clips else 0.0, clip_high=high if clips else high - 1 if name == "cispo" else 0.0,
        dual_clip=dual, sapo_temperature_pos=args.sapo_temperature_pos, sapo_temperature_neg=args.sapo_temperature_neg,
        vespo_k_pos=args.vespo_k_pos, vespo_lambda_pos=max(args.vespo_lambda_pos, 1e-4), vespo_k_neg=args.vespo_k_neg,
        vespo_lambda_neg=max(args.vespo_lambda_neg, 1e-4),
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
    _entropy_window_stats: Any  # TRL's own: a tensor [2] or None

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
        entropic: torch.Tensor | None = None  # the tokens that top_entropy_quantile leaves a gradient
        if self.top_entropy_quantile < 1:
            entropic = self.get_high_entropy_mask(entropy.detach(), kept, 1 - self.top_entropy_quantile)
        loss, values = self._policy_loss(inputs, kept, entropic, logprobs)
        accumulation = self.current_gradient_accumulation_steps if mode == "train" else 1
        if self._counts_step_tokens:
            loss = loss / self._step_tokens(inputs["num_items_in_batch"])
        policy_loss = loss.detach()
        if not self._counts_step_tokens:
            loss = loss / accumulation
        if self._entropy_bonus_enabled:  # over tokens whatever the loss's own weights, as in TRL
            loss = loss - self._entropy_bonus(mode, entropy[kept if entropic is None else entropic]) / accumulation
            metrics["policy_loss"].append(self.accelerator.gather(policy_loss).nanmean().item())
            if mode == "train" and self.accelerator.sync_gradients:
                metrics["entropy_coef"].append(self.entropy_coef)
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * aux_loss / accumulation
            metrics["aux_loss"].append(self.accelerator.gather(aux_loss.detach()).mean().item())
        log_means(self, mode, {"entropy": entropy[kept].detach(), **values})
        return loss

    def _entropy_bonus(self, mode: str, entropy: torch.Tensor) -> torch.Tensor:
        """The coefficient times the mean of the tokens' entropy [N]. Under use_adaptive_entropy the coefficient of the
        next optimizer step follows from the entropy of this one's tokens on all processes; TRL keeps the state."""
        total, coefficient = entropy.sum(), self.entropy_coef
        if self.use_adaptive_entropy:
            coefficient = coefficient if self._last_world_entropy <= self.args.entropy_target else 0.0
        if self.use_adaptive_entropy and mode == "train":
            seen = torch.stack([total.detach(), total.new_tensor(len(entropy))])
            before = self._entropy_window_stats
            self._entropy_window_stats = seen if before is None else before + seen
            if self.accelerator.sync_gradients:
                reduced, count = self.accelerator.reduce(self._entropy_window_stats, reduction="sum").tolist()
                self._last_world_entropy = reduced / max(count, 1)
                self._entropy_window_stats = None
                delta = self.args.entropy_coef_delta
                if self._last_world_entropy <= self.args.entropy_target:
                    self.entropy_coef = min(self.entropy_coef + delta, self.args.entropy_coef_max)
                else:
                    self.entropy_coef = max(self.entropy_coef - delta, self.args.entropy_coef_min)
        return coefficient * total / max(len(entropy), 1)

    @property
    def _counts_step_tokens(self) -> bool:
        return self.loss_type in ("dapo", "cispo", "vespo")

    def _step_tokens(self, num_items_in_batch: torch.Tensor) -> torch.Tensor:
        """Tokens of an optimizer step per process, from those of the generation batch of all processes."""
        tokens = num_items_in_batch.clamp(min=1) / self.accelerator.num_processes
        if mode_of(self) == "eval":
            return tokens
        return tokens * self.current_gradient_accumulation_steps / self.args.steps_per_generation

    def _policy_loss(self, inputs: dict[str, Any], kept: torch.Tensor, entropic: torch.Tensor | None,
                     logprobs: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss of the micro-batch (not yet divided where TRL divides by the tokens of the step), and values to log.

        Args:
            kept: bool [S, C]. entropic: bool [S, C] or None, tokens that have an advantage. logprobs: [S, C] with
                gradient.
        """
        options = policy_options(self)
        cu_seqlens = F.pad(kept.sum(1).cumsum(0), (1, 0)).to(torch.int32)

        def pack(name: str, wanted: bool = True) -> torch.Tensor | None:
            return inputs[name][kept] if wanted and inputs.get(name) is not None else None

        policy, old, ref = logprobs[kept], pack("old_per_token_logps"), pack("ref_per_token_logps", self.beta != 0)
        if not len(policy):  # a zero that is connected to the model
            return logprobs.sum(), self._measure(inputs, kept, cu_seqlens, policy.detach(), policy.detach())
        advantages = self._advantages(inputs, kept, entropic, logprobs)[kept]
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

    def _advantages(self, inputs: dict[str, Any], kept: torch.Tensor, entropic: torch.Tensor | None,
                    logprobs: torch.Tensor) -> torch.Tensor:
        """Advantages [S, C], 0 where TRL takes the surrogate away and leaves the KL and the count of the tokens."""
        advantages = inputs["advantages"].reshape(len(kept), -1)
        if self.off_policy_mask_threshold is not None:
            old = inputs.get("old_per_token_logps")
            sampled = inputs.get("sampling_per_token_logps", logprobs.detach() if old is None else old)
            advantages = advantages * self.get_off_policy_mask(advantages, logprobs, sampled, kept.long(),
                                                               self.off_policy_mask_threshold)
        return advantages.expand_as(kept) if entropic is None else advantages * entropic

    def _measure(self, inputs: dict[str, Any], kept: torch.Tensor, cu_seqlens: torch.Tensor, log_ratio: torch.Tensor,
                 kl: torch.Tensor) -> dict[str, torch.Tensor]:
        """Values of TRL's metrics that are means: one per token, or one per completion where its ratio is one."""
        values = {"kl": kl} if self.beta != 0 else {}
        if self.loss_type == "sapo":
            return values
        if self.loss_type == "vespo":
            padded = log_ratio.new_zeros(kept.shape).masked_scatter(kept, log_ratio)
            phi = self.get_gamma_weights(
                inputs["advantages"].reshape(len(kept), -1), padded, kept, inputs.get("importance_sampling_ratio"),
                self.args.vespo_k_pos, self.args.vespo_lambda_pos, self.args.vespo_k_neg, self.args.vespo_lambda_neg)
            return {**values, "vespo/phi_seq_mean": phi[:, 0] if phi.shape[1] == 1 else phi[kept]}
        level, advantages = self.importance_sampling_level, inputs["advantages"]
        ratio = importance_ratio(log_ratio, cu_seqlens, level=level)
        per_token = level == "token" or advantages.numel() != len(kept)
        if not per_token:
            ratio = importance_ratio(log_ratio, cu_seqlens, level="completion")
        advantages = advantages.reshape(len(kept), -1).expand_as(kept)[kept] if per_token else advantages.view(-1)
        if self.loss_type == "cispo":
            return {**values, "cispo_clip_ratio": (ratio > self.epsilon_high) & (advantages > 0)}
        if self.args.delta is not None:
            ratio = ratio.clamp(max=self.args.delta)
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
