"""Whether two runs are the same, bit by bit: metrics, evaluations, rollouts, pairs and final weights, times aside.

    python bench/compare_runs.py RUN OTHER

A change that should change no result is shown by it: the demo before and after, `veripo demo --out A`, `--out B`.
Folders of media differ between the runs, so paths are compared by file name.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # bench/ itself on the path would offer bench/kernels as `kernels`, a Hugging Face package
    sys.path[0] = __file__.rpartition("/bench/")[0]

import pyarrow.parquet as pq

from veripo_fast.run.folder import RunDir
from veripo_fast.run.metrics import read_records

PER_PROCESS = ("seconds", "speed", "video_decodes", "tower_runs", "cache_hits", "decoder_fallbacks", "sync_bytes",
               "sync_over_plain_copy", "engine_rebuilds", "tracker_misses")
"""Metrics of a step that tell what this process had to do for it: another one after a resume."""


def records_of(path: Path) -> list[dict[str, Any]]:
    """Lines of a JSONL file without `PER_PROCESS`."""
    return [{key: value for key, value in record.items() if key not in PER_PROCESS} for record in read_records(path)]


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Rows of a Parquet file, folders of media left out."""
    return [{key: re.sub(r'"[^"]*/([^"/]+)"', r'"\1"', value) if key == "prompt" else value
             for key, value in row.items()} for row in pq.read_table(path).to_pylist()]


def differences(first: RunDir, second: RunDir) -> list[str]:
    """One line for each thing that differs; the numbers of what was compared go to standard output."""
    found: list[str] = []
    for name in ("metrics", "evals"):
        ours, theirs = records_of(getattr(first, name)), records_of(getattr(second, name))
        print(f"{name}: {len(ours)} and {len(theirs)} records")
        if not ours or ours != theirs:
            found.append(f"{name} differ")
    tables = {path.relative_to(first.root) for path in first.root.rglob("*.parquet")}
    others = {path.relative_to(second.root) for path in second.root.rglob("*.parquet")}
    print(f"tables: {len(tables)} and {len(others)}")
    found += [f"{name} is in one run alone" for name in sorted(tables ^ others)]
    found += [f"{name} differs" for name in sorted(tables & others)
              if rows_of(first.root / name) != rows_of(second.root / name)]
    names = [run.checkpoints.joinpath("latest").read_text().strip() for run in (first, second)]
    weights = [run.checkpoints.joinpath(name, "model.safetensors").read_bytes()
               for run, name in zip((first, second), names, strict=True)]
    print(f"weights: {names[0]} and {names[1]}, {len(weights[0])} bytes")
    if weights[0] != weights[1]:
        found.append("the final weights differ")
    return found


def main() -> int:
    """Compare the runs that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("other", type=Path)
    options = parser.parse_args()
    found = differences(RunDir(options.run), RunDir(options.other))
    print("\n".join(found) if found else "bitwise equal, times aside")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
