"""An evaluation that was stopped goes on: the batches that are done lie in its folder until the whole is.

Only the first rank reads and writes. What is there counts for the same evaluation alone: the same files, checkpoint,
functions of the user's and options.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from veripo_fast.config.describe import to_tree
from veripo_fast.config.schema import Config
from veripo_fast.errors import ConfigError, DataError
from veripo_fast.rollout.store import read_groups, write_groups
from veripo_fast.run.inputs import differences, read_inputs, write_inputs
from veripo_fast.types import RolloutGroup

log = logging.getLogger(__name__)
SECTIONS = ("data", "eval", "model", "reward", "rollout", "seed", "video")
"""Of the configuration: what decides about completions and scores."""
SKIPPED = "skipped.jsonl"
ASIDE = {"data.train", "model.path", "rollout.weights", "rollout.kv_cache_gb"}
"""Of these, what does not; the checkpoint counts by its files."""
_PART = re.compile(r"(\.tmp-)?[a-z_]+-\d{8}\.parquet(-\d+-[0-9a-f]+)?")
"""The name of a stored batch, or of one that a crash left half written."""


def provenance(config: Config, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Fingerprints and versions of `take_inputs`, with the options that decide."""
    tree = to_tree(config)
    options: dict[str, Any] = {}
    for section in SECTIONS:
        value = tree[section]
        fields = {f"{section}.{name}": item for name, item in value.items()} if isinstance(value, dict) else {
            section: value}
        options |= {name: json.dumps(item) for name, item in fields.items() if name not in ASIDE}
    if config.eval.judge != "rules":
        options["eval.judge_settings"] = json.dumps(to_tree(config.reporting_judge))
    return {**inputs, "options": options}


def check_same(folder: Path, now: dict[str, Any]) -> None:
    """Raises ConfigError where the folder is a run's, or holds a part of another evaluation, by what differs, or files
    in `parts` that are none of an evaluation."""
    if (folder / "checkpoints").is_dir() or (folder / "metrics.jsonl").exists():
        raise ConfigError(f"{folder} is the folder of a run, whose evals.jsonl and inputs.json an evaluation would "
                          "replace; name another folder by --out")
    strange = [path.name for path in _entries(folder / "parts") if not _PART.fullmatch(path.name)]
    if strange:
        raise ConfigError(f"{folder / 'parts'} holds {strange[0]}, which is no part of an evaluation; name another "
                          "folder by --out")
    before = _before(folder)
    changes = [f"{kind}: {phrase}" for kind in ("data", "model", "code", "options", "versions")
               for phrase in differences(before, now, kind)] if before else []
    if changes:
        raise ConfigError(f"{folder} holds a part of another evaluation ({'; '.join(changes[:4])}"
                          f"{' and more' if len(changes) > 4 else ''}); remove it, or name another folder by --out")


def _entries(parts: Path) -> list[Path]:
    return sorted(parts.iterdir()) if parts.is_dir() else [parts] if parts.exists() else []


def _before(folder: Path) -> dict[str, Any]:
    """What the parts in a folder are of; empty where there are none, or nobody can say."""
    return read_inputs(folder / "inputs.json") if (folder / "parts").exists() else {}


class Progress:
    """The done batches of an evaluation, in `folder`/parts, and `folder`/inputs.json, which says of what.

    Args:
        now: from `provenance`.

    Raises:
        ConfigError: as `check_same`.
    """

    def __init__(self, folder: Path, now: dict[str, Any]) -> None:
        self.parts = folder / "parts"
        check_same(folder, now)  # again: another process may have begun and died since it was asked
        before = _before(folder)
        if not before:
            self.finish()
            (folder / SKIPPED).unlink(missing_ok=True)
        write_inputs(folder / "inputs.json", now, before.get("commands", []))
        self.parts.mkdir(exist_ok=True)

    def done(self, mode: str) -> list[int]:
        """First prompts of the batches that are there."""
        names = sorted(self.parts.glob(f"{mode}-*.parquet"))
        if names:
            log.info("%s: going on behind %d batches that are done", mode, len(names))
        return [int(name.stem.rpartition("-")[2]) for name in names]

    def read(self, mode: str, start: int) -> list[RolloutGroup]:
        """The groups of a batch, as they were kept. Raises DataError where the file was damaged since."""
        try:
            return read_groups(self._file(mode, start))
        except OSError as error:
            raise DataError(f"{self._file(mode, start)} cannot be read: {error.strerror or error}") from error

    def keep(self, mode: str, start: int, groups: Sequence[RolloutGroup]) -> None:
        """Store a batch, whole or not at all."""
        write_groups(self._file(mode, start), groups, "eval", start)

    def finish(self) -> None:
        """All is written elsewhere. Files that are not this module's stay."""
        for path in _entries(self.parts):
            if _PART.fullmatch(path.name):
                path.unlink()
        with suppress(OSError):  # not there, or it holds something else
            self.parts.rmdir()

    def _file(self, mode: str, start: int) -> Path:
        return self.parts / f"{mode}-{start:08d}.parquet"
