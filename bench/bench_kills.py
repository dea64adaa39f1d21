"""Runs of two ranks of which one is killed at a random moment: does `--resume` give the uninterrupted run, bitwise?

    python bench/bench_kills.py [--kills 30] [--seed 0]

GRPO, DPO and GRPO of the demo's policy with FSDP2 and gloo, in fresh processes: six steps, each with a checkpoint, and
an evaluation before and after each stage. SIGKILL comes at a moment drawn from the whole run, start included, to a rank
that is drawn. Compared are metrics, rollouts, pairs, evaluations and weights. One line goes to
bench/results/kills.jsonl.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

if __name__ == "__main__":  # bench/ itself on the path would offer bench/kernels as `kernels`, a Hugging Face package
    sys.path[0] = __file__.rpartition("/bench/")[0]

from bench import recipe
from bench.compare_runs import differences
from bench.tied import PATHS, tied
from veripo_fast.config.describe import to_yaml
from veripo_fast.config.load import apply_overrides
from veripo_fast.config.schema import Config
from veripo_fast.demo.corpus import write_corpus
from veripo_fast.demo.run import demo_config
from veripo_fast.run.folder import RunDir

RANKS = 2
MOST_SECONDS = 900.0
"""A run takes half a minute on two idle cores; one that hangs is a failure."""
SMALL = {"grpo.steps": 2, "grpo.prompts_per_step": 6, "rollout.group_size": 4, "dpo.max_steps": 2,
         "dpo.pairs_per_step": 6, "eval.limit": 6, "eval.samples": 1, "checkpoint.every": 1, "threads": 1,
         "model.device": "cpu", "distributed.timeout_seconds": 25}
"""A rank that is killed before the ranks have met is missed after `timeout_seconds`."""
PATIENT = ("--distributed.timeout-seconds", "600")
"""Of runs that nobody kills: on a busy machine one rank may start much later than the other."""


@dataclass(frozen=True)
class Kill:
    """What became of one run."""

    rank: int
    seconds: float
    """From the signal to the end of the other rank."""
    doing: str = ""
    """What the other one said that it was doing."""
    failure: str = ""
    """Empty where the resumed run is the uninterrupted one."""


@dataclass(frozen=True)
class Run:
    """How the ranks of a run ended."""

    codes: list[int]
    outputs: list[str]
    seconds: float
    """From the start, or from the signal, to the end of the last rank."""


def config_of(folder: Path, corpus: Path) -> Path:
    """The configuration of a run, as a file."""
    config: Config = demo_config(folder, seed=0, quick=True)
    stages = tuple(replace(stage, set={}) for stage in config.stages)
    config = apply_overrides(replace(config, stages=stages), SMALL | {
        "data.train": [str(corpus / "train.jsonl")], "data.eval": [str(corpus / "heldout.jsonl")]})
    folder.mkdir()
    path = folder / "run.yaml"
    path.write_text(to_yaml(config))
    return path


def train(config: Path, *options: str, after: float | None = None, rank: int = 0) -> Run:
    """Start the ranks and wait for their end; `after`: seconds until SIGKILL comes to one of them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    outputs = [config.with_name(f"rank-{number}.txt") for number in range(RANKS)]
    started = time.monotonic()
    processes = []
    for number, output in enumerate(outputs):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(PATHS), "RANK": str(number), "OMP_NUM_THREADS": "1",
                       "LOCAL_RANK": str(number), "WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1",
                       "MASTER_PORT": str(port)}
        with output.open("w") as file:
            processes.append(subprocess.Popen(
                tied(sys.executable, "-m", "veripo_fast", "train", "--config", config, *options), env=environment,
                stdout=file, stderr=file))
    if after is not None:
        with suppress(subprocess.TimeoutExpired):  # where it ends before
            processes[rank].wait(after)
        started = time.monotonic()
        processes[rank].kill()
    deadline = time.monotonic() + MOST_SECONDS
    for process in processes:
        try:
            process.wait(max(deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return Run([process.returncode for process in processes], [output.read_text() for output in outputs],
               time.monotonic() - started)


def kill(config: Path, whole: Path, rank: int, after: float) -> Kill | None:
    """Kill a run, resume and compare it; None where it had ended before."""
    killed = train(config, after=after, rank=rank)
    if killed.codes[rank] != -9:
        return None
    other = 1 - rank
    told = re.findall(r"while this one was (.*?)(?: of step \d+| after \S+)?(?: \(|;)|(could not meet the others)",
                      killed.outputs[other])
    kill = Kill(rank, killed.seconds, *("".join(match) for match in told[:1]))
    if killed.codes[other] == 0:
        kill = replace(kill, doing="done")  # the last exchange was over
    elif killed.codes[other] == -9 or not told or "Traceback" in killed.outputs[other]:
        return replace(kill, failure=f"the other rank ended with exit code {killed.codes[other]}, unexplained")
    run = config.parent / "run"
    resumed = train(config, *PATIENT, *(["--resume"] if RunDir(run).config.exists() else []))
    if any(resumed.codes):
        return replace(kill, failure=f"resumed with exit codes {resumed.codes}: {last_lines(resumed.outputs)}")
    with redirect_stdout(sys.stderr):
        found = differences(RunDir(run), RunDir(whole))
    return replace(kill, failure="; ".join(found))


def last_lines(outputs: Sequence[str]) -> str:
    """The end of what each rank said, whatever it was: the folder is gone when the bench ends."""
    return " | ".join(output[-600:].strip() for output in outputs)


def row(kills: Sequence[Kill], seconds: float) -> dict[str, Any]:
    """The result line."""
    waits = [one.seconds for one in kills]
    failures = [one.failure for one in kills if one.failure]
    return {"bench": "kills", "ranks": RANKS, "kills": len(kills), "same": len(kills) - len(failures),
            "failures": sorted(set(failures)), "of_rank_0": sum(one.rank == 0 for one in kills),
            "doing": dict(Counter(one.doing for one in kills).most_common()), "run_seconds": round(seconds, 1),
            "end_seconds_median": round(statistics.median(waits), 2), "end_seconds_max": round(max(waits), 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    kills: list[Kill] = []
    with TemporaryDirectory(prefix="veripo-kills-") as name:
        root = Path(name)
        write_corpus(root / "corpus", 24, 6, seed=0)
        whole = train(config_of(root / "whole", root / "corpus"), *PATIENT)
        assert not any(whole.codes), whole.outputs
        number, seconds = 0, whole.seconds
        while len(kills) < args.kills:
            number += 1
            done = kill(config_of(root / str(number), root / "corpus"), root / "whole" / "run", rng.randrange(RANKS),
                        rng.uniform(0.0, seconds))
            if done is None:
                seconds *= 0.9  # the machine is faster than it was
                continue
            kills.append(done)
            print(f"{len(kills)}: rank {done.rank}, the other was {done.doing or 'silent'} and ended after "
                  f"{done.seconds:.1f} s: {done.failure or 'same'}", flush=True)
    print(recipe.append("kills", row(kills, whole.seconds)))


if __name__ == "__main__":
    main()
