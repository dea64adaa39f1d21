"""The demo's GRPO steps with a contrast group of half the completions, by patch and by frame, over those without.

    python bench/bench_contrast.py [--steps 5] [--rounds 3]

Runs take turns, in this process. Nothing is rewarded for the contrast, so that all train alike and sample the same
completions with the frames in order: what differs is what a contrast costs. Seconds are medians over the steps behind
the first. Tower runs are those for contrasts, beside their number; lines go to bench/results/contrast.jsonl.
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
from bench.measure import Ratio
from veripo_fast.config.load import apply_overrides
from veripo_fast.demo.corpus import write_corpus
from veripo_fast.demo.run import HELDOUT_QUICK, TRAIN_QUICK
from veripo_fast.rollout.store import read_groups
from veripo_fast.run.folder import RunDir
from veripo_fast.run.metrics import read_records
from veripo_fast.trainer import train

WAYS: dict[str, dict[str, object]] = {
    "none": {}, "patch": {"plan.contrast": "shuffle"},
    "frame": {"plan.contrast": "shuffle", "plan.contrast_by": "frame"}}


def tokens_of(run: RunDir) -> list[list[int]]:
    """Every completion of a run."""
    groups = [group for file in run.rollout_files("grpo-1") for group in read_groups(file)]
    return [row.token_ids for group in groups for row in group.completions]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    tower: dict[str, dict[str, int]] = {}
    same = True
    with TemporaryDirectory(prefix="veripo-contrast-") as name, redirect_stderr(sys.stdout):
        folder = Path(name)
        base = apply_overrides(config_of(folder, options.steps), {"model.freeze_vision": True})
        write_corpus(folder / "corpus", TRAIN_QUICK, HELDOUT_QUICK, 0)
        for number in range(options.rounds):
            runs = {way: RunDir(folder / f"{way}-{number}") for way in WAYS}
            for way in list(WAYS)[::1 if number % 2 else -1]:
                train(apply_overrides(base, {**WAYS[way], "run_dir": str(runs[way].root)}))
                records = read_records(runs[way].metrics)
                seconds[way].append(statistics.median(record["speed"]["step_seconds"] for record in records[1:]))
                contrasts = [record["contrast"] for record in records if "contrast" in record]
                tower[way] = {key: sum(contrast[key] for contrast in contrasts) for key in ("groups", "tower_runs")}
            same = same and tokens_of(runs["none"]) == tokens_of(runs["patch"]) == tokens_of(runs["frame"])
    row = {"bench": "contrast", "group_size": base.rollout.group_size, "contrast_size": base.plan.contrast_size,
           "steps": options.steps, "rounds": options.rounds, "same_completions": same, "contrasts": tower,
           **Ratio.of(seconds["patch"], seconds["none"]).fields("patch_over_none"),
           **Ratio.of(seconds["frame"], seconds["none"]).fields("frame_over_none")}
    print(row, recipe.append("contrast", row))


if __name__ == "__main__":
    main()
