"""The timeline of real runs: of one process and of two ranks, of one that was killed, and of one that wants none."""

from __future__ import annotations

import json
import signal
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.support import ranks, runs
from tests.support.run_compare import assert_same, written
from veripo_fast.cli import main
from veripo_fast.config.load import load_config
from veripo_fast.report.timeline import REST, read_windows, stage_times
from veripo_fast.run.folder import RunDir
from veripo_fast.run.metrics import read_records
from veripo_fast.schedule import timeline
from veripo_fast.stages import time_log
from veripo_fast.stages.time_log import cut_after

STAGES = {"grpo-1": {"vision", "sync", "rollout", "reward", "update"}, "dpo-1": {"vision", "update"},
          "grpo-2": {"vision", "sync", "rollout", "reward", "update"}}


@pytest.fixture(params=[1, 2])
def size(request: pytest.FixtureRequest) -> int:
    return request.param


def test_phases_and_waits_make_up_a_step(size: int) -> None:
    rest = whole = 0.0
    for stage in stage_times(read_windows(ranks.whole(size))):
        assert stage.ranks == {size}
        phases = {part for part in stage.parts if not part.startswith("wait for ") and part != REST}
        assert phases == STAGES[stage.name]
        assert ("wait for ranks" in stage.parts) == (size > 1)
        rest += stage.mean(REST) * len(stage.steps)
        whole += stage.step_seconds * len(stage.steps)
    assert rest < 0.05 * whole


def test_every_step_is_there_once_with_every_rank(size: int) -> None:
    rows = list(read_windows(ranks.whole(size)))
    steps = [row for row in rows if row["step"] is not None]
    metrics = read_records(RunDir(ranks.whole(size)).metrics)
    assert [(row["global_step"], row["stage"], row["step"]) for row in steps] == [
        (row["global_step"], row["stage"], row["step"]) for row in metrics]
    assert {len(row["ranks"]) for row in rows} == {size}
    for row, record in zip(steps, metrics, strict=True):
        seconds = (row["ranks"][0]["end_us"] - row["ranks"][0]["start_us"]) / 1e6
        assert seconds == pytest.approx(record["speed"]["step_seconds"], rel=0.1, abs=0.05)
    between = {name for row in rows if row["step"] is None for name in row["ranks"][0]["own_us"]}
    assert between == {"load", "eval", "checkpoint", "verify", "reference"}


def test_windows_of_a_rank_follow_each_other(size: int) -> None:
    """Nothing between the first window and the last is missing, and clocks of one machine agree to within a second."""
    rows = list(read_windows(ranks.whole(size)))
    for rank in range(size):
        for before, after in pairwise(row["ranks"][rank] for row in rows):
            assert 0 <= before["start_us"] <= before["end_us"] <= after["start_us"]
            assert abs(after["offset_us"]) < 1_000_000
    assert [row["ranks"][0]["offset_us"] for row in rows] == [0] * len(rows)


