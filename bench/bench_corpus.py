"""CPU seconds and memory that it takes to start training on a corpus of many lines.

    python bench/bench_corpus.py --lines 1000000

A child trains nothing: it imports what training imports, reads the lines and draws the first prompts.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

if __name__ == "__main__":  # bench/ itself on the path would offer bench/kernels as `kernels`, a Hugging Face package
    sys.path[0] = __file__.rpartition("/bench/")[0]

from bench.recipe import append
from bench.tied import tied

QUESTIONS = ("What does the person do after opening the door?", "How many red cubes are on the table at the end?",
             "Which of the objects is the farthest from the camera in the last frame?", "What is written on the sign?")


def write_corpus(path: Path, lines: int) -> None:
    """Records as in Video-R1-260k: half of them choices, a quarter numbers, a quarter texts."""
    draw = random.Random(0)
    with path.open("w") as file:
        for number in range(lines):
            kind = draw.choice(("multiple choice", "multiple choice", "numerical", "free-form"))
            row = {"problem_id": number, "problem": f"{draw.choice(QUESTIONS)} (clip {number})", "data_type": "video",
                   "problem_type": kind, "options": [], "solution": "<answer>a red cube</answer>",
                   "path": f"./clips/{number % 1000:03d}/{number}.mp4", "data_source": "STAR"}
            if kind == "multiple choice":
                row["options"] = [f"{letter}. the object number {draw.randrange(1000)}" for letter in "ABCD"]
                row["solution"] = f"<answer>{draw.choice('ABCD')}</answer>"
            elif kind == "numerical":
                row["solution"] = f"<answer>{draw.randrange(100)}</answer>"
            file.write(json.dumps(row) + "\n")


def child(path: str) -> None:
    """Print CPU seconds (imports apart), and the peak of memory in bytes."""
    import veripo_fast.trainer  # noqa: F401
    from veripo_fast.config.inputs import DataConfig
    from veripo_fast.data.order import PromptOrder
    from veripo_fast.data.prompts import read_prompts
    from veripo_fast.run.memory import status_bytes

    imports = time.process_time()
    started = time.perf_counter()
    prompts, skipped = read_prompts([path], DataConfig())
    indices, _ = PromptOrder(len(prompts), seed=0).take(0, 16)
    print(json.dumps({"import_cpu_seconds": imports, "read_cpu_seconds": time.process_time() - imports,
                      "read_wall_seconds": time.perf_counter() - started, "prompts": len(prompts),
                      "skipped": len(skipped), "drawn": len(indices),
                      "peak_bytes": status_bytes("VmHWM")}))


def measure(path: Path, runs: int) -> list[dict[str, float]]:
    """One row per run of a child."""
    rows = []
    for _ in range(runs):
        out = subprocess.run(tied(sys.executable, __file__, "--child", path), check=True, capture_output=True,
                             text=True)
        rows.append(json.loads(out.stdout.splitlines()[-1]))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lines", type=int, default=1_000_000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "corpus.jsonl"
        write_corpus(path, options.lines)
        rows = sorted(measure(path, options.runs), key=lambda row: row["read_cpu_seconds"])
        median = rows[len(rows) // 2]
        row = {"bench": "corpus", "lines": options.lines, "bytes": path.stat().st_size, "runs": options.runs, **median,
               "cpu_seconds": median["import_cpu_seconds"] + median["read_cpu_seconds"],
               "read_cpu_seconds_min": rows[0]["read_cpu_seconds"],
               "read_cpu_seconds_max": rows[-1]["read_cpu_seconds"]}
    print(json.dumps(row))
    print(append("corpus", row))


if __name__ == "__main__":
    main()
