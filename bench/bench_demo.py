"""The demo on several seeds: how held-out accuracy and think/answer inconsistency move, and how long it takes.

    python bench/bench_demo.py --seeds 0 1 2 --out /tmp/demo-seeds [--engine vllm]

Appends one line per seed to bench/results/demo.jsonl. With the torch engine it also draws demo.png beside it, from the
newest line of each seed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # bench/ itself on the path would offer bench/kernels as `kernels`, a Hugging Face package
    sys.path[0] = __file__.rpartition("/bench/")[0]

from bench import recipe
from veripo_fast.demo.run import prompt_accuracy, run_demo
from veripo_fast.evaluation.intervals import paired_difference
from veripo_fast.run.folder import RunDir
from veripo_fast.run.metrics import read_records

MODES = ("greedy", "sampled")
KEPT = ("accuracy", "accuracy_low", "accuracy_high", "mra", "format_rate", "inconsistency_rate", "inconsistency_low",
        "inconsistency_high", "length_mean", "by_type")


def measure(run: RunDir) -> dict[str, Any]:
    """Scores per stage and mode, the paired change of accuracy from start to end, inconsistency over each DPO stage."""
    row: dict[str, Any] = {}
    records = read_records(run.evals)
    stages = list(dict.fromkeys(record["stage"] for record in records))
    for mode in MODES:
        by_stage = {record["stage"]: record for record in records if record["mode"] == mode}
        change = paired_difference(prompt_accuracy(run, stages[0], mode), prompt_accuracy(run, stages[-1], mode))
        row[mode] = {
            "points": round(100 * change.mean, 1), "points_low": round(100 * change.low, 1),
            "points_high": round(100 * change.high, 1),
            "inconsistency_over_dpo": [[by_stage[a]["inconsistency_rate"], by_stage[b]["inconsistency_rate"]]
                                       for a, b in pairwise(stages) if b.startswith("dpo")],
            "stages": {name: {key: rounded(by_stage[name][key]) for key in KEPT} for name in stages},
            "prompts": by_stage[stages[0]]["prompts"], "completions": by_stage[stages[0]]["completions"]}
    return row


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return round(value, 4) if isinstance(value, float) else value


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Accuracy and inconsistency over the stages, a line per seed, sampled completions."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), dpi=110)
    names = list(rows[0]["sampled"]["stages"])
    for axis, key, title in ((axes[0], "accuracy", "held-out accuracy"),
                             (axes[1], "inconsistency_rate", "think/answer inconsistency")):
        for row in rows:
            stages = row["sampled"]["stages"]
            low = key.replace("_rate", "") + "_low"
            high = key.replace("_rate", "") + "_high"
            values = [stages[name][key] for name in names]
            spread = [[v - stages[n][low] for v, n in zip(values, names, strict=True)],
                      [stages[n][high] - v for v, n in zip(values, names, strict=True)]]
            axis.errorbar(names, values, yerr=spread, marker="o", capsize=3, label=f"seed {row['seed']}")
        axis.set_title(title, fontsize=10)
        axis.set_ylim(0, 1 if key == "accuracy" else None)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--engine", choices=["torch", "vllm"], default="torch", help="vllm: run in .venv-engines")
    args = parser.parse_args()
    for seed in args.seeds:
        folder = args.out / f"seed_{seed}"
        started = time.monotonic()
        run_demo(folder, seed, quick=False, options=["--rollout.engine", args.engine])
        minutes = (time.monotonic() - started) / 60
        recipe.append("demo", {"bench": "demo", "seed": seed, "engine": args.engine, "minutes": round(minutes, 1),
                               **measure(RunDir(folder / "run"))})
    if args.engine != "torch":
        return
    results = recipe.RESULTS / "demo.jsonl"
    rows = map(json.loads, results.read_text().splitlines())
    newest = {row["seed"]: row for row in rows if row.get("engine", "torch") == "torch"}
    draw([newest[seed] for seed in sorted(newest)], recipe.RESULTS / "demo.png")


if __name__ == "__main__":
    main()
