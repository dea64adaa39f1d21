"""Accuracy and length by difficulty: held-out prompts in groups by how often the first evaluation answered them right.

The groups are made from the first evaluation, so its own values are extreme by construction: prompts that were never
right by bad luck get better without any training. Later evaluations can be compared with each other.
"""

from __future__ import annotations

from dataclasses import dataclass

from veripo_fast.report.charts import Chart, IntervalMark, interval_chart
from veripo_fast.report.run_data import Row, RunData, read_columns
from veripo_fast.report.scores import UNIT, Table, by_mode

LEVELS = ("never right", "under half", "half or more", "always right")


@dataclass
class Difficulty:
    """The charts and the table of a mode."""

    mode: str
    charts: list[Chart]
    table: Table


def difficulty(run: RunData) -> Difficulty | None:
    """Of sampled completions where there are any, else of greedy ones; None with fewer than two stored evaluations."""
    modes = by_mode(run)
    for mode in [name for name in ("sampled", "greedy") if name in modes]:
        stages = [str(row.get("stage")) for row in modes[mode]]
        stored = {stage: rows for stage in stages if (rows := _by_prompt(run, stage, mode))}
        if len(stored) > 1:
            return _shown(mode, stored)
    return None


def level(accuracy: float) -> str:
    """The name of a share of right answers, 0 to 1."""
    if accuracy in (0, 1):
        return LEVELS[3] if accuracy else LEVELS[0]
    return LEVELS[1] if accuracy < 0.5 else LEVELS[2]


_Prompts = dict[str, tuple[float, float]]
"""Prompt -> mean accuracy and mean tokens of its completions."""


def _by_prompt(run: RunData, stage: str, mode: str) -> _Prompts:
    name = str(run.dir.eval_rows(stage, mode).relative_to(run.dir.root))
    found: dict[str, list[Row]] = {}
    for row in read_columns(run, name, ["prompt_id", "accuracy", "token_ids"]):
        found.setdefault(row["prompt_id"], []).append(row)
    return {prompt: (sum(row["accuracy"] for row in rows) / len(rows),
                     sum(len(row["token_ids"]) for row in rows) / len(rows)) for prompt, rows in found.items()}


def _shown(mode: str, stored: dict[str, _Prompts]) -> Difficulty:
    first = next(iter(stored.values()))
    levels = {name: [prompt for prompt, (accuracy, _) in first.items() if level(accuracy) == name] for name in LEVELS}
    levels = {name: prompts for name, prompts in levels.items() if prompts}
    means = {stage: {name: _means([rows[prompt] for prompt in prompts if prompt in rows])
                     for name, prompts in levels.items()} for stage, rows in stored.items()}
    charts = []
    for place, (title, fixed) in enumerate((("Accuracy by difficulty", UNIT), ("Tokens by difficulty", None))):
        lines: dict[str, list[IntervalMark | None]] = {
            stage: [None if mean is None else IntervalMark(mean[place], None, None) for mean in row.values()]
            for stage, row in means.items()}
        charts.append(Chart(title, "", interval_chart(title, list(levels), lines, fixed, fixed is UNIT)))
    rows = [[f"{name} ({len(prompts)})", *(_cell(row[name]) for row in means.values())]
            for name, prompts in levels.items()]
    table = Table(f"Accuracy in % and tokens, {mode}, by accuracy at {next(iter(stored))}", ["", *stored], rows)
    return Difficulty(mode, charts, table)


def _means(values: list[tuple[float, float]]) -> tuple[float, float] | None:
    if not values:
        return None
    accuracy, tokens = zip(*values, strict=True)
    return sum(accuracy) / len(values), sum(tokens) / len(values)


def _cell(mean: tuple[float, float] | None) -> str:
    return "–" if mean is None else f"{mean[0] * 100:.1f}, {mean[1]:,.0f}"
