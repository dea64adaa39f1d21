"""Checkpoints that survive kill -9 at every line, full disks and damaged files."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests.support.children import PATIENCE_SECONDS, run, start
from tests.support.paths import PYTHONPATH
from veripo_fast.errors import CheckpointError
from veripo_fast.run import checkpoint
from veripo_fast.run.atomic import atomic_write_text
from veripo_fast.run.checkpoint import checkpoint_step, latest_checkpoint, save_checkpoint, verify_checkpoint


def writer(content: str):
    """A policy in two shards and trainer state in a folder below."""
    def write(folder: Path) -> None:
        for name in ("model-1.safetensors", "model-2.safetensors"):
            (folder / name).write_text(content * 100)
        (folder / "trainer").mkdir()
        (folder / "trainer" / "state.pt").write_text(content)
    return write


def save(root: Path, step: int, keep: int = 2, **options) -> Path:
    return save_checkpoint(root, step, writer(str(step)), keep, **options)


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_saved_folder_holds_what_was_written(tmp_path):
    path = save(tmp_path / "new" / "checkpoints", 7)
    assert path == tmp_path / "new" / "checkpoints" / "step_000007" == latest_checkpoint(path.parent)
    assert (path / "trainer" / "state.pt").read_text() == "7"
    assert sorted(json.loads((path / "manifest.json").read_text())["files"]) == [
        "model-1.safetensors", "model-2.safetensors", "trainer/state.pt"]
    assert (path.parent / "latest").read_text() == "step_000007\n"
    assert checkpoint_step(path) == 7
    verify_checkpoint(path)


def test_keeps_the_last_n_and_the_protected(tmp_path):
    for step in range(1, 7):
        save(tmp_path, step, protect=[tmp_path / "step_000002"])
    assert names(tmp_path) == ["latest", "step_000002", "step_000005", "step_000006"]


def test_steps_that_a_resume_left_behind_are_deleted(tmp_path):
    for step in (1, 2, 9):
        save(tmp_path, step, keep=3)
    save(tmp_path, 3, keep=3)
    assert names(tmp_path) == ["latest", "step_000001", "step_000002", "step_000003"]


def test_same_step_again_replaces_it(tmp_path):
    save(tmp_path, 1)
    save_checkpoint(tmp_path, 1, writer("again"), 2)
    assert (tmp_path / "step_000001" / "trainer" / "state.pt").read_text() == "again"
    assert names(tmp_path) == ["latest", "step_000001"]


def test_nothing_saved_yet(tmp_path):
    assert latest_checkpoint(tmp_path / "none") is None
    assert latest_checkpoint(tmp_path) is None


def test_error_of_the_writer_comes_through_and_leaves_nothing(tmp_path):
    def write(folder: Path) -> None:
        (folder / "part").write_text("x")
        raise RuntimeError("size mismatch")

    save(tmp_path, 1)
    with pytest.raises(RuntimeError, match="size mismatch"):
        save_checkpoint(tmp_path, 2, write, 2)
    assert names(tmp_path) == ["latest", "step_000001"]


def test_interrupted_replacement_is_found_and_undone(tmp_path):
    def write(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    replaced = tmp_path / ".replaced-step_000001"
    path = save(tmp_path, 1)
    path.rename(replaced)
    assert latest_checkpoint(tmp_path) == path and names(tmp_path) == ["latest", "step_000001"]
    path.rename(replaced)
    with pytest.raises(CheckpointError):
        save_checkpoint(tmp_path, 2, write, 2)
    assert names(tmp_path) == ["latest", "step_000001"]


def delete(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    os.truncate(path, 50)


def flip(path: Path) -> None:
    path.write_bytes(b"X" + path.read_bytes()[1:])


@pytest.mark.parametrize(("damage", "file", "words"), [
    (delete, "model-2.safetensors", "is incomplete: model-2.safetensors is missing"),
    (truncate, "model-1.safetensors", "is damaged: model-1.safetensors has 50 of 100 bytes"),
    (flip, "trainer/state.pt", "is damaged: the content of trainer/state.pt has changed since it was saved"),
    (delete, "manifest.json", "is incomplete: manifest.json is missing"),
    (truncate, "manifest.json", "has a damaged manifest.json"),
])
def test_damage_is_named_and_the_one_before_is_taken(tmp_path, caplog, damage, file, words):
    save(tmp_path, 1)
    damage(save(tmp_path, 2) / file)
    with pytest.raises(CheckpointError, match=words):
        verify_checkpoint(tmp_path / "step_000002")
    assert latest_checkpoint(tmp_path) == tmp_path / "step_000001"
    assert words in caplog.text and "falling back to" in caplog.text


def test_all_damaged_names_all(tmp_path):
    for step in (1, 2):
        delete(save(tmp_path, step) / "model-1.safetensors")
    with pytest.raises(CheckpointError) as caught:
        latest_checkpoint(tmp_path)
    assert str(caught.value).count("model-1.safetensors is missing") == 2


def test_latest_decides_over_a_later_folder(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2)
    atomic_write_text(tmp_path / "latest", "step_000001\n")  # killed between the rename and this file
    assert latest_checkpoint(tmp_path) == tmp_path / "step_000001"


def test_latest_that_names_nothing_usable(tmp_path, caplog):
    save(tmp_path, 1)
    (tmp_path / "latest").write_text("../etc\n")
    assert latest_checkpoint(tmp_path) == tmp_path / "step_000001"
    assert "'../etc'" in caplog.text


# kill -9

KILL_AT_EVERY_LINE = """
import os, shutil, signal, sys
from pathlib import Path
from tests.run import test_checkpoint
from tests.run.test_checkpoint import save, writer
from veripo_fast.run import checkpoint

