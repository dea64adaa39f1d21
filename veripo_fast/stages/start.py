"""How a run begins: its folder is made, or found again with `--resume`, before anything is loaded."""

from __future__ import annotations

import logging
import shutil
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

from veripo_fast.config.describe import to_yaml
from veripo_fast.config.load import load_config
from veripo_fast.config.schema import Config
from veripo_fast.errors import ConfigError, DataError
from veripo_fast.model.checkpoint_files import resolve_path
from veripo_fast.run.atomic import atomic_write_text
from veripo_fast.run.folder import RunDir

log = logging.getLogger(__name__)


def open_run(config: Config, resume: bool) -> RunDir:
    """Make the run folder, or find the one to resume.

    Raises:
        UserError: the folder is taken or holds no run, or the configuration names a file or folder that is not there.
    """
    run = RunDir(config.run_dir)
    if not config.stages:
        raise ConfigError("stages is empty: the configuration says nothing to train")
    if resume:
        if not run.config.is_file():
            raise ConfigError(f"{run.root} is no run to resume: it has no config.yaml")
        _warn_of_changes(load_config(run.config), config)
        _tidy(run)
    elif not _is_free(run.root):
        raise ConfigError(f"run_dir {run.root} exists already; resume it with --resume or name another folder")
    _check_inputs(config)
    run.root.mkdir(parents=True, exist_ok=True)
    atomic_write_text(run.config, to_yaml(config))
    return run


def discard_run(root: Path) -> None:
    """Remove what is in a folder, and the folder unless it is a mount point or a link."""
    for entry in root.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)
    with suppress(OSError):
        root.rmdir()


def _check_inputs(config: Config) -> None:
    if not resolve_path(config.model.path).is_dir():
        raise ConfigError(f"model.path {config.model.path} is not a folder")
    if any(stage.kind == "grpo" and not stage.data for stage in config.stages) and not config.data.train:
        raise ConfigError("data.train names no files")
    stage_files = [file for stage in config.stages for file in stage.data]
    for file in (*config.data.train, *config.data.eval, *stage_files):
        if not Path(file).exists():
            raise DataError(f"data file {file} does not exist")


def _is_free(root: Path) -> bool:
    """Whether nothing is there, or at most what a kill leaves before config.yaml has its name."""
    return not root.exists() or (root.is_dir() and all(entry.name.startswith(".tmp-") for entry in root.iterdir()))


def _tidy(run: RunDir) -> None:
    """Remove files that a kill left half written; checkpoints are tidied when the next one is saved."""
    for path in run.root.rglob(".tmp-*"):
        if path.is_file() and run.checkpoints not in path.parents:
            path.unlink()


def _warn_of_changes(before: Config, now: Config) -> None:
    for item in fields(Config):
        if item.name != "cache" and getattr(before, item.name) != getattr(now, item.name):  # a cache changes no result
            log.warning("%s differs from the run that is resumed: the result is no longer that of one configuration",
                        item.name)
