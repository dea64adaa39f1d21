"""The demo's loop on two ranks against one process, equal global batch: rewards, weights, and time of a step.

    python bench/bench_ranks.py [--ranks 2] [--rounds 2] [--steps 10] [--backend fsdp] [--zero-stage 2]

One process runs once with as many threads as there are ranks, and once with one; a rank has one thread. Runs take
turns. Seconds are medians over the GRPO steps behind the first, from the metrics of rank 0. Lines go to
bench/results/ranks.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

if __name__ == "__main__":  # bench/ itself on the path would offer bench/kernels as `kernels`, a Hugging Face package
    sys.path[0] = __file__.rpartition("/bench/")[0]

from bench import recipe
from bench.measure import Ratio, digits
from bench.tied import PATHS, tied


def demo(out: Path, ranks: int, threads: int, options: list[str]) -> None:
    """`veripo demo`, under torchrun where there are several ranks."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": os.pathsep.join(PATHS)}
    done = subprocess.run(tied(sys.executable, *launch, "-m", "veripo_fast", "demo", "--out", out, "--threads",
                               str(threads), *options), env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"the demo on {ranks} ranks ended with {done.returncode}: {done.stderr[-2000:]}")


def steps_of(out: Path) -> list[dict[str, Any]]:
    lines = (out / "run" / "metrics.jsonl").read_text().splitlines()
    return [step for step in map(json.loads, lines) if step["kind"] == "grpo"]


def seconds_of(steps: list[dict[str, Any]]) -> float:
    return statistics.median(sum(step["seconds"].values()) - step["seconds"].get("checkpoint", 0.0)
                             for step in steps[1:])


def largest_weight_difference(one: Path, other: Path) -> float:
    from safetensors.torch import load_file

    weights = [load_file(sorted((out / "run/checkpoints").glob("step_*/model.safetensors"))[-1])
               for out in (one, other)]
    return max(float((weights[0][name] - weights[1][name]).abs().max()) for name in weights[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--backend", choices=("fsdp", "deepspeed"), default="fsdp")
    parser.add_argument("--zero-stage", type=int, default=2)
    args = parser.parse_args()
    options = ["--stages", "[{kind: grpo}]", "--grpo.steps", str(args.steps), "--eval.at", "never"]
    sharded = ["--distributed.backend", args.backend]
    if args.backend == "deepspeed":
        sharded += ["--distributed.zero-stage", str(args.zero_stage)]
    ways = {"one process": (1, args.ranks, []), "one process, one thread": (1, 1, []),
            f"{args.ranks} ranks": (args.ranks, 1, sharded)}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with TemporaryDirectory(prefix="veripo-ranks-") as folder:
        for number in range(args.rounds):
            outs = {name: Path(folder) / f"{number}-{name.replace(' ', '-')}" for name in ways}
            for name, (ranks, threads, more) in ways.items():
                demo(outs[name], ranks, threads, [*options, *more])
                seconds[name].append(seconds_of(steps_of(outs[name])))
        one, many = outs["one process"], outs[f"{args.ranks} ranks"]
        rewards = [[step["reward_mean"] for step in steps_of(out)] for out in (one, many)]
        idle = statistics.fmean(step["idle_share"] for step in steps_of(many) if "idle_share" in step)
        row = {"bench": "ranks", "ranks": args.ranks, "backend": args.backend,
               "zero_stage": args.zero_stage if args.backend == "deepspeed" else None, "steps": args.steps,
               "step_seconds": {name: [digits(value) for value in values] for name, values in seconds.items()},
               **Ratio.of(seconds[f"{args.ranks} ranks"], seconds["one process"]).fields("over_one_process"),
               **Ratio.of(seconds[f"{args.ranks} ranks"], seconds["one process, one thread"]).fields("over_one_thread"),
               "largest_reward_difference": max(abs(a - b) for a, b in zip(*rewards, strict=True)),
               "largest_weight_difference": largest_weight_difference(one, many), "idle_share_mean": digits(idle)}
    path = recipe.append("ranks", row)
    print(json.dumps(row, indent=1), path)


if __name__ == "__main__":
    main()
