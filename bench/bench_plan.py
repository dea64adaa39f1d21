"""`veripo plan --from` a run against real runs of other configurations: seconds of a step, on one and two CPU ranks.

    python bench/bench_plan.py [--folder FOLDER] [--steps 5]

The policy of 30 M weights and its corpus are those of bench_ledger.py; each rank has one thread. One run gives rates
and lengths. Of the others the lengths are taken from their own metrics, so that rates alone are put to the test; the
predicted step is compared with the mean of the measured ones. Runs that --folder holds already are taken as they are.
Lines go to bench/results/plan.jsonl.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from tempfile import gettempdir

if __name__ == "__main__":  # bench/ itself on the path would offer bench/kernels as `kernels`, a Hugging Face package
    sys.path[0] = __file__.rpartition("/bench/")[0]

from bench import bench_ledger, recipe
from bench.measure import digits
from veripo_fast.config.load import load_config
from veripo_fast.model.checkpoint_files import resolve_path
from veripo_fast.report.plan import lengths_of, measure
from veripo_fast.run.metrics import read_records
from veripo_fast.schedule.planner import plan
from veripo_fast.schedule.shapes import read_shape

BASE = "plan base"
CASES: dict[str, tuple[int, dict[str, object]]] = {
    BASE: (1, {}),
    "plan group of 4, 8 prompts": (1, {"rollout.group-size": 4, "grpo.prompts-per-step": 8}),
    "plan 32 tokens, KL reference": (1, {"rollout.max-new-tokens": 32, "grpo.kl-coef": 0.05}),
    "plan 2 ranks": (2, {}),
    "plan 2 ranks, group of 16": (2, {"rollout.group-size": 16}),
}
"""Name -> ranks, and options beside those of bench_ledger.py."""


def step_seconds(run: Path) -> float:
    """Mean over the steps behind the first, as the share of groups with a signal is one."""
    return statistics.fmean(row["speed"]["step_seconds"] for row in read_records(run / "metrics.jsonl")[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path(gettempdir()) / "veripo-plan")
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args()
    args.folder.mkdir(exist_ok=True)
    bench_ledger.prepared(args.folder, bench_ledger.family_of(BASE))
    runs = {}
    for name, (ranks, options) in CASES.items():
        bench_ledger.CASES[name] = ranks, {"grpo.steps": args.steps, "checkpoint.every": args.steps, **options}
        runs[name] = bench_ledger.folder_of(args.folder, name)
        if not runs[name].exists():
            bench_ledger.run(args.folder, name, sys.executable)
        if name == BASE:
            rates = measure(runs[name], None).rates
            continue
        config = load_config(runs[name] / "config.yaml")
        lengths = lengths_of(read_records(runs[name] / "metrics.jsonl")[1:])
        shape = read_shape(resolve_path(config.model.path))
        stage = plan(shape, config, ranks, None, rates, {"grpo": lengths}).stages[0]
        measured, predicted = step_seconds(runs[name]), stage.step_seconds - rates.step_seconds
        row = {"bench": "plan", "case": name.removeprefix("plan "), "ranks": ranks, "steps": args.steps,
               "ratio": digits(predicted / measured), "predicted_seconds": digits(predicted),
               "measured_seconds": digits(measured),
               "phases": {phase: digits(value) for phase, value in stage.seconds.items()}}
        print(name, row["ratio"], recipe.append("plan", row), flush=True)


if __name__ == "__main__":
    main()