base, root, step = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
os.fsync = lambda descriptor: None  # the page cache survives kill -9, and this runs hundreds of saves
left = 0

def trace(frame, event, argument):
    global left
    if frame.f_code.co_filename not in (checkpoint.__file__, test_checkpoint.__file__):
        return None
    if event == "line":
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
    return trace

outcomes = set()
for line in range(10_000):
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(base, root)
    child = os.fork()
    if child == 0:
        left = line
        sys.settrace(trace)
        checkpoint.save_checkpoint(root, step, writer("new"), 2)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL), (line, status)
    path = checkpoint.latest_checkpoint(root)
    content = (path / "trainer" / "state.pt").read_text()
    assert (path / "model-2.safetensors").read_text() == content * 100, (line, path)
    outcomes.add(content)
    save(root, 9)
    after = sorted(p.name for p in root.iterdir())
    assert after[0] == "latest" and after[-1] == "step_000009" and len(after) == 3, (line, after)
    if status == 0:
        break
print(line, sorted(outcomes))
"""


@pytest.fixture
def memory_path(tmp_path):
    """A folder in memory where there is one: disks take milliseconds to rename and remove."""
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=shared) as folder:
        yield Path(folder)


@pytest.mark.parametrize("step", [2, 3], ids=["replace the latest", "add one"])
def test_kill_at_every_line_of_a_save_leaves_a_loadable_latest(memory_path, step):
    for earlier in (1, 2):
        save(memory_path / "base", earlier)
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH}
    folders = [memory_path / "base", memory_path / "root"]
    result = run(sys.executable, "-c", KILL_AT_EVERY_LINE, *folders, str(step), env=environment)
    assert result.returncode == 0, result.stderr
    lines, outcomes = result.stdout.split(maxsplit=1)
    assert int(lines) > 80
    assert outcomes.strip() == "['2', 'new']"


SAVE_FOREVER = """
import sys
from pathlib import Path
from veripo_fast.run.checkpoint import latest_checkpoint, save_checkpoint, checkpoint_step

def write(folder):
    for index in range(20):
        (folder / f"shard-{index}").write_bytes(bytes([step % 251]) * 200_000)

root = Path(sys.argv[1])
latest = latest_checkpoint(root)
step = checkpoint_step(latest) if latest else 0
while True:
    step += 1
    save_checkpoint(root, step, write, keep=2)
    print(step, flush=True)
"""


def test_kill_at_any_time_and_resume(tmp_path):
    steps = []
    for delay in (0.0, 0.01, 0.023, 0.037, 0.051):
        process = start(sys.executable, "-c", SAVE_FOREVER, tmp_path, env={**os.environ, "PYTHONPATH": PYTHONPATH})
        first = int(process.stdout.readline())
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait(PATIENCE_SECONDS)
        process.stdout.close()
        path = latest_checkpoint(tmp_path)
        assert (path / "shard-19").read_bytes()[:1] == bytes([checkpoint_step(path) % 251])
        steps += [first, checkpoint_step(path)]
    assert steps == sorted(steps)


# Storage that fails

SAVE_TOO_MUCH = """
import resource, sys
from pathlib import Path
from veripo_fast.run.checkpoint import save_checkpoint
from veripo_fast.errors import CheckpointError

root, limit, library = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
if library == "torch":
    import torch
elif library == "safetensors":
    import numpy
    from safetensors.numpy import save_file

def small(folder):
    (folder / "model.safetensors").write_bytes(b"x" * 1000)

def large(folder):
    small(folder)
    if library == "torch":
        torch.save({"weight": torch.zeros(1_000_000)}, folder / "optimizer.pt")
    elif library == "safetensors":
        save_file({"weight": numpy.zeros(1_000_000)}, folder / "optimizer.safetensors")
    else:
        (folder / "optimizer.pt").write_bytes(b"x" * 4_000_000)

save_checkpoint(root, 1, small, 2)
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    save_checkpoint(root, 2, large, 2)
except CheckpointError as error:
    print(error)
"""


def check_refusal(result: subprocess.CompletedProcess, root: Path, reason: str) -> None:
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"cannot save the checkpoint {root / 'step_000002'}: ")
    assert reason in result.stdout
    assert result.stdout.endswith(f"; the earlier checkpoint {root / 'step_000001'} is intact\n")
    assert names(root) == ["latest", "step_000001"]
    assert latest_checkpoint(root) == root / "step_000001"


@pytest.mark.parametrize(("library", "reason"), [
    ("python", "File too large"), ("safetensors", "File too large"), ("torch", "torch.save could not write")])
def test_write_past_a_size_limit(tmp_path, python, library, reason):
    check_refusal(python("-c", SAVE_TOO_MUCH, str(tmp_path), "200000", library), tmp_path, reason)


def test_full_disk(tmp_path, python):
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("needs root to mount a small disk; test_write_past_a_size_limit stands in")
    try:
        check_refusal(python("-c", SAVE_TOO_MUCH, str(tmp_path), "0", "python"), tmp_path, "No space left on device")
    finally:
        subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.parametrize("failing", ["_seal", "_publish"])
def test_storage_that_fails_after_the_writer(tmp_path, monkeypatch, failing):
    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(checkpoint, failing, fail)
    with pytest.raises(CheckpointError, match=r"Input/output error .* there is no earlier checkpoint"):
        save(tmp_path, 1)
    assert names(tmp_path) == []


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="Not a directory"):
        save(tmp_path / "file" / "checkpoints", 1)


def test_atomic_write_keeps_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "latest"
    atomic_write_text(path, "old")
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        atomic_write_text(path, "new")
    assert path.read_text() == "old" and names(tmp_path) == ["latest"]
