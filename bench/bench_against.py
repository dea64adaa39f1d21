"""This checkout against another one of the same project: a training step, the kernels and the video work, interleaved.

    python bench/bench_against.py OTHER [--rounds 3] [--rows step,kernels,video]

Says what a change cost. Both run under this interpreter, each with the packages of its own checkout; a round measures
each once (a training step and an op ten times), and ratios are seconds here over seconds there. Lines go to
bench/results/against.jsonl.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

if __name__ == "__main__":  # bench/ itself on the path would offer bench/kernels as `kernels`, a Hugging Face package
    sys.path[0] = __file__.rpartition("/bench/")[0]

from bench import recipe
from bench.measure import Ratio, digits, paired
from bench.tied import REPOSITORY, tied
from bench.video.textured import Size, textured
from bench.video.worker import Worker

PIXELS = [4 * 28 * 28, 115_000]
ROWS = ("step", "kernels", "video")


def packages(checkout: Path) -> str:
    """Search path of a checkout; one from before bench/ was a package had its scripts import each other by name."""
    flat = (checkout / "bench", checkout / "tests") if (checkout / "bench/video_ours.py").exists() else ()
    return os.pathsep.join(map(str, (checkout / "kernels", checkout, *flat)))


def commit(checkout: Path) -> str:
    return subprocess.run(["git", "describe", "--always", "--dirty"], cwd=checkout, capture_output=True, text=True,
                          check=True).stdout.strip()


class Served:
    """A script of a checkout's in a process of its own, which answers a word with a number."""

    def __init__(self, checkout: Path, threads: int, script: str) -> None:
        environment = {**os.environ, "PYTHONPATH": packages(checkout), "OMP_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen(tied(sys.executable, "-c", script), env=environment, cwd=checkout,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, word: str = "step") -> float:
        """Seconds of one step, or of one call of the op that is named."""
        return float(self._answer(word))

    def close(self) -> int:
        """End the process; the most that it held, in MiB."""
        peak = int(self._answer("peak"))
        self.process.communicate()
        return peak

    def _answer(self, word: str) -> str:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{word}\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("answer "):
                return line.removeprefix("answer ")
        sys.exit(f"the script of a checkout ended with {self.process.wait()} at {word!r}")


SHARED_STEP = """
import re, sys, time
import torch
from bench.bench_step import Step, build_model
step = Step(build_model("qwen2_5_vl"), 1000, 64, 8, False)
for word in sys.stdin:
    if word.strip() == "peak":
        held = re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())
        print("answer", int(held.group(1)) >> 10, flush=True)
        continue
    step.model.zero_grad()
    started = time.perf_counter()
    step.shared("sdpa")
    print("answer", time.perf_counter() - started, flush=True)
"""
"""The default shape of bench_step.py; `bench` is a package here, and a folder without __init__.py in old checkouts."""


OPS = ("linear_logprobs", "linear_policy_loss", "linear_dpo_loss", "gather_logprobs", "grpo_loss", "dpo_loss")
KERNELS = """
import re, sys, time
import torch, veripo_kernels as ours
draw = torch.Generator().manual_seed(0)
def normal(*size):
    return torch.randn(*size, generator=draw)
T, D, V, LONG = 2048, 1024, 8192, 65536
hidden, head = normal(T, D).requires_grad_(), (normal(V, D) / 32).requires_grad_()
ids, ends = torch.randint(V, (T,), generator=draw), torch.arange(0, T + 1, 256)
old, logits = -normal(T).abs(), normal(256, 151936).requires_grad_()
chosen = torch.randint(151936, (256,), generator=draw)
long, before, far = normal(LONG).requires_grad_(), normal(LONG), torch.arange(0, LONG + 1, 512)
advantages = normal(128)
ops = {
    "linear_logprobs": lambda: ours.linear_logprobs(hidden, head, ids).sum(),
    "linear_policy_loss": lambda: ours.linear_policy_loss(hidden, head, ids, old, advantages[:8], ends)[0],
    "linear_dpo_loss": lambda: ours.linear_dpo_loss(hidden, head, ids, old, ends)[0],
    "gather_logprobs": lambda: ours.gather_logprobs(logits, chosen).sum(),
    "grpo_loss": lambda: ours.grpo_loss(long, before, advantages, far)[0],
    "dpo_loss": lambda: ours.dpo_loss(long, before, far)[0],
}
for word in sys.stdin:
    word = word.strip()
    if word == "peak":
        held = re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())
        print("answer", int(held.group(1)) >> 10, flush=True)
        continue
    for leaf in (hidden, head, logits, long):
        leaf.grad = None
    started = time.perf_counter()
    ops[word]().backward()
    print("answer", time.perf_counter() - started, flush=True)
"""
"""Forward and backward of an op on a CPU, by what is public in all checkouts."""


def kernels_row(other: Path, rounds: int, threads: int) -> Iterator[dict[str, Any]]:
    """Each op, call by call in turns."""
    here, there = Served(REPOSITORY, threads, KERNELS), Served(other, threads, KERNELS)
    for op in OPS:
        ways: dict[str, Callable[[], object]] = {"here": partial(here, op), "there": partial(there, op)}
        seconds = paired(ways, 10 * rounds, lambda run: float(str(run())), warmups=2)
        yield {"row": op, "threads": threads, "rounds": 10 * rounds,
               **{f"{way}_seconds_median": digits(statistics.median(values)) for way, values in seconds.items()},
               **Ratio.of(seconds["here"], seconds["there"]).fields("here_over_there")}
    print("MiB at most:", here.close(), "here,", there.close(), "there", flush=True)


def step_row(other: Path, rounds: int, threads: int) -> Iterator[dict[str, Any]]:
    """Shared prefix, step by step in turns: whatever else the machine does then meets both."""
    here, there = Served(REPOSITORY, threads, SHARED_STEP), Served(other, threads, SHARED_STEP)
    ways: dict[str, Callable[[], object]] = {"here": here, "there": there}
    seconds = paired(ways, 10 * rounds, lambda run: float(str(run())), warmups=2)
    peaks = {"here_peak_mib": here.close(), "there_peak_mib": there.close()}
    yield {"row": "step", "threads": threads, "rounds": 10 * rounds, **peaks,
           **{f"{way}_seconds_median": digits(statistics.median(values)) for way, values in seconds.items()},
           **Ratio.of(seconds["here"], seconds["there"]).fields("here_over_there")}


def worker_of(checkout: Path) -> Worker:
    script = next(path for path in (checkout / "bench/video/ours.py", checkout / "bench/video_ours.py")
                  if path.exists())
    return Worker(str(script), {0}, {"PYTHONPATH": packages(checkout)})


def video_row(other: Path, rounds: int, threads: int) -> Iterator[dict[str, Any]]:
    """File to pixel values, 64 frames; and the video work of a GRPO step on four clips, first epoch, frozen tower."""
    with TemporaryDirectory(prefix="veripo-against-") as folder:
        clips = [str(textured(Size(360, 640), Path(folder)))]
        paths = [*clips]
        for number in range(3):
            copy = Path(folder) / f"copy-{number}.mp4"
            copy.write_bytes(Path(clips[0]).read_bytes())
            paths.append(str(copy))
        with worker_of(REPOSITORY) as here, worker_of(other) as there:
            def of_decoding(worker: Worker) -> float:
                return float(worker.call("end_to_end", path=clips[0], frames=64, pixels=PIXELS)["cpu_seconds"])

            def of_step(worker: Worker) -> float:
                epochs = worker.call("step", paths=paths, frames=64, pixels=PIXELS, frozen=True)
                return float(epochs["first"]["cpu_seconds"])

            for name, way in (("end_to_end", of_decoding), ("grpo_step", of_step)):
                ways: dict[str, Callable[[], object]] = {"here": partial(way, here), "there": partial(way, there)}
                for run in ways.values():
                    run()
                seconds = paired(ways, rounds, lambda run: float(str(run())))
                yield {"row": name, "here_seconds": seconds["here"], "there_seconds": seconds["there"],
                       **Ratio.of(seconds["here"], seconds["there"]).fields("here_over_there")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("other", type=Path, help="the other checkout, with its compiled op built in place")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="of a training step; video work has one core")
    parser.add_argument("--rows", type=lambda text: text.split(","), default=list(ROWS))
    args = parser.parse_args()
    other = args.other.resolve()
    for name, rows in (("step", step_row), ("kernels", kernels_row), ("video", video_row)):
        for row in rows(other, args.rounds, args.threads) if name in args.rows else ():
            recipe.append("against", {"bench": "against", "other": commit(other), **row})
            print(row, flush=True)


if __name__ == "__main__":
    main()
