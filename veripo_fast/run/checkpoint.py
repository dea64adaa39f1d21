"""Checkpoint folders that are either complete or not there, whenever the process dies.

    ROOT/step_000050/...       what the caller wrote, and manifest.json (size and CRC-32 of every file), written last
    ROOT/latest                name of the newest complete one
    ROOT/.tmp-*                unfinished or half deleted; removed by the next save
    ROOT/.replaced-step_000050 the old one while a second save of the same step takes its name

One process works in a ROOT at a time. CRC-32 finds truncation and rot, not tampering.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import zlib
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from safetensors import SafetensorError

from veripo_fast.errors import CheckpointError
from veripo_fast.run.atomic import atomic_write_text, sync

MANIFEST = "manifest.json"
_CHUNK_BYTES = 1 << 20
_REPLACED = ".replaced-"
_STEP = re.compile(r"(?:\.replaced-)?step_(\d+)")
_log = logging.getLogger(__name__)


def save_checkpoint(root: Path, step: int, write: Callable[[Path], None], keep: int,
                    protect: Collection[Path] = ()) -> Path:
    """Have `write` fill a folder, make it durable, and only then give it the name ROOT/step_NNNNNN.

    Afterwards the `keep` newest up to `step` and those in `protect` remain; later steps, which a resume has left
    behind, go too. Raises CheckpointError when storage fails, with the earlier checkpoints as they were. Any other
    error of `write` comes through, and leaves nothing behind either.
    """
    final = checkpoint_path(root, step)
    temporary = root / f".tmp-{final.name}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        _tidy(root)
        temporary.mkdir()
        write(temporary)
        _seal(temporary)
        _publish(temporary, final)
    except (OSError, RuntimeError, SafetensorError) as error:
        if not (reason := _storage_failure(error)):
            raise
        raise CheckpointError(_sentence(final, reason)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _prune(root, final, keep, {path.name for path in protect})
    return final


def checkpoint_path(root: Path, step: int) -> Path:
    """The folder of a step's checkpoint."""
    return root / f"step_{step:06d}"


def latest_checkpoint(root: Path) -> Path | None:
    """The newest complete checkpoint, or None when there is none at all.

    The one that `latest` names comes first. A damaged one is named in the log and the one before it is taken; one that
    a crash left under its `.replaced-` name gets its own back. Raises CheckpointError when all are damaged.
    """
    problems: list[str] = []
    for path in _candidates(root):
        try:
            verify_checkpoint(path)
        except CheckpointError as error:
            _log.warning("%s", error)
            problems.append(str(error))
            continue
        if problems:
            _log.warning("falling back to %s", path)
        return path.rename(_own_name(path)) if path != _own_name(path) else path
    if problems:
        raise CheckpointError(f"no complete checkpoint in {root}: {'; '.join(problems)}")
    return None


def verify_checkpoint(path: Path, *, contents: bool = True) -> None:
    """Compare a checkpoint folder with its manifest; `contents=False` looks at sizes alone.

    Raises CheckpointError that names the first file which is missing, truncated or changed.
    """
    try:
        files = json.loads((path / MANIFEST).read_bytes())["files"]
        for name, entry in files.items():
            _verify_file(path, name, entry, contents)
    except FileNotFoundError as error:
        missing = Path(error.filename).relative_to(path)
        raise CheckpointError(f"checkpoint {path} is incomplete: {missing} is missing") from None
    except OSError as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"checkpoint {path} has a damaged {MANIFEST}: {error}") from error


def checkpoint_step(path: Path) -> int:
    """The step in the name of a checkpoint folder."""
    match = _STEP.fullmatch(path.name)
    if match is None:
        raise CheckpointError(f"{path} is not a checkpoint folder: the name must be step_ and a number")
    return int(match[1])


# Writing

def _seal(folder: Path) -> None:
    """Make every file durable, then describe them in the manifest, then make the folders durable."""
    paths = sorted(folder.rglob("*"))
    files = {}
    for path in paths:
        if path.is_file():
            sync(path)
            files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "crc32": _crc32(path)}
    atomic_write_text(folder / MANIFEST, json.dumps({"files": files}, indent=1) + "\n")
    for path in paths:
        if path.is_dir():
            sync(path)


