"""docs/metrics.md and the metrics of real runs name the same things."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

from tests.support import policies, ranks, runs
from tests.support.paths import REPOSITORY
from tests.support.run_compare import written
from veripo_fast.run.folder import RunDir
from veripo_fast.run.metrics import MetricsLog, read_records
from veripo_fast.run.trackers import Tracker

TEXT = (REPOSITORY / "docs" / "metrics.md").read_text("utf-8")
ROWS = re.findall(r"^\| `([\w.]+)` \|([^|]*)\| ((?:[^|]|\\\|)*) \|$", TEXT, re.MULTILINE)
"""Name, unit, and what it is."""
NAMED = ("columns", "pairs_by_family")
"""Groups of metrics whose names a configuration chooses."""
ELSEWHERE = {name for name, _, meaning in ROWS if meaning.startswith(("vllm: ", "GPU: "))}
"""Names that a run on a CPU with the torch engine does not write; the code writes them as they stand here."""


def names(record: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in record.items():
        if isinstance(value, dict):
            yield from ({f"{key}.NAME"} if key in NAMED else names(value, f"{prefix}{key}."))
        else:
            yield prefix + key


def written_by(run: Path) -> set[str]:
    return {name for record in read_records(RunDir(run).metrics) for name in names(record)}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """What runs write that turn on whatever adds a name."""
    folder = tmp_path_factory.mktemp("names")
    shown = demonstrations(folder / "shown.jsonl")
    wordings = {"data__train": [str(two_wordings(folder / "wordings.jsonl"))],
                "data__keep_keys": ["problem", "new_questions"], "plan__wordings": 2, "plan__pairing": "all",
                "stages": [{"kind": "grpo"}], "grpo__steps": 1, "eval__at": "never"}
    return (
        trained(folder / "loop", 1, model__path=str(policies.untied_checkpoint("qwen3_vl")), model__freeze_vision=False,
                optimizer__part_norms=True, optimizer__offload=True, grpo__kl_coef=0.05, eval__every=1,
                eval__every_limit=2, reward__on_error="count",
                stages=[{"kind": "sft", "data": [str(shown)]}, {"kind": "grpo"}], sft__epochs=1)
        | trained(folder / "dpo", 1, optimizer__part_norms=False)
        | trained(folder / "contrast", 1, plan__contrast="shuffle", plan__refill=1, grpo__steps=1, eval__at="never",
                  reward__terms=[{"use": "accuracy"}, {"use": "format"}, {"use": "temporal", "weight": 0.3}],
                  stages=[{"kind": "grpo"}])
        | trained(folder / "wordings", 1, **wordings)
        | trained(folder / "online", 1, grpo__dpo_rate=0.1, dpo__guard="nll", eval__at="never",
                  grpo__loss_options={"entropy_coef": 0.01}, stages=[{"kind": "grpo"}])
        | trained(folder / "ranks", 2, stages=[{"kind": "grpo"}], eval__at="never")
        | missed(folder / "missed"))


def trained(folder: Path, size: int, **options: Any) -> set[str]:
    folder.mkdir()
    ended = ranks.train(size, written(runs.config(folder / "run", **options), folder))
    assert ranks.codes(ended) == [0] * size, ended
    return written_by(folder / "run")


def missed(folder: Path) -> set[str]:
    """With a tracker that fails."""
    def start() -> NoReturn:
        raise OSError("offline")

    with MetricsLog(RunDir(folder).metrics, trackers=[Tracker("gone", start)]) as log:
        for step in (1, 2):
            log.log({"global_step": step})
    return written_by(folder)


def demonstrations(path: Path) -> Path:
    rows = [json.loads(line) for line in (runs.corpus() / "train.jsonl").read_text().splitlines()]
    for row in rows:
        if "path" in row:
            row["path"] = str(runs.corpus() / row["path"])
        row["process"] = "<think>it is.</think>"
        row["solution"] = f"<answer>{row['solution'].removeprefix('<answer>').removesuffix('</answer>')}</answer>"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def two_wordings(path: Path) -> Path:
    rows = [json.loads(line) for line in (runs.corpus() / "train.jsonl").read_text().splitlines()]
    for row in rows:
        if "path" in row:
            row["path"] = str(runs.corpus() / row["path"])
        row["new_questions"] = [f"Please say: {row['problem']}"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_every_name_that_is_written_stands_there(found: set[str]) -> None:
    assert len(ROWS) > 80
    assert found - {name for name, _, _ in ROWS} == set()


def test_every_name_that_stands_there_is_written(found: set[str]) -> None:
    assert {name for name, _, _ in ROWS} - found - ELSEWHERE == set()


def test_names_of_elsewhere_are_in_the_code() -> None:
    source = "".join(path.read_text("utf-8") for path in (REPOSITORY / "veripo_fast").rglob("*.py"))
    for name in ELSEWHERE:
        last = name.rsplit(".", 1)[-1]
        assert f'"{last}"' in source or f"'{last}'" in source, name


def test_each_stands_there_once_and_says_something() -> None:
    listed = [name for name, _, _ in ROWS]
    assert sorted(set(listed)) == sorted(listed)
    assert [name for name, _, meaning in ROWS if len(meaning.split()) < 2] == []
    assert TEXT.count("\n| `") == len(ROWS), "a row that the test cannot read"
