"""The policy: a Hugging Face checkpoint of a family in `config/families.py`, run on packed groups.

The vision tower runs once per prompt (or not at all when its cached output is given), the prompt once per group, and
the language-model head only where a completion token is predicted.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, GenerationConfig

from veripo_fast.config.inputs import ModelConfig
from veripo_fast.distributed.backend import Backend, LocalBackend
from veripo_fast.distributed.flops import ModelCost, group_flops
from veripo_fast.model.adapter_files import refuse_adapters
from veripo_fast.model.attention import AttentionShape, implementation, select
from veripo_fast.model.checkpoint_files import (
    COPIED_FILES,
    load_weights,
    refuse_windows,
    resolve_device,
    resolve_path,
)
from veripo_fast.model.drop_in import complete_files, write_weights
from veripo_fast.model.encoding import PromptEncoder
from veripo_fast.model.families import check_expert_widths, check_options, fit
from veripo_fast.model.liger import apply_liger
from veripo_fast.model.lora import Adapters, is_adapter
from veripo_fast.model.packing import PackedBatch, pack
from veripo_fast.model.replay import describe
from veripo_fast.model.shared_prefix import PromptCache
from veripo_fast.model.skinny import reordered
from veripo_fast.model.step import LogprobInputs, LossInputs, PolicyStep, StepOutput
from veripo_fast.model.tower import Tower
from veripo_fast.types import LoadedPrompt, Message, Prompt, VisionFeatures


class Policy(Tower):
    """A model with its encoder; `version` counts the optimizer steps behind its weights.

    Args:
        adapters: those in the model, which are then all that is trained.
    """

    def __init__(self, model: Any, encoder: PromptEncoder, *, freeze_vision: bool, attention: str = "sdpa",
                 router_balance: float = 0.0, adapters: Adapters | None = None) -> None:
        super().__init__(model.model.visual, encoder, frozen=freeze_vision)
        self.model = model
        self.adapters = adapters
        if adapters is not None:
            adapters.freeze_the_rest(model)
        self.version = 0
        self._idle_batch: PackedBatch | None = None
        whole, unread = _language_numbers(adapters, self.num_layers)
        self.text_cost = ModelCost.of(model.config, tower_trained=False, adapters=whole, unread_adapters=unread,
                                      router_balance=router_balance)
        self.routers = describe(model, encoder.family)
        self.step = PolicyStep(model, list(encoder.pad_ids.values()), router_balance)
        self.backend: Backend = LocalBackend(self.step, self.all_parameters)
        model.model.language_model.set_attn_implementation(implementation(attention))

    @property
    def num_layers(self) -> int:
        return self.model.config.get_text_config().num_hidden_layers

    @property
    def vocabulary(self) -> int:
        """Rows of the language-model head."""
        return self.model.config.get_text_config().vocab_size

    def parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        """Named trainable parameters, each once."""
        return [(name, p) for name, p in self.all_parameters() if p.requires_grad]

    def all_parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        """Named parameters as they are now, frozen ones too, each once."""
        return list(self.model.named_parameters())

    def features_of(self, prompts: Sequence[LoadedPrompt]) -> list[VisionFeatures | None]:
        """Tower output for an update: the one at hand while the tower is frozen, else a new pass with gradients."""
        if self.frozen_vision:
            return [item.features for item in prompts]
        media = [item.encoded.media for item in prompts if item.encoded.media is not None]
        fresh = iter(self.vision_features_of(media) if media else [])
        return [None if item.encoded.media is None else next(fresh) for item in prompts]

    def completion_logprobs(self, batch: PackedBatch, features: Sequence[VisionFeatures | None], *,
                            temperature: float = 1.0) -> torch.Tensor:
        """Log-probabilities float32 [M] of the completion tokens of a packed row."""
        return self.forward(batch, features, LogprobInputs(temperature)).logprobs

    def forward(self, batch: PackedBatch, features: Sequence[VisionFeatures | None], inputs: LossInputs) -> StepOutput:
        """`PolicyStep.forward`, wherever the weights lie. Collective where they are sharded."""
        self._count(batch)
        with self._drawing():
            output: StepOutput = self.backend.forward(batch, features, inputs)
        return output

    @contextmanager
    def _drawing(self) -> Iterator[None]:
        """A block around a pass, in which dropout of adapters draws."""
        if self.adapters is None:
            yield
            return
        with self.adapters.drawing(self.device):
            yield

    def _count(self, batch: PackedBatch) -> None:
        """Count a pass, which is followed by a backward unless gradients are off."""
        backward = torch.is_grad_enabled()
        for group in batch.groups:
            lengths = [packed + 1 for packed in group.completions]
            self.passes.flops += group_flops(self.text_cost, group.prompt, lengths, backward=backward)
        if backward:
            self.passes.trained_tokens += len(batch.token_ids)

    def idle_inputs(self) -> tuple[PackedBatch, list[None], LogprobInputs]:
        """Inputs of `forward` that are a few tokens long."""
        if self._idle_batch is None:
            prompt = self.encoder.encode(Prompt("idle", (Message("user", ("?",)),), "text", ""), None)
            self._idle_batch = pack([(prompt, [[self.encoder.eos_id]])])
        return self._idle_batch, [None], LogprobInputs()

    def idle(self) -> torch.Tensor:
        """A loss of 0 with a gradient of 0: what a rank runs while others have a micro-batch left."""
        with self.passes.spare():
            return self.forward(*self.idle_inputs()).logprobs.sum() * 0.0

    def hidden(self, batch: PackedBatch, features: Sequence[VisionFeatures | None],
               cache: PromptCache | None = None) -> torch.Tensor:
        """`PolicyStep.hidden`; `features` of each group's prompt, None without media."""
        return self.step.hidden(batch, features, cache)

    def decoding(self, rows: int, tokens: int) -> AbstractContextManager[None]:
        """A block in which up to `tokens` tokens of each of `rows` completions are written (`skinny.reordered`)."""
        return reordered([self.step.language_model, self.step.lm_head], rows, tokens)

    def decode_hidden(self, token_ids: torch.Tensor, positions: torch.Tensor, cache: PromptCache) -> torch.Tensor:
        """Hidden states [rows, D] of one new token per completion: token_ids and positions int64 [rows]."""
        hidden = self.step.run_language_model(token_ids[:, None], positions.expand(3, -1)[..., None], [],
                                              groups=None, cache=cache)
        cache.length += 1
        return hidden[:, 0]

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [..., V] of hidden states [..., D]."""
        return self.model.lm_head(hidden)


def _language_numbers(adapters: Adapters | None, layers: int) -> tuple[int, int]:
    """Numbers of the adapters outside of the tower; and of those of the last layer but for keys and values."""
    named = [] if adapters is None else adapters.parameters()
    sizes = {name: parameter.numel() for name, parameter in named if ".visual." not in name}
    last = f".layers.{layers - 1}."
    return sum(sizes.values()), sum(size for name, size in sizes.items()
                                    if last in name and ".k_proj." not in name and ".v_proj." not in name)


def load_policy(config: ModelConfig, path: Path | None = None, *, seed: int = 0) -> Policy:
    """Load a checkpoint folder (`path` instead of `config.path` when a run continues from its own).

    With adapters (`config.lora`) the model is always that of `config.path`, and `path` holds adapters.

    Args:
        seed: of new adapters.

    Raises:
        CheckpointError: no such folder, another architecture, a sliding window, or a missing or damaged weight file, by
            name; adapters without their base, or of another one.
        ConfigError: an option that the family does not have; adapters are asked for and cannot be made.
    """
    lora = config.lora
    folder = resolve_path(config.path) if lora.rank or path is None else path
    refuse_adapters(folder)
    encoder = PromptEncoder(folder)
    check_options(encoder.family, config)
    check_expert_widths(folder, encoder.family, encoder.config)
    refuse_windows(folder, encoder.config)
    model = load_weights(AutoModelForImageTextToText, folder, config.dtype)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig()  # the file is copied: transformers reads some that it won't write
    torch.nn.Module.to(model, resolve_device(config.device))
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    else:
        model.eval()
    if config.liger:
        apply_liger(model)
    fit(model, encoder.family, folder, lora.rank > 0)
    attention = select(config.attention, AttentionShape.of(model))
    adapters = None
    if lora.rank:
        adapters = Adapters(model, lora, folder, seed)
        if path is not None or lora.adapter:
            adapters.load(path or resolve_path(lora.adapter))
    return Policy(model, encoder, freeze_vision=config.freeze_vision, attention=attention,
                  router_balance=config.router_balance, adapters=adapters)


def in_own_memory(policy: Policy) -> Policy:
    """Move the weights into memory of their own, out of a mapped file or of what an engine shares.

    In the file they lie at any offset, and a matmul of one row depends on alignment (1e-7 in greedy log-probs between a
    resumed run and an uninterrupted one); the file may be deleted, too.
    """
    for parameter in policy.model.parameters():
        parameter.data = parameter.data.clone()
    return policy


def weights_on_host(policy: Policy, keep: bool) -> dict[str, torch.Tensor] | None:
    """Copies of all weights, or of the adapters alone where there are any, in host memory, sent one after the other
    where ranks share them. Collective.

    Args:
        keep: whether this rank wants them; else None.
    """
    copies: dict[str, torch.Tensor] = {}
    for name, value in policy.backend.weights():
        if keep and (policy.adapters is None or is_adapter(name)):
            copies[name] = value.detach().to("cpu", copy=True)
    return copies if keep else None


def save_policy(policy: Policy, folder: Path, weights: dict[str, torch.Tensor] | None = None) -> None:
    """Write a checkpoint that `from_pretrained` loads: weights, config, and the processor files it came with, completed
    where others would read more out of them (model/drop_in.py); of a policy with adapters an adapter folder.

    Args:
        weights: by name, whole; None: the policy's own.
    """
    if policy.adapters is not None:
        policy.adapters.save(folder, weights)
        return
    write_weights(policy.model, policy.encoder.family, folder, weights)
    for pattern in COPIED_FILES:
        for file in policy.encoder.path.glob(pattern):
            shutil.copyfile(file, folder / file.name)
    complete_files(policy.encoder, folder)
