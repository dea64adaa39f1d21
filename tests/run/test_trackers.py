"""Trackers beside metrics.jsonl: the real libraries, offline; and one that fails costs its own records alone."""

from __future__ import annotations

import json
import logging
import sqlite3
import struct
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from veripo_fast.config.load import apply_overrides
from veripo_fast.config.schema import Config
from veripo_fast.errors import ConfigError
from veripo_fast.run.metrics import MetricsLog, read_records
from veripo_fast.run.trackers import Tracker, check_trackers, run_id, trackers_of

RECORDS = [{"global_step": step, "stage": "grpo-1", "step": step - 1, "loss": 0.5 / step,
            "speed": {"flops": 2.0 * step}} for step in (1, 2, 3)]
CONFIG = {"seed": 1, "model": {"path": "tiny"}}


def logged(root: Path, names: tuple[str, ...], records: list[dict] = RECORDS) -> list[Tracker]:
    root.mkdir(exist_ok=True)
    trackers = trackers_of(names, "a project", root, CONFIG)
    with MetricsLog(root / "metrics.jsonl", trackers=trackers) as log:
        for record in records:
            log.log(record)
    assert [row["global_step"] for row in read_records(root / "metrics.jsonl")][-len(records):] == [
        record["global_step"] for record in records]
    return trackers


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own reader finds every scalar, with the step of the run as x."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    [tracker] = logged(tmp_path / "run", ("tensorboard", "wandb"))
    assert tracker.missed == 0
    [folder] = (tmp_path / "run" / "wandb").glob("offline-run-*")
    [file] = folder.glob("run-*.wandb")
    assert run_id(tmp_path / "run") in file.name
    deadline = time.monotonic() + 60
    while len(found := wandb_history(file)) < 3 and time.monotonic() < deadline:
        time.sleep(0.1)  # a process of its own writes the file
    assert [row["global_step"] for row in found] == [1, 2, 3]
    assert [row["loss"] for row in found] == [0.5, 0.25, pytest.approx(0.5 / 3)]
    assert [row["speed/flops"] for row in found] == [2.0, 4.0, 6.0]


def wandb_history(file: Path) -> list[dict[str, float]]:
    """What an offline file of W&B holds: its records, in the log format of LevelDB behind a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    rows = []
    for data in leveldb_records(file.read_bytes()[7:]):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows


def leveldb_records(data: bytes, block: int = 1 << 15, first: int = 7) -> Iterator[bytes]:
    """Blocks of 32 KB hold chunks: checksum (4 bytes), length (2), kind (1: whole, 2: first, 3: middle, 4: last)."""
    place, parts = 0, b""
    while place + 7 <= len(data):
        left = block - (place + first) % block
        if left < 7:
            place += left
            continue
        length, kind = struct.unpack("<HB", data[place + 4:place + 7])
        parts = (b"" if kind in (1, 2) else parts) + data[place + 7:place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield parts


def test_wandb_without_a_key_is_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                        caplog: pytest.LogCaptureFixture) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    with caplog.at_level(logging.WARNING):
        [tracker] = logged(tmp_path / "run", ("wandb",))
    assert tracker.missed == 0 and list((tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert caplog.text.count("it notes offline") == 1


def test_trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its database holds every scalar; a process that goes on adds to the same run."""
    import trackio.sqlite_storage as storage
    import trackio.utils as utils

    for module in (storage, utils):
        if hasattr(module, "TRACKIO_DIR"):
            monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")
    root = tmp_path / "run"
    assert [tracker.missed for tracker in logged(root, ("trackio",))] == [0]
    logged(root, ("trackio",), [{"global_step": 4, "loss": 0.1}])
    [database] = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute("select run_name, step, metrics from metrics order by step").fetchall()
    assert {name for name, _, _ in rows} == {f"run-{run_id(root)}"}
    assert [(step, json.loads(text)["loss"]) for _, step, text in rows] == [
        (1, 0.5), (2, 0.25), (3, pytest.approx(0.5 / 3)), (4, 0.1)]


class Fails:
    """A library whose network comes and goes."""

    def __init__(self, at: tuple[int, ...]) -> None:
        self.at, self.taken = at, []

    def log(self, scalars: Mapping[str, float], global_step: int) -> None:
        if global_step in self.at:
            raise OSError("no route to host")
        self.taken.append(global_step)

    def close(self) -> None:
        raise TimeoutError("still sending")


def test_one_that_fails_is_said_once_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    library = Fails((2, 3))
    tracker = Tracker("shaky", lambda: library)
    with caplog.at_level(logging.WARNING), MetricsLog(tmp_path / "m.jsonl", trackers=[tracker]) as log:
        for step in (1, 2, 3, 4):
            log.log({"global_step": step})
    assert library.taken == [1, 4] and tracker.missed == 2
    assert caplog.text.count("shaky failed (OSError: no route to host); the run goes on") == 1
    rows = read_records(tmp_path / "m.jsonl")
    assert [row.get("tracker_misses") for row in rows] == [None, None, 1, 2]
    assert "still sending" in caplog.text


def test_one_that_cannot_begin_is_not_tried_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tries = []

    def start() -> Fails:
        tries.append(1)
        raise ConnectionError("offline\n\x1b[31m")

    tracker = Tracker("gone", start)
    with caplog.at_level(logging.WARNING), MetricsLog(tmp_path / "m.jsonl", trackers=[tracker]) as log:
        for step in (1, 2, 3):
            log.log({"global_step": step})
    assert len(tries) == 1 and tracker.missed == 3
    assert caplog.text.count("the run goes on") == 1 and "gone missed 3 records" in caplog.text
    assert len(read_records(tmp_path / "m.jsonl")) == 3


def test_one_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    check_trackers(("tensorboard", "wandb", "trackio"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_trackers(("tensorboard",))
    with pytest.raises(ConfigError, match=r"wandb, which is not installed; pip install 'veripo-fast\[wandb\]'"):
        check_trackers(("tensorboard", "wandb"))


@pytest.mark.parametrize(("options", "message"), [
    ({"train.trackers": ["wandb", "wandb"]}, "name one twice"),
    ({"train.trackers": ["mlflow"]}, "mlflow"),
    ({"train.project": "mine"}, "project changes nothing without trackio or wandb"),
    ({"train.show_samples": 0}, "show_samples must be greater than 0"),
])
def test_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        apply_overrides(Config(), options)
