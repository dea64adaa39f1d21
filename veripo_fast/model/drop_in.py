"""What a checkpoint folder needs so that transformers and vLLM do with it what the trainer did.

Files are copied from the checkpoint that training began with. What it leaves out, and veripo has from elsewhere, is
written: to us a default, to others an error, or other text without one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

from veripo_fast.config.families import Family
from veripo_fast.model.description import VisionSpec
from veripo_fast.model.encoding import PromptEncoder
from veripo_fast.run.weight_files import read_json
from veripo_fast.weights.layouts import stored

IMAGES, VIDEOS = "preprocessor_config.json", "video_preprocessor_config.json"


def write_weights(model: Any, family: Family, folder: Path, weights: dict[str, torch.Tensor] | None = None) -> None:
    """`save_pretrained`, with experts as the family's files hold them. Transformers 5.17 turns them when it reads, and
    writes them unturned; vLLM refuses such a file.

    Args:
        weights: by name, whole; None: the model's own.
    """
    if not family.transposed_experts:
        model.save_pretrained(folder, state_dict=weights)
        return
    held = model.state_dict() if weights is None else weights
    turned = {name: stored(name, tensor, family.name) for name, tensor in held.items()}
    model.save_pretrained(folder, state_dict=turned, save_original_format=False)


def complete_files(encoder: PromptEncoder, folder: Path) -> None:
    """Write what the files that were copied into a checkpoint folder lack. Raises OSError, CheckpointError."""
    _complete_ends(encoder, folder / "generation_config.json")
    _complete_template(encoder.tokenizer, folder)
    _complete_processor(encoder, folder)


def _complete_ends(encoder: PromptEncoder, file: Path) -> None:
    """Every token that ended a completion of ours: a base checkpoint does not name the end of turn."""
    stored = read_json(file) if file.is_file() else {}
    named = stored.get("eos_token_id")
    ids = set(named) if isinstance(named, list) else {named}
    if not ids >= set(encoder.end_ids):
        ends = list(encoder.end_ids)
        _write(file, stored | {"eos_token_id": ends[0] if len(ends) == 1 else ends})


def _complete_template(tokenizer: Any, folder: Path) -> None:
    """Processors of transformers 5 do not read the chat template of tokenizer_config.json, where older folders have it.
    """
    if not list(folder.glob("chat_template*")) and isinstance(tokenizer.chat_template, str):
        (folder / "chat_template.jinja").write_text(tokenizer.chat_template, "utf-8")


def _complete_processor(encoder: PromptEncoder, folder: Path) -> None:
    """Patch geometry, mean and deviation. vLLM 0.32 gives raw bytes to a tower whose mean is in no file."""
    whole = folder / "processor_config.json"
    if whole.is_file() and "image_processor" in read_json(whole):
        return
    names = [IMAGES] if (folder / IMAGES).is_file() and not (folder / VIDEOS).is_file() else [IMAGES, VIDEOS]
    for name in names:  # without a file of their own videos are read by that of images
        stored = read_json(folder / name) if (folder / name).is_file() else {}
        known = _known(encoder.vision, encoder.config.model_type)
        if not stored.keys() >= known.keys():
            _write(folder / name, known | stored)


def _known(vision: VisionSpec, family: str) -> dict[str, Any]:
    return {"patch_size": vision.patch_size, "merge_size": vision.merge_size,
            "temporal_patch_size": vision.temporal_patch_size, "image_mean": list(vision.mean),
            "image_std": list(vision.std), "processor_class": PROCESSOR_MAPPING_NAMES[family]}


def _write(file: Path, stored: dict[str, Any]) -> None:
    file.write_text(json.dumps(stored, indent=2) + "\n", "utf-8")
