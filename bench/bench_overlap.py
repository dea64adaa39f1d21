"""The demo's GRPO steps with everything overlapped, and with every overlap off: equal bits, seconds, idle time.

    python bench/bench_overlap.py [--steps 6] [--rounds 3]

Runs take turns, in this process, with all cores. Seconds are medians over the steps behind the first; idle is what the
training thread waits for. Checkpoints are written after each step, so that there is something to write behind.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from contextlib import redirect_stderr
from pathlib import Path
from tempfile import TemporaryDirectory

if __name__ == "__main__":  # bench/ itself on the path would offer bench/kernels as `kernels`, a Hugging Face package
    sys.path[0] = __file__.rpartition("/bench/")[0]

from bench import recipe
from bench.bench_timeline import config_of
from bench.compare_runs import differences
from bench.measure import Ratio, digits
from veripo_fast.config.load import apply_overrides
from veripo_fast.demo.corpus import write_corpus
from veripo_fast.demo.run import HELDOUT_QUICK, TRAIN_QUICK
from veripo_fast.report.timeline import read_windows
from veripo_fast.run.folder import RunDir
from veripo_fast.trainer import train

WAYS: dict[str, dict[str, object]] = {
    "on": {"cache.prefetch_prompts": 256, "reward.streamed": True, "checkpoint.asynchronous": True},
    "off": {"cache.prefetch_prompts": 0, "reward.streamed": False, "checkpoint.asynchronous": False}}

NO_EVALUATIONS = "evals differ"
"""What `differences` says of runs that have none."""


def seconds_and_idle(run: Path) -> tuple[float, float]:
    """Wall seconds from one step to the next, checkpoints included, and the share of them that was waited for."""
    windows = [(window["step"], window["ranks"][0]) for window in read_windows(run)]
    begins = [own["start_us"] for step, own in windows if step is not None]
    whole = (begins[-1] - begins[1]) / 1e6
    waits = sum(sum(own["waits_us"].values()) for _, own in windows if begins[1] <= own["start_us"] < begins[-1])
    return whole / (len(begins) - 2), waits / 1e6 / whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    idle: dict[str, list[float]] = {way: [] for way in WAYS}
    with TemporaryDirectory(prefix="veripo-overlap-") as name, redirect_stderr(sys.stdout):
        folder = Path(name)
        base = config_of(folder, options.steps)
        write_corpus(folder / "corpus", TRAIN_QUICK, HELDOUT_QUICK, 0)
        found: list[str] = []
        for number in range(options.rounds):
            runs = {way: folder / f"{way}-{number}" for way in WAYS}
            for way in list(WAYS)[::1 if number % 2 else -1]:
                train(apply_overrides(base, {**WAYS[way], "run_dir": str(runs[way]), "checkpoint.every": 1}))
                step, share = seconds_and_idle(runs[way])
                seconds[way].append(step)
                idle[way].append(share)
            found += [line for line in differences(RunDir(runs["on"]), RunDir(runs["off"])) if line != NO_EVALUATIONS]
    row = {"bench": "overlap", "steps": options.steps, "rounds": options.rounds, "differences": found,
           **Ratio.of(seconds["on"], seconds["off"]).fields("on_over_off"),
           "idle_share": {way: digits(statistics.median(values)) for way, values in idle.items()}}
    print(row, recipe.append("overlap", row))


if __name__ == "__main__":
    main()
