"""Evaluations that are killed at a random moment: does the same command afterwards give what one go gives, bitwise?

    python bench/bench_eval_kills.py [--kills 10] [--items 300] [--seed 0]

`veripo eval` of the demo's policy on its held-out questions, greedy and one sample each, eight questions a batch, in
fresh processes. SIGKILL comes at a moment drawn from the whole evaluation, start included. Compared are the scores, the
completions and the lines of prompts; that no prompt was sampled twice is read from the batches that lay there at the
kill. One line goes to bench/results/eval_kills.jsonl.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

if __name__ == "__main__":  # bench/ itself on the path would offer bench/kernels as `kernels`, a Hugging Face package
    sys.path[0] = __file__.rpartition("/bench/")[0]

from bench import recipe
from bench.measure import digits
from bench.tied import tied
from veripo_fast.config.describe import to_yaml
from veripo_fast.config.load import apply_overrides
from veripo_fast.demo.corpus import write_corpus
from veripo_fast.demo.run import demo_config
from veripo_fast.rollout.store import read_groups

BATCH = 8


def evaluation(config: Path, out: Path) -> subprocess.Popen[str]:
    """The command, started."""
    return subprocess.Popen(tied(sys.executable, "-m", "veripo_fast", "eval", "--config", config, "--out", out),
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finished(config: Path, out: Path) -> float:
    """Seconds of a whole evaluation."""
    started = time.perf_counter()
    process = evaluation(config, out)
    _, error = process.communicate()
    if process.returncode:
        sys.exit(f"the evaluation ended with {process.returncode}: {error[-2000:]}")
    return time.perf_counter() - started


def result(out: Path) -> dict[str, Any]:
    """What an evaluation leaves, times aside."""
    records = [json.loads(line) for line in (out / "evals.jsonl").read_text().splitlines()]
    found: dict[str, Any] = {"records": [{k: v for k, v in one.items() if k != "seconds"} for one in records]}
    for mode in ("greedy", "sampled"):
        found[mode] = [(group.prompt.prompt_id, [vars(completion) for completion in group.completions])
                       for group in read_groups(out / f"{mode}.parquet")]
        found[f"{mode} lines"] = (out / f"{mode}.jsonl").read_text()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, value in (("kills", 10), ("items", 300), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    draw = random.Random(args.seed)
    with TemporaryDirectory(prefix="veripo-eval-kills-") as name:
        folder = Path(name)
        write_corpus(folder / "corpus", 4, args.items, args.seed)
        config = apply_overrides(demo_config(folder, seed=args.seed, quick=True), {
            "data.train": [], "data.eval": [str(folder / "corpus" / "heldout.jsonl")], "eval.limit": args.items,
            "eval.samples": 1, "eval.prompts_per_batch": BATCH, "threads": 1, "model.device": "cpu"})
        (folder / "config.yaml").write_text(to_yaml(config))
        seconds = finished(folder / "config.yaml", folder / "whole")
        whole = result(folder / "whole")
        same, done, ended = 0, [], 0
        for number in range(args.kills):
            out = folder / "killed"
            shutil.rmtree(out, ignore_errors=True)
            process = evaluation(folder / "config.yaml", out)
            try:
                process.communicate(timeout=draw.uniform(0, seconds))
                ended += 1
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
            done.append(len(list(out.glob("parts/*.parquet"))))
            finished(folder / "config.yaml", out)
            same += result(out) == whole
            print(f"kill {number}: {done[-1]} batches were done; {same} of {number + 1} equal", flush=True)
        batches = 2 * -(-len(whole["greedy"]) // BATCH)
        recipe.append("eval_kills", {
            "bench": "eval_kills", "items": len(whole["greedy"]), "batches": batches, "kills": args.kills, "same": same,
            "ended_before_the_kill": ended, "batches_done_at_the_kill": done, "seconds": digits(seconds),
            "twice": len(whole["greedy"]) - len({prompt for prompt, _ in whole["greedy"]})})
        print(f"{same} of {args.kills} equal")


if __name__ == "__main__":
    main()
