"""One training step as a module: the language model, the head and the fused loss inside one `forward`.

GRPO, DPO (policy and reference) and plain log-probs all go through it. Whoever shards the policy wraps this module: the
head's weight is read inside `forward`, where a wrapper has gathered it (read outside, ZeRO-3 fails with a tied head and
is silently wrong with an untied one). The frozen vision tower stays outside; its output comes in as `features`.

Letters: T packed tokens, M completion tokens, N completions, B pairs, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from veripo_kernels import PolicyLoss, PreferenceLoss, linear_dpo_loss, linear_logprobs, linear_policy_loss
from veripo_kernels.options import AdvantagesPer

from veripo_fast.distributed.flops import trims_last_layer
from veripo_fast.model.families import balance_loss
from veripo_fast.model.last_layer import trim_last_layer
from veripo_fast.model.layer_memory import watch_layers
from veripo_fast.model.lora import head_weight
from veripo_fast.model.packing import PackedBatch
from veripo_fast.model.pair_weights import confidence_weights
from veripo_fast.model.recomputation import recompute, recomputing
from veripo_fast.model.replay import Replay
from veripo_fast.model.shared_prefix import PromptCache, forget_masks, read_tokens
from veripo_fast.model.token_inputs import TokenInputs
from veripo_fast.types import VisionFeatures

SEQUENCE: AdvantagesPer = "sequence"
TOKEN: AdvantagesPer = "token"


class StepOutput(NamedTuple):
    """What one forward gives."""

    loss: torch.Tensor | None
    """float32 scalar with a gradient; None where only log-probs were asked for."""
    metrics: dict[str, torch.Tensor]
    """Scalars of the loss, and of what was replayed, without gradients."""
    logprobs: torch.Tensor
    """float32 [M]: log-probabilities of the completion tokens."""
    share: float = 0.0
    """Of the whole update that this micro-batch is; 0 where it has no loss."""


class LossInputs(Protocol):
    """What is computed from hidden states [M, D] and the head's weight [V, D]."""

    def compute(self, hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, cu_seqlens: torch.Tensor
                ) -> StepOutput:
        """`targets`: int64 [M], the completion tokens; `cu_seqlens`: int64 [N + 1], where completions begin and end."""
        ...


@dataclass(frozen=True)
class LogprobInputs:
    """Log-probabilities alone."""

    temperature: float = 1.0

    def compute(self, hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, cu_seqlens: torch.Tensor
                ) -> StepOutput:
        return StepOutput(None, {}, linear_logprobs(hidden, head, targets, temperature=self.temperature))


@dataclass(frozen=True)
class PolicyLossInputs:
    """A policy loss on a micro-batch of rollout groups, weighted so that the micro-batches of an update add up."""

    loss: PolicyLoss
    advantages: torch.Tensor
    """float [N]."""
    old_logprobs: torch.Tensor | None
    """float32 [M]; None: the policy has not moved since the rollout, so its own are the old ones."""
    ref_logprobs: torch.Tensor | None
    """float32 [M] of the reference policy, for the KL term."""
    temperature: float
    num_sequences: int
    """Completions of the whole update."""
    num_tokens: int
    """Completion tokens of the whole update."""
    rollout_logprobs: torch.Tensor | None = None
    """float32 [M] of the engine, for the importance weights."""
    tokens: TokenInputs | None = None
    """What single tokens count; None: all the same."""

    def compute(self, hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, cu_seqlens: torch.Tensor
                ) -> StepOutput:
        advantages, per = self.advantages, SEQUENCE
        if self.tokens is not None:
            advantages = self.tokens.advantages(advantages, hidden, head, cu_seqlens, self.temperature)
            per = TOKEN
        loss, metrics, logprobs = linear_policy_loss(
            hidden, head, targets, self.old_logprobs, advantages, cu_seqlens, loss=self.loss,
            temperature=self.temperature, ref_logprobs=self.ref_logprobs,
            rollout_logprobs=self.rollout_logprobs, num_sequences=self.num_sequences,
            num_tokens=self.num_tokens, advantages_per=per, single_use=True)
        pull = None if self.tokens is None else self.tokens.pull(
            hidden, head, targets, self.old_logprobs, cu_seqlens, self.loss, temperature=self.temperature,
            num_sequences=self.num_sequences, num_tokens=self.num_tokens)
        return StepOutput(loss if pull is None else loss + pull, metrics, logprobs,
                          (len(cu_seqlens) - 1) / self.num_sequences)


@dataclass(frozen=True)
class PairLossInputs:
    """A preference loss on a micro-batch of pairs, packed as (chosen, rejected, chosen, ...)."""

    loss: PreferenceLoss
    ref_logprobs: torch.Tensor
    """float32 [B, 2] of the reference policy, summed as the loss sums them."""
    loss_mask: torch.Tensor
    """float32 [M]: 1 on tokens that enter the loss."""
    num_pairs: int
    """Pairs of the whole update."""
    by_confidence: bool = False
    """Whether pairs are weighted by how likely the policy would write them now (`model/pair_weights.py`)."""

    def compute(self, hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, cu_seqlens: torch.Tensor
                ) -> StepOutput:
        weights = confidence_weights(hidden, head, targets, cu_seqlens, self.loss_mask) if self.by_confidence else None
        loss, metrics, logprobs = linear_dpo_loss(
            hidden, head, targets, self.ref_logprobs, cu_seqlens, loss=self.loss, loss_mask=self.loss_mask,
            weights=weights, num_pairs=self.num_pairs, single_use=True)
        return StepOutput(loss, metrics, logprobs, (len(cu_seqlens) - 1) / 2 / self.num_pairs)


