"""`veripo timeline RUN`: where the time of each stage went, on all ranks, from timeline.jsonl.

Of a rank, a step is its phases without the waits inside them, its waits, and a rest. What a phase waits for inside of
FSDP, DeepSpeed or NCCL is time of the phase: only exchanges over the CPU are told apart.
"""

from __future__ import annotations

import logging
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from veripo_fast.errors import UserError
from veripo_fast.report.curves import PHASES
from veripo_fast.run.folder import RunDir
from veripo_fast.run.jsonlines import parse_object
from veripo_fast.schedule.timeline import WAIT
from veripo_fast.text import duration, plural, printable

log = logging.getLogger(__name__)
Row = dict[str, Any]
REST = "rest"
"""What lies in no phase and no wait."""


@dataclass
class Step:
    """A step, in seconds."""

    global_step: int
    seconds: float
    """Of the window, mean over the ranks."""
    parts: dict[str, float]
    """Phases, waits and the rest, mean over the ranks."""
    lags: dict[str, tuple[float, int]]
    """Of each phase: how much longer the slowest rank took than the median one, and which that was."""


@dataclass
class StageTimes:
    """The steps of a stage that were looked at."""

    name: str
    ranks: set[int] = field(default_factory=set)
    """Numbers of ranks: a resume may have changed it."""
    steps: list[Step] = field(default_factory=list)
    between: dict[str, float] = field(default_factory=dict)
    """What was done between steps: phases, waits and rest, seconds in all, mean over the ranks."""

    @property
    def step_seconds(self) -> float:
        """Mean of a step."""
        return statistics.fmean(step.seconds for step in self.steps)

    def mean(self, part: str) -> float:
        """Seconds of a phase or wait in a step."""
        return statistics.fmean(step.parts.get(part, 0.0) for step in self.steps)

    def share(self, part: str) -> float:
        """Of the stage's steps: the share of a phase or wait."""
        return self.mean(part) / self.step_seconds if self.step_seconds else 0.0

    @property
    def parts(self) -> list[str]:
        """Phases in the order of the data flow, waits, and the rest."""
        found = dict.fromkeys(part for step in self.steps for part in step.parts)
        phases = [part for part in found if not is_wait(part) and part != REST]
        return [*in_order(phases), *sorted(filter(is_wait, found)), REST]

    @property
    def idle_share(self) -> float:
        """Share of the steps in which a rank waited, mean over the ranks."""
        return sum(self.share(part) for part in self.parts if is_wait(part))

    def lag(self, phase: str) -> tuple[float, int]:
        """Mean seconds by which the slowest rank of a phase is behind the median one, and which is most often."""
        lags = [step.lags[phase] for step in self.steps if phase in step.lags]
        if not lags:
            return 0.0, 0
        slowest = Counter(rank for lag, rank in lags if lag > 0)
        return sum(lag for lag, _ in lags) / len(self.steps), min(slowest, key=lambda r: (-slowest[r], r), default=0)

    @property
    def straggler_share(self) -> float:
        """Share of the steps that slowest ranks took longer than median ones, over all phases."""
        lags = sum(self.lag(part)[0] for part in self.parts)
        return lags / self.step_seconds if self.step_seconds else 0.0


def is_wait(part: str) -> bool:
    """Whether it is idle time."""
    return part.startswith(WAIT)


def in_order(phases: Iterable[str]) -> list[str]:
    """Phases in the order of the data flow, unknown ones behind them."""
    found = list(phases)
    return [phase for phase in PHASES if phase in found] + [phase for phase in found if phase not in PHASES]


# -- reading ---------------------------------------------------------------------------------------------------------


def read_windows(run: Path, steps: tuple[int, int] | None = None, *, say: bool = True) -> Iterator[Row]:
    """The lines of a run's timeline; those that are none, as a kill may leave one, are counted in the log.

    Args:
        steps: first and last `global_step` wanted.
        say: whether anything goes to the log.

    Raises:
        UserError: there is no such folder, no timeline in it, or no such step.
    """
    path = timeline_path(run)
    bad: list[int] = []
    found, known = 0, (0, 0)
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            row = parse_object(line)
            if row is None or not _is_window(row):
                bad.append(number)
                continue
            if row["step"] is not None:
                known = (known[0] or row["global_step"], row["global_step"])
            if steps is None or steps[0] <= row["global_step"] <= steps[1]:
                found += row["step"] is not None
                yield row
    if bad and say:
        log.warning("%s: %s could not be read (the first is line %d)", path, plural(len(bad), "line"), bad[0])
    if not found and steps is None:
        raise UserError(f"{path} holds no step yet")
    if not found and steps is not None:
        raise UserError(f"{path} holds no step from {steps[0]} to {steps[1]}: it has {known[0]} to {known[1]}")


def timeline_path(run: Path) -> Path:
    """The file. Raises UserError: no folder, or no timeline in it."""
    if not run.is_dir():
        raise UserError(f"run folder {run} does not exist")
    folder = RunDir(run)
    if not folder.config.exists() and not folder.metrics.exists():
        raise UserError(f"{run} is not a run folder: it holds neither config.yaml nor metrics.jsonl")
    if not folder.timeline.exists():
        raise UserError(f"{run} holds no timeline.jsonl: the run is older than timelines, has not begun a step, or was "
                        "started with --train.timeline false")
    return folder.timeline


