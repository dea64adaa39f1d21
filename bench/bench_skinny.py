"""Products of a few rows in float32 on a CPU: weights as torch keeps them, and as oneDNN reads them (model/skinny.py).

    python bench/bench_skinny.py [--rounds 15]

One thread; 24 weights of a shape follow each other, so that none is in a cache near by. Both ways take turns. The ratio
is over the plain product's CPU time; `reorder_tokens` is what reordering costs, in products of that shape. Lines go to
bench/results/skinny.jsonl.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

if __name__ == "__main__":  # bench/ itself on the path would offer bench/kernels as `kernels`, a Hugging Face package
    sys.path[0] = __file__.rpartition("/bench/")[0]

import torch

from bench import recipe
from bench.measure import digits
from veripo_fast.model.skinny import reordered

SHAPES = {"up": (512, 1408), "down": (1408, 512), "query": (512, 512), "head": (512, 4096)}
"""Inputs and outputs of the layers of case B (`veripo bench step`)."""
ROWS = (8, 16, 32, 64, 128)
WEIGHTS = 24


def cpu_seconds(function: Callable[[], object]) -> float:
    started = time.process_time()
    function()
    return time.process_time() - started


@torch.no_grad()
def measured(inner: int, outer: int, rows: int, rounds: int) -> dict[str, float]:
    layers = [torch.nn.Linear(inner, outer, bias=False) for _ in range(WEIGHTS)]
    states = torch.randn(rows, inner)

    def run() -> None:
        for layer in layers:
            layer(states)

    run()
    plain, ours, making = [], [], []
    for _ in range(rounds):
        plain.append(cpu_seconds(run))
        started = time.process_time()
        with reordered(layers, rows, 1 << 20):
            making.append(time.process_time() - started)
            run()
            ours.append(cpu_seconds(run))
    ratios = [one / other for one, other in zip(plain, ours, strict=True)]
    flops = 2 * inner * outer * rows * WEIGHTS
    return {"ratio_median": digits(statistics.median(ratios)), "ratio_min": digits(min(ratios)),
            "ratio_max": digits(max(ratios)), "plain_gflops": digits(flops / statistics.median(plain) / 1e9),
            "reordered_gflops": digits(flops / statistics.median(ours) / 1e9),
            "reorder_tokens": digits(statistics.median(making) / statistics.median(ours))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name, (inner, outer) in SHAPES.items():
        for rows in ROWS:
            row = {"bench": "skinny", "layer": name, "inputs": inner, "outputs": outer, "rows": rows,
                   "rounds": args.rounds, **measured(inner, outer, rows, args.rounds)}
            print(name, rows, row["ratio_median"], recipe.append("skinny", row), flush=True)


if __name__ == "__main__":
    main()
