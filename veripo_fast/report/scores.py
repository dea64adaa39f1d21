"""The headline, the stage strip and the evaluation section, as plain values for the template."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from veripo_fast.evaluation.intervals import paired_difference
from veripo_fast.report.charts import Chart, IntervalMark, interval_chart
from veripo_fast.report.run_data import Row, RunData, Stage, finite, read_columns
from veripo_fast.text import duration, number, plural

UNIT = (0.0, 1.0)
_COLUMNS = ("accuracy", "mra", "format_rate", "inconsistency_rate", "length_mean", "prompts", "completions")


@dataclass
class Figure:
    """One number of the headline."""

    label: str
    value: str
    detail: list[str]
    change: str = ""
    tone: str = ""
    """`good` or `bad` where the direction has a meaning."""


@dataclass
class Table:
    """A small table: header, then rows of text."""

    title: str
    header: list[str]
    rows: list[list[str]]


def percent(value: object) -> str:
    """`63.5`, or a dash when there is no number."""
    known = finite(value)
    return "–" if known is None else f"{known * 100:.1f}"


def tidy(value: object) -> str:
    """`1,200`, `84.3`, or a dash when there is no number."""
    known = finite(value)
    return "–" if known is None else f"{known:,.0f}" if known == int(known) else f"{known:,.1f}"


def interval(low: object, high: object) -> str:
    """`59.1–67.8` in percent, or nothing."""
    return f"{percent(low)}–{percent(high)}" if finite(low) is not None and finite(high) is not None else ""


def headline(run: RunData) -> list[Figure]:
    """The three numbers that a reader came for."""
    return [_accuracy_figure(run), _inconsistency_figure(run), _time_figure(run)]


def _points(change: float) -> str:
    return f"{change * 100:+.1f} points".replace("-", "−")


def by_mode(run: RunData) -> dict[str, list[Row]]:
    """Evaluations by mode, greedy first."""
    modes = sorted({str(row.get("mode", "")) for row in run.evals}, key=lambda mode: (mode != "greedy", mode))
    return {mode: [row for row in run.evals if str(row.get("mode", "")) == mode] for mode in modes}


def by_stage(run: RunData) -> list[tuple[str, list[Row]]]:
    """Evaluations by stage, in the order of the run."""
    stages = dict.fromkeys(str(row.get("stage")) for row in run.evals)
    return [(stage, [row for row in run.evals if str(row.get("stage")) == stage]) for stage in stages]


def other_scores(run: RunData) -> list[str]:
    """Numeric keys of the evaluations that the table has no column of its own for."""
    keys = dict.fromkeys(key for row in run.evals for key in row if finite(row[key]) is not None)
    return [key for key in keys if key not in _COLUMNS and not key.endswith(("_low", "_high"))]


def other_score(key: str, value: object) -> str:
    """A rate in percent, any other number as it is."""
    return percent(value) if key.endswith(("_rate", "_share")) else tidy(value)


def _with_interval(row: Row, key: str) -> str:
    low_high = interval(row.get(f"{key}_low"), row.get(f"{key}_high"))
    return f"{percent(row.get(key))} %" + (f" ({low_high})" if low_high else "")


def _accuracy_figure(run: RunData) -> Figure:
    modes = {mode: known for mode, rows in by_mode(run).items()
             if (known := [row for row in rows if finite(row.get("accuracy")) is not None])}
    if not modes:
        return Figure("Held-out accuracy", "–", ["not evaluated yet"])
    mode, rows = next(iter(modes.items()))
    if len(rows) == 1:
        only = f"{rows[0].get('stage')}: {_with_interval(rows[0], 'accuracy')}"
        return Figure(f"Held-out accuracy, {mode}", f"{percent(rows[0]['accuracy'])} %",
                      [only, "not evaluated again yet"])
    first, last = rows[0], rows[-1]
    gain = last["accuracy"] - first["accuracy"]
    detail = [f"{row.get('stage')}: {_with_interval(row, 'accuracy')}" for row in (first, last)]
    detail += _change_interval(run, str(first.get("stage")), str(last.get("stage")), mode)
    for other, line in list(modes.items())[1:]:
        detail.append(f"{other}: {percent(line[0].get('accuracy'))} → {percent(line[-1].get('accuracy'))} %")
    return Figure(f"Held-out accuracy, {mode}", f"{percent(first['accuracy'])} → {percent(last['accuracy'])} %", detail,
                  _points(gain), "good" if gain > 0 else "bad" if gain < 0 else "")


def _change_interval(run: RunData, first: str, last: str, mode: str) -> list[str]:
    """The interval of the change over the same prompts, where both evaluations kept their completions."""
    before, after = (_prompt_accuracy(run, stage, mode) for stage in (first, last))
    if not before or before.keys() != after.keys():
        return []
    change = paired_difference(list(before.values()), [after[name] for name in before])
    low, high = (f"{value * 100:+.1f}".replace("-", "−") for value in (change.low, change.high))
    return [f"change on the same prompts: {low} to {high} points"]


def _prompt_accuracy(run: RunData, stage: str, mode: str) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    name = str(run.dir.eval_rows(stage, mode).relative_to(run.dir.root))
    for row in read_columns(run, name, ["prompt_id", "accuracy"]):
        found.setdefault(row["prompt_id"], []).append(row["accuracy"])
    return {prompt_id: sum(values) / len(values) for prompt_id, values in found.items()}


def _around_dpo(run: RunData, rows: list[Row]) -> list[tuple[Row, Row]]:
    """(evaluation before, evaluation after) of every dpo stage."""
    names = {stage.name for stage in run.stages if stage.kind == "dpo"}
    return [(rows[i - 1], row) for i, row in enumerate(rows) if i and row.get("stage") in names
            and finite(row.get("inconsistency_rate")) is not None
            and finite(rows[i - 1].get("inconsistency_rate")) is not None]


def _inconsistency_figure(run: RunData) -> Figure:
    modes = {mode: around for mode, rows in by_mode(run).items() if (around := _around_dpo(run, rows))}
    if not modes:
        return Figure("Inconsistency before and after DPO", "–", ["no DPO stage evaluated yet"])
    mode, around = next(iter(modes.items()))
    before, after = around[0]
    change = after["inconsistency_rate"] - before["inconsistency_rate"]
    detail = [f"{row.get('stage')}: {_rate_with_interval(row)}" for row in (before, after)]
    if finite(after.get("no_verdict_rate")) is not None:
        detail.append(f"no verdict: {percent(before.get('no_verdict_rate'))} → {percent(after['no_verdict_rate'])} %")
    detail += [f"{b.get('stage')} → {a.get('stage')}: {percent(b['inconsistency_rate'])} → "
               f"{percent(a['inconsistency_rate'])} %" for b, a in around[1:]]
    detail += [f"{other}: {percent(line[0][0]['inconsistency_rate'])} → {percent(line[0][1]['inconsistency_rate'])} %"
               for other, line in list(modes.items())[1:]]
    return Figure(f"Inconsistency before and after DPO, {mode}",
                  f"{percent(before['inconsistency_rate'])} → {percent(after['inconsistency_rate'])} %", detail,
                  _points(change), "good" if change < 0 else "bad" if change > 0 else "")


def _rate_with_interval(row: Row) -> str:
    low_high = interval(row.get("inconsistency_low"), row.get("inconsistency_high"))
    return f"{percent(row.get('inconsistency_rate'))} %" + (f" ({low_high})" if low_high else "")


def _time_figure(run: RunData) -> Figure:
    spent: Counter[str] = Counter()
    for stage in run.stages:
        spent.update(stage.seconds)
    total = sum(spent.values())
    if not total:
        return Figure("Training time", "–", ["no step recorded yet"])
    steps = plural(sum(len(stage.rows) for stage in run.stages), "step")
    shares = [f"{phase}: {seconds / total * 100:.0f} %" for phase, seconds in spent.most_common(3)]
    return Figure("Training time", duration(total), [f"{steps}, without evaluation", *shares])


def stage_state(stage: Stage) -> str:
    """`done`, `partial` or `waiting`."""
    return "done" if stage.finished else "partial" if stage.rows else "waiting"


def stage_text(stage: Stage) -> str:
    """One line under the stage's name in the strip at the top."""
    if not stage.rows:
        return "no steps" if stage.finished else "not started"
    asked = stage.expected_steps
    steps = f"{len(stage.rows):,} of {plural(asked, 'step')}" if asked and not stage.finished else plural(
        len(stage.rows), "step")
    rate = "" if stage.learning_rate is None else f", lr {number(stage.learning_rate)}"
    return steps + rate


