"""The judge `llm` as the ledger sees it: what its folder holds, and what it takes while it judges.

Read from config.json and the safetensors headers, so a folder that cannot judge is refused before anything is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veripo_fast.config.load import apply_overrides
from veripo_fast.config.schema import Config
from veripo_fast.errors import CheckpointError
from veripo_fast.run.weight_files import read_json, weight_files
from veripo_fast.schedule.activations import working_bytes
from veripo_fast.schedule.shapes import EMBEDDING, HEAD, Shape, header

BATCH_TOKENS = 8192
"""Prompt and reply tokens of one batch of the judge without vLLM, padding included; a longer prompt runs alone."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
"""One of them is there where a folder has a tokenizer."""


@dataclass(frozen=True)
class JudgeShape:
    """A causal language model."""

    layers: int
    hidden: int
    intermediate: int
    queries: int
    keys: int
    """Width of a token's keys, which is that of its values."""
    vocabulary: int
    positions: int
    """Longest sequence."""
    numbers: int
    """Weights; a tied head counts once."""

    def cache_bytes_per_token(self, itemsize: int) -> int:
        """Keys and values of a token in all layers."""
        return 2 * self.layers * self.keys * itemsize


def judge_folders(config: Config) -> dict[str, str]:
    """Stage -> folder of the judge `llm`, of the stages that have one."""
    folders = {}
    for stage in config.stages:
        verifier = apply_overrides(config, stage.set).verifier
        if stage.kind == "dpo" and verifier.judge == "llm":
            folders[stage.name] = verifier.llm_path
    return folders


def judge_shapes(config: Config) -> dict[str, JudgeShape]:
    """Folder -> shape of the judges `llm` of all stages and of the evaluation.

    Raises:
        CheckpointError: a folder cannot be one.
    """
    folders = list(judge_folders(config).values())
    if config.eval.judge == "llm":
        folders.append(config.reporting_judge.llm_path)
    return {folder: read_judge(Path(folder)) for folder in folders}


def read_judge(folder: Path) -> JudgeShape:
    """The shape of a judge's folder.

    Raises:
        CheckpointError: it is no folder, has no tokenizer, no chat template or no head that writes, holds quantised
            weights, or lacks what its config.json needs.
    """
    if not folder.is_dir():
        raise CheckpointError(f"verifier.llm_path {folder} is not a folder")
    config = read_json(folder / "config.json")
    _check_writes(folder, config)
    tensors: dict[str, tuple[Shape, int]] = {}
    for name in weight_files(folder):
        tensors |= header(folder / name)
    shapes = {name: shape for name, (shape, _) in tensors.items()}
    try:
        embedding = next(shape for name, shape in shapes.items() if name.endswith(EMBEDDING))
        layers, heads = int(config["num_hidden_layers"]), int(config["num_attention_heads"])
        hidden, positions = int(config["hidden_size"]), int(config["max_position_embeddings"])
        head = int(config.get("head_dim") or hidden // heads)
        keys = int(config.get("num_key_value_heads") or heads) * head
        intermediate = int(config["intermediate_size"])
    except (StopIteration, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"{folder} does not describe a language model that can judge: "
                              f"{error or EMBEDDING} is missing or makes no sense") from error
    if HEAD not in shapes and not config.get("tie_word_embeddings"):
        raise CheckpointError(f"{folder} has no generation head: {HEAD} is in none of its weight files, and "
                              "config.json does not tie it to the embedding")
    numbers = sum(math.prod(shape) for shape in shapes.values())
    return JudgeShape(layers, hidden, intermediate, heads * head, keys, embedding[0], positions, numbers)


def _check_writes(folder: Path, config: Mapping[str, Any]) -> None:
    """Whether the folder is that of a causal language model with everything that a chat needs."""
    names = config.get("architectures")
    named = [str(name) for name in names] if isinstance(names, list) else []
    if not any(name.endswith("ForCausalLM") for name in named):
        raise CheckpointError(f"verifier.llm_path {folder} has no generation head of a language model: its config.json "
                              f"names {', '.join(named) or 'no architecture'}; take a folder of a ...ForCausalLM")
    if config.get("quantization_config"):
        raise CheckpointError(f"verifier.llm_path {folder} holds quantised weights, which the judge `llm` cannot run; "
                              "take the checkpoint that they were made from, or verifier.judge endpoint")
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise CheckpointError(f"verifier.llm_path {folder} has no tokenizer: none of {', '.join(TOKENIZER_FILES)}")
    settings = folder / "tokenizer_config.json"
    has_template = any((folder / name).is_file() for name in ("chat_template.jinja", "chat_template.json"))
    if not has_template and not (settings.is_file() and read_json(settings).get("chat_template")):
        raise CheckpointError(f"verifier.llm_path {folder} has no chat template, so it was not trained to be asked; "
                              "take an instruction-tuned model")


def judging_owners(shape: JudgeShape, itemsize: int, cache_bytes: int) -> dict[str, int]:
    """Owner -> bytes while a judge works.

    Args:
        cache_bytes: the key/value cache of a vLLM engine; 0: transformers, which makes one for each batch and copies
            a layer of it with each token.
    """
    tokens = BATCH_TOKENS
    logits = 256 * shape.vocabulary * 4 * 3
    cache = cache_bytes or shape.cache_bytes_per_token(itemsize) * tokens * (shape.layers + 1) // shape.layers
    return {"judge weights": shape.numbers * itemsize, "judge key/value cache": cache,
            "judge activations": working_bytes(shape, tokens, itemsize) + min(logits, 1 << 30)}
