"""Log-probs of a transformers model without its logits, where a trainer calls a fused head; used by `trl_*.py`.

Letters: B rows, L positions of a row, M positions with a label, D hidden, V vocabulary.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch

from veripo_kernels import reference
from veripo_kernels.linear import linear_logprobs

_MAX_HEAD_ERROR = 0.02  # relative; rounding to bfloat16 gives 0.003, a forgotten factor far more
_checked_models: WeakSet[torch.nn.Module] = WeakSet()


@dataclass(frozen=True)
class Scores:
    """What TRL reads from the output of its fused head, by its names; token values are 0 where the label is -100."""

    log_probs: torch.Tensor
    """[B, L - 1] float32: log-prob of each next token."""
    entropy: Any
    """[B, L - 1] float32, nats; None where not asked for."""
    mean_logits: torch.Tensor | None
    """[B, L - 1] float32, mean over the vocabulary, without gradient; None for a head with softcap."""
    confidence: torch.Tensor | None
    """[B, L - 1] float32: log-prob of the token less log sum p^2 over the vocabulary, without gradient; None where not
    asked for."""
    aux_loss: Any
    """Load-balancing loss [] of a mixture of experts, None of other models."""


class ScoringModel:
    """Stands for a model where TRL calls its fused head (`labels=..., fused_lm_head=True`) and gives `Scores`.

    The model runs through its wrappers (DDP, DeepSpeed, PEFT) and builds the logits of the last position only. A
    forward hook on its body, there during the call, takes the hidden states.
    """

    def __init__(self, trainer: Any, model: torch.nn.Module, *, temperature: float = 1.0, entropy: bool = False,
                 mean_logits: bool = False, confidence: bool = False) -> None:
        self.model, self.accelerator = model, trainer.accelerator
        self.core = causal_model(trainer, model)
        self.temperature, self.entropy, self.mean_logits = temperature, entropy, mean_logits
        self.confidence = confidence
        self.float32 = getattr(trainer.args, "cast_lm_head_to_fp32", False)

    def __call__(self, *, labels: torch.Tensor, fused_lm_head: bool, **inputs: Any) -> Scores:
        """Scores where labels, int64 [B, L], are not -100. `fused_lm_head` is TRL's switch, here always on."""
        hidden, outputs = self._run(inputs)
        head = self.core.get_output_embeddings()
        device = head.weight.device
        dtype = self._head_dtype(hidden)
        hidden, weight = hidden.to(device, dtype), head.weight.to(dtype)
        bias = None if head.bias is None else head.bias.to(dtype)
        scale, softcap = logit_transform(self.core.config.get_text_config())
        # softcap * tanh(scale * z / softcap) is scale * c * tanh(z / c) with c = softcap / scale
        softcap = None if softcap is None else softcap / scale
        if self.core not in _checked_models:
            check_head(self.core, outputs.logits[:, -1], hidden[:, -1], weight, bias, scale, softcap)
            _checked_models.add(self.core)
        labels = labels[:, 1:].to(device)
        kept = labels != -100
        rows = hidden[:, :-1][kept]
        aux_loss = getattr(outputs, "aux_loss", None)
        if not len(rows):  # every parameter still takes part in backward, as DDP needs
            nothing = outputs.logits.new_zeros(kept.shape, dtype=torch.float32) + 0.0 * outputs.logits.float().sum()
            return Scores(nothing, nothing, nothing.detach(), nothing.detach(), aux_loss)
        with torch.autocast(device.type, enabled=False):
            values: Any = linear_logprobs(rows, weight, labels[kept], temperature=self.temperature / scale, bias=bias,
                                          softcap=softcap, entropy=self.entropy)
            logprobs, entropy = values if self.entropy else (values, None)
            known = self.mean_logits and softcap is None
            mean_logits = scale * head_mean(rows, weight, bias) if known else None
            confidence = None
            if self.confidence:  # log sum p^2 = 2 log p_y - log q_y with q the softmax of twice the logits
                with torch.no_grad():
                    confidence = linear_logprobs(rows, weight, labels[kept], temperature=self.temperature / scale / 2,
                                                 bias=bias, softcap=softcap) - logprobs

        def spread(packed: torch.Tensor) -> torch.Tensor:
            return packed.new_zeros(kept.shape).masked_scatter(kept, packed)

        return Scores(spread(logprobs), None if entropy is None else spread(entropy),
                      None if mean_logits is None else spread(mean_logits),
                      None if confidence is None else spread(confidence), aux_loss)

    def _run(self, inputs: dict[str, Any]) -> tuple[torch.Tensor, Any]:
        """Hidden states [B, L, D] that the head gets, and the model's own output."""
        taken: list[torch.Tensor] = []
        hook = self.core.base_model.register_forward_hook(lambda module, args, output: taken.append(output[0]))
        try:
            outputs = self.model(**{"use_cache": False, **inputs}, logits_to_keep=1)
        finally:
            hook.remove()
        return taken[0], outputs

    def _head_dtype(self, hidden: torch.Tensor) -> torch.dtype:
        """The type of the head's product: TRL's cast_lm_head_to_fp32, else autocast's, else the hidden states' own."""
        if self.float32:
            return torch.float32
        device = hidden.device.type
        with self.accelerator.autocast():
            return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def causal_model(trainer: Any, model: torch.nn.Module) -> Any:
    """The transformers model inside its wrappers."""
    core = trainer.accelerator.unwrap_model(model)
    return core.get_base_model() if hasattr(core, "get_base_model") else core


