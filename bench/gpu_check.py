"""One command for a GPU node: every op checked on the GPU, every row of the H100 table measured, in ten minutes.

    python bench/gpu_check.py

Each part runs in a process of its own, so that one that crashes or hangs takes no other along; the GPU tests get the
time that is left. Results are appended to bench/results/h100.jsonl, a line per row: reached, missed, or why there is no
number.
Letters: T tokens, V vocabulary, D hidden.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # bench/ itself on the path would offer bench/kernels as `kernels`, a Hugging Face package
    sys.path[0] = __file__.rpartition("/bench/")[0]

from bench import recipe
from bench.kernels import child
from bench.tied import PATHS, REPOSITORY, tied

GPU_TESTS = ("tests/kernels/test_gather.py", "tests/model/test_attention.py", "tests/video/test_gpu.py")
"""Test files that put their tensors on a GPU where there is one; the others test kernels in the interpreter."""
BUDGET_SECONDS, PART_SECONDS = 570, 150
_RESULT = "RESULT "


@dataclass(frozen=True)
class Sizes:
    """What is measured."""

    shapes: tuple[tuple[int, int, int], ...] = ((8192, 2048, 151936), (8192, 3584, 152064))
    """T, D, V of the rows against bare products."""
    loss_tokens: int = 65536
    long_tokens: int = 32768
    accuracy: tuple[int, int, int] = (8192, 2048, 151936)
    rounds: int = 20
    workspace_bytes: int = 1 << 30
    tiny: bool = False


FULL = Sizes()
TINY = Sizes(shapes=((32, 16, 260),), loss_tokens=64, long_tokens=64, accuracy=(32, 16, 260), rounds=2,
             workspace_bytes=8 * 260 * 4, tiny=True)


# -- the parts, each run in a child ----------------------------------------------------------------------------------

def part_sweep(device: Any, sizes: Sizes) -> list[dict[str, Any]]:
    """One row: how many cases are right, and what is wrong with the others."""
    from bench.kernels import sweep

    wrong, count = {}, 0
    for name, check in sweep.sweep(device, sweep.TINY if sizes.tiny else sweep.Sizes()):
        count += 1
        try:
            check()
        except (AssertionError, RuntimeError, ValueError, TypeError) as error:
            wrong[name] = f"{type(error).__name__}: {child.last_line(str(error))}"
            print(f"wrong: {name}: {wrong[name]}", flush=True)
    return [{"row": "ops against float64", "cases": count, "wrong": wrong, "passed": not wrong}]


def part_accuracy(device: Any, sizes: Sizes) -> list[dict[str, Any]]:
    from bench.kernels.rows import accuracy

    return [accuracy(list(sizes.accuracy), str(device), "triton", rows=1024)]


def _part_products(train_head: bool) -> Callable[[Any, Sizes], list[dict[str, Any]]]:
    def part(device: Any, sizes: Sizes) -> list[dict[str, Any]]:
        import torch

        from bench.kernels.cases import Shape
        from bench.kernels.rows import against_products

        return [against_products(Shape(*shape), device, torch.bfloat16, train_head=train_head, rounds=sizes.rounds)
                for shape in sizes.shapes]

    return part


def part_gather(device: Any, sizes: Sizes) -> list[dict[str, Any]]:
    import torch

    from bench.kernels.cases import Shape
    from bench.kernels.rows import against_read

    return [against_read(Shape(*sizes.shapes[0]), device, torch.bfloat16, rounds=sizes.rounds)]


def part_losses(device: Any, sizes: Sizes) -> list[dict[str, Any]]:
    from bench.kernels.rows import against_eager

    return [against_eager(op, sizes.loss_tokens, device, rounds=sizes.rounds) for op in ("grpo_loss", "dpo_loss")]


def part_idle(device: Any, sizes: Sizes) -> list[dict[str, Any]]:
    import torch

    from bench.kernels.cases import Shape
    from bench.kernels.rows import idle_tokens

    return [idle_tokens(Shape(*sizes.shapes[0]), device, torch.bfloat16, rounds=sizes.rounds,
                        workspace_bytes=sizes.workspace_bytes)]


def part_memory(device: Any, sizes: Sizes) -> list[dict[str, Any]]:
    import torch

    from bench.kernels.cases import Shape
    from bench.kernels.rows import memory

    return memory(Shape(*sizes.shapes[0]), device, torch.bfloat16, long_tokens=sizes.long_tokens,
                  peak=child.peak_of, workspace_bytes=sizes.workspace_bytes)


def part_video(device: Any, sizes: Sizes) -> list[dict[str, Any]]:
    from bench.video import gpu

    return list(gpu.rows(device, gpu.TINY if sizes.tiny else gpu.Sizes()))


def part_engine(device: Any, sizes: Sizes) -> list[dict[str, Any]]:
    """vLLM beside the trainer on one GPU; the shapes of a 3B model with random weights."""
    from bench import bench_engine
    from veripo_fast.errors import ConfigError
    from veripo_fast.rollout.vllm_library import check_version

    try:
        check_version()
    except ConfigError as error:
        return [not_measured("engine", str(error))]
    return bench_engine.gpu_rows("30m" if sizes.tiny else "3b", 1 if sizes.tiny else 3)


PARTS: dict[str, Callable[[Any, Sizes], list[dict[str, Any]]]] = {
    "trainable-head": _part_products(True), "frozen-head": _part_products(False), "gather": part_gather,
    "losses": part_losses, "idle": part_idle, "memory": part_memory, "accuracy": part_accuracy, "video": part_video,
    "engine": part_engine, "sweep": part_sweep,
}
"""In the order of what a short visit to a GPU should bring home first."""


# -- the parent ------------------------------------------------------------------------------------------------------

def run_part(name: str, device: str, seconds: float) -> list[dict[str, Any]]:
    """Rows of a part, measured in a process of its own; one row that says why where it fails or takes too long."""
    command = tied(sys.executable, __file__, "--device", device, "--part", name)
    environment = {key: value for key, value in os.environ.items() if device == "cpu" or key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(PATHS)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=environment, check=False)
    except subprocess.TimeoutExpired:
        return [not_measured(name, f"took longer than {seconds:.0f} seconds")]
    rows = [json.loads(line.removeprefix(_RESULT)) for line in done.stdout.splitlines() if line.startswith(_RESULT)]
    if done.returncode:
        print(done.stderr[-4000:], file=sys.stderr)
        rows.append(not_measured(name, child.last_line(done.stderr)))
    return rows


def run_tests(seconds: float) -> list[dict[str, Any]]:
    """One row about the GPU tests, run without the interpreter."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = tied(sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider",
                   *(file for file in GPU_TESTS if (REPOSITORY / file).exists()))
    try:
        done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=seconds,
                              check=False)
    except subprocess.TimeoutExpired:
        return [not_measured("tests", f"took longer than the {seconds:.0f} seconds that were left")]
    return [tests_row(done.stdout, done.returncode)]