def _publish(temporary: Path, final: Path) -> None:
    replaced = final.with_name(f"{_REPLACED}{final.name}")
    if final.exists():
        final.rename(replaced)
    temporary.rename(final)
    sync(final.parent)
    atomic_write_text(final.with_name("latest"), final.name + "\n")
    shutil.rmtree(replaced, ignore_errors=True)


def _tidy(root: Path) -> None:
    """Clear what a crash left: an interrupted replacement is undone or finished, temporaries are deleted."""
    for replaced in root.glob(f"{_REPLACED}*"):
        if _own_name(replaced).exists():
            shutil.rmtree(replaced)
        else:
            replaced.rename(_own_name(replaced))
    for leftover in root.glob(".tmp-*"):
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()


def _prune(root: Path, newest: Path, keep: int, protected: set[str]) -> None:
    step = checkpoint_step(newest)
    older = [path for path in _folders(root) if checkpoint_step(path) <= step]
    kept = {path.name for path in sorted(older, key=checkpoint_step)[-keep:]} | protected | {newest.name}
    for path in _folders(root):
        if path.name in kept:
            continue
        trash = root / f".tmp-delete-{path.name}"
        try:
            path.rename(trash)  # first, so that a half deleted folder never looks like a checkpoint
            shutil.rmtree(trash)
        except OSError as error:
            _log.warning("the old checkpoint %s could not be deleted: %s", path, error.strerror)


def _crc32(path: Path) -> int:
    value, buffer = 0, bytearray(_CHUNK_BYTES)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            value = zlib.crc32(memoryview(buffer)[:count], value)
    return value


# Reading

def _folders(root: Path) -> list[Path]:
    return [path for path in root.glob("step_*") if _STEP.fullmatch(path.name) and path.is_dir()]


def _candidates(root: Path) -> Iterator[Path]:
    """The one that `latest` names, then the earlier ones from new to old, then those after it (see _prune)."""
    replaced = [path for path in root.glob(f"{_REPLACED}step_*")
                if _STEP.fullmatch(path.name) and not _own_name(path).exists()]
    paths = sorted(_folders(root) + replaced, key=checkpoint_step, reverse=True)
    named = _named(root)
    if named is None:
        yield from paths
        return
    yield named
    others = [path for path in paths if path != named]
    yield from sorted(others, key=lambda path: checkpoint_step(path) > checkpoint_step(named))


def _own_name(path: Path) -> Path:
    return path.with_name(path.name.removeprefix(_REPLACED))


def _named(root: Path) -> Path | None:
    """What the file `latest` names, whether it is there or not."""
    try:
        name = (root / "latest").read_text("utf-8", errors="replace").strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    if _STEP.fullmatch(name):
        return root / name
    _log.warning("%s must hold the name of a checkpoint folder, got %r", root / "latest", name[:40])
    return None


def _verify_file(folder: Path, name: str, entry: dict[str, int], contents: bool) -> None:
    size = (folder / name).stat().st_size
    if size != entry["bytes"]:
        raise CheckpointError(f"checkpoint {folder} is damaged: {name} has {size} of {entry['bytes']} bytes")
    if contents and _crc32(folder / name) != entry["crc32"]:
        raise CheckpointError(f"checkpoint {folder} is damaged: the content of {name} has changed since it was saved")


# Storage that fails

def _storage_failure(error: BaseException) -> str:
    """Why storage failed, or an empty string when the error is about something else.

    torch.save reports a full disk as a RuntimeError of its zip writer, with the OSError (if any) as context.
    """
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if isinstance(error, SafetensorError):
        return str(error) if "os error" in str(error) else ""
    if isinstance(error.__context__, OSError):
        return _storage_failure(error.__context__)
    return "torch.save could not write" if "inline_container" in str(error) or "iostream" in str(error) else ""


def _sentence(final: Path, reason: str) -> str:
    earlier = "; there is no earlier checkpoint"
    for path in _candidates(final.parent):
        try:
            verify_checkpoint(path, contents=False)
        except CheckpointError:
            continue
        earlier = f"; the earlier checkpoint {path} is intact"
        break
    return f"cannot save the checkpoint {final}: {reason} ({_free_megabytes(final.parent)} MB free){earlier}"


def _free_megabytes(folder: Path) -> int:
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free // 1_000_000