def logit_transform(config: Any) -> tuple[float, float | None]:
    """Factor and softcap of a model's logits: softcap * tanh(factor * z / softcap), under the names configs use."""
    softcap = getattr(config, "final_logit_softcapping", None)
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return float(getattr(config, name)), softcap
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0, softcap
    return float(scaling if config.model_type == "hyperclovax" else 1 / scaling), softcap


@torch.no_grad()
def check_head(core: Any, logits: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None,
               scale: float, softcap: float | None) -> None:
    """Raises ValueError if the model does more between hidden [B, D] and logits [B, V] than is known here."""
    expected = logits.float()
    error = (scale * reference.linear_logits(hidden, weight, bias=bias, softcap=softcap) - expected).norm()
    if error > _MAX_HEAD_ERROR * expected.norm():
        raise ValueError(f"{type(core).__name__} changes its logits after lm_head in a way that is not known here: "
                         f"relative difference {(error / expected.norm()).item():.2g} from its own")


@torch.no_grad()
def head_mean(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Mean logit [M] float32 of rows [M, D]: the rows times the mean row of weight [V, D]."""
    mean = rows.float() @ weight.mean(0, dtype=torch.float32)
    return mean if bias is None else mean + bias.float().mean()


def check_model(trainer: Any) -> None:
    """Raises ValueError, naming it, for a model or a way to shard it that `ScoringModel` cannot serve."""
    core = causal_model(trainer, trainer.model)
    refuse("model", type(core).__name__, "logits_to_keep" not in inspect.signature(type(core).forward).parameters,
            "its forward has no logits_to_keep")
    for config in getattr(trainer.accelerator.unwrap_model(trainer.model), "peft_config", {}).values():
        refuse("peft_config", config.peft_type, config.is_prompt_learning, "prompt learning adds positions")
    plugin = trainer.accelerator.state.deepspeed_plugin if trainer.is_deepspeed_enabled else None
    stage = plugin.zero_stage if plugin is not None else 0
    refuse("deepspeed", f"ZeRO-{stage}", stage == 3, "lm_head is sharded when the loss reads it; ZeRO-1 and 2 work")
    refuse("fsdp", trainer.args.fsdp, trainer.is_fsdp_enabled, "lm_head is sharded when the loss reads it")
    parallelism = trainer.accelerator.parallelism_config
    for name in ("tp_size", "cp_size", "sp_size"):
        size = getattr(parallelism, name, 1)
        refuse(f"parallelism_config.{name}", size, size > 1, "rows and lm_head must be whole on a device")


def refuse(option: str, value: object, wrong: bool, reason: str = "these losses do not have it") -> None:
    if wrong:
        raise ValueError(f"use_veripo_losses: {option}={value!r} cannot be honoured: {reason}")


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
