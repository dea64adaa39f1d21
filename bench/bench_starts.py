"""Starts of a run with many decoding threads: each a fresh process with cold caches, and each must end well.

    python bench/bench_starts.py [--starts 100] [--workers 8]

What threads load on first use (the compiled op, decoders) is loaded anew by every start, by all of them at once. A
second registration of an op's fake is an error, as in torch 2.11; torch 2.13 takes it in silence. One line goes to
bench/results/starts.jsonl.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

if __name__ == "__main__":  # bench/ itself on the path would offer bench/kernels as `kernels`, a Hugging Face package
    sys.path[0] = __file__.rpartition("/bench/")[0]

from bench import recipe
from bench.kernels.child import last_line
from bench.tied import PATHS, tied

CLIPS = 16
"""Two for each thread: all have work from the first moment on."""
MOST_SECONDS = 600.0
"""A start takes 6 s on an idle machine; one that hangs is a failure."""
STRICT = """import functools, torch
torch.library.register_fake = functools.partial(torch.library.register_fake, allow_override=False)
"""
"""sitecustomize.py of each start."""


@dataclass(frozen=True)
class Start:
    """How a run ended."""

    seconds: float
    failure: str = ""
    """What it said last; empty where every clip went through."""


def veripo(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The command line of this checkout, without the caches of this user."""
    (cwd / "sitecustomize.py").write_text(STRICT)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*PATHS, str(cwd)]), "XDG_CACHE_HOME": str(cwd / "xdg")}
    return subprocess.run(tied(sys.executable, "-m", "veripo_fast.cli", *arguments), capture_output=True, text=True,
                          timeout=MOST_SECONDS, env=environment, cwd=cwd, check=False)


def start(corpus: Path, workers: int) -> Start:
    """`veripo precompute` of the corpus into an empty cache."""
    with TemporaryDirectory(prefix="veripo-starts-") as folder:
        started = time.perf_counter()
        try:
            done = veripo("precompute", corpus, "--cache.folder", Path(folder) / "cache", "--video.workers",
                          str(workers), cwd=Path(folder))
        except subprocess.TimeoutExpired:
            return Start(time.perf_counter() - started, f"took longer than {MOST_SECONDS:.0f} s")
        seconds = time.perf_counter() - started
    if done.returncode:
        return Start(seconds, last_line(done.stderr) or f"exit code {done.returncode}")
    counts = re.search(r"(\d+) media: (\d+) new, 0 already there, 0 skipped", done.stdout)
    if not counts or counts[1] != counts[2]:
        return Start(seconds, last_line(done.stdout))
    return Start(seconds)


def row(starts: list[Start], workers: int, clips: int) -> dict[str, Any]:
    """The result line."""
    seconds = [one.seconds for one in starts]
    failures = [one.failure for one in starts if one.failure]
    return {"bench": "starts", "workers": workers, "clips": clips, "starts": len(starts),
            "clean": len(starts) - len(failures), "failures": sorted(set(failures)),
            "seconds_median": round(statistics.median(seconds), 2), "seconds_min": round(min(seconds), 2),
            "seconds_max": round(max(seconds), 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--starts", type=int, default=100)
    parser.add_argument("--workers", type=int, default=8)
    args = parser.parse_args()
    with TemporaryDirectory(prefix="veripo-starts-") as folder:
        corpus = Path(folder) / "corpus"
        veripo("synth", corpus, "--train", str(2 * CLIPS), "--heldout", "1", cwd=Path(folder)).check_returncode()
        clips = len(list(corpus.rglob("*.mp4")))
        starts = []
        for number in range(args.starts):
            starts.append(start(corpus, args.workers))
            print(f"{number + 1}: {starts[-1].seconds:.1f} s {starts[-1].failure or 'clean'}", flush=True)
    print(recipe.append("starts", row(starts, args.workers, clips)))


if __name__ == "__main__":
    main()
