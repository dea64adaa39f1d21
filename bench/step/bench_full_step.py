"""A whole GRPO step and a whole DPO step on videos, by phase, beside TRL's trainers, and without each fast path.

    python bench/step/bench_full_step.py [--cases A,B,C,dpo] [--rounds 3] [--threads N] [--no-peer] [--quick] [--plot]

or `veripo bench step`. Both sides start from the same weights and the same patches of rendered mp4 clips; tokens,
log-probs and gradients are compared before anything is timed. bench/step/cases.py has the sizes, bench/step/peer.py
what was changed in TRL. On the CPU, in float32. Lines go to bench/results/full_step.jsonl.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":  # bench/ itself on the path would offer bench/kernels as `kernels`, a Hugging Face package
    sys.path[0] = __file__.rpartition("/bench/")[0]

import torch

from bench import recipe
from bench.names import known_names
from bench.step.cases import CASES, PEER, Case, switches_of
from bench.step.plot import plot, table
from bench.step.rows import MismatchError, Row, Session, cores_of, group_over_pair, peer_missing, rows_of
from bench.video.worker import WorkerError

DEFAULT_OUT = recipe.RESULTS / "full_step.jsonl"


def told(row: Row) -> str:
    """A line as one sentence."""
    if row["row"] == "group_over_pair":
        return (f"a group of case B costs {row['ours']} DPO pairs here and {row['peer']} in {PEER}: "
                "the price of repeated prompts")
    what = f"case {row['case']['name']}"
    if "step_ratio_median" not in row:
        return f"{what}: ours alone, {sum(values[0] for values in row['ours_seconds'].values()):.3g} s a step"
    numbers = []
    for part in ("step", "training", "rollout"):
        if f"{part}_ratio_median" in row:
            numbers.append(f"{part} {row[f'{part}_ratio_median']}x ({row[f'{part}_ratio_min']} to "
                           f"{row[f'{part}_ratio_max']}; CPU {row[f'{part}_cpu_ratio_median']}x)")
    side = PEER if row["row"] == PEER else f"{row['row']} {row['switch']}"
    return f"{what}, {side} over ours: {', '.join(numbers)}, memory of training {row['training_memory_ratio']}x"


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="veripo bench step", description=__doc__.split("\n")[0])
    parser.add_argument("--cases", default=",".join(CASES), metavar="A,B", help=f"(default {','.join(CASES)})")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="paired rounds (default 3)")
    parser.add_argument("--threads", type=int, metavar="N", help="processors of each side (default all)")
    parser.add_argument("--no-peer", action="store_true", help=f"ours alone, without {PEER}")
    parser.add_argument("--no-switches", action="store_true", help="with all fast paths only")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that everything runs")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, metavar="FILE",
                        help="lines are appended to it (default bench/results/full_step.jsonl)")
    parser.add_argument("--plot", action="store_true",
                        help="also draw the newest lines of FILE as a PNG beside it, and print them as a table")
    args = parser.parse_args()
    args.cases = known_names(args.cases, CASES, "case", parser)
    if args.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {args.rounds}")
    if args.out.suffix != ".jsonl":
        parser.error(f"--out must end in .jsonl, got {args.out}")
    try:
        args.cores = cores_of(args.threads)
    except ValueError as error:
        parser.error(str(error))
    return args


def measure(case: Case, args: argparse.Namespace, with_peer: bool) -> list[Row]:
    """The lines of a case."""
    with tempfile.TemporaryDirectory(prefix="veripo-bench-") as folder, \
            Session(case, Path(folder), args.cores, with_peer) as session:
        common = session.agreed()
        answers = session.measured(args.rounds, [] if args.no_switches else switches_of(case))
    return [row | {"case": case.fields()} | common for row in rows_of(case, answers)]


def main() -> None:
    args = parsed()
    reason = None if args.no_peer else peer_missing()
    if reason:
        print(f"{PEER} is not measured: {reason}", flush=True)
    with_peer = not args.no_peer and reason is None
    args.out.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(len(args.cores))  # the recipe's device names them
    lines: dict[str, Row] = {}
    try:
        for name in args.cases:
            case = CASES[name].quick() if args.quick else CASES[name]
            rows = measure(case, args, with_peer)
            lines[name] = rows[0]
            if with_peer and name in ("B", "dpo") and {"B", "dpo"} <= lines.keys():
                rows.append(group_over_pair(lines["B"], lines["dpo"]))
            for row in rows:
                row = {"bench": "full_step", "quick": args.quick, "rounds": args.rounds,
                       "threads": len(args.cores), **row}
                recipe.append(str(args.out.resolve().with_suffix("")), row)
                print(told(row), flush=True)
    except (MismatchError, WorkerError) as error:
        sys.exit(f"veripo bench step: {error}")
    if args.plot:
        rows = [json.loads(line) for line in args.out.read_text().splitlines()]
        rows = [row for row in rows if row["quick"] == args.quick]
        print(plot(rows, args.out.with_suffix(".png")), table(rows), sep="\n")


if __name__ == "__main__":
    main()