def tests_row(output: str, code: int) -> dict[str, Any]:
    """What pytest's output says: its last line, and the failures."""
    failures = re.findall(r"^(?:FAILED|ERROR) (.*)$", output, re.MULTILINE)
    return {"row": "GPU tests", "files": list(GPU_TESTS), "summary": child.last_line(output),
            "failures": failures[:20],
            "passed": code == 0}


def not_measured(name: str, reason: str) -> dict[str, Any]:
    return {"row": name, "not_measured": reason[:400], "passed": False}


def told(row: dict[str, Any]) -> str:
    """A row as one line."""
    if "not_measured" in row:
        return f"not measured  {row['row']}: {row['not_measured']}"
    mark = "reached" if row["passed"] else "MISSED "
    details = {"value", "limit", "limits", "cases", "summary", "launches", "logprob_error_max", "logprob_error_mean",
               "dhead_relative_rms", "tokens", "hidden", "vocabulary", "wrong", "frames_per_second", "wrong_frames",
               "psnr"} & row.keys()
    return f"{mark}       {row['row']}: " + ", ".join(f"{key} {row[key]}" for key in sorted(details))


def check(device: str, part: Callable[[str, str, float], list[dict[str, Any]]] = run_part,
          tests: Callable[[float], list[dict[str, Any]]] = run_tests) -> list[dict[str, Any]]:
    """All parts within the budget; every row is stored as soon as it is there."""
    end, rows = time.monotonic() + BUDGET_SECONDS, []
    for name in [*PARTS, "tests"]:
        left = end - time.monotonic()
        if left < 5:
            found = [not_measured(name, f"the {BUDGET_SECONDS} seconds were over")]
        else:
            found = tests(left) if name == "tests" else part(name, device, min(left, PART_SECONDS))
        for row in found:
            recipe.append("h100", {"bench": "gpu_check", "part": name, **row})
            print(told(row), flush=True)
        rows += found
    return rows


def in_child(name: str, device: str) -> None:
    """Measure a part here and print its rows for the parent."""
    child.use_interpreter()
    import torch

    for row in PARTS[name](torch.device(device), TINY if device == "cpu" else FULL):
        print(_RESULT + json.dumps(row), flush=True)


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help=argparse.SUPPRESS)  # cpu: tiny
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)  # one part, in this process
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)  # another folder for the results
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parsed(arguments)
    if args.part:
        in_child(args.part, args.device)
        return
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit(f"gpu_check: torch {torch.__version__} sees no CUDA device, so no GPU row can be measured here")
    if args.out:
        recipe.RESULTS = args.out
    print(f"{recipe.device_name()}; {', '.join(f'{name} {version}' for name, version in recipe.versions().items())}")
    rows = check(args.device)
    reached = sum(row["passed"] for row in rows)
    print(f"{reached} of {len(rows)} rows reached; written to {recipe.RESULTS / 'h100.jsonl'}")
    sys.exit(reached < len(rows))


if __name__ == "__main__":
    main()
