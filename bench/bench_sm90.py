"""Every Triton kernel compiled for an H100, on any machine, and what its machine code costs.

    python bench/bench_sm90.py [MODULE ...]     modules default to all of veripo_kernels.jit

`veripo_kernels.testing.sm90` does the work. Each line is appended to bench/results/sm90.jsonl.
"""

from __future__ import annotations

import argparse
import sys

if __name__ == "__main__":  # bench/ itself on the path would offer bench/kernels as `kernels`, a Hugging Face package
    sys.path[0] = __file__.rpartition("/bench/")[0]

from veripo_kernels.testing import sm90

from bench import recipe


def main() -> int:
    """As sm90's: 1 when a case has faults."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("modules", nargs="*", metavar="MODULE")
    rows = sm90.compile_all(parser.parse_args().modules)
    for row in rows:
        recipe.append("sm90", {"bench": "sm90", "target": "sm_90", **row})
    return int(any(row["faults"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