def evaluation_charts(run: RunData) -> list[Chart]:
    """Accuracy, inconsistency and length after each stage."""
    modes, stages = by_mode(run), [stage for stage, _ in by_stage(run)]
    if not stages:
        return []

    def line(rows: list[Row], key: str, bounds: str) -> list[IntervalMark | None]:
        found = {str(row.get("stage")): row for row in rows}
        return [_interval_of(found.get(stage, {}), key, bounds) for stage in stages]

    charts = []
    for title, key, bounds, fixed in (("Accuracy", "accuracy", "accuracy", UNIT),
                                      ("Inconsistency", "inconsistency_rate", "inconsistency", UNIT),
                                      ("Completion length, tokens", "length_mean", "length_mean", None)):
        svg = interval_chart(title, stages, {m: line(rows, key, bounds) for m, rows in modes.items()}, fixed,
                             fixed is UNIT)
        if svg:
            charts.append(Chart(title, "", svg))
    return charts


def _interval_of(row: Row, key: str, bounds: str) -> IntervalMark | None:
    value, low, high = (finite(row.get(name)) for name in (key, f"{bounds}_low", f"{bounds}_high"))
    return None if value is None else IntervalMark(value, low, high)


def type_table(run: RunData) -> Table | None:
    """Accuracy by problem type, in the first mode there is."""
    for mode, rows in by_mode(run).items():
        tables = {str(row.get("stage")): row.get("by_type") or {} for row in rows}
        types = sorted({kind for table in tables.values() for kind in table})
        if types:
            return Table(f"Accuracy by problem type, {mode}, %", ["", *tables],
                         [[kind, *(percent(table.get(kind)) for table in tables.values())] for kind in types])
    return None


