"""One GRPO step: rollout -> reward -> advantage -> update (arXiv 2402.03300).

Groups whose advantages are all zero are dropped before any forward pass is paid. While the policy has taken no step
since the rollout, its own log-probs are the old ones; for later updates of the same rollout batch the engine's are, so
no pass is ever run for them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from veripo_kernels import PolicyLoss, linear_policy_loss

from veripo_fast.config.schema import Config
from veripo_fast.model.packing import PackedBatch, micro_batches, pack, packed_length
from veripo_fast.model.policy import Policy
from veripo_fast.reward.groups import has_signal
from veripo_fast.stages.optimizer import Optimizer
from veripo_fast.types import LoadedPrompt, RolloutGroup, VisionFeatures


def rollout_metrics(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """Means over all completions of a rollout batch, and the share of groups that carry no signal."""
    rows = [completion for group in groups for completion in group.completions]

    def mean(values: list[float]) -> float:
        return sum(values) / max(len(values), 1)

    return {"reward_mean": mean([row.reward for row in rows]), "accuracy_mean": mean([row.accuracy for row in rows]),
            "format_mean": mean([row.format for row in rows]),
            "length_mean": mean([float(len(row.token_ids)) for row in rows]),
            "finished_share": mean([float(row.finish_reason == "stop") for row in rows]),
            "zero_variance_share": mean([float(not has_signal(group)) for group in groups]),
            "prompts": len(groups)}


def group_features(policy: Policy, prompts: Sequence[LoadedPrompt]) -> list[VisionFeatures | None]:
    """Tower output for an update: the one at hand while the tower is frozen, otherwise a new pass with gradients."""
    if policy.frozen_vision:
        return [item.features for item in prompts]
    media = [item.encoded.media for item in prompts if item.encoded.media is not None]
    fresh = iter(policy.vision_features_of(media) if media else [])
    return [None if item.encoded.media is None else next(fresh) for item in prompts]


class GrpoUpdate:
    """The updates of one stage; `ref` is the policy at its start, or None without a KL term."""

    def __init__(self, policy: Policy, optimizer: Optimizer, config: Config, ref: Policy | None) -> None:
        self.policy = policy
        self.optimizer = optimizer
        self.config = config
        self.loss = policy_loss(config)
        self.ref = ref

    def run(self, prompts: Sequence[LoadedPrompt], groups: Sequence[RolloutGroup]) -> dict[str, float]:
        """`updates_per_rollout` optimizer steps over a rewarded rollout batch; returns their mean metrics."""
        share = -(-self.config.grpo.prompts_per_step // self.config.grpo.updates_per_rollout)
        version = self.policy.version
        rows: list[dict[str, float]] = []
        for start in range(0, len(groups), share):
            part = list(zip(prompts[start:start + share], groups[start:start + share], strict=True))
            metrics = self._update(part, fresh=self.policy.version == version)
            if metrics is not None:
                rows.append(metrics)
        names = sorted({name for row in rows for name in row})
        means = {name: sum(row[name] for row in rows if name in row) / sum(name in row for row in rows)
                 for name in names}
        for name in ("ratio_max", "parity_max"):
            if name in means:
                means[name] = max(row[name] for row in rows if name in row)
        return means | {"updates": self.policy.version - version}

    def _update(self, part: list[tuple[LoadedPrompt, RolloutGroup]], fresh: bool) -> dict[str, float] | None:
        """One optimizer step; None when no group carries a signal."""
        live = [(prompt, group) for prompt, group in part if has_signal(group)]
        if not live:
            return None
        completions = [c for _, group in part for c in group.completions]
        counts = {"num_sequences": len(completions), "num_tokens": sum(len(c.token_ids) for c in completions)}
        lengths = [packed_length(prompt.encoded, [c.token_ids for c in group.completions]) for prompt, group in live]
        metrics = {"loss": 0.0, "clip_share": 0.0, "kl": 0.0, "ratio_max": 0.0, "parity_max": 0.0}
        for run in micro_batches(lengths, self.config.optimizer.max_tokens):
            for name, value in self._backward([live[i] for i in run], counts, fresh).items():
                metrics[name] = max(metrics[name], value) if name.endswith("_max") else metrics[name] + value
        rate = self.optimizer.learning_rate()
        norm = self.optimizer.step(metrics["loss"])
        if not fresh:
            del metrics["parity_max"]
        if norm is None:
            return {"skipped_updates": 1.0}
        self.policy.version += 1
        return metrics | {"grad_norm": norm, "learning_rate": rate, "skipped_updates": 0.0,
                          "packed_tokens": float(sum(lengths))}

    def _backward(self, rows: list[tuple[LoadedPrompt, RolloutGroup]], counts: dict[str, int],
                  fresh: bool) -> dict[str, float]:
        """Forward and backward of one micro-batch; weighted so that the parts add up to the whole update."""
        device = self.policy.device
        prompts = [prompt for prompt, _ in rows]
        batch = pack([(prompt.encoded, [c.token_ids for c in group.completions]) for prompt, group in rows])
        hidden = self.policy.completion_hidden(batch, group_features(self.policy, prompts))
        completions = [c for _, group in rows for c in group.completions]
        rollout_logprobs = torch.tensor([v for c in completions for v in c.rollout_logprobs], device=device)
        ref_logprobs = None
        if self.ref is not None:
            with torch.no_grad():
                ref_logprobs = self._logprobs(self.ref, batch, prompts)
        loss, metrics, policy_logprobs = linear_policy_loss(
            hidden, self.policy.model.lm_head.weight, batch.targets.to(device), None if fresh else rollout_logprobs,
            torch.tensor([c.advantage for c in completions], device=device), batch.cu_seqlens.to(device),
            loss=self.loss, temperature=self.config.rollout.temperature, ref_logprobs=ref_logprobs,
            num_sequences=counts["num_sequences"], num_tokens=counts["num_tokens"])
        loss.backward()
        parity = (policy_logprobs - rollout_logprobs).abs().amax()
        shares = {"clip_share": metrics["clip_low_share"] + metrics["clip_high_share"], "kl": metrics["kl"],
                  "ratio_max": metrics["ratio_max"]}
        return {"loss": loss.item(), "parity_max": parity.item(), **{k: v.item() for k, v in shares.items()}}

    def _logprobs(self, policy: Policy, batch: PackedBatch, prompts: Sequence[LoadedPrompt]) -> torch.Tensor:
        return policy.completion_logprobs(batch, group_features(policy, prompts),
                                          temperature=self.config.rollout.temperature)


def policy_loss(config: Config) -> PolicyLoss:
    """The loss that a configuration describes."""
    grpo = config.grpo
    return PolicyLoss(grpo.loss, aggregation=grpo.aggregation, constant_length=config.rollout.max_new_tokens,
                      clip_low=grpo.clip_low, clip_high=grpo.clip_high, dual_clip=grpo.dual_clip, kl_coef=grpo.kl_coef,
                      kl_kind=grpo.kl_kind)
