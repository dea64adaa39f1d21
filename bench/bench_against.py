"""This checkout against another one of the same project: a training step and the video work, interleaved.

    python bench/bench_against.py OTHER [--rounds 3] [--rows step,video]

Says what a change cost. Both run under this interpreter, each with the packages of its own checkout; a round measures
each once, and ratios are seconds here over seconds there. Lines go to bench/results/against.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
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
from bench.measure import Ratio, paired
from bench.tied import REPOSITORY, tied
from bench.video.textured import Size, textured
from bench.video.worker import Worker

PIXELS = [4 * 28 * 28, 115_000]
ROWS = ("step", "video")


def packages(checkout: Path) -> str:
    """Search path of a checkout; one from before bench/ was a package had its scripts import each other by name."""
    flat = (checkout / "bench", checkout / "tests") if (checkout / "bench/video_ours.py").exists() else ()
    return os.pathsep.join(map(str, (checkout / "kernels", checkout, *flat)))


def commit(checkout: Path) -> str:
    return subprocess.run(["git", "describe", "--always", "--dirty"], cwd=checkout, capture_output=True, text=True,
                          check=True).stdout.strip()


def step(checkout: Path, taken: dict[Path, list[dict[str, Any]]]) -> None:
    """One run of a checkout's bench_step.py; its line is taken back out of that checkout's results."""
    results = checkout / "bench/results/step.jsonl"
    before = results.read_text()
    environment = {**os.environ, "PYTHONPATH": packages(checkout)}
    subprocess.run(tied(sys.executable, checkout / "bench/bench_step.py", "--backends", "sdpa", "--runs", "2"),
                   env=environment, cwd=checkout, check=True, stdout=subprocess.DEVNULL)
    taken[checkout].append(json.loads(results.read_text()[len(before):].splitlines()[0]))
    results.write_text(before)


def step_row(other: Path, rounds: int) -> Iterator[dict[str, Any]]:
    """Default shape of bench_step.py, shared prefix, each round in a fresh process."""
    taken: dict[Path, list[dict[str, Any]]] = {REPOSITORY: [], other: []}
    ways: dict[str, Callable[[], object]] = {str(one): partial(step, one, taken) for one in taken}
    paired(ways, rounds, lambda run: float(run() is None))
    here, there = ([min(line["shared_seconds"]) for line in taken[one]] for one in taken)
    peaks = ([line["shared_peak_mib"] for line in taken[one]] for one in taken)
    yield {"row": "step", "here_seconds": here, "there_seconds": there,
           **dict(zip(("here_peak_mib", "there_peak_mib"), peaks, strict=True)),
           **Ratio.of(here, there).fields("here_over_there")}


def worker_of(checkout: Path) -> Worker:
    script = next(path for path in (checkout / "bench/video/ours.py", checkout / "bench/video_ours.py")
                  if path.exists())
    return Worker(str(script), {0}, {"PYTHONPATH": packages(checkout)})


def video_row(other: Path, rounds: int) -> Iterator[dict[str, Any]]:
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
    parser.add_argument("--rows", type=lambda text: text.split(","), default=list(ROWS))
    args = parser.parse_args()
    other = args.other.resolve()
    for name, rows in (("step", step_row), ("video", video_row)):
        for row in rows(other, args.rounds) if name in args.rows else ():
            recipe.append("against", {"bench": "against", "other": commit(other), **row})
            print(row, flush=True)


if __name__ == "__main__":
    main()
