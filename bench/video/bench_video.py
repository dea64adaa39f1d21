"""Video work beside other libraries: file to pixel values, one GRPO step, which frames come back, waiting in training.

    python bench/video/bench_video.py [--rows end_to_end,wrong_frames] [--rounds N] [--quick] [--out FILE] [--plot]

or `veripo bench video`. The peer is qwen-vl-utils with Hugging Face's video processor, each of its readers that works
here; a missing one is named. Both sides run in a process of their own on one core. Lines go to
bench/results/video.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":  # bench/ itself on the path would offer bench/kernels as `kernels`, a Hugging Face package
    sys.path[0] = __file__.rpartition("/bench/")[0]

import torch

from bench import recipe
from bench.names import known_names
from bench.video.plot import plot
from bench.video.rows import QUICK, ROWS, Row, Scale, Session

DEFAULT_OUT = recipe.RESULTS / "video.jsonl"


def told(row: Row) -> str:
    """A line as one sentence."""
    what = f"{row['row']} {row['clip']}" if "clip" in row else row["row"]
    if "not_measured" in row:
        return f"{what}: {row.get('peer') or row['decoder']} not measured: {row['not_measured']}"
    if "cpu_speedup_median" in row:
        epoch = f", {row['epoch']} epoch, tower {row['tower']}" if "epoch" in row else ""
        pixels = (f", at most {row['cpu_bound_median']}x with this decoder; mean error {row['mae_levels']} levels, "
                  f"{row['psnr_db']} dB" if "mae_levels" in row else "")
        return (f"{what}{epoch}: {row['cpu_speedup_median']}x less CPU than {row['peer']} "
                f"({row['cpu_speedup_min']} to {row['cpu_speedup_max']}; wall {row['wall_speedup_median']}x){pixels}")
    if "whole" in row:
        counts = {group: ", ".join(f"{row[group][kind]} {kind}" for kind in ("asked", "right", "wrong", "refused"))
                  for group in ("whole", "damaged")}
        return f"{what}, {row['decoder']}: whole files {counts['whole']}; damaged files {counts['damaged']}"
    return (f"{what}, {'with' if row['prefetch'] else 'without'} prefetch: {row['wait_share']:.2%} of "
            f"{row['median_step_seconds']} s a step")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="veripo bench video", description=__doc__.split("\n")[0])
    parser.add_argument("--rows", default=",".join(ROWS), metavar="A,B", help=f"(default {','.join(ROWS)})")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="paired rounds (default 5)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that everything runs")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, metavar="FILE",
                        help="lines are appended to it (default bench/results/video.jsonl)")
    parser.add_argument("--plot", action="store_true", help="also draw the newest lines of FILE as a PNG beside it")
    parser.add_argument("--torchvision", type=Path, default=Path(sys.prefix) / "oracle", metavar="DIR",
                        help="folder that holds a torchvision for the peer, where none is installed")
    args = parser.parse_args()
    args.rows = known_names(args.rows, ROWS, "row", parser)
    if args.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {args.rounds}")
    if args.out.suffix != ".jsonl":
        parser.error(f"--out must end in .jsonl, got {args.out}")
    return args


def main() -> None:
    args = parsed()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    kept = Path(tempfile.gettempdir()) / f"veripo-bench-video-{os.getuid()}"
    torchvision = str(args.torchvision.resolve()) if (args.torchvision / "torchvision").is_dir() else ""
    with tempfile.TemporaryDirectory(prefix="veripo-bench-") as folder, \
            Session(QUICK if args.quick else Scale(), args.rounds, Path(folder), kept, torchvision) as session:
        for row in (row for name in args.rows for row in ROWS[name](session)):
            torch.set_num_threads(row["cores"])  # the recipe's device names them
            row |= {"rounds": args.rounds, "quick": args.quick}
            recipe.append(str(args.out.resolve().with_suffix("")), row)
            print(told(row), flush=True)
    if args.plot:
        rows = [json.loads(line) for line in args.out.read_text().splitlines()]
        print(plot([row for row in rows if row["quick"] == args.quick], args.out.with_suffix(".png")))


if __name__ == "__main__":
    main()