def step_range(text: str) -> tuple[int, int]:
    """`3-8` or `5`: first and last step. Raises UserError."""
    first, dash, last = text.partition("-")
    if not first.isdecimal() or (dash and not last.isdecimal()):
        raise UserError(f"--steps takes a number or a range such as 3-8, got {text!r}")
    numbers = int(first), int(last or first)
    if numbers[0] > numbers[1]:
        raise UserError(f"--steps {text} ends before it begins")
    return numbers


def _is_window(row: Row) -> bool:
    ranks = row.get("ranks")
    return (isinstance(row.get("global_step"), int) and isinstance(row.get("stage"), str) and "step" in row
            and isinstance(row.get("began"), int | float) and isinstance(ranks, list) and bool(ranks)
            and all(map(_is_rank, ranks)))


_SPAN, _COUNT = (str, str, int, int), (str, int, (int, float))
"""What the entries of `spans` and `counts` are."""


def _is_rank(rank: Any) -> bool:
    if not isinstance(rank, dict):
        return False
    numbers = [rank.get(name) for name in ("start_us", "end_us", "offset_us", "dropped")]
    for name in ("own_us", "waits_us"):
        if not isinstance(rank.get(name), dict):
            return False
        numbers += rank[name].values()
    return (all(isinstance(value, int) for value in numbers) and _all_are(rank.get("spans"), _SPAN)
            and _all_are(rank.get("counts"), _COUNT))


def _all_are(rows: Any, kinds: tuple[Any, ...]) -> bool:
    return isinstance(rows, list) and all(
        isinstance(row, list) and len(row) == len(kinds) and all(map(isinstance, row, kinds)) for row in rows)


# -- sums ------------------------------------------------------------------------------------------------------------


def stage_times(windows: Iterable[Row]) -> list[StageTimes]:
    """The windows of a run by stage, in order; stages without a step are left out."""
    stages: dict[str, StageTimes] = {}
    for row in windows:
        stage = stages.setdefault(row["stage"], StageTimes(row["stage"]))
        parts = _means([_parts(rank) for rank in row["ranks"]])
        if row["step"] is None:
            for name, seconds in parts.items():
                stage.between[name] = stage.between.get(name, 0.0) + seconds
            continue
        stage.ranks.add(len(row["ranks"]))
        lags = {phase: _lag([rank["own_us"].get(phase, 0) / 1e6 for rank in row["ranks"]])
                for phase in dict.fromkeys(name for rank in row["ranks"] for name in rank["own_us"])}
        stage.steps.append(Step(row["global_step"], sum(parts.values()), parts, lags))
    return [stage for stage in stages.values() if stage.steps]


def _parts(rank: Row) -> dict[str, float]:
    """Phases, waits and rest of a rank's window, in seconds."""
    named = {name: value / 1e6 for name, value in (rank["own_us"] | rank["waits_us"]).items()}
    return named | {REST: max((rank["end_us"] - rank["start_us"]) / 1e6 - sum(named.values()), 0.0)}


def _means(ranks: Sequence[dict[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for rank in ranks for name in rank)
    return {name: sum(rank.get(name, 0.0) for rank in ranks) / len(ranks) for name in names}


def _lag(seconds: Sequence[float]) -> tuple[float, int]:
    """How much longer the slowest took than the median one, and its number."""
    slowest = max(seconds)
    return slowest - statistics.median(seconds), seconds.index(slowest)


# -- as text ---------------------------------------------------------------------------------------------------------


def as_text(stages: Sequence[StageTimes]) -> str:
    """A table per stage, and what its slowest step and the time between steps were spent on."""
    return "\n\n".join("\n".join(_stage_lines(stage)) for stage in stages)


def _stage_lines(stage: StageTimes) -> list[str]:
    ranks = " and then ".join(plural(count, "rank") for count in sorted(stage.ranks))
    several = max(stage.ranks) > 1
    lines = [f"{printable(stage.name)}: {plural(len(stage.steps), 'step')}, {duration(stage.step_seconds)} each, on "
             f"{ranks}"]
    heading = f"  {'':<22}{'mean':>12}{'share':>10}"
    lines.append(heading + ("  slowest rank behind the median" if several else ""))
    for part in stage.parts:
        text = f"  {printable(part):<22}{duration(stage.mean(part)):>12}{_percent(stage.share(part)):>10}"
        seconds, rank = stage.lag(part)
        if several and seconds >= 0.0005 * stage.step_seconds:
            text += f"  {duration(seconds)} ({_percent(seconds / stage.step_seconds)}), most often rank {rank}"
        lines.append(text)
    lines.append(f"  idle {_percent(stage.idle_share)}"
                 + (f", stragglers {_percent(stage.straggler_share)}" if several else ""))
    lines.append(f"  {slowest_step(stage)}")
    spent = {name: seconds for name, seconds in stage.between.items() if seconds >= 0.005}
    if spent:
        order = sorted(spent, key=lambda name: (-round(spent[name], 6), name))
        named = [f"{printable(name)} {duration(spent[name])}" for name in order]
        lines.append(f"  between steps {duration(sum(stage.between.values()))}: {', '.join(named)}")
    return lines


def slowest_step(stage: StageTimes) -> str:
    """Which step took longest, and in what."""
    slowest = max(stage.steps, key=lambda step: step.seconds)
    text = f"slowest step {slowest.global_step:,}: {duration(slowest.seconds)}"
    more = {part: seconds - stage.mean(part) for part, seconds in slowest.parts.items()}
    cause = max(more, key=lambda part: more[part])
    if len(stage.steps) == 1 or more[cause] <= 0:
        return text
    return f"{text}, {duration(more[cause])} more than the mean in {printable(cause)}"


def _percent(share: float) -> str:
    return f"{share * 100:.1f} %"
