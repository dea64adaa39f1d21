"""The vision tower of a checkpoint, by itself or inside of a policy: patches -> embeddings; and how weights are loaded.

By itself it is what fills a cache: 0.7 billion weights, whatever the size of the language model beside them.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from veripo_fast.config.schema import ModelConfig
from veripo_fast.errors import CheckpointError
from veripo_fast.model.encoding import PromptEncoder
from veripo_fast.types import MediaInputs

TINY_POLICY = Path(__file__).parent.parent / "demo" / "tiny_policy"
_CLASSES = {"qwen2_5_vl": "Qwen2_5_VisionTransformerPretrainedModel", "qwen3_vl": "Qwen3VLVisionModel"}
"""Of each family: the tower's class in transformers."""
_PREFIX = re.compile(r"(model\.)?visual\.")
"""What the names of its weights begin with in the checkpoint of a whole model."""


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


class Tower:
    """A vision tower with the encoder of its checkpoint.

    Args:
        visual: transformers' vision model. frozen: whether it is not trained.
    """

    def __init__(self, visual: Any, encoder: PromptEncoder, *, frozen: bool) -> None:
        self.visual = visual
        self.encoder = encoder
        self.frozen_vision = frozen
        visual.requires_grad_(not frozen)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.visual.device
        return device

    @property
    def patch_dtype(self) -> torch.dtype:
        """In which patches are best made, float32 or bfloat16: what the tower computes in."""
        dtype: torch.dtype = self.visual.dtype
        return dtype

    def vision_features(self, media: MediaInputs) -> VisionFeatures:
        """Run the tower on all media of one prompt (images and videos in one call)."""
        return self.vision_features_of([media])[0]

    def vision_features_of(self, media: Sequence[MediaInputs]) -> list[VisionFeatures]:
        """Run the tower once on the media of several prompts."""
        visual = self.visual
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


def resolve_path(path: str) -> Path:
    """Folder of a checkpoint; `tiny` names the one shipped in the package."""
    return TINY_POLICY if path == "tiny" else Path(path)


def resolve_device(name: str) -> torch.device:
    """`auto` takes a GPU when there is one."""
    return torch.device("cuda" if name == "auto" and torch.cuda.is_available() else "cpu" if name == "auto" else name)


def load_tower(config: ModelConfig) -> Tower:
    """The tower of a checkpoint folder, frozen, as `model.load_policy` loads it; of the files, only those with its
    weights are read.

    Raises:
        CheckpointError: no such folder, another architecture, or a missing or damaged weight file, by name.
    """
    folder = resolve_path(config.path)
    encoder = PromptEncoder(folder)
    family = encoder.config.model_type
    model_class = getattr(importlib.import_module(f"transformers.models.{family}.modeling_{family}"), _CLASSES[family])
    weights: dict[str, torch.Tensor] = {}
    for name in _weight_files(folder, _PREFIX):
        with _opened(folder / name) as file:
            weights |= {_PREFIX.sub("", key): file.get_tensor(key) for key in file.keys()  # noqa: SIM118 (no dict)
                        if _PREFIX.match(key)}
    visual = from_pretrained(model_class, folder, config.dtype, prefix="visual.", pretrained_model_name_or_path=None,
                             config=encoder.config.vision_config, state_dict=weights)
    return Tower(visual.to(resolve_device(config.device)).eval(), encoder, frozen=True)


def load_weights(model_class: Any, folder: Path, dtype: str) -> Any:
    """`model_class.from_pretrained(folder)`, with every weight that it needs, or CheckpointError."""
    for name in _weight_files(folder):
        with _opened(folder / name):
            pass
    return from_pretrained(model_class, folder, dtype, pretrained_model_name_or_path=folder)


def from_pretrained(model_class: Any, folder: Path, dtype: str, *, prefix: str = "", **options: Any) -> Any:
    """transformers' method, or CheckpointError; weights that `folder` lacks are named with `prefix`."""
    try:
        model, info = model_class.from_pretrained(dtype=getattr(torch, dtype), attn_implementation="sdpa",
                                                  output_loading_info=True, **options)
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"the weights in {folder} cannot be loaded: {error}") from error
    if info["missing_keys"]:  # transformers would leave them random, with a warning
        missing = ", ".join(prefix + name for name in sorted(info["missing_keys"]))
        raise CheckpointError(f"the weights in {folder} are incomplete: {missing}")
    return model


def _weight_files(folder: Path, wanted: re.Pattern[str] | None = None) -> list[str]:
    """Names of the safetensors files, of a sharded checkpoint those that hold weights with names that `wanted` matches.

    Raises:
        CheckpointError: one is not there.
    """
    index = folder / "model.safetensors.index.json"
    names = sorted({file for weight, file in json.loads(index.read_text())["weight_map"].items()
                    if wanted is None or wanted.match(weight)}) if index.is_file() else ["model.safetensors"]
    for name in names:
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} lacks the weight file {name}")
    return names


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"the weight file {path} is damaged: {error}") from error
