"""What measuring a step costs: its phases (time and memory) and its timeline, as a share of the step's wall time.

    python bench/bench_timeline.py [--steps 6] [--rounds 200]

A real run of the demo's policy gives the wall time of a step and how many phases, spans and counters it records. Then
the same calls are timed with nothing in them: a phase with and without a timeline by turns, a span, a counter, and the
line of a whole step put together and appended to the file. One line goes to bench/results/timeline.jsonl.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

if __name__ == "__main__":  # bench/ itself on the path would offer bench/kernels as `kernels`, a Hugging Face package
    sys.path[0] = __file__.rpartition("/bench/")[0]

from bench import recipe
from veripo_fast.config.schema import Config, EvalConfig, StageConfig
from veripo_fast.demo.corpus import write_corpus
from veripo_fast.demo.run import HELDOUT_QUICK, TRAIN_QUICK, demo_config
from veripo_fast.report.timeline import read_windows
from veripo_fast.run.folder import RunDir
from veripo_fast.run.interrupt import StopRequests
from veripo_fast.run.metrics import MetricsLog
from veripo_fast.schedule import timeline
from veripo_fast.schedule.timeline import MAIN, count, span
from veripo_fast.stages.session import Session
from veripo_fast.trainer import train

PHASES = {"vision", "sync", "rollout", "reward", "update"}


def config_of(folder: Path, steps: int) -> Config:
    """The demo at its full batch, one GRPO stage long."""
    config = demo_config(folder, 0, quick=False)
    return replace(config, grpo=replace(config.grpo, steps=steps), eval=EvalConfig(at="never"),
                   stages=(StageConfig("grpo", "grpo-1"),))


def recorded(run: RunDir) -> dict[str, float]:
    """Medians over the steps behind the first, which warms up."""
    steps = [row["ranks"][0] for row in read_windows(run.root) if row["step"]]
    spans = [len(step["spans"]) for step in steps]
    phases = [sum(name in PHASES and lane == MAIN for name, lane, _, _ in step["spans"]) for step in steps]
    return {"step_seconds": statistics.median((step["end_us"] - step["start_us"]) / 1e6 for step in steps),
            "phases": statistics.median(phases), "spans": statistics.median(spans),
            "counts": statistics.median(len(step["counts"]) for step in steps)}


def seconds_of(work: Callable[[], Any], rounds: int, calls: int = 20) -> list[float]:
    """Seconds of one call, as often as there are rounds."""
    found = []
    for _ in range(rounds):
        started = time.perf_counter()
        for _ in range(calls):
            work()
        found.append((time.perf_counter() - started) / calls)
    return found


def costs(config: Config, folder: Path, spans: int, rounds: int) -> dict[str, float]:
    """Median seconds of a phase with and without a timeline, of a span, a counter, and a step's line."""
    run = RunDir(folder / "costs")
    session = Session(replace(config, run_dir=str(run.root)), run, MetricsLog(run.metrics), StopRequests())
    times = session.books.times
    on = times.timeline
    assert on is not None

    def phase() -> None:
        with session.phase("update"):
            pass

    def one_span() -> None:
        with span("decode"):
            pass

    def line() -> None:
        times.begin_step("grpo-1", 0)
        for _ in range(spans):
            one_span()
        times.write([times.taken("grpo-1")], 1)

    measured: dict[str, list[float]] = {"phase": [], "phase_without": [], "span": [], "counter": [], "step_line": []}
    for _ in range(rounds):
        timeline.begin(on)
        measured["phase"] += seconds_of(phase, 1)
        measured["span"] += seconds_of(one_span, 1)
        measured["counter"] += seconds_of(partial(count, "bytes", 1), 1)
        measured["step_line"] += seconds_of(line, 1, calls=1)
        timeline.end()
        measured["phase_without"] += seconds_of(phase, 1)
        on.take("grpo-1")
    session.close()
    return {f"{name}_seconds": statistics.median(values) for name, values in measured.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=200)
    options = parser.parse_args()
    with TemporaryDirectory(prefix="veripo-timeline-") as name, redirect_stderr(sys.stdout):
        folder = Path(name)
        config = config_of(folder, options.steps)
        write_corpus(folder / "corpus", TRAIN_QUICK, HELDOUT_QUICK, 0)
        train(config)
        step = recorded(RunDir(config.run_dir))
        cost = costs(config, folder, int(step["spans"]), options.rounds)
    phases = step["phases"] * cost["phase_seconds"]
    row = {"bench": "timeline", "steps": options.steps, "rounds": options.rounds, **step,
           **{key: float(f"{value:.3g}") for key, value in cost.items()},
           "share_phases_and_timeline": round((phases + cost["step_line_seconds"]) / step["step_seconds"], 6),
           "share_timeline": round((step["phases"] * (cost["phase_seconds"] - cost["phase_without_seconds"])
                                    + cost["step_line_seconds"]) / step["step_seconds"], 6)}
    print(row)
    recipe.append("timeline", row)


if __name__ == "__main__":
    main()
