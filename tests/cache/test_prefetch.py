"""Decoding ahead: bounds, one slot per video, clean ends; and a run does not depend on it."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import policies, runs
from tests.support.children import PATIENCE_SECONDS, wait_until
from veripo_fast.cache.prefetch import MediaSlots
from veripo_fast.config.inputs import VideoConfig
from veripo_fast.errors import MediaError
from veripo_fast.model import encoding
from veripo_fast.rollout.torch_engine import TorchEngine
from veripo_fast.run.folder import RunDir
from veripo_fast.run.metrics import read_records
from veripo_fast.trainer import train
from veripo_fast.types import Media, Prompt, Video

SIZE = 10


class Gate:
    """A fetch function that stands at a gate: `opened` lets named videos through; records what began."""

    def __init__(self) -> None:
        self.began: list[str] = []
        self.running = self.most = 0
        self._open: set[str] = set()
        self._changed = threading.Condition()

    def open(self, *names: str) -> None:
        with self._changed:
            self._open.update(names)
            self._changed.notify_all()

    def fetch(self, prompt: Prompt) -> str:
        name = prompt.prompt_id
        with self._changed:
            self.began.append(name)
            self.running += 1
            self.most = max(self.most, self.running)
            self._changed.notify_all()
            self._changed.wait_for(lambda: name in self._open, PATIENCE_SECONDS)
            self.running -= 1
        if name == "bad":
            raise MediaError("bad.mp4 is damaged")
        if name == "bug":
            raise ZeroDivisionError(name)
        return name.upper()

    def wait(self, count: int) -> list[str]:
        """The first `count` that began."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.began) >= count, PATIENCE_SECONDS), self.began
        time.sleep(0.05)  # one more would begin now
        assert len(self.began) == count, self.began
        return self.began


def wishes(names: str) -> dict[tuple[Media, ...], Prompt]:
    prompts = [policies.prompt_of(Video(name), prompt_id=name) for name in names.split()]
    return {prompt.media: prompt for prompt in prompts}


def taken(slots: MediaSlots, names: str) -> list[object]:
    return list(slots.take(wishes(names)).values())


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def slots_of(gate: Gate) -> Iterator[Callable[..., MediaSlots]]:
    made: list[MediaSlots] = []

    def make(max_bytes: int = 1000, workers: int = 2, held: int = SIZE) -> MediaSlots:
        made.append(MediaSlots(VideoConfig(workers=workers), gate.fetch, max_bytes=max_bytes,
                               most_bytes=lambda prompt: 99 * SIZE if prompt.prompt_id == "huge" else 2 * SIZE,
                               nbytes=lambda result: held))
        return made[-1]

    yield make
    gate.open(*"abcdefgh", "bad", "bug", "huge")
    for slots in made:
        slots.close()


def test_as_many_run_as_there_are_threads_and_in_order(slots_of: Callable[..., MediaSlots], gate: Gate) -> None:
    slots = slots_of()
    slots.ahead(wishes("a b c d"))
    assert sorted(gate.wait(2)) == ["a", "b"]
    gate.open("b")
    assert gate.wait(3)[2] == "c"
    gate.open("a", "c", "d")
    gate.wait(4)
    assert taken(slots, "d b a c") == ["D", "B", "A", "C"]
    assert len(gate.began) == 4 and gate.most == 2 and slots.held_bytes == 0


def test_bytes_bound_what_is_fetched_ahead(slots_of: Callable[..., MediaSlots], gate: Gate) -> None:
    """Room for 4: a and b count 2 each until they are there, then 1."""
    slots = slots_of(max_bytes=4 * SIZE, workers=8)
    gate.open(*"abcdefgh")
    slots.ahead(wishes("a b c d e f"))
    assert sorted(gate.wait(3)) == ["a", "b", "c"], "3 are held, and the next might take 2"
    assert slots.held_bytes == 3 * SIZE
    assert taken(slots, "a") == ["A"]
    assert gate.wait(4)[3] == "d" and slots.held_bytes == 3 * SIZE
    assert taken(slots, "b c d e f") == ["B", "C", "D", "E", "F"]
    assert sorted(gate.began) == list("abcdef") and slots.held_bytes == 0


def test_who_asks_for_media_in_flight_waits_for_its_slot(slots_of: Callable[..., MediaSlots], gate: Gate) -> None:
    slots = slots_of()
    slots.ahead(wishes("a b c"))
    gate.wait(2)
    threading.Timer(0.1, gate.open, "abc").start()
    assert taken(slots, "c a") == ["C", "A"]
    assert taken(slots, "b") == ["B"]
    assert sorted(gate.began) == ["a", "b", "c"]
    assert taken(slots, "a") == ["A"] and len(gate.began) == 4, "a slot is taken once"


def test_errors_come_where_the_media_are_taken(slots_of: Callable[..., MediaSlots], gate: Gate) -> None:
    slots = slots_of()
    gate.open("a", "bad", "bug")
    slots.ahead(wishes("bad a bug"))
    gate.wait(3)
    bad, good = taken(slots, "bad a")
    assert isinstance(bad, MediaError) and str(bad) == "bad.mp4 is damaged" and good == "A"
    with pytest.raises(ZeroDivisionError, match="bug"):
        taken(slots, "bug")