def inconsistency_table(run: RunData) -> Table | None:
    """Inconsistent answers after each stage (VerIPO's Fig. 1C), by data source where there are several, with the change
    that each stage made; of the first mode."""
    for mode, rows in by_mode(run).items():
        columns = {str(row.get("stage")): {"all": row.get("inconsistency_rate"),
                                           **(row.get("inconsistency_by_source") or {})} for row in rows}
        names = list(dict.fromkeys(name for column in columns.values() for name in column))
        if len(columns) < 2 or not any(finite(column["all"]) is not None for column in columns.values()):
            continue
        names = ["all"] if len(names) == 2 else [*names[1:], "all"]
        return Table(f"Inconsistent after each stage, {mode}, % (change)", ["", *columns],
                     [[name, *_with_changes([column.get(name) for column in columns.values()])] for name in names])
    return None


def _with_changes(values: list[object]) -> list[str]:
    cells = []
    for before, value in zip([None, *values], values, strict=False):
        one, other = finite(before), finite(value)
        change = "" if one is None or other is None else f" ({other * 100 - one * 100:+.1f})".replace("-", "−")
        cells.append(percent(value) + change)
    return cells


def judge_line(run: RunData) -> str:
    """Who said what is inconsistent, and whether the same judge chose pairs; empty of evaluations that do not say."""
    named = [row for row in run.evals if row.get("judge")]
    if not named:
        return ""
    judges = ", ".join(dict.fromkeys(str(row["judge"]) for row in named))
    if any(row.get("judge_chose_pairs") for row in named):
        return (f"Inconsistent is what the judge \"{judges}\" says, which also chose the pairs that were trained on: a "
                "policy may have learnt to please it. eval.judge names another one.")
    trained = any(row.get("judge_chose_pairs") is False for row in named)
    return f"Inconsistent is what the judge \"{judges}\" says{', which chose no pair of this run' if trained else ''}."


def control_table(run: RunData) -> Table | None:
    """The controls of every evaluation that has some."""
    rows = []
    for row in run.evals:
        controls = row.get("controls")
        for name, one in controls.items() if isinstance(controls, dict) else ():
            low_high = [f"{(finite(one.get(key)) or 0.0) * 100:+.1f}".replace("-", "−")
                        for key in ("gain", "gain_low", "gain_high")]
            rows.append([f"{row.get('stage')}, {row.get('mode')}, {name}", tidy(one.get("prompts")),
                         *(percent(one.get(key)) for key in ("accuracy_whole", "accuracy", "format_rate")),
                         f"{low_high[0]} ({low_high[1]} to {low_high[2]})", percent(one.get("as_well_rate")),
                         percent(one.get("chance"))])
    header = ["", "prompts", "accuracy", "control", "its format", "difference", "as well", "guesses"]
    return Table("Controls, %", header, rows) if rows else None
