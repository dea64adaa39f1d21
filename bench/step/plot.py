"""One figure and one table of the step bench, from the newest line of each kind.

On one thread CPU time is shown, which other processes disturb least; on several, where threads wait for each other,
wall time.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from bench.step.cases import CASES, PEER

OURS = "ours"
Row = dict[str, Any]
COLOURS = {"vision": "#7aa974", "rollout": "#8c9bb0", "reward": "#d9d9d9", "reference": "#e0b354",
           "training": "#c44e52"}
TITLES = {"A": "GRPO, 4 prompts, TRL in one batch, its head at every position",
          "B": "GRPO, 2 prompts, TRL in its fastest batches, its head as on a GPU",
          "C": "GRPO, 1 prompt, vocabulary 151,936, TRL's head as on a GPU",
          "dpo": "DPO, 8 pairs, TRL's head as on a GPU"}


def newest(rows: list[Row]) -> list[Row]:
    """The last line of each kind, in the order of the cases."""
    last = {(row.get("case", {}).get("name"), row["row"], row.get("switch")): row for row in rows}
    both = {name for name, kind, _ in last if kind == PEER}
    order = [*CASES, None]
    return sorted((row for (name, kind, _), row in last.items() if kind != OURS or name not in both),
                  key=lambda row: (order.index(row.get("case", {}).get("name")), row["row"] not in (PEER, OURS)))


def ratio(row: Row, part: str, which: str = "median") -> float:
    """Ratio of a part of the step: its median over the rounds, min or max."""
    value: float = row[f"{part}_{'cpu_' if row['threads'] == 1 else ''}ratio_{which}"]
    return value


def spread(row: Row, part: str) -> str:
    """The median with its smallest and largest."""
    return f"{ratio(row, part):.1f} ({ratio(row, part, 'min'):.1f} to {ratio(row, part, 'max'):.1f})"


def seconds_of(row: Row, side: str) -> dict[str, list[float]]:
    """Seconds of the phases of a side, round by round."""
    found: dict[str, list[float]] = row[f"{side}_{'cpu_' if row['threads'] == 1 else ''}seconds"]
    return found


def measured_on(rows: list[Row]) -> str:
    """What the times are."""
    threads = sorted({row["threads"] for row in rows})
    return "CPU time, one core" if threads == [1] else f"{' or '.join(map(str, threads))} threads"


def table(rows: list[Row]) -> str:
    """The cases as lines of a Markdown table: the peer's time and memory over ours."""
    rows = [row for row in newest(rows) if row["row"] == PEER]
    lines = [f"| TRL's step over ours ({measured_on(rows)}) | whole step | training | rollout | memory of training |",
             "|---|---|---|---|---|"]
    for row in rows:
        parts = [spread(row, part) if f"{part}_ratio_median" in row else ""
                 for part in ("step", "training", "rollout")]
        lines.append(" | ".join([f"| {TITLES[row['case']['name']]}", *parts, f"{row['training_memory_ratio']:.1f} |"]))
    return "\n".join(lines)


def plot(rows: list[Row], path: Path) -> Path:
    """Draw the lines into a PNG: phases of both sides, and the step without each fast path."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = newest(rows)
    names = [name for name in CASES if any(row.get("case", {}).get("name") == name for row in rows)]
    figure, axes = pyplot.subplots(len(names), 2, squeeze=False, layout="constrained",
                                   figsize=(12, 0.8 + 1.75 * len(names)), gridspec_kw={"width_ratios": [3, 2]})
    for name, (left, right) in zip(names, axes, strict=True):
        own = [row for row in rows if row.get("case", {}).get("name") == name]
        _phases(left, own[0])
        _switches(right, [row for row in own if row["row"] in ("with", "without")])
        left.set_title(f"{name}: {TITLES[name]}", fontsize=9, loc="left")
        for axis in (left, right):
            axis.tick_params(labelsize=8)
            axis.spines[["top", "right"]].set_visible(False)
    axes[-1][0].set_xlabel("time over our whole step; peaks are of training", fontsize=8)
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=colour) for colour in COLOURS.values()]
    figure.legend(handles, COLOURS, ncols=len(COLOURS), fontsize=8, frameon=False, loc="outside lower center")
    first = rows[0]
    peer = f", TRL {first['versions']['trl']}" if "trl" in first["versions"] else ""
    figure.suptitle(f"{first['device'].split(',')[0]}, {measured_on(rows)}{peer}: medians over paired rounds",
                    fontsize=10)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def _phases(axis: Any, row: Row) -> None:
    """Bars of both sides, phase after phase, in units of our whole step."""
    sides = [side for side in ("peer", "ours") if f"{side}_seconds" in row]
    whole = sum(statistics.median(values) for values in seconds_of(row, "ours").values())
    for place, side in enumerate(sides):
        end = 0.0
        for phase, colour in COLOURS.items():
            if phase in seconds_of(row, side):
                width = statistics.median(seconds_of(row, side)[phase]) / whole
                axis.barh(place, width, left=end, color=colour)
                end += width
        axis.annotate(f"{end:.1f}x, {row[f'{side}_peak_mib']['training']:,} MiB", (end, place), (5, 0),
                      textcoords="offset points", va="center", fontsize=8)
    axis.set_yticks(range(len(sides)), ["TRL" if side == "peer" else "veripo" for side in sides])
    axis.margins(x=0.3)


def _switches(axis: Any, rows: list[Row]) -> None:
    """A bar for each switch."""
    if not rows:
        axis.set_axis_off()
        return
    rows = rows[::-1]
    values = [ratio(row, "step") for row in rows]
    axis.barh(range(len(rows)), values, color="#8c9bb0")
    for place, value in enumerate(values):
        axis.annotate(f"{value:.2f}x", (value, place), (5, 0), textcoords="offset points", va="center", fontsize=8)
    axis.set_yticks(range(len(rows)), [f"{row['row']} {row['switch']}" for row in rows])
    axis.set_title("our step without one fast path (with one more), over our step", fontsize=9, loc="left")
    axis.axvline(1, color="black", linewidth=0.8)
    axis.margins(x=0.2)
