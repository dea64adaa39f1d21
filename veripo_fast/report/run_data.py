"""Reads a run folder for the report, whatever part of it exists so far.

A run may be half done, killed in the middle of a line, or copied without its videos. Nothing here stops at that: what
cannot be read becomes one sentence in `RunData.notes`, which the report prints.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

from veripo_fast.config.schema import default_stage_name
from veripo_fast.errors import UserError
from veripo_fast.run.folder import RunDir
from veripo_fast.run.jsonlines import read_objects
from veripo_fast.text import plural, without_credentials

Row = dict[str, Any]


COLUMN = "reward term "
"""Before the name of a term of the reward, beside accuracy and format."""


@dataclass
class Stage:
    """One stage as configured and as far as it ran."""

    name: str
    kind: str
    expected_steps: int | None = None
    """Steps that the configuration asks for; None when that depends on the number of pairs."""
    learning_rate: float | None = None
    rollouts_from: str = ""
    rows: list[Row] = field(default_factory=list)
    """Lines of metrics.jsonl, in order."""
    finished: bool = False

    @cached_property
    def seconds(self) -> dict[str, float]:
        """Seconds of each phase, summed over the stage."""
        total: dict[str, float] = {}
        for row in self.rows:
            for phase, seconds in phases(row).items():
                total[phase] = total.get(phase, 0.0) + seconds
        return total


@dataclass
class RunData:
    """What is known of a run."""

    name: str
    dir: RunDir
    config: Row
    config_text: str
    stages: list[Stage]
    evals: list[Row]
    skipped: list[Row]
    notes: list[str]
    """Sentences: what could not be read."""

    def of_kind(self, kind: str) -> list[Stage]:
        """Stages of one kind that have metrics."""
        return [stage for stage in self.stages if stage.kind == kind and stage.rows]


def load_run(root: Path) -> RunData:
    """Read everything but rollouts and verdicts. Raises UserError if `root` is not a run folder."""
    if not root.is_dir():
        raise UserError(f"run folder {root} does not exist")
    run = RunDir(root)
    if not run.config.exists() and not run.metrics.exists():
        raise UserError(f"{root} is not a run folder: it holds neither config.yaml nor metrics.jsonl")
    notes: list[str] = []
    config, config_text = _config(run.config, notes)
    metrics = [row for row in read_jsonl(run.metrics, notes) if isinstance(row.get("global_step"), int)]
    evals = _last_of(read_jsonl(run.evals, notes), "stage", "mode")
    stages = _stages(config, _last_of(metrics, "stage", "global_step"))
    _mark_finished(stages, evals)
    return RunData(root.resolve().name, run, config, config_text, stages, evals, read_jsonl(run.skipped, notes), notes)


def read_jsonl(path: Path, notes: list[str]) -> list[Row]:
    """The objects of a JSONL file; lines that are none are counted in one note. A missing file is empty."""
    rows, bad = read_objects(path)
    if bad:
        notes.append(f"{path.name}: {plural(len(bad), 'line')} could not be read (the first is line {bad[0]}).")
    return rows


def finite(value: object) -> float | None:
    """The value as a float, or None when it is no finite number (booleans are none)."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def phases(row: Row) -> dict[str, float]:
    """Phase -> seconds of one metrics line."""
    seconds = row.get("seconds")
    pairs = seconds.items() if isinstance(seconds, Mapping) else ()
    return {str(phase): value for phase, raw in pairs if (value := finite(raw)) is not None}


def _last_of(rows: Iterable[Row], *keys: str) -> list[Row]:
    """One row per key in order of first appearance: a resumed run may repeat a step, and the last line counts."""
    latest: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        latest[tuple(str(row.get(key)) for key in keys)] = row
    return list(latest.values())


def _config(path: Path, notes: list[str]) -> tuple[Row, str]:
    if not path.exists():
        notes.append("config.yaml is missing: stages that have not started are unknown.")
        return {}, ""
    text = without_credentials(path.read_text(encoding="utf-8", errors="replace"))
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError as error:
        notes.append(f"config.yaml could not be read: {str(error).splitlines()[0]}.")
        return {}, text
    return (config if isinstance(config, dict) else {}), text


def part(config: Row, name: str) -> Row:
    """One part of the configuration tree, empty when absent."""
    value = config.get(name)
    return value if isinstance(value, dict) else {}


def _stages(config: Row, metrics: list[Row]) -> list[Stage]:
    """Configured stages in order, then any other that metrics.jsonl knows."""
    stages: dict[str, Stage] = {}
    counts: dict[str, int] = {}
    latest_grpo = ""
    for raw in config.get("stages") or ():
        kind = str(raw.get("kind", "grpo"))
        counts[kind] = counts.get(kind, 0) + 1
        name = str(raw.get("name") or default_stage_name(kind, counts[kind]))
        stages[name] = Stage(name, kind, *_planned(config, raw, kind))
        if kind == "grpo":
            latest_grpo = name
        elif kind == "dpo":
            stages[name].rollouts_from = str(raw.get("rollouts_from") or latest_grpo)
    for row in metrics:
        name = str(row.get("stage", "?"))
        stage = stages.setdefault(name, Stage(name, str(row.get("kind", "grpo"))))
        terms = {COLUMN + term: value for term, value in part(row, "columns").items()}
        flat = {name: value for name, value in row.items() if name not in ("speed", "columns")}
        stage.rows.append(flat | terms | part(row, "speed"))
    return _with_sources(list(stages.values()))


def _with_sources(stages: list[Stage]) -> list[Stage]:
    """Give each dpo stage the latest grpo stage before it, where the configuration named none."""
    latest = ""
    for stage in stages:
        if stage.kind == "grpo":
            latest = stage.name
        elif stage.kind == "dpo":
            stage.rollouts_from = stage.rollouts_from or latest
    return stages


def _planned(config: Row, raw: Row, kind: str) -> tuple[int | None, float | None]:
    """(steps, learning rate) of a configured stage, its own overrides first."""
    own = {str(key).replace("-", "_"): value for key, value in part(raw, "set").items()}

    def setting(name: str) -> Any:
        return own.get(f"{kind}.{name}", part(config, kind).get(name))

    steps = setting("steps") if kind == "grpo" else None
    return (steps if isinstance(steps, int) else None), finite(setting("learning_rate"))


def _mark_finished(stages: list[Stage], evals: list[Row]) -> None:
    """A stage is finished when it ran all its steps, was evaluated, or a later one began."""
    evaluated = {row.get("stage") for row in evals}
    later_began = False
    for stage in reversed(stages):
        all_steps = stage.expected_steps is not None and len(stage.rows) >= stage.expected_steps
        stage.finished = later_began or all_steps or stage.name in evaluated
        later_began = later_began or bool(stage.rows)


def read_columns(run: RunData, name: str, columns: Sequence[str], where: pc.Expression | None = None) -> list[Row]:
    """Columns of a Parquet file in the run folder, of the rows `where` holds; empty, with a note, when unreadable."""
    path = run.dir.root / name
    if not path.exists():
        return []
    try:
        return pq.read_table(path, columns=list(columns), filters=where).to_pylist()
    except (pa.ArrowException, KeyError, OSError) as error:
        run.notes.append(f"{name} could not be read: {str(error).splitlines()[0]}.")
        return []
