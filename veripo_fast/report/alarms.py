"""What went wrong in a run as its metrics say it: the first thing on the page."""

from __future__ import annotations

from collections.abc import Callable

from veripo_fast.report.run_data import Row, RunData, Stage, finite, part
from veripo_fast.run.metrics import STEPS_WITHOUT_SIGNAL
from veripo_fast.text import number, plural

_GUARD_DRIFT = 0.2
"""Default of dpo.guard_drift, for runs that name none."""


def alarms(run: RunData) -> list[str]:
    """Sentences, in the order of the stages; empty where nothing is known to be wrong."""
    margin = finite(part(run.config, "dpo").get("guard_drift")) or _GUARD_DRIFT
    return [f"{stage.name}: {sentence}" for stage in run.stages for sentence in _of_stage(stage, margin)]


def _of_stage(stage: Stage, margin: float) -> list[str]:
    said = []
    zero = _first(stage, lambda row: _count(row, "zero_reward_steps") > 0)
    if zero:
        steps = plural(int(_count(stage.rows[-1], "zero_reward_steps")), "step")
        said.append(f"all rewards were 0 in {steps}, first in step {zero['global_step']:,}. Look at its rollouts, and "
                    "at reward and the data's answers.")
    silent = max(stage.rows, key=lambda row: _count(row, "steps_without_signal"), default={})
    if _count(silent, "steps_without_signal") >= STEPS_WITHOUT_SIGNAL:
        said.append(f"no group carried a signal for {int(_count(silent, 'steps_without_signal'))} steps in a row, up "
                    f"to step {silent['global_step']:,}, so nothing was learned.")
    collapsed = _first(stage, lambda row: _count(row, "collapsed_steps") > 0)
    if collapsed:
        steps = plural(int(_count(stage.rows[-1], "collapsed_steps")), "step")
        said.append(f"the policy had collapsed in {steps}, first in step {collapsed['global_step']:,}.")
    low = _first(stage, lambda row: _count(row, "chosen_drift") < -margin)
    if low:
        lowest = min(_count(row, "chosen_drift") for row in stage.rows)
        said.append(f"chosen completions became less likely than under the reference, first in step "
                    f"{low['global_step']:,}, at most by {number(-lowest)} nats per token.")
    skipped = sum(_count(row, "skipped_updates") > 0 for row in stage.rows)
    if skipped:
        said.append(f"optimizer steps were skipped in {plural(skipped, 'step')}: loss or gradient was not finite.")
    return said


def _first(stage: Stage, test: Callable[[Row], bool]) -> Row | None:
    return next(filter(test, stage.rows), None)


def _count(row: Row, name: str) -> float:
    return finite(row.get(name)) or 0.0
