"""The curves and the time section: every metric over its stages, and where the seconds went."""

from __future__ import annotations

from dataclasses import dataclass

from veripo_fast.report.charts import Band, Chart, line_chart, smooth_window
from veripo_fast.report.run_data import COLUMN, Row, RunData, Stage, finite, phases
from veripo_fast.report.scores import UNIT, Table
from veripo_fast.text import duration, number

METRICS: dict[str, tuple[str, str, tuple[float, float] | None]] = {
    "reward_mean": ("Reward", "mean per completion", None),
    "accuracy_mean": ("Accuracy", "mean of the rollouts, 0 to 1", UNIT),
    "format_mean": ("Format", "share of well-formed completions", UNIT),
    "eval_accuracy": ("Held-out accuracy", "inside the stage, greedy, 0 to 1", UNIT),
    "eval_accurate_and_consistent_rate": ("Held-out, accurate and consistent", "inside the stage, greedy", UNIT),
    "eval_format_rate": ("Held-out format", "inside the stage, greedy", UNIT),
    "eval_inconsistency_rate": ("Held-out inconsistency", "inside the stage, greedy", UNIT),
    "eval_length_mean": ("Held-out length", "tokens, inside the stage, greedy", None),
    "preference_accuracy": ("Preference accuracy", "pairs ranked right", UNIT),
    "margin": ("Margin", "implicit reward, chosen − rejected", None),
    "chosen_logprobs_mean": ("Chosen logprobs", "mean per token, nats", None),
    "rejected_logprobs_mean": ("Rejected logprobs", "mean per token, nats", None),
    "chosen_drift": ("Chosen drift", "policy − reference, per token", None),
    "length_mean": ("Length", "tokens per completion", None),
    "finished_share": ("Finished", "share that ended by itself", UNIT),
    "zero_variance_share": ("Zero-variance groups", "share of the groups", UNIT),
    "zero_reward_steps": ("Steps of reward 0", "so far in the stage", None),
    "steps_without_signal": ("Steps without signal", "in a row", None),
    "collapsed_steps": ("Collapsed steps", "so far in the stage", None),
    "loss": ("Loss", "", None),
    "kl": ("KL to the reference", "nats per token", None),
    "grad_norm": ("Gradient norm", "before clipping", None),
    "grad_norm_tower": ("Gradient norm of the tower", "before clipping", None),
    "grad_norm_merger": ("Gradient norm of the mergers", "before clipping", None),
    "grad_norm_language_model": ("Gradient norm of the language model", "before clipping", None),
    "grad_norm_head": ("Gradient norm of the head", "before clipping", None),
    "clip_share": ("Clipped tokens", "share of tokens", None),
    "ratio_max": ("Largest ratio", "policy / old", None),
    "parity_max": ("Parity", "largest |trainer − engine|, nats", None),
    "router_mismatch": ("Router mismatch", "share of (token, layer)", UNIT),
    "router_unknown": ("Experts unknown", "share of (token, layer)", UNIT),
    "learning_rate": ("Learning rate", "", None),
    "packed_tokens": ("Packed tokens", "per optimizer step", None),
    "engine_parity_max": ("Parity gate", "largest |trainer − engine| of its prompts, nats", None),
    "sync_bytes": ("Bytes of a sync", "trainer to engine", None),
    "sampled_tokens_per_second": ("Tokens sampled", "per second of the step", None),
    "trained_tokens_per_second": ("Tokens trained", "per second of the update", None),
    "flops": ("FLOPs", "tower, rollout and update", None),
    "needed_share": ("Needed FLOPs", "share of those done", UNIT),
    "mfu": ("MFU", "of the dense bfloat16 peak, over the step", UNIT),
}
"""Known metrics in drawing order: title, what the axis shows, fixed range. Other numeric keys are drawn after them."""
NO_METRIC = {"global_step", "step", "seconds", "step_seconds"}
PHASES = ("decode", "vision", "sync", "rollout", "parity", "reward", "verify", "reference", "forward", "update",
          "checkpoint", "eval")
"""Known phases in the order of the data flow; others follow."""
KINDS = {"sft": "SFT", "grpo": "GRPO", "dpo": "DPO"}


@dataclass
class Curves:
    """The charts of one kind of stage."""

    kind: str
    title: str
    window: int
    charts: list[Chart]
    constant: list[str]
    """Metrics that never changed, as text."""


