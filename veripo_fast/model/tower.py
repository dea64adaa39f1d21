"""The vision tower of a checkpoint, by itself or inside of a policy: patches -> embeddings; and how weights are loaded.

By itself it is what fills a cache: 0.7 billion weights, whatever the size of the language model beside them.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F

from veripo_fast.config.families import FAMILIES
from veripo_fast.config.inputs import ModelConfig
from veripo_fast.distributed.flops import Passes, TowerCost, tower_flops
from veripo_fast.model.checkpoint_files import from_pretrained, opened, resolve_device, resolve_path
from veripo_fast.model.encoding import PromptEncoder
from veripo_fast.run.weight_files import weight_files
from veripo_fast.types import MediaInputs, VisionFeatures

_PREFIX = re.compile(r"(model\.)?visual\.")
"""What the names of its weights begin with in the checkpoint of a whole model."""


class Tower:
    """A vision tower with the encoder of its checkpoint.

    Args:
        visual: transformers' vision model. frozen: whether it is not trained.
    """

    def __init__(self, visual: Any, encoder: PromptEncoder, *, frozen: bool) -> None:
        self.visual = visual
        self.encoder = encoder
        self.frozen_vision = frozen
        self.passes = Passes()
        visual.requires_grad_(not frozen)
        visual.patch_embed.proj.forward = partial(_embed_patches, visual.patch_embed.proj)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.visual.device
        return device

    @property
    def patch_dtype(self) -> torch.dtype:
        """In which patches are best made, float32 or bfloat16: what the tower computes in."""
        dtype: torch.dtype = self.visual.dtype
        return dtype

    @cached_property
    def cost(self) -> TowerCost:
        """What the FLOPs of its passes depend on."""
        return TowerCost.of(self.visual.config)

    def vision_features(self, media: MediaInputs) -> VisionFeatures:
        """Run the tower on all media of one prompt (images and videos in one call)."""
        return self.vision_features_of([media])[0]

    def vision_features_of(self, media: Sequence[MediaInputs]) -> list[VisionFeatures]:
        """Run the tower once on the media of several prompts."""
        visual = self.visual
        pixels = [item.pixel_values for item in media if item.pixel_values is not None]
        assert len(pixels) == len(media), "media were stripped of their pixels before the tower ran"
        grids = torch.cat([item.grid_thw for item in media])
        backward = torch.is_grad_enabled() and not self.frozen_vision
        self.passes.flops += tower_flops(self.cost, grids.tolist(), backward=backward)
        with torch.set_grad_enabled(backward):
            out = visual((pixels[0] if len(pixels) == 1 else torch.cat(pixels)).to(self.device, visual.dtype),
                         grid_thw=grids.to(self.device), return_dict=True)
        merged = self.encoder.vision.merge_size ** 2
        sizes = [int(item.grid_thw.prod(-1).sum()) // merged for item in media]
        deepstack = [level.split(sizes) for level in getattr(out, "deepstack_features", None) or ()]
        return [VisionFeatures(embeddings, tuple(level[i] for level in deepstack))
                for i, embeddings in enumerate(out.pooler_output.split(sizes))]


def _embed_patches(convolution: torch.nn.Conv3d, patches: torch.Tensor) -> torch.Tensor:
    """[N, C, frames, side, side] -> [N, D]: a convolution whose kernel is the whole patch is one matrix product, which
    torch computes four times faster."""
    return F.linear(patches.flatten(1), convolution.weight.flatten(1), convolution.bias)


def load_tower(config: ModelConfig) -> Tower:
    """The tower of a checkpoint folder, frozen, as `model.load_policy` loads it; of the files, only those with its
    weights are read.

    Raises:
        CheckpointError: no such folder, another architecture, or a missing or damaged weight file, by name.
    """
    folder = resolve_path(config.path)
    encoder = PromptEncoder(folder)
    family = FAMILIES[encoder.config.model_type]
    model_class = getattr(importlib.import_module(family.module), family.tower_class)
    weights: dict[str, torch.Tensor] = {}
    for name in weight_files(folder, _PREFIX):
        with opened(folder / name) as file:
            weights |= {_PREFIX.sub("", key): file.get_tensor(key) for key in file.keys()  # noqa: SIM118 (no dict)
                        if _PREFIX.match(key)}
    visual = from_pretrained(model_class, folder, config.dtype, prefix="visual.", pretrained_model_name_or_path=None,
                             config=encoder.config.vision_config, state_dict=weights)
    return Tower(visual.to(resolve_device(config.device)).eval(), encoder, frozen=True)