def test_what_is_no_longer_wanted_gives_its_bytes_back(slots_of: Callable[..., MediaSlots], gate: Gate) -> None:
    slots = slots_of()
    gate.open("a", "b")
    slots.ahead(wishes("a b c d e"))
    gate.wait(4)
    slots.ahead(wishes("b f"))  # a is dropped, b stays, c and d still run, e never begins
    gate.open("c", "d", "f")
    assert gate.wait(5)[4] == "f"
    assert taken(slots, "b f") == ["B", "F"]
    slots.ahead({})
    assert slots.held_bytes == 0 and len(gate.began) == 5


def test_media_that_may_be_larger_than_the_room_are_left_out(slots_of: Callable[..., MediaSlots], gate: Gate,
                                                             caplog: pytest.LogCaptureFixture) -> None:
    slots = slots_of(max_bytes=50)
    gate.open("huge", "a")
    with caplog.at_level(logging.WARNING):
        slots.ahead(wishes("huge a"))
        assert gate.wait(1) == ["a"]
        slots.ahead(wishes("a huge"))
    assert [record.message for record in caplog.records] == [
        "huge may take 990 bytes, more than cache.prefetch_bytes 50: it is not decoded ahead"]
    assert taken(slots, "huge") == ["HUGE"]


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("veripo-")]


def test_the_end_waits_for_what_runs_and_starts_nothing(slots_of: Callable[..., MediaSlots], gate: Gate) -> None:
    slots = slots_of()
    slots.ahead(wishes("a b c d"))
    gate.wait(2)
    threading.Timer(0.1, gate.open, "abcd").start()
    slots.close()
    assert sorted(gate.began) == ["a", "b"] and threads() == []


# -- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The training file of the tests, and two records whose videos cannot be read."""
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    (path.parent / "page.mp4").write_text("<!DOCTYPE html><html></html>")
    records = [json.loads(line) for line in (runs.corpus() / "train.jsonl").read_text().splitlines()]
    for record in records:
        if "path" in record:
            record["path"] = str(runs.corpus() / record["path"])
    records[3:3] = [{"problem_id": f"page-{n}", "problem": "What?", "answer": "yes", "path": "page.mp4"} for n in "ab"]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def options(data: str, **changes: object) -> dict:
    return {"data__train": [data], "eval__at": "never", "grpo__steps": 3, "grpo__prompts_per_step": 3,
            "stages": [{"kind": "grpo"}]} | changes


@pytest.mark.parametrize("freeze", [True, False])
def test_a_run_is_bitwise_the_same_without_it(tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch,
                                              freeze: bool) -> None:
    """Frozen and trained tower; with it, a step's videos are decoded while the policy generates for the step before.

    What is fetched ahead stands still until then, and the policy waits for it.
    """
    go, generating, early, left = threading.Event(), threading.Event(), [], []
    fetched: list[MediaSlots] = []
    plain_decode, plain_generate = encoding.decode, TorchEngine.generate
    plain_ahead, plain_take = MediaSlots.ahead, MediaSlots.take

    def ahead_of(slots: MediaSlots, prompts: dict) -> None:
        fetched[:] = [slots]
        if prompts:
            go.clear()
        plain_ahead(slots, prompts)

    def take(slots: MediaSlots, prompts: dict) -> object:
        go.set()
        return plain_take(slots, prompts)

    def decode(*arguments: object) -> object:
        assert go.wait(PATIENCE_SECONDS)
        if generating.is_set():
            early.append(arguments)
        return plain_decode(*arguments)

    def generate(*arguments: object, **named: object) -> object:
        generating.set()
        go.set()
        wait_until(lambda: all(slot.future.done() for slot in [*fetched[0]._slots.values()]), "videos of the next step")
        generating.clear()
        return plain_generate(*arguments, **named)

    monkeypatch.setattr(MediaSlots, "ahead", ahead_of)
    monkeypatch.setattr(MediaSlots, "take", take)
    monkeypatch.setattr(encoding, "decode", decode)
    monkeypatch.setattr(TorchEngine, "generate", generate)
    for ahead in (256, 0):
        folder = tmp_path / str(ahead)
        train(runs.config(folder, **options(data, model__freeze_vision=freeze, cache__prefetch_prompts=ahead,
                                            stages=[{"kind": "grpo"}, {"kind": "dpo"}])))
        assert threads() == [] and bool(early) == (ahead > 0)
        early.clear()
        run = RunDir(folder)
        rows = read_records(run.metrics)
        left.append(([{k: v for k, v in row.items() if k not in ("seconds", "speed")} for row in rows],
                     run.skipped.read_text(), [path.read_bytes() for path in run.rollout_files("grpo-1")]))
    assert left[0] == left[1] and "page.mp4" in left[0][1]
    assert sum(row["video_decodes"] for row in left[0][0]) >= 3


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_no_thread_outlives_a_run_that_fails(tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch,
                                             error: type[BaseException]) -> None:
    """The error comes while the next videos are being decoded."""
    seen: list[str] = []

    def generate(*arguments: object, **named: object) -> None:
        seen.extend(threads())
        raise error

    monkeypatch.setattr(TorchEngine, "generate", generate)
    with pytest.raises(error):
        train(runs.config(tmp_path / "run", **options(data, cache__folder=str(tmp_path / "cache"))))
    assert any(name.startswith("veripo-media") for name in seen) and threads() == []