def test_trace_of_a_run(size: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "trace.json"
    assert main(["timeline", str(ranks.whole(size)), "--out", str(out)]) == 0
    assert f"on {size} rank" in capsys.readouterr().out
    events = json.loads(out.read_text(), parse_constant=pytest.fail)["traceEvents"]
    lanes: dict[tuple[int, int], list[tuple[int, int, str]]] = {}
    names = {(event["pid"], event.get("tid")): event["args"]["name"] for event in events
             if event["name"] in ("process_name", "thread_name")}
    assert {pid for pid, _ in names} == set(range(size))
    for event in events:
        assert event["ph"] in "MXC" and event.get("ts", 0) >= 0 and event.get("dur", 0) >= 0
        if event["ph"] == "X":
            lanes.setdefault((event["pid"], event["tid"]), []).append(
                (event["ts"], event["ts"] + event["dur"], event["name"]))
    assert set(lanes) <= set(names)
    for rank in range(size):
        steps = {name for *_, name in lanes[rank, 1] if name.startswith("step ")}
        assert steps == {f"step {number}" for number in range(1, 7)}
    assert {"main", "rewards"} <= set(names.values())
    assert any(name.startswith("veripo-media") for name in names.values())
    for spans in lanes.values():
        assert_nested(spans)


def assert_nested(spans: list[tuple[int, int, str]]) -> None:
    """Each span of a lane lies in another one, or next to it."""
    open_spans: list[tuple[int, int, str]] = []
    for span in sorted(spans, key=lambda one: (one[0], -one[1])):
        while open_spans and open_spans[-1][1] <= span[0]:
            open_spans.pop()
        assert not open_spans or span[1] <= open_spans[-1][1], (open_spans[-1], span)
        open_spans.append(span)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_killed_run_holds_no_step_twice(tmp_path: Path, asynchronous: bool) -> None:
    """Killed where step 2 stands in the timeline and not in the metrics; then where a checkpoint is half written."""
    options = {"checkpoint__asynchronous": asynchronous, "stages": [{"kind": "grpo"}], "grpo__steps": 6,
               "eval__at": "never", "checkpoint__every": 1}
    config = written(runs.config(tmp_path / "run", **options), tmp_path)
    run = RunDir(tmp_path / "run")
    for moment in ("doing in vision of step 1", r"mkdir .*\.tmp-step_000002$",
                   "open .*rollouts/grpo-1/.tmp-step_000003"):
        resume = ["--resume"] if run.config.exists() else []
        assert runs.forks().run("train", "--config", config, *resume, at=moment).code == -signal.SIGKILL
        with run.timeline.open("a") as file:
            file.write('{"global_step": 9, "st')  # what a kill in the middle of a write leaves
    ended = runs.forks().run("train", "--config", config, "--resume")
    assert ended.code == 0, ended.output
    rows = [json.loads(line) for line in run.timeline.read_text().splitlines()]
    assert [row["step"] for row in rows if row["step"] is not None] == [0, 1, 2, 3, 4, 5]
    assert [row["global_step"] for row in rows] == sorted(row["global_step"] for row in rows)
    spans = {(lane, name) for row in rows for rank in row["ranks"] for name, lane, _, _ in rank["spans"]}
    assert (("checkpoint", "write checkpoint") in spans) == asynchronous


def test_cut_after(tmp_path: Path) -> None:
    path = tmp_path / "timeline.jsonl"
    cut_after(path, 3)
    assert not path.exists()
    lines = [json.dumps({"global_step": step}) + "\n" for step in (0, 1, 1, 2, 3)]
    for step, kept in ((0, 1), (1, 3), (2, 4), (9, 5)):
        path.write_text("".join(lines) + '{"global_step": 1')
        cut_after(path, step)
        assert path.read_text() == "".join(lines[:kept])


def test_off(tmp_path: Path) -> None:
    """The same run, without the file; what a run before has left there of later steps is gone too."""
    runs_of: dict[bool, RunDir] = {}
    for wanted in (True, False):
        folder = tmp_path / str(wanted)
        folder.mkdir()
        config = written(runs.config(folder / "run", train__timeline=wanted, stages=[{"kind": "grpo"}],
                                     eval__at="never"), folder)
        assert load_config(config).train.timeline == wanted
        assert runs.forks().run("train", "--config", config).code == 0
        runs_of[wanted] = RunDir(folder / "run")
    assert runs_of[True].timeline.exists() and not runs_of[False].timeline.exists()
    assert_same(runs_of[False].root, runs_of[True].root)


def test_a_large_file_gets_sums_and_then_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                 caplog: pytest.LogCaptureFixture) -> None:
    from veripo_fast.distributed.world import ONE

    monkeypatch.setattr(time_log, "SPAN_BYTES", 1000)
    monkeypatch.setattr(time_log, "MOST_BYTES", 2000)
    log = time_log.TimeLog(tmp_path / "timeline.jsonl", ONE, wanted=True, after=0)
    try:
        for step in range(60):
            log.begin_step("grpo-1", step)
            with timeline.span("update"):
                pass
            log.write([log.taken("grpo-1")], step + 1)
    finally:
        log.close()
    rows: list[dict[str, Any]] = [json.loads(line) for line in log.path.read_text().splitlines()]
    steps = [row["ranks"][0] for row in rows if row["step"] is not None]
    assert 1 < len(steps) < 60 and log.path.stat().st_size < 3000
    assert steps[0]["spans"] and not steps[-1]["spans"]
    assert steps[-1]["dropped"] == 1 and "update" in steps[-1]["own_us"]
    said = [record.message for record in caplog.records]
    assert len(said) == 2 and "1 KB: from here on it gets no spans" in said[0] and "2 KB: it gets nothing" in said[1]


def test_work_of_ranks_is_that_of_one_process() -> None:
    """But for videos that both ranks run through the tower, which only the counts of runs tell."""
    one, two = (read_records(RunDir(ranks.whole(size)).metrics) for size in (1, 2))
    assert all(0 < row["speed"]["needed_share"] <= 1 and "mfu" not in row["speed"] for row in (*one, *two))
    tower: set[int] = set()
    for ours, theirs in zip(two, one, strict=True):
        needed = [round(row["speed"]["flops"] * row["speed"]["needed_share"]) for row in (theirs, ours)]
        more = ours["tower_runs"] - theirs["tower_runs"]
        if more:
            tower.add(round((needed[1] - needed[0]) / more))
        else:
            assert needed[0] == needed[1] and ours["speed"]["flops"] == theirs["speed"]["flops"]
    assert len(tower) <= 1 and all(flops > 0 for flops in tower)
