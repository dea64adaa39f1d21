"""The policy: a Hugging Face Qwen2.5-VL or Qwen3-VL checkpoint, run on packed groups.

The vision tower runs once per prompt (or not at all when its cached output is given), the prompt once per group, and
the language-model head only where a completion token is predicted.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForImageTextToText
from veripo_kernels import linear_logprobs

from veripo_fast import attention_backends, shared_prefix
from veripo_fast.config import ModelConfig
from veripo_fast.encoding import PromptEncoder
from veripo_fast.errors import CheckpointError
from veripo_fast.liger import apply_liger
from veripo_fast.packing import PackedBatch, pack
from veripo_fast.types import MediaInputs, Prompt

if TYPE_CHECKING:
    from veripo_fast.rollout import LoadedPrompt

TINY_POLICY = Path(__file__).parent / "tiny_policy"


@dataclass(frozen=True)
class VisionFeatures:
    """Tower output of all media of one prompt, in the order of the pad tokens."""

    embeddings: torch.Tensor
    """[tokens, D], after the merger."""
    deepstack: tuple[torch.Tensor, ...] = ()
    """Qwen3-VL: [tokens, D] for each of the first decoder layers; empty for Qwen2.5-VL."""

    def detached(self) -> VisionFeatures:
        return VisionFeatures(self.embeddings.detach(), tuple(level.detach() for level in self.deepstack))

    @property
    def nbytes(self) -> int:
        return self.embeddings.nbytes + sum(level.nbytes for level in self.deepstack)


class Policy:
    """A model with its encoder; `version` counts the optimizer steps behind its weights."""

    def __init__(self, model: Any, encoder: PromptEncoder, *, freeze_vision: bool, attention: str = "sdpa") -> None:
        self.model = model
        self.encoder = encoder
        self.frozen_vision = freeze_vision
        self.version = 0
        model.model.visual.requires_grad_(not freeze_vision)
        model.model.language_model.set_attn_implementation(attention_backends.implementation(attention))

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def patch_dtype(self) -> torch.dtype:
        """In which patches are best made: what the tower computes in, so that nothing is converted after."""
        dtype: torch.dtype = self.model.model.visual.dtype
        return dtype if dtype in (torch.float32, torch.bfloat16) else torch.float32

    @property
    def num_layers(self) -> int:
        return self.model.config.get_text_config().num_hidden_layers

    def parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        """Named trainable parameters, each once."""
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]

    def vision_features(self, media: MediaInputs) -> VisionFeatures:
        """Run the tower on all media of one prompt (images and videos in one call)."""
        return self.vision_features_of([media])[0]

    def vision_features_of(self, media: Sequence[MediaInputs]) -> list[VisionFeatures]:
        """Run the tower once on the media of several prompts."""
        visual = self.model.model.visual
        pixels = [item.pixel_values for item in media if item.pixel_values is not None]
        assert len(pixels) == len(media), "media were stripped of their pixels before the tower ran"
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen_vision):
            out = visual((pixels[0] if len(pixels) == 1 else torch.cat(pixels)).to(self.device, visual.dtype),
                         grid_thw=torch.cat([item.grid_thw for item in media]).to(self.device), return_dict=True)
        merged = self.encoder.vision.merge_size ** 2
        sizes = [int(item.grid_thw.prod(-1).sum()) // merged for item in media]
        deepstack = [level.split(sizes) for level in getattr(out, "deepstack_features", None) or ()]
        return [VisionFeatures(embeddings, tuple(level[i] for level in deepstack))
                for i, embeddings in enumerate(out.pooler_output.split(sizes))]

    def hidden(self, batch: PackedBatch, features: Sequence[VisionFeatures | None],
               cache: shared_prefix.PromptCache | None = None) -> torch.Tensor:
        """Last hidden states [T, D] of a packed row; `features` of each group's prompt, None without media."""
        ids = batch.token_ids.to(self.device)
        return self._language_model(ids[None], batch.positions.to(self.device)[:, None],
                                    [f for f in features if f is not None], groups=batch.groups, cache=cache)[0]

    def decode_hidden(self, token_ids: torch.Tensor, positions: torch.Tensor,
                      cache: shared_prefix.PromptCache) -> torch.Tensor:
        """Hidden states [rows, D] of one new token per completion: token_ids and positions int64 [rows]."""
        hidden = self._language_model(token_ids[:, None], positions.expand(3, -1)[..., None], [],
                                      groups=None, cache=cache)
        cache.length += 1
        return hidden[:, 0]

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [..., V] of hidden states [..., D]."""
        return self.model.lm_head(hidden)

    def completion_hidden(self, batch: PackedBatch, features: Sequence[VisionFeatures | None]) -> torch.Tensor:
        """Hidden states [M, D] from which the head predicts the completion tokens of a packed row."""
        return self.hidden(batch, features)[batch.logit_index.to(self.device)]

    def completion_logprobs(self, batch: PackedBatch, features: Sequence[VisionFeatures | None], *,
                            temperature: float = 1.0) -> torch.Tensor:
        """Log-probabilities float32 [M] of the completion tokens of a packed row."""
        return linear_logprobs(self.completion_hidden(batch, features), self.model.lm_head.weight,
                               batch.targets.to(self.device), temperature=temperature)

    def _language_model(self, ids: torch.Tensor, positions: torch.Tensor, features: Sequence[VisionFeatures],
                        **attention: Any) -> torch.Tensor:
        embeddings = self.model.get_input_embeddings()(ids)
        extra: dict[str, Any] = {}
        if features:
            pads = torch.tensor(list(self.encoder.pad_ids.values()), device=ids.device)
            visual = torch.isin(ids, pads)
            embeddings = embeddings.masked_scatter(
                visual[..., None], torch.cat([f.embeddings for f in features]).to(embeddings.dtype))
            if features[0].deepstack:
                levels = zip(*(f.deepstack for f in features), strict=True)
                extra = {"visual_pos_masks": visual, "deepstack_visual_embeds": [torch.cat(level) for level in levels]}
        return self.model.model.language_model(
            inputs_embeds=embeddings, position_ids=positions, attention_mask=None, use_cache=False,
            **extra, **attention).last_hidden_state


def resolve_path(path: str) -> Path:
    """Folder of a checkpoint; `tiny` names the one shipped in the package."""
    return TINY_POLICY if path == "tiny" else Path(path)


def resolve_device(name: str) -> torch.device:
    """`auto` takes a GPU when there is one."""
    return torch.device("cuda" if name == "auto" and torch.cuda.is_available() else "cpu" if name == "auto" else name)


def load_policy(config: ModelConfig, path: Path | None = None) -> Policy:
    """Load a checkpoint folder (`path` instead of `config.path` when a run continues from its own).

    Raises:
        CheckpointError: no such folder, another architecture, or a missing or damaged weight file, by name.
    """
    folder = path or resolve_path(config.path)
    encoder = PromptEncoder(folder)
    _check_shards(folder)
    try:
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=getattr(torch, config.dtype), attn_implementation="sdpa", output_loading_info=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"the weights in {folder} cannot be loaded: {error}") from error
    model, info = loaded
    if info["missing_keys"]:  # transformers would leave them random, with a warning
        raise CheckpointError(f"the weights in {folder} are incomplete: {', '.join(sorted(info['missing_keys']))}")
    torch.nn.Module.to(model, resolve_device(config.device))
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    else:
        model.eval()
    if config.liger:
        apply_liger(model)
    attention = attention_backends.select(config.attention, attention_backends.AttentionShape.of(model))
    return Policy(model, encoder, freeze_vision=config.freeze_vision, attention=attention)


def _check_shards(folder: Path) -> None:
    """Every shard that the index names must be there, and whole."""
    from safetensors import SafetensorError, safe_open

    index = folder / "model.safetensors.index.json"
    names = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else [
        "model.safetensors"]
    for name in names:
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} lacks the weight file {name}")
        try:
            with safe_open(folder / name, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"the weight file {folder / name} is damaged: {error}") from error


def answer_scorer(policy: Policy, load: Callable[[Prompt], LoadedPrompt]
                  ) -> Callable[[Prompt, list[str], list[str]], list[float]]:
    """Mean log-probability of continuations of a prompt, for the likelihood judge; `load` brings the prompt's media.

    The returned function takes a prompt, prefixes (what the policy wrote so far) and as many continuations, and gives
    for each pair the mean over the continuation's tokens of log p(token | prompt, prefix, tokens before), in nats.
    """

    @torch.no_grad()
    def score(prompt: Prompt, prefixes: list[str], continuations: list[str]) -> list[float]:
        encode = policy.encoder.encode_completion
        loaded = load(prompt)
        pairs = [(encode(prefix), encode(continuation))
                 for prefix, continuation in zip(prefixes, continuations, strict=True)]
        batch = pack([(loaded.encoded, [before + after for before, after in pairs])])
        logprobs = policy.completion_logprobs(batch, [loaded.features]).split(batch.cu_seqlens.diff().tolist())
        return [float(row[len(before):].mean()) for row, (before, _) in zip(logprobs, pairs, strict=True)]

    return score


_PROCESSOR_FILES = ("tokenizer*", "vocab*", "merges*", "special_tokens_map.json", "added_tokens.json", "chat_template*",
                    "*processor_config.json")


def save_policy(policy: Policy, folder: Path) -> None:
    """Write a checkpoint that `from_pretrained` loads: weights, config, and the processor files it came with."""
    policy.model.save_pretrained(folder)
    for pattern in _PROCESSOR_FILES:
        for file in policy.encoder.path.glob(pattern):
            shutil.copyfile(file, folder / file.name)
