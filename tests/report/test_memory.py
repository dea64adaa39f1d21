"""The memory table of the report, from whatever a run folder holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support import report_run
from veripo_fast.report.memory import memory_table
from veripo_fast.report.page import write_report
from veripo_fast.report.run_data import RunData
from veripo_fast.run.folder import RunDir

LINE = {"stage": "grpo-1", "device": "cpu", "peak_bytes": {"load": 1_000_000_000, "reward": 900_000_000},
        "predicted": {"load": {"device": {"weights": 700_000_000, "process": 200_000_000}, "host": {}},
                      "update": {"device": {"weights": 90, "tower": 10, "masters": 50}, "host": {}}},
        "owner_bytes": {"weights": 100, "AdamW's moments": 7}}


def data(root: Path, *lines: object) -> RunData:
    root.mkdir(exist_ok=True)
    (root / "memory.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return RunData("run", RunDir(root), {}, "", [], [], [], [])


def test_phases_and_owners(tmp_path: Path) -> None:
    table = memory_table(data(tmp_path, LINE))
    assert table is not None and table.rows == [
        ["grpo-1", "load", "900 MB", "1 GB", "0.90"], ["grpo-1", "reward", "–", "900 MB", "–"],
        ["grpo-1", "weights alone", "100 B", "100 B", "1.00"], ["grpo-1", "AdamW's moments alone", "–", "7 B", "–"]]


def test_nothing_measured(tmp_path: Path) -> None:
    assert memory_table(data(tmp_path)) is None


@pytest.mark.parametrize("line", [
    {"stage": "g", "peak_bytes": {"load": "many"}}, {"peak_bytes": [1]}, {"stage": 3, "predicted": 4}, {}])
def test_damaged_lines_are_left_out(tmp_path: Path, line: object) -> None:
    assert memory_table(data(tmp_path, line)) is None


def test_an_older_run_without_a_prediction(tmp_path: Path) -> None:
    table = memory_table(data(tmp_path, {"stage": "g", "device": "cpu", "peak_bytes": {"update": 5_000_000}}))
    assert table is not None and table.rows == [["g", "update", "–", "5 MB", "–"]]


def test_it_stands_in_the_page(tmp_path: Path) -> None:
    run = report_run.make_run(tmp_path / "run")
    (run / "memory.jsonl").write_text(json.dumps(LINE) + "\n")
    page = write_report(run).read_text()
    section = page.split('<section id="memory"')[1].split("</section>")[0]
    assert "weights alone" in section and "<td>0.90</td>" in section
