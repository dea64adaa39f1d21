"""Which files of a checkpoint folder hold its weights, by its index; needs no torch."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from veripo_fast.errors import CheckpointError


def read_json(path: Path) -> dict[str, Any]:
    """The object of a JSON file. Raises CheckpointError."""
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {json.dumps(value)[:40]}")
    return value


def weight_files(folder: Path, wanted: re.Pattern[str] | None = None) -> list[str]:
    """Names of the safetensors files, of a sharded checkpoint those that hold weights with names that `wanted` matches.

    Raises:
        CheckpointError: one is not there.
    """
    index = folder / "model.safetensors.index.json"
    names = _indexed(index, wanted) if index.is_file() else ["model.safetensors"]
    for name in names:
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} lacks the weight file {name}")
    return names


def _indexed(index: Path, wanted: re.Pattern[str] | None) -> list[str]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(file, str) for file in places.values()):
        raise CheckpointError(f"{index} has no weight_map that names a file for each weight")
    return sorted({file for weight, file in places.items() if wanted is None or wanted.match(weight)})
