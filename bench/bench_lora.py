"""Adapters beside full training, on the demo: held-out accuracy behind its schedule, bytes of AdamW's state and of a
checkpoint.

    python bench/bench_lora.py --seeds 0 --out /tmp/lora [--rate 10] [--dpo-rate 3] [--rank 16]

Both run the demo of a seed; the adapters at `--rate` and `--dpo-rate` times the learning rates of its stages. Appends
one line per seed to bench/results/lora.jsonl. A run that is there is not run again.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # bench/ itself on the path would offer bench/kernels as `kernels`, a Hugging Face package
    sys.path[0] = __file__.rpartition("/bench/")[0]

from bench import recipe
from bench.bench_demo import MODES, rounded
from veripo_fast.config.load import load_config
from veripo_fast.demo.run import demo_config, prompt_accuracy, run_demo
from veripo_fast.evaluation.intervals import paired_difference
from veripo_fast.run.folder import RunDir
from veripo_fast.run.metrics import read_records
from veripo_fast.trainer import train


def options_of(seed: int, rank: int, rate: float, dpo_rate: float) -> list[str]:
    """Those of `veripo demo` that train adapters of every linear layer at multiples of the demo's learning rates."""
    config = demo_config(Path(), seed, quick=False)
    options = ["--model.lora.rank", str(rank), "--grpo.learning_rate", f"{config.grpo.learning_rate * rate:.3g}",
               "--dpo.learning_rate", f"{config.dpo.learning_rate * dpo_rate:.3g}"]
    for number, stage in enumerate(config.stages):
        own = stage.set.get("grpo.learning_rate")
        if isinstance(own, float):
            options += [f"--stages.{number}.set.grpo.learning_rate", f"{own * rate:.3g}"]
    return options


def trained(folder: Path, seed: int, options: list[str]) -> RunDir:
    """The demo with these options, run unless it is there."""
    run = RunDir(folder / "run")
    if run.config.is_file():
        train(load_config(run.config), resume=True)
    else:
        run_demo(folder, seed, quick=False, options=options)
    return run


def scores(run: RunDir, mode: str) -> dict[str, Any]:
    """Accuracy behind each stage."""
    return {record["stage"]: record["accuracy"] for record in read_records(run.evals) if record["mode"] == mode}


def optimizer_bytes(run: RunDir) -> int:
    """Of AdamW's moments, as the first stage held them."""
    held = read_records(run.memory)[0]["owner_bytes"]
    return int(held["AdamW's moments"])


def checkpoint_bytes(run: RunDir) -> int:
    """Of the newest checkpoint's files, the state of the optimizer aside."""
    folder = run.checkpoints / (run.checkpoints / "latest").read_text().strip()
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def compared(full: RunDir, lora: RunDir) -> dict[str, Any]:
    """What a line of the results says of both."""
    row: dict[str, Any] = {}
    for mode in MODES:
        last = list(scores(full, mode))[-1]
        change = paired_difference(prompt_accuracy(full, last, mode), prompt_accuracy(lora, last, mode))
        row[mode] = {"full": rounded(scores(full, mode)), "lora": rounded(scores(lora, mode)),
                     "points": round(100 * change.mean, 1), "points_low": round(100 * change.low, 1),
                     "points_high": round(100 * change.high, 1)}
    for name, measure in (("optimizer_bytes", optimizer_bytes), ("checkpoint_bytes", checkpoint_bytes)):
        row[name] = {"full": measure(full), "lora": measure(lora),
                     "ratio": round(measure(lora) / measure(full), 4)}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rate", type=float, default=10.0, help="times the learning rates of grpo (default 10)")
    parser.add_argument("--dpo-rate", type=float, default=3.0, help="times that of dpo (default 3)")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    for seed in args.seeds:
        full = trained(args.out / f"full_{seed}", seed, [])
        lora = trained(args.out / f"lora_{seed}_{args.rank}_{args.rate:g}_{args.dpo_rate:g}", seed,
                       options_of(seed, args.rank, args.rate, args.dpo_rate))
        recipe.append("lora", {"bench": "lora", "seed": seed, "rank": args.rank, "rate": args.rate,
                               "dpo_rate": args.dpo_rate, **compared(full, lora)})


if __name__ == "__main__":
    main()