@dataclass
class TimeBar:
    """Where one stage spent its time."""

    stage: str
    total: str
    segments: list[tuple[str, int, float, str]]
    """(phase, colour number, percent of the longest stage, text)."""


def curves(run: RunData) -> list[Curves]:
    """Every numeric metric, drawn per kind of stage."""
    return [_curves_of(kind, stages) for kind in dict.fromkeys(stage.kind for stage in run.stages)
            if (stages := run.of_kind(kind))]


def _curves_of(kind: str, stages: list[Stage]) -> Curves:
    rows = [row for stage in stages for row in stage.rows]
    present = [key for key in dict.fromkeys(k for row in rows for k in row) if key not in NO_METRIC
               and any(finite(row.get(key)) is not None for row in rows)]
    result = Curves(kind, KINDS.get(kind, kind), smooth_window(max(len(stage.rows) for stage in stages)), [], [])
    for key in [k for k in METRICS if k in present] + [k for k in present if k not in METRICS]:
        note = "mean per completion, before its weight" if key.startswith(COLUMN) else ""
        title, note, fixed = METRICS.get(key, (key.replace("_", " ").capitalize(), note, None))
        bands = [_band(stage, [row for row in stage.rows if key in row], key) for stage in stages]
        _add_chart(result, title, note, [band for band in bands if any(v is not None for v in band.values)], fixed)
    seconds = [Band(stage.name, _steps(stage.rows), tuple(sum(phases(row).values()) for row in stage.rows))
               for stage in stages]
    _add_chart(result, "Step time", "seconds, all phases", seconds, None)
    return result


def _band(stage: Stage, rows: list[Row], key: str) -> Band:
    """The rows that have the key: null where it was not finite, left out where it was not recorded."""
    return Band(stage.name, _steps(rows), tuple(finite(row[key]) for row in rows))


def _steps(rows: list[Row]) -> tuple[int, ...]:
    return tuple(row["global_step"] for row in rows)


def _add_chart(to: Curves, title: str, note: str, bands: list[Band], fixed: tuple[float, float] | None) -> None:
    known = [v for band in bands for v in band.values if v is not None]
    if len(set(known)) == 1 and all(None not in band.values for band in bands):
        if known[0] or title != "Step time":
            to.constant.append(f"{title.lower()} {number(known[0])}")
        return
    to.charts.append(Chart(title, note, line_chart(title, bands, fixed), number(known[-1])))


def phase_order(run: RunData) -> list[str]:
    """Phases that occur, in the order of the data flow."""
    found = dict.fromkeys(phase for stage in run.stages for phase in stage.seconds)
    return [p for p in PHASES if p in found] + [p for p in found if p not in PHASES]


def time_bars(run: RunData) -> list[TimeBar]:
    """One stacked bar per stage, all on the scale of the longest."""
    order, ran = phase_order(run), [stage for stage in run.stages if stage.seconds]
    longest = max((sum(stage.seconds.values()) for stage in ran), default=0.0)
    return [TimeBar(stage.name, duration(sum(stage.seconds.values())),
                    [(phase, order.index(phase), stage.seconds[phase] / longest * 100,
                      f"{phase} {duration(stage.seconds[phase])}") for phase in order if stage.seconds.get(phase)])
            for stage in ran if longest]


def time_table(run: RunData) -> Table | None:
    """Time per phase and stage, in one unit so that the columns compare, and the share of the whole."""
    ran = [stage for stage in run.stages if stage.seconds]
    total = sum(sum(stage.seconds.values()) for stage in ran)
    if not total:
        return None
    title, unit = ("Minutes", 60.0) if total >= 2 * 3600 else ("Seconds", 1.0)

    def line(name: str, values: list[float]) -> list[str]:
        cells = [f"{value / unit:,.1f}" if value else "–" for value in (*values, sum(values))]
        return [name, *cells, f"{sum(values) / total * 100:.1f} %"]

    rows = [line(phase, [stage.seconds.get(phase, 0.0) for stage in ran]) for phase in phase_order(run)]
    rows.append(line("all", [sum(stage.seconds.values()) for stage in ran]))
    return Table(title, ["", *(stage.name for stage in ran), "total", "share"], rows)