@dataclass(frozen=True)
class SupervisedLossInputs:
    """Negative log-likelihood of a micro-batch of demonstrations, weighted so that those of an update add up.

    Its gradient is that of a policy loss at ratio 1 with advantage 1, so it takes the same three matrix products.
    """

    loss_mask: torch.Tensor
    """float32 [M]: 1 on tokens that are learnt."""
    num_tokens: int
    """Learnt tokens of the whole update."""

    def compute(self, hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, cu_seqlens: torch.Tensor
                ) -> StepOutput:
        ones = torch.ones(len(cu_seqlens) - 1, device=hidden.device)
        surrogate, _, logprobs = linear_policy_loss(
            hidden, head, targets, None, ones, cu_seqlens, loss=_SUPERVISED, loss_mask=self.loss_mask,
            num_tokens=self.num_tokens, advantages_per="sequence", single_use=True)
        likelihood = -(logprobs * self.loss_mask).sum() / self.num_tokens
        return StepOutput(surrogate - surrogate.detach() + likelihood, {}, logprobs,
                          float(self.loss_mask.sum()) / self.num_tokens)


_SUPERVISED = PolicyLoss("dapo")


class PolicyStep(torch.nn.Module):
    """The trained part of a policy.

    Args:
        model: transformers' model for conditional generation, of a family in `config/families.py`.
        pad_ids: token ids that stand for merged patches in a prompt.
        router_balance: weight of the load-balancing loss of experts, which is added to every loss; 0: none.
    """

    def __init__(self, model: Any, pad_ids: Sequence[int], router_balance: float = 0.0) -> None:
        super().__init__()
        self.language_model = model.model.language_model
        self.lm_head = model.lm_head
        self.pad_ids = list(pad_ids)
        self.router_balance = router_balance
        self._config = model.config
        self._trimmed = trims_last_layer(model.config, router_balance)
        if self._trimmed:
            trim_last_layer(self.language_model)
        recompute(self.language_model)
        watch_layers(self.language_model)

    def forward(self, batch: PackedBatch, features: Sequence[VisionFeatures | None], inputs: LossInputs) -> StepOutput:
        """Run a packed row and compute its loss; `features` of each group's prompt, None without media."""
        device = self.lm_head.weight.device
        replay = Replay.of(batch, device)
        routed: dict[str, Any] = {} if replay is None else {"replay": replay}
        if self.router_balance:
            routed["output_router_logits"] = True
        output = self._run(batch, features, None, **routed)
        hidden = self._read(output, batch)[batch.logit_index.to(device)]
        computed = inputs.compute(hidden, head_weight(self.lm_head), batch.targets.to(device),
                                  batch.cu_seqlens.to(device))
        if replay is not None:
            computed = computed._replace(metrics=computed.metrics | replay.counts())
        if not self.router_balance or computed.loss is None:
            return computed
        balance = balance_loss(self._config, output.router_logits)
        return computed._replace(loss=computed.loss + self.router_balance * computed.share * balance)

    def hidden(self, batch: PackedBatch, features: Sequence[VisionFeatures | None],
               cache: PromptCache | None = None) -> torch.Tensor:
        """Last hidden states [n, D] of the tokens of a packed row that are read (`read_tokens`); `cache` keeps the keys
        and values of the prompts."""
        return self._read(self._run(batch, features, cache), batch)

    def _read(self, output: Any, batch: PackedBatch) -> torch.Tensor:
        """Last hidden states [n, D] of the tokens that are read."""
        hidden: torch.Tensor = output.last_hidden_state[0]
        return hidden if self._trimmed else hidden[read_tokens(batch.groups, hidden.device)]

    def _run(self, batch: PackedBatch, features: Sequence[VisionFeatures | None], cache: PromptCache | None,
             **options: Any) -> Any:
        device = self.lm_head.weight.device
        try:
            with recomputing():
                return self._output(
                    batch.token_ids.to(device)[None], batch.positions.to(device)[:, None],
                    [item for item in features if item is not None], groups=batch.groups, cache=cache,
                    trim=self._trimmed, **options)
        finally:
            forget_masks()

    def run_language_model(self, ids: torch.Tensor, positions: torch.Tensor, features: Sequence[VisionFeatures],
                           **attention: Any) -> torch.Tensor:
        """Last hidden states [rows, T, D] of ids [rows, T] at positions [3, rows, T], pads replaced by `features`."""
        hidden: torch.Tensor = self._output(ids, positions, features, **attention).last_hidden_state
        return hidden

    def _output(self, ids: torch.Tensor, positions: torch.Tensor, features: Sequence[VisionFeatures],
                **options: Any) -> Any:
        embeddings = self.language_model.get_input_embeddings()(ids)
        extra: dict[str, Any] = {}
        if features:
            visual = torch.isin(ids, torch.tensor(self.pad_ids, device=ids.device))
            embeddings = embeddings.masked_scatter(
                visual[..., None], torch.cat([item.embeddings for item in features]).to(embeddings.dtype))
            if features[0].deepstack:
                levels = zip(*(item.deepstack for item in features), strict=True)
                extra = {"visual_pos_masks": visual, "deepstack_visual_embeds": [torch.cat(level) for level in levels]}
        return self.language_model(
            inputs_embeds=embeddings, position_ids=positions, attention_mask=None, use_cache=False,
            **extra, **options)
