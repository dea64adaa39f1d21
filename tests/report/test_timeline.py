"""`veripo timeline` on constructed files: the text to the letter, the trace, and files that are damaged."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from veripo_fast.cli import main
from veripo_fast.report.timeline import read_windows, stage_times
from veripo_fast.run.folder import RunDir


def rank(start: float, end: float, own: dict[str, float], waits: dict[str, float] | None = None, offset: int = 0,
         spans: list[list[Any]] | None = None) -> dict[str, Any]:
    """One rank's part of a line; times in seconds."""
    return {"offset_us": offset, "start_us": int(start * 1e6), "end_us": int(end * 1e6),
            "own_us": {name: int(value * 1e6) for name, value in own.items()},
            "waits_us": {name: int(value * 1e6) for name, value in (waits or {}).items()},
            "spans": [[name, lane, int(first * 1e6), int(last * 1e6)] for name, lane, first, last in spans or []],
            "counts": [["prefetched bytes", int(end * 1e6), 5]], "dropped": 0}


def line(global_step: int, step: int | None, *ranks: dict[str, Any], stage: str = "grpo-1") -> dict[str, Any]:
    return {"global_step": global_step, "stage": stage, "step": step, "began": 1e9, "ranks": list(ranks)}


LINES = [
    line(1, None, rank(0, 4, {"load": 3.0}), rank(0, 4, {"load": 3.0}, {"wait for ranks": 0.5})),
    line(1, 0,
         rank(4, 14, {"vision": 1.0, "rollout": 5.0, "update": 2.0}, {"wait for media": 0.5, "wait for ranks": 1.0},
              spans=[["decode", "media_0", 3.5, 4.5], ["wait for media", "main", 4.0, 4.5],
                     ["vision", "main", 4.0, 5.5], ["rollout", "main", 5.5, 10.5],
                     ["wait for ranks", "main", 10.5, 11.5], ["update", "main", 11.5, 13.5]]),
         rank(4, 14, {"vision": 1.0, "rollout": 6.0, "update": 2.0}, {"wait for media": 0.5},
              spans=[["vision", "main", 4.0, 5.5], ["rollout", "main", 5.5, 11.5], ["update", "main", 11.5, 13.5]],
              offset=400)),
    line(2, None, rank(14, 15, {"checkpoint": 1.0}), rank(14, 15, {}, {"wait for ranks": 1.0}, offset=400)),
    line(2, 1, rank(15, 35, {"vision": 1.0, "rollout": 9.0, "update": 2.0}, {"wait for ranks": 6.0}),
         rank(15, 35, {"vision": 1.0, "rollout": 15.0, "update": 2.0})),
    line(3, 0, rank(36, 38, {"vision": 0.5, "update": 1.5}), stage="dpo-1")]

TEXT = """\
grpo-1: 2 steps, 15.0 s each, on 2 ranks
                                mean     share  slowest rank behind the median
  vision                       1.0 s     6.7 %
  rollout                      8.8 s    58.3 %  1.8 s (11.7 %), most often rank 1
  update                       2.0 s    13.3 %
  wait for media              0.25 s     1.7 %
  wait for ranks               1.8 s    11.7 %
  rest                         1.2 s     8.3 %
  idle 13.3 %, stragglers 11.7 %
  slowest step 2: 20.0 s, 3.2 s more than the mean in rollout
  between steps 5.0 s: load 3.0 s, rest 0.75 s, wait for ranks 0.75 s, checkpoint 0.50 s

dpo-1: 1 step, 2.0 s each, on 1 rank
                                mean     share
  vision                      0.50 s    25.0 %
  update                       1.5 s    75.0 %
  rest                        0.00 s     0.0 %
  idle 0.0 %
  slowest step 3: 2.0 s
"""


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    folder = RunDir(tmp_path / "run")
    folder.root.mkdir()
    folder.config.write_text("stages: []\n")
    folder.timeline.write_text("".join(json.dumps(row) + "\n" for row in LINES))
    return folder


def test_text(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["timeline", str(run.root)]) == 0
    assert capsys.readouterr().out == TEXT


def test_shares_add_up(run: RunDir) -> None:
    for stage in stage_times(read_windows(run.root)):
        assert sum(stage.share(part) for part in stage.parts) == pytest.approx(1)


