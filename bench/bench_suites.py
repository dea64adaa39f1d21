"""CPU time of the test files that two commits share by name, in turns: what a change of the project cost its tests.

    python bench/bench_suites.py BEFORE AFTER [--rounds 2] [--files test_update.py ...]

Each commit is checked out into a folder of its own and builds its ops there. Files that lie in other folders now count
as the same. Tests run in one process on one core; what they start counts too. One line goes to
bench/results/suites.jsonl, with how many tests each commit has in those files.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

if __name__ == "__main__":  # bench/ itself on the path would offer bench/kernels as `kernels`, a Hugging Face package
    sys.path[0] = __file__.rpartition("/bench/")[0]

from bench import recipe
from bench.measure import Ratio
from bench.tied import REPOSITORY, tied

FILES = [f"test_{name}.py" for name in (
    "advantages", "answers", "bad_inputs", "checkpoint", "cli", "encoding", "evaluate", "metrics", "patches",
    "precompute", "prefetch", "reference", "shared_prefix", "tower", "trainer", "update")]
"""A quarter of the files of November 2026: those of the loop, without compilers and browsers."""


class Checkout:
    """A commit in a folder of its own."""

    def __init__(self, commit: str, folder: Path, names: list[str]) -> None:
        self.folder = folder
        git("worktree", "add", "--detach", str(folder), commit)
        self.environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{folder / 'kernels'}"}
        self._run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"])
        self.files = self._run(["git", "ls-files", *(f":(glob)tests/**/{name}" for name in names)]).split()
        if len(self.files) != len(names):
            sys.exit(f"bench_suites: {commit} has {len(self.files)} of the {len(names)} files")

    def tests(self) -> int:
        """Tests in the files."""
        text = self._pytest("--collect-only", "-o", "addopts=")
        found = re.search(r"(\d+) tests? collected", text)
        if found is None:
            sys.exit(f"bench_suites: pytest collects nothing in {self.folder}:\n{text}")
        return int(found[1])

    def seconds(self) -> float:
        """CPU seconds of a run of the tests, whatever their result."""
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        self._pytest()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime

    def _pytest(self, *options: str) -> str:
        return self._run(tied(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options, *self.files))

    def _run(self, command: list[str]) -> str:
        done = subprocess.run(command, cwd=self.folder, env=self.environment, capture_output=True, text=True,
                              check=False)
        return done.stdout + done.stderr


def git(*arguments: str) -> None:
    done = subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"bench_suites: git {' '.join(arguments)}: {done.stderr.strip().splitlines()[-1]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("before")
    parser.add_argument("after")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--files", nargs="+", default=FILES, metavar="FILE")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {args.rounds}")
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    times: list[list[float]] = [[], []]
    try:
        with TemporaryDirectory(prefix="veripo-bench-") as folder:
            sides = [Checkout(commit, Path(folder) / name, args.files)
                     for name, commit in (("before", args.before), ("after", args.after))]
            counts = [side.tests() for side in sides]
            for number in range(args.rounds):
                for place in (0, 1) if number % 2 == 0 else (1, 0):
                    times[place].append(sides[place].seconds())
                    print(f"round {number + 1}: {(args.before, args.after)[place]} {times[place][-1]:.1f} s",
                          flush=True)
    finally:
        git("worktree", "prune")
    row = {"bench": "suites", "before": args.before, "after": args.after, "files": len(args.files),
           "tests_before": counts[0], "tests_after": counts[1], "rounds": args.rounds,
           "seconds_before": [round(value, 1) for value in times[0]],
           "seconds_after": [round(value, 1) for value in times[1]],
           **Ratio.of(times[1], times[0]).fields("after_over_before")}
    recipe.append("suites", row)
    print({name: value for name, value in row.items() if "over" in name})


if __name__ == "__main__":
    main()
