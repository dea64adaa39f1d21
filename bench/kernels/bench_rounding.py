"""The compiled gather_logprobs against float64 on random rows, each clone: the largest error over its derived bound.

    python bench/kernels/bench_rounding.py [--rows 10000] [--trial]

`rounding.py` derives the bound. A clone runs in a process of its own, forced by VERIPO_ISA; one that the processor
lacks is named and left out. Torch's own float32 is judged by the same bound beside it. Appends a line per clone to
bench/results/rounding.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from typing import Any

if __name__ == "__main__":  # bench/ itself on the path would offer bench/kernels as `kernels`, a Hugging Face package
    sys.path[0] = __file__.rpartition("/bench/")[0]

import torch
from veripo_kernels import cpp

from bench import recipe
from bench.kernels import rounding
from bench.measure import digits
from bench.tied import tied

CLONES = ("baseline", "avx2", "avx512")


def measure(rows: int) -> dict[str, Any]:
    """Rows beyond the bound, and the largest ratio of each result in float32 and in the 16-bit types."""
    largest: dict[str, float] = {}
    torchs: dict[str, float] = {}
    beyond = 0
    for case in rounding.random_cases(rows):
        exact = rounding.plain(case, torch.float64)
        bounds = rounding.bounds(case, exact)
        ratios = rounding.ratios(rounding.compiled(*case), exact, bounds)
        beyond += int((torch.stack(list(ratios.values())) > 1).any(0).sum())
        kind = "float32" if case.logits.dtype == torch.float32 else "16-bit"
        for name, ratio in ratios.items():
            key = f"{name}, {kind}"
            largest[key] = max(largest.get(key, 0.0), float(ratio.max()))
        for name, ratio in rounding.ratios(rounding.plain(case, torch.float32), exact, bounds).items():
            torchs[name] = max(torchs.get(name, 0.0), float(ratio.max()))
    return {"row": "gather_logprobs, error over the derived bound", "isa": cpp.isa(),
            "torch_capability": torch.backends.cpu.get_cpu_capability(), "rows": rows, "rows_beyond": beyond,
            "value": digits(max(largest.values())), "limit": 1, "passed": beyond == 0,
            "largest_ratios": {name: digits(value) for name, value in sorted(largest.items())},
            "torch_largest_ratios": {name: digits(value) for name, value in sorted(torchs.items())}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=10_000, help="random rows per clone (default 10,000)")
    parser.add_argument("--trial", action="store_true", help="write no line: to see that everything runs")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    reason = cpp.missing()
    if reason is not None:
        parser.error(f"the compiled op is needed: {reason}")
    if args.child:
        print(json.dumps(measure(args.rows)))
        return
    for isa in CLONES:
        if CLONES.index(isa) > CLONES.index(cpp.isa()):
            print(f"{isa}: this processor has {cpp.isa()} and lacks it")
            continue
        command = tied(sys.executable, __file__, "--child", "--rows", str(args.rows))
        row = json.loads(subprocess.run(command, env={**os.environ, "VERIPO_ISA": isa}, check=True,
                                        stdout=subprocess.PIPE, text=True).stdout)
        print(f"{isa}: {row['rows_beyond']} of {args.rows} rows beyond the bound, largest ratio {row['value']}; {row}",
              flush=True)
        if not args.trial:
            recipe.append("rounding", row)


if __name__ == "__main__":
    main()