def test_some_steps(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["timeline", str(run.root), "--steps", "2"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("grpo-1: 1 step, 20.0 s each, on 2 ranks\n") and "load" not in said
    assert main(["timeline", str(run.root), "--steps", "2-9"]) == 0
    assert "dpo-1: 1 step" in capsys.readouterr().out


def test_trace(run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "trace.json"
    assert main(["timeline", str(run.root), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{TEXT}\ntrace: {out} (open it in ui.perfetto.dev)\n"
    events = json.loads(out.read_text())["traceEvents"]
    names = [(e["pid"], e["args"]["name"]) for e in events if e["name"] in ("process_name", "thread_name")]
    assert names == [(0, "rank 0"), (0, "main"), (1, "rank 1"), (1, "main"), (0, "media_0")]
    spans = {(e["pid"], e["tid"], e["name"]): (e["ts"], e["dur"]) for e in events if e["ph"] == "X"}
    assert spans[0, 1, "step 1"] == (4_000_000, 10_000_000)
    assert spans[0, 2, "decode"] == (3_500_000, 1_000_000)
    assert spans[1, 1, "rollout"] == (5_500_200, 6_000_000)  # the middle of the rank's offsets: 0, 400, 400, 0
    assert {e["args"]["value"] for e in events if e["ph"] == "C"} == {5}


def test_trace_of_some_steps_begins_with_them(run: RunDir, tmp_path: Path) -> None:
    """What began before is cut there, and a rank whose clock is ahead comes first."""
    early = line(2, 1, rank(15, 35, {}, spans=[["write", "checkpoint", 1, 16]]), rank(15, 35, {}, offset=-1000))
    run.timeline.write_text("".join(json.dumps(row) + "\n" for row in (*LINES[:3], early)))
    out = tmp_path / "trace.json"
    assert main(["timeline", str(run.root), "--steps", "2", "--out", str(out)]) == 0
    spans = {(e["pid"], e["name"]): (e["ts"], e["dur"]) for e in json.loads(out.read_text())["traceEvents"]
             if e["ph"] == "X"}
    assert spans[0, "write"] == (0, 16_000_000 - 14_000_000 + 300)
    assert spans[0, "step 2"] == (1_000_300, 20_000_000) and spans[1, "step 2"] == (1_000_000, 20_000_000)


@pytest.mark.parametrize(("text", "said"), [
    ("0-0", "holds no step from 0 to 0: it has 1 to 3"), ("4", "holds no step from 4 to 4: it has 1 to 3"),
    ("3-2", "--steps 3-2 ends before it begins"), ("a-b", "--steps takes a number or a range such as 3-8, got 'a-b'"),
    ("-2", "--steps takes a number or a range such as 3-8, got '-2'"), ("2-", "--steps takes a number or a range")])
def test_steps_that_are_none(run: RunDir, capsys: pytest.CaptureFixture[str], text: str, said: str) -> None:
    assert main(["timeline", str(run.root), f"--steps={text}"]) == 2
    complaint = capsys.readouterr().err
    assert said in complaint and complaint.count("\n") == 1


def complaint(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What is said of a command that fails, in one line."""
    assert main(["timeline", *map(str, arguments)]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    return said.err


def test_runs_without_a_timeline(run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nowhere does not exist" in complaint(capsys, tmp_path / "nowhere")
    assert "is not a run folder: it holds neither config.yaml nor metrics.jsonl" in complaint(capsys, tmp_path)
    run.timeline.write_text("")
    assert "timeline.jsonl holds no step yet" in complaint(capsys, run.root)
    run.timeline.unlink()
    assert "holds no timeline.jsonl: the run is older than timelines" in complaint(capsys, run.root)


def test_a_trace_that_cannot_be_written(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    assert "the trace cannot be written to /proc/nowhere/t.json" in complaint(capsys, run.root, "--out",
                                                                              "/proc/nowhere/t.json")


@pytest.mark.parametrize("torn", [
    '{"global_step": 4, "stage": "dpo-1", "st', '{"global_step": 4}\n', "\x00\x00\x00\n", "[1, 2]\n",
    json.dumps(line(4, 1, {"start_us": 0, "end_us": 1})) + "\n", json.dumps(line(4, 1)) + "\n",
    json.dumps(line(4, 1, rank(0, 1, {}) | {"own_us": {"update": "much"}})) + "\n",
    json.dumps(line(4, 1, rank(0, 1, {}) | {"spans": [["update"]]})) + "\n",
    json.dumps(line(4, 1, rank(0, 1, {}) | {"counts": [1]})) + "\n"])
def test_a_line_that_is_none_is_left_out_and_said(run: RunDir, tmp_path: Path, torn: str,
                                                  capsys: pytest.CaptureFixture[str],
                                                  caplog: pytest.LogCaptureFixture) -> None:
    with run.timeline.open("a") as file:
        file.write(torn)
    out = tmp_path / "trace.json"
    assert main(["timeline", str(run.root), "--out", str(out)]) == 0
    assert capsys.readouterr().out.startswith(TEXT)
    assert re.search(r"timeline\.jsonl: 1 line could not be read \(the first is line 6\)", caplog.text)
    assert json.loads(out.read_text())
    assert caplog.text.count("could not be read") == 1


def test_a_name_of_others_moves_no_cursor(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    run.timeline.write_text(json.dumps(line(1, 0, rank(0, 1, {"up\x1b[2Jdate": 1.0}), stage="s\x1b[1m")) + "\n")
    assert main(["timeline", str(run.root)]) == 0
    assert "\x1b" not in capsys.readouterr().out
