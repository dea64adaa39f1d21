"""`veripo report RUN RUN ...`: several runs on one page, side by side: scores after each stage, curves, differences in
their configurations, alarms. No script; the runs are told apart by colour and by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veripo_fast.errors import ConfigError, UserError
from veripo_fast.report.alarms import alarms
from veripo_fast.report.charts import Band, Chart, IntervalMark, interval_chart, line_chart
from veripo_fast.report.curves import METRICS
from veripo_fast.report.page import page_environment
from veripo_fast.report.run_data import Row, RunData, finite, load_run
from veripo_fast.report.scores import UNIT, Table, by_mode, interval, percent, tidy
from veripo_fast.run.atomic import atomic_write_bytes
from veripo_fast.text import duration

SCORES = (("Accuracy", "accuracy", "accuracy"), ("Inconsistency", "inconsistency_rate", "inconsistency"))
CURVES = ("reward_mean", "accuracy_mean", "length_mean", "zero_variance_share", "grad_norm", "kl",
          "preference_accuracy", "chosen_drift")
"""Metrics that are drawn where a run has them."""
MOST_RUNS = 6
"""On a page: more lines cannot be told apart."""


@dataclass
class Shown:
    """A run as the page has it."""

    name: str
    run: RunData


def write_runs(folders: Sequence[Path], out: Path | None) -> Path:
    """Write the page of several runs to `out`, a file or a folder (default runs.html).

    Raises:
        UserError: a folder is none of a run, there are too many, or the file cannot be written.
    """
    if len(folders) > MOST_RUNS:
        raise ConfigError(f"{len(folders)} runs do not fit on one page; name {MOST_RUNS} at most")
    shown = _named([load_run(Path(folder)) for folder in folders])
    target = Path("runs.html") if out is None else Path(out)
    target = target / "runs.html" if target.is_dir() else target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_bytes(target, _page(shown).encode(errors="replace"))
    except OSError as error:
        raise UserError(f"the report cannot be written to {target}: {error.strerror or error}") from error
    return target


def _named(runs: Sequence[RunData]) -> list[Shown]:
    """With names that differ: those of the folders above where the folders' own are the same."""
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        names = [f"{run.dir.root.resolve().parent.name}/{run.name}" for run in runs]
    if len(set(names)) < len(names):
        names = [f"{number}: {name}" for number, name in enumerate(names, 1)]
    return [Shown(name, run) for name, run in zip(names, runs, strict=True)]


def _page(shown: Sequence[Shown]) -> str:
    modes = list(dict.fromkeys(mode for one in shown for mode in by_mode(one.run)))
    return page_environment().get_template("runs.html").render(
        names=[one.name for one in shown], scores=_table(shown),
        alarms=[f"{one.name}, {sentence}" for one in shown for sentence in alarms(one.run)],
        notes=[f"{one.name}: {note}" for one in shown for note in one.run.notes],
        modes=[(mode, _charts(shown, mode)) for mode in modes],
        curves=_curves(shown), differences=_differences(shown))


def _table(shown: Sequence[Shown]) -> Table:
    """What came out, and what it cost."""
    header = ["", "steps", "training", "accuracy, start", "end", "inconsistent, start", "end", "tokens, end"]
    rows = []
    for one in shown:
        run = one.run
        mode, evals = next(iter(by_mode(run).items()), ("", []))
        first, last = (evals[0], evals[-1]) if evals else ({}, {})
        steps = sum(len(stage.rows) for stage in run.stages)
        seconds = sum(sum(stage.seconds.values()) for stage in run.stages)
        scores = [_score(row, key, bounds) for _, key, bounds in SCORES for row in (first, last)]
        name = f"{one.name}, {mode}" if mode else one.name
        rows.append([name, f"{steps:,}", duration(seconds) if seconds else "–", *scores, tidy(last.get("length_mean"))])
    return Table("Held-out scores in % (95 % interval)", header, rows)


def _score(row: Row, key: str, bounds: str) -> str:
    low_high = interval(row.get(f"{bounds}_low"), row.get(f"{bounds}_high"))
    return percent(row.get(key)) + (f" ({low_high})" if low_high else "")


def _charts(shown: Sequence[Shown], mode: str) -> list[Chart]:
    """Scores after each stage, a line for each run."""
    stages = list(dict.fromkeys(str(row.get("stage")) for one in shown for row in one.run.evals))
    charts = []
    for title, key, bounds in (*SCORES, ("Tokens", "length_mean", "length_mean")):
        lines: dict[str, list[IntervalMark | None]] = {}
        for one in shown:
            rows = {str(row.get("stage")): row for row in by_mode(one.run).get(mode, [])}
            lines[one.name] = [_mark(rows.get(stage, {}), key, bounds) for stage in stages]
        fixed = None if key == "length_mean" else UNIT
        svg = interval_chart(title, stages, lines, fixed, fixed is UNIT)
        if svg:
            charts.append(Chart(title, "", svg))
    return charts


def _mark(row: Row, key: str, bounds: str) -> IntervalMark | None:
    value = finite(row.get(key))
    return None if value is None else IntervalMark(value, finite(row.get(f"{bounds}_low")),
                                                   finite(row.get(f"{bounds}_high")))


def _curves(shown: Sequence[Shown]) -> list[Chart]:
    """Metrics over the steps, the runs next to each other on one scale."""
    charts = []
    for key in CURVES:
        title, note, fixed = METRICS[key]
        bands = []
        for one in shown:
            rows = [row for stage in one.run.stages for row in stage.rows if key in row]
            values = tuple(finite(row[key]) for row in rows)
            if any(value is not None for value in values):
                bands.append(Band(one.name, tuple(row["global_step"] for row in rows), values))
        if bands:
            charts.append(Chart(title, note, line_chart(title, bands, fixed)))
    return charts


def _differences(shown: Sequence[Shown]) -> Table | None:
    """Options in which the configurations differ."""
    flat = [dict(_flat(one.run.config)) for one in shown]
    names = [name for name in dict.fromkeys(name for one in flat for name in one)
             if name != "run_dir" and len({one.get(name, "–") for one in flat}) > 1]
    if not names:
        return None
    return Table("Options that differ", ["", *(one.name for one in shown)],
                 [[name, *(one.get(name, "–") for one in flat)] for name in names])


def _flat(value: Any, name: str = "") -> list[tuple[str, str]]:
    """Dotted name -> text of every leaf."""
    if isinstance(value, Mapping) and value:
        return [leaf for key, item in value.items() for leaf in _flat(item, f"{name}.{key}" if name else str(key))]
    if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        return [leaf for number, item in enumerate(value) for leaf in _flat(item, f"{name}.{number}")]
    return [(name, str(value))]
