"""The steps of each stage as one bar: phases, what ranks wait for, and what no phase holds, as shares of a step."""

from __future__ import annotations

from dataclasses import dataclass

from veripo_fast.errors import UserError
from veripo_fast.report.curves import phase_order
from veripo_fast.report.run_data import RunData
from veripo_fast.report.scores import Table
from veripo_fast.report.timeline import REST, StageTimes, in_order, is_wait, read_windows, stage_times
from veripo_fast.schedule.timeline import FOR_CHECKPOINT, FOR_MEDIA, FOR_RANKS
from veripo_fast.text import duration, plural

_KINDS = {FOR_MEDIA: "idle media", FOR_RANKS: "idle ranks", FOR_CHECKPOINT: "idle checkpoint", REST: "rest"}
"""What is no phase -> its class in the style sheet."""


@dataclass
class StepBar:
    """A stage's steps."""

    stage: str
    step: str
    segments: list[tuple[str, float, str]]
    """(class in the style sheet, percent of a step, text)."""


@dataclass
class StepBars:
    """The bars with what explains them."""

    bars: list[StepBar]
    legend: list[tuple[str, str]]
    """(class in the style sheet, name)."""
    table: Table


def step_bars(run: RunData) -> StepBars | None:
    """One bar per stage; None where the run has no timeline, as those of older versions."""
    try:
        stages = stage_times(read_windows(run.dir.root))
    except UserError:
        return None
    names = list(dict.fromkeys(part for stage in stages for part in stage.parts))
    parts = [*in_order(name for name in names if name not in _KINDS), *(name for name in _KINDS if name in names)]
    known = phase_order(run)
    order = [*known, *(part for part in parts if part not in known and part not in _KINDS)]
    classes = {part: _KINDS.get(part) or f"p{order.index(part) % 10}" for part in parts}
    bars = [StepBar(stage.name, duration(stage.step_seconds), [
        (classes[part], stage.share(part) * 100, f"{part} {duration(stage.mean(part))}, {_percent(stage.share(part))}")
        for part in parts if stage.share(part) > 0]) for stage in stages]
    return StepBars(bars, [(classes[part], part) for part in parts], _table(stages, parts))


def _table(stages: list[StageTimes], parts: list[str]) -> Table:
    """Shares of a step by stage; with several ranks, how much of it slowest ranks take longer than median ones."""
    rows = [[part, *(_percent(stage.share(part)) if stage.share(part) else "–" for stage in stages)] for part in parts]
    if any(is_wait(part) for part in parts):
        rows.append(["idle", *(_percent(stage.idle_share) for stage in stages)])
    if max(count for stage in stages for count in stage.ranks) > 1:
        rows.append(["stragglers", *(_percent(stage.straggler_share) for stage in stages)])
        rows.append(["slowest rank", *(_slowest_rank(stage) for stage in stages)])
    rows.append(["a step takes", *(duration(stage.step_seconds) for stage in stages)])
    rows.append(["the longest", *(_longest(stage) for stage in stages)])
    ranks = sorted({count for stage in stages for count in stage.ranks})
    return Table(f"Share of a step, mean over {' and '.join(plural(count, 'rank') for count in ranks)}",
                 ["", *(stage.name for stage in stages)], rows)


def _slowest_rank(stage: StageTimes) -> str:
    """Which rank is most often behind the others, in the phase that loses most by it."""
    phase = max(stage.parts, key=lambda part: stage.lag(part)[0])
    seconds, rank = stage.lag(phase)
    return f"{rank} in {phase}" if seconds else "–"


def _longest(stage: StageTimes) -> str:
    step = max(stage.steps, key=lambda one: one.seconds)
    return f"{duration(step.seconds)} (step {step.global_step:,})"


def _percent(share: float) -> str:
    return f"{share * 100:.1f} %"
