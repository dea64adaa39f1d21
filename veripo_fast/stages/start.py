"""How a run begins: its folder is made, or found again with `--resume`, before anything is loaded."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from veripo_fast.config.describe import to_tree, to_yaml
from veripo_fast.config.load import apply_overrides, load_config
from veripo_fast.config.schema import Config
from veripo_fast.data.remote import is_remote, local_files
from veripo_fast.distributed.choice import check_backend, gpu_name
from veripo_fast.distributed.world import World
from veripo_fast.errors import ConfigError, DataError
from veripo_fast.model.checkpoint_files import adapter_folder, resolve_path
from veripo_fast.model.vision_text import check_vision_text
from veripo_fast.recipes.checked import check_functions, own_files
from veripo_fast.run.atomic import atomic_write_text
from veripo_fast.run.folder import RunDir
from veripo_fast.run.inputs import differences, read_inputs, take_inputs, write_inputs
from veripo_fast.run.lock import NAME as LOCK
from veripo_fast.run.lock import RunLock
from veripo_fast.run.trackers import check_trackers
from veripo_fast.schedule.judge import judge_shapes

log = logging.getLogger(__name__)
CHANGES = ("code", "config", "data", "media", "model", "rollouts")
"""What `--allow-changes` can name."""
HARMLESS = ("cache.", "checkpoint.", "train.", "video.workers", "video.timeout_seconds", "verifier.endpoint_key_env",
            "verifier.endpoint_concurrency", "verifier.endpoint_timeout_seconds", "verifier.endpoint_retries",
            "rollout.parity_every", "rollout.parity_tolerance", "rollout.stall_seconds", "distributed.timeout_seconds")
"""Options that change how long a run takes and what it keeps, never its results."""


def check_run(config: Config, resume: bool, allow_changes: Collection[str] = ()) -> RunDir:
    """The run folder, which may not exist yet; nothing is written.

    Raises:
        UserError: the folder is taken or holds no run, or the configuration names a file or folder that is not there.
    """
    run = RunDir(config.run_dir)
    if not config.stages:
        raise ConfigError("stages is empty: the configuration says nothing to train")
    for name in allow_changes:
        if name not in CHANGES:
            raise ConfigError(f"--allow-changes takes {', '.join(CHANGES)}, got {name!r}")
    if resume and not run.config.is_file():
        raise ConfigError(f"{run.root} is no run to resume: it has no config.yaml")
    if not resume and not _is_free(run.root):
        raise ConfigError(f"run_dir {run.root} exists already; resume it with --resume or name another folder")
    _check_inputs(config)
    return run


@contextmanager
def claimed(run: RunDir, config: Config, inputs: dict[str, Any], resume: bool, allow_changes: Collection[str] = (),
            memory: Mapping[str, Any] | None = None) -> Iterator[Callable[[], None]]:
    """Hold the run folder, with what the run is made of written into it.

    What is given has to be called once the run has begun: the folder of a new one that could not is left empty, so that
    the next attempt finds it free.

    Args:
        memory: what its phases will hold, from `stages.memory.check_memory`.

    Raises:
        ConfigError: another process holds it, or a resume would go on with other inputs.
    """
    run.root.mkdir(parents=True, exist_ok=True)
    began = resume

    def begin() -> None:
        nonlocal began
        began = True

    with RunLock(run.root):
        try:
            begin_run(run, config, inputs, resume, allow_changes)
            if memory is not None:
                atomic_write_text(run.memory_plan, json.dumps(memory, indent=1) + "\n")
            yield begin
        finally:
            if not began:
                discard_run(run.root)


def check_ranks(config: Config, world: World) -> dict[str, Any]:
    """Whether ranks and configuration go together, and all ranks work on the same; returns its fingerprints.

    Raises:
        ConfigError: they do not; on the first rank, PeerFailed on others.
    """
    world.agreed(lambda: check_backend(config, world))
    world.same("a configuration", to_yaml(config), "start all ranks with the same file and options")
    world.agreed(lambda: _check_inputs(config))
    inputs = take_inputs(local_files(_data_files(config)), resolve_path(config.model.path), own_files(config),
                         {"adapter": adapter_folder(config.model), "vision_text": vision_text_folder(config)})
    for kind, what in (("data", "data files"), ("model", "a model"), ("versions", "packages"), ("code", "functions")):
        world.same(what, json.dumps(inputs[kind], sort_keys=True), "every machine needs the same")
    world.same("a GPU", gpu_name(config.model.device), "mixed GPUs would wait for the slowest")
    return inputs


def begin_run(run: RunDir, config: Config, inputs: dict[str, Any], resume: bool,
              allow_changes: Collection[str] = ()) -> None:
    """Write what the run is made of; called with the folder locked.

    Args:
        inputs: fingerprints, from `check_ranks`.

    Raises:
        ConfigError: a resume would go on with other inputs, and they are not allowed.
    """
    before: dict[str, Any] = {}
    if resume:
        before = read_inputs(run.inputs)
        _compare(load_config(run.config), config, before, inputs, allow_changes)
        _tidy(run)
    write_inputs(run.inputs, inputs, before.get("commands", []))
    if resume and _is_finished(run, config):
        log.info("%s is finished: its config.yaml stays as it is", run.root)
        return
    atomic_write_text(run.config, to_yaml(config))


def discard_run(root: Path) -> None:
    """Remove what is in a folder, and the folder unless it is a mount point or a link."""
    for entry in root.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)
    with suppress(OSError):
        root.rmdir()


def _data_files(config: Config) -> list[str]:
    stage_files = [file for stage in config.stages for file in stage.data]
    return [*config.data.train, *config.data.eval, *stage_files]


def _check_inputs(config: Config) -> None:
    if not resolve_path(config.model.path).is_dir():
        raise ConfigError(f"model.path {config.model.path} is not a folder")
    adapter = config.model.lora.adapter
    if adapter and not resolve_path(adapter).is_dir():
        raise ConfigError(f"model.lora.adapter {adapter} is not a folder")
    judge_shapes(config)
    if (vision_text := vision_text_folder(config)) is not None:
        check_vision_text(vision_text)
    check_trackers(config.train.trackers)
    if any(stage.kind != "dpo" and not stage.data for stage in config.stages) and not config.data.train:
        raise ConfigError("data.train names no files")
    for file in _data_files(config):
        if not is_remote(file) and not Path(file).exists():
            raise DataError(f"data file {file} does not exist")
    local_files(_data_files(config))  # of remote ones a copy is made now
    check_functions(config)


def vision_text_folder(config: Config) -> Path | None:
    """Of the model that tells rewards what frames show, for the run or a stage of it; None where there is none."""
    named = {part.reward.vision_text for part in (config, *(apply_overrides(config, stage.set)
                                                            for stage in config.stages))} - {""}
    if len(named) > 1:
        raise ConfigError(f"reward.vision_text names {len(named)} folders, {', '.join(sorted(named))}; a run has one")
    return Path(named.pop()) if named else None


def _is_free(root: Path) -> bool:
    """Whether nothing is there, or at most what a kill leaves before config.yaml has its name."""
    if not root.exists():
        return True
    return root.is_dir() and all(entry.name.startswith(".tmp-") or entry.name in (LOCK, "inputs.json")
                                 for entry in root.iterdir())


def _is_finished(run: RunDir, config: Config) -> bool:
    """Whether the newest checkpoint stands behind the last stage."""
    try:
        name = (run.checkpoints / "latest").read_text().strip()
        state = json.loads((run.checkpoints / name / "trainer" / "state.json").read_bytes())
    except (OSError, ValueError):
        return False
    return bool(state.get("stage", 0) >= len(config.stages))


def _tidy(run: RunDir) -> None:
    """Remove files that a kill left half written; checkpoints are tidied when the next one is saved."""
    for path in run.root.rglob(".tmp-*"):
        if path.is_file() and run.checkpoints not in path.parents:
            path.unlink()


def _compare(old: Config, new: Config, before: dict[str, Any], inputs: dict[str, Any],
             allow_changes: Collection[str]) -> None:
    """Name every difference; ConfigError for those that change results and are not allowed."""
    changes = {"config": changed_options(old, new)}
    if before:
        changes |= {kind: differences(before, inputs, kind) for kind in ("data", "model", "code")}
        for phrase in differences(before, inputs, "versions"):
            log.warning("%s since this run began: results may differ in their last digits", phrase)
    else:
        log.warning("the run that is resumed has no inputs.json: whether its data or model have changed is not known")
    for kind, phrases in changes.items():
        if not phrases:
            continue
        if kind not in allow_changes:
            raise ConfigError(f"the run that is resumed was begun with another {kind}: {'; '.join(phrases)}. The "
                              f"result would be that of no single run; --allow-changes {kind} goes on all the same")
        log.warning("going on with another %s, as allowed: %s", kind, "; ".join(phrases))


def changed_options(old: Config, new: Config) -> list[str]:
    """Dotted options that differ and change results; stages may be added behind those that were there."""
    before, now = to_tree(old), to_tree(new)
    earlier = before.pop("stages")
    stages = now.pop("stages")[:len(earlier)]
    changed = [f"{name} was {one!r}, is {other!r}" for name, one, other in _leaves(before, now, "")
               if name != "run_dir" and not name.startswith(HARMLESS)]
    return changed + ([] if stages == earlier else ["stages differ"])


def _leaves(before: dict[str, Any], now: dict[str, Any], where: str) -> list[tuple[str, Any, Any]]:
    """(dotted name, value before, value now) of every leaf that differs."""
    found = []
    for name, value in now.items():
        one = before.get(name)
        if isinstance(value, dict) and isinstance(one, dict):
            found += _leaves(one, value, f"{where}{name}.")
        elif one != value:
            found.append((f"{where}{name}", one, value))
    return found
