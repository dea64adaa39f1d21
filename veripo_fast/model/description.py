"""What the files of a checkpoint folder beside its weights say: family, configuration, tokenizer, end tokens, patches.

A folder is a stranger's. None of its code is run, and a file that is broken is a CheckpointError that names it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoTokenizer

from veripo_fast.config.families import FAMILIES, closest, names
from veripo_fast.errors import CheckpointError
from veripo_fast.model.checkpoint_files import UNUSABLE
from veripo_fast.model.template_check import template_problem
from veripo_fast.run.weight_files import read_json

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class VisionSpec:
    """What a checkpoint's tower expects."""

    patch_size: int
    merge_size: int
    temporal_patch_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def factor(self) -> int:
        """Frame sides are multiples of this, in pixels."""
        return self.patch_size * self.merge_size

    @property
    def features(self) -> int:
        """Numbers in a patch."""
        return 3 * self.temporal_patch_size * self.patch_size ** 2

    def num_patches(self, frames: Sequence[torch.Tensor]) -> int:
        """Of several media, each [T, 3, H, W] with sides that are multiples of `factor`."""
        return sum(-(-len(pixels) // self.temporal_patch_size) * (pixels[0, 0].numel() // self.patch_size ** 2)
                   for pixels in frames)


def check_family(folder: Path) -> None:
    """Whether veripo trains a checkpoint, before any library reads it: some ask the terminal whether to run its code.

    Raises:
        CheckpointError: no checkpoint, or one of another family.
    """
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} is not a checkpoint folder: it has no config.json")
    stored = read_json(folder / "config.json")
    family = stored.get("model_type")
    if family not in FAMILIES:
        raise CheckpointError(f"{folder} is a {family!r} checkpoint; veripo trains {names()}{_hint(stored)}")
    if stored.get("auto_map"):
        log.warning("the checkpoint %s names code of its own (auto_map); it is not run", folder)


def _hint(stored: dict[str, Any]) -> str:
    """What may help with a family that is not known."""
    like = closest(str(stored.get("model_type")))
    hint = f"; the closest is {like}" if like else ""
    return f"{hint}; its own code (auto_map in config.json) is never run" if stored.get("auto_map") else hint


def config_of(folder: Path) -> Any:
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (StrictDataclassError, *UNUSABLE) as error:
        raise CheckpointError(f"{folder / 'config.json'} cannot be used: {error or type(error).__name__}") from error


def check_token_ids(folder: Path, config: Any, tokenizer: Any) -> None:
    """CheckpointError when the model's special tokens are not the tokenizer's."""
    vocabulary = tokenizer.get_vocab()
    known = set(vocabulary.values())
    for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"):
        value = getattr(config, name)
        if type(value) is not int or value not in known:
            raise CheckpointError(f"{folder / 'config.json'} has {name} {value!r}, which is no token of tokenizer.json")
    if "<|im_end|>" not in vocabulary:
        raise CheckpointError(f"{folder / 'tokenizer.json'} has no token <|im_end|>, which ends a turn")


def tokenizer_of(folder: Path) -> Any:
    """The tokenizer of a checkpoint, none of whose code is run, and whose chat template ends."""
    try:
        tokenizer = cast(Any, AutoTokenizer.from_pretrained(folder, trust_remote_code=False))
    except Exception as error:  # the tokenizers library raises Exception itself for whatever it cannot read
        raise CheckpointError(f"the tokenizer of {folder} cannot be loaded from tokenizer.json and "
                              f"tokenizer_config.json: {error or type(error).__name__}") from error
    if tokenizer.init_kwargs.get("auto_map"):
        log.warning("the tokenizer of %s names code of its own (auto_map); it is not run", folder)
    templates = tokenizer.chat_template
    if not templates:
        raise CheckpointError(f"{folder} has no chat template: put the family's chat_template.jinja there, or take the "
                              "Instruct checkpoint")
    for template in templates.values() if isinstance(templates, dict) else [templates]:
        problem = template_problem(template) if isinstance(template, str) else ""
        if problem:
            raise CheckpointError(f"the chat template of {folder} {problem}; correct chat_template.jinja or "
                                  "tokenizer_config.json there")
    return tokenizer


def end_ids_of(path: Path, eos_id: int) -> tuple[int, ...]:
    """End tokens of a checkpoint: `eos_token_id` of its generation config is a number, a list of them, or absent."""
    file = path / "generation_config.json"
    named = read_json(file).get("eos_token_id") if file.is_file() else None
    ids = named if isinstance(named, list) else [named]
    if named is not None and not all(type(value) is int and value >= 0 for value in ids):
        raise CheckpointError(f"{file} has eos_token_id {named!r}; it must be a token id or a list of them")
    return tuple(sorted({eos_id, *(ids if named is not None else ())}))


def vision_spec_of(path: Path, config: Any) -> VisionSpec:
    """Patch geometry from the model, mean and std from the checkpoint's processor files (or the family's defaults)."""
    vision = config.vision_config
    defaults = FAMILIES[config.model_type].colours
    mean, std = defaults
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):  # the last one counts
        if (path / name).is_file():
            stored = read_json(path / name)
            mean = _three(path / name, "image_mean", stored.get("image_mean", defaults[0]))
            std = _three(path / name, "image_std", stored.get("image_std", defaults[1]))
    return VisionSpec(vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size, mean, std)


def _three(file: Path, name: str, values: Any) -> tuple[float, float, float]:
    """Mean or deviation of the three colours."""
    numbers = values if isinstance(values, list | tuple) else []
    if len(numbers) != 3 or not all(type(value) in (int, float) and math.isfinite(value) for value in numbers):
        raise CheckpointError(f"{file} has {name} {values!r}; it must be three numbers")
    if name == "image_std" and min(numbers) <= 0:
        raise CheckpointError(f"{file} has {name} {values!r}; deviations must be positive")
    return numbers[0], numbers[1], numbers[2]
