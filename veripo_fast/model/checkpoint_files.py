"""Checkpoint folders on disk: where they are, how their weights are read, and what is written beside new ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from veripo_fast.config.families import FAMILIES
from veripo_fast.config.inputs import ModelConfig
from veripo_fast.errors import CheckpointError, ConfigError
from veripo_fast.run.weight_files import read_json, weight_files

UNUSABLE = (OSError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError,
            ImportError)
"""What libraries raise for a configuration that is JSON and still makes no sense."""
JSON_FILES = ("config.json", "generation_config.json", "preprocessor_config.json", "video_preprocessor_config.json",
              "processor_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
              "added_tokens.json", "vocab.json", "chat_template.json", "model.safetensors.index.json")
"""Files of a checkpoint that hold a JSON object each. Those that veripo does not read go into its own checkpoints."""
TINY_POLICY = Path(__file__).parent.parent / "demo" / "tiny_policy"


def resolve_path(path: str) -> Path:
    """Folder of a checkpoint: `tiny` is the one shipped in the package, RUN/checkpoints/latest the newest of a run,
    RUN/checkpoints/best that of the best evaluation."""
    if path == "tiny":
        return TINY_POLICY
    named = Path(path)
    if named.name in ("latest", "best") and named.is_file():
        return named.with_name(named.read_text("utf-8", errors="replace").strip())
    return named


def adapter_folder(config: ModelConfig) -> Path | None:
    """Of the adapters that a policy begins with, if there are any."""
    return resolve_path(config.lora.adapter) if config.lora.adapter else None


def check_files(folder: Path) -> None:
    """CheckpointError when a file of a checkpoint that is text is broken, or its weights are quantised."""
    for name in JSON_FILES:
        if (folder / name).exists():
            stored = read_json(folder / name)
            if name == "config.json":
                _refuse_quantised(folder / name, stored)
    template = folder / "chat_template.jinja"
    try:
        if template.exists():
            template.read_text("utf-8")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{template} cannot be read: {error}") from error


def _refuse_quantised(path: Path, stored: dict[str, Any]) -> None:
    for part in (stored, stored.get("text_config"), stored.get("vision_config")):
        settings = part.get("quantization_config") if isinstance(part, dict) else None
        if settings:
            method = settings.get("quant_method") if isinstance(settings, dict) else None
            raise CheckpointError(f"{path} describes quantised weights (quantization_config, {method or 'no method'}), "
                                  "which have no gradients; take the checkpoint that they were made from")


def resolve_device(name: str) -> torch.device:
    """`auto` takes a GPU when there is one. Raises ConfigError for `cuda` without one."""
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ConfigError(f"model.device is cuda, but torch {torch.__version__} finds no GPU; auto takes what is there")
    if name == "auto":
        return torch.device("cuda" if available else "cpu")
    return torch.device(name)


def refuse_windows(folder: Path, config: Any) -> None:
    """A packed row lets each token see its whole prompt and completion: CheckpointError for layers that must not.

    transformers 5 says it per layer (`layer_types`, made of use_sliding_window, sliding_window and max_window_layers).
    A window that no sequence of the model can leave (max_position_embeddings) takes nothing away.
    """
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None)
    if kinds is None:
        kinds = ["sliding_attention" if getattr(text, "use_sliding_window", None) else "full_attention"]
    window, longest = getattr(text, "sliding_window", None), text.max_position_embeddings
    windowed = "sliding_attention" in kinds and (window is None or window < longest)
    if windowed:
        raise CheckpointError(
            f"{folder} cannot be trained with use_sliding_window: its layers see {window} tokens and its sequences may "
            f"have {longest} (max_position_embeddings); set use_sliding_window to false in config.json if all of yours "
            "are shorter than the window")
    run = FAMILIES[config.model_type].layer_kinds
    others = sorted(set(kinds) - {"sliding_attention", *run})
    if others:
        raise CheckpointError(f"{folder} has layers of the kind {others[0]!r} (layer_types in config.json); "
                              f"veripo trains {' and '.join(run)}")


def load_weights(model_class: Any, folder: Path, dtype: str) -> Any:
    """`model_class.from_pretrained(folder)`, with every weight that it needs, or CheckpointError."""
    for name in weight_files(folder):
        with opened(folder / name):
            pass
    return from_pretrained(model_class, folder, dtype, pretrained_model_name_or_path=folder)


def from_pretrained(model_class: Any, folder: Path, dtype: str, *, prefix: str = "", **options: Any) -> Any:
    """transformers' method, or CheckpointError; weights that `folder` lacks are named with `prefix`."""
    try:
        model, info = model_class.from_pretrained(dtype=getattr(torch, dtype), attn_implementation="sdpa",
                                                  output_loading_info=True, trust_remote_code=False, **options)
    except UNUSABLE as error:
        raise CheckpointError(f"the weights in {folder} cannot be loaded as its config.json describes them: "
                              f"{error or type(error).__name__}") from error
    if info["missing_keys"]:  # transformers would leave them random, with a warning
        missing = ", ".join(prefix + name for name in sorted(info["missing_keys"]))
        raise CheckpointError(f"the weights in {folder} are incomplete: {missing}")
    return model


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"the weight file {path} is damaged: {error}") from error


COPIED_FILES = ("generation_config.json", "tokenizer*", "vocab*", "merges*", "special_tokens_map.json",
                "added_tokens.json", "chat_template*",
                "*processor_config.json")
"""What a checkpoint that is written takes from the one that training began with."""
