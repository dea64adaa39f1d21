"""One command for a GPU node: every op checked on the GPU, every row of the Hopper table measured, in eight minutes.

    python bench/gpu_check.py [--out FOLDER]     on a GPU; torch, triton and numpy are all that it needs
    python bench/gpu_check.py --device cpu       a rehearsal: the same code at tiny sizes, Triton in its interpreter

Each part (gpu_parts.py) runs in a process of its own, the most valuable first; one that crashes or hangs is ended and
takes no other along. Every row is printed and stored as it comes, in FOLDER/DEVICE.jsonl, which is
bench/results/h200.jsonl on an NVIDIA H200. A row is reached, missed, or says why there is no number. Parts whose
packages are not installed are left out by name.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO

if __name__ == "__main__":  # bench/ itself on the path would offer bench/kernels as `kernels`, a Hugging Face package
    sys.path[0] = __file__.rpartition("/bench/")[0]

from bench import recipe
from bench.gpu_parts import FULL, PARTS, TINY, Row, not_measured
from bench.kernels import child
from bench.tied import PATHS, REPOSITORY, tied

GPU_TESTS = ("tests/kernels/test_gather.py", "tests/model/test_attention.py", "tests/video/test_gpu.py")
"""Test files that put their tensors on a GPU where there is one; the others test kernels in the interpreter."""
BUDGET_SECONDS = 480.0
TESTS_NEED = ("pytest", "hypothesis", "av", "transformers")
TEST_SECONDS = 120.0
"""Of one test file."""
_LEAST_SECONDS = 5.0
"""With less left a part is not started: it would not get beyond its imports."""
_RESULT = "RESULT "
_LAST_WORDS_SECONDS = 5.0
"""How long the end of a process that was killed is waited for: one that a GPU holds may never end."""


def absent(needs: Iterable[str]) -> str | None:
    """Which packages are missing, as a sentence; None where all are here."""
    names = [name for name in needs if importlib.util.find_spec(name) is None]
    return f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} not installed" if names else None


def run_part(name: str, device: str, seconds: float) -> Iterator[Row]:
    """Rows of a part as they come from a process of its own; where it fails or hangs, a last one that says so."""
    command = tied(sys.executable, __file__, "--device", device, "--part", name)
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    if device == "cpu":
        environment["TRITON_INTERPRET"] = "1"
    environment["PYTHONPATH"] = os.pathsep.join(PATHS)
    end, count = time.monotonic() + seconds, 0
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment,
                                   start_new_session=True)
        lines = _lines(process.stdout)
        try:
            for line in _until(lines, end):
                if line.startswith(_RESULT):
                    count += 1
                    yield json.loads(line.removeprefix(_RESULT))
            code = process.wait(max(end - time.monotonic(), 0.1))
        except (TimeoutError, subprocess.TimeoutExpired):
            before = f", after {count} rows" if count else ""
            yield not_measured(name, f"took longer than {seconds:.0f} seconds{before}")
            return
        finally:
            _end(process)
        errors.seek(0)
        if code:
            text = errors.read()
            print(text[-4000:], file=sys.stderr)
            yield not_measured(name, child.last_line(text) or f"ended with exit code {code}")


def _lines(stream: IO[str] | None) -> queue.Queue[str | None]:
    """The lines of a stream, then None. A thread reads, because a pipe may stay open behind a process that hangs."""
    assert stream is not None
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in stream:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    return lines


def _until(lines: queue.Queue[str | None], end: float) -> Iterator[str]:
    """Lines until the last one. Raises TimeoutError at `end`, in monotonic seconds."""
    while True:
        try:
            line = lines.get(timeout=max(end - time.monotonic(), 0.001))
        except queue.Empty:
            raise TimeoutError from None
        if line is None:
            return
        yield line


def _end(process: subprocess.Popen[str]) -> None:
    """Kill a process and all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        process.wait(_LAST_WORDS_SECONDS)


def run_tests(file: str, seconds: float) -> Row:
    """One row about a file of GPU tests, run without the interpreter."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = tied(sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", file)
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=output, stderr=output, text=True,
                                   start_new_session=True)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return not_measured(file, f"took longer than {seconds:.0f} seconds")
        finally:
            _end(process)
        output.seek(0)
        return tests_row(file, output.read(), code)


def tests_row(file: str, output: str, code: int) -> Row:
    """What pytest's output says: its last line, and the failures."""
    failures = re.findall(r"^(?:FAILED|ERROR) (.*)$", output, re.MULTILINE)
    return {"row": f"GPU tests: {file}", "summary": child.last_line(output), "failures": failures[:20],
            "passed": code == 0}


def left_out(name: str, reason: str) -> Row:
    """A row of what was not asked of this machine; it counts neither as reached nor as missed."""
    return {"row": name, "left_out": reason}


def rehearsed(row: Row, device: str) -> Row:
    """A row without its verdict where that is about the speed or memory of a GPU and this is none."""
    return {key: value for key, value in row.items() if key != "passed"} if device == "cpu" and "value" in row else row


def told(row: Row) -> str:
    """A row as one line."""
    if "left_out" in row:
        return f"left out      {row['row']}: {row['left_out']}"
    if "not_measured" in row:
        return f"not measured  {row['row']}: {row['not_measured']}"
    mark = {True: "reached", False: "MISSED ", None: "ran    "}[row.get("passed")]
    details = {"value", "limit", "limits", "cases", "summary", "launches", "logprob_error_max", "logprob_error_mean",
               "dhead_relative_rms", "tokens", "hidden", "vocabulary", "wrong", "frames_per_second", "wrong_frames",
               "psnr", "ran"} & row.keys()
    return f"{mark}       {row['row']}: " + ", ".join(f"{key} {row[key]}" for key in sorted(details))


def check(device: str, part: Callable[[str, str, float], Iterable[Row]] = run_part,
          tests: Callable[[str, float], Row] = run_tests) -> Iterator[Row]:
    """The rows of all parts within the budget."""
    end = time.monotonic() + BUDGET_SECONDS
    for name, what in PARTS.items():
        left = end - time.monotonic()
        if (missing := absent(what.needs)) is not None:
            yield {"part": name, **left_out(name, missing)}
        elif left < _LEAST_SECONDS:
            yield {"part": name, **_too_late(name)}
        else:
            yield from ({"part": name, **rehearsed(row, device)} for row in part(name, device, min(left, what.seconds)))
    for file in GPU_TESTS:
        left = end - time.monotonic()
        if device == "cpu":
            row = left_out(file, "without a GPU it runs with the other tests")
        elif (missing := absent(TESTS_NEED)) is not None:
            row = left_out(file, missing)
        else:
            row = _too_late(file) if left < _LEAST_SECONDS else tests(file, min(left, TEST_SECONDS))
        yield {"part": "tests", **row}


def _too_late(name: str) -> Row:
    return not_measured(name, f"the {BUDGET_SECONDS:.0f} seconds were over")


def results_name(device: str, gpu: str) -> str:
    """The name of the results file of a device: `h200` for an NVIDIA H200, `cpu` for every CPU."""
    words = re.findall(r"[a-z0-9]+", gpu.lower())
    return "cpu" if device == "cpu" else "-".join(word for word in words if word != "nvidia")


def keep(rows: Iterable[Row], name: str) -> list[Row]:
    """Store and print each row as it comes."""
    started, kept = time.monotonic(), []
    for row in rows:
        recipe.append(name, {"bench": "gpu_check", **row, "at_seconds": round(time.monotonic() - started, 1)})
        print(told(row), flush=True)
        kept.append(row)
    return kept


def in_child(name: str, device: str) -> None:
    """Measure a part here and print its rows for the parent."""
    child.use_interpreter()
    import torch

    for row in PARTS[name].run(torch.device(device), TINY if device == "cpu" else FULL):
        print(_RESULT + json.dumps(row), flush=True)


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"),
                        help="cpu: a rehearsal at tiny sizes, Triton in its interpreter (default cuda)")
    parser.add_argument("--out", type=Path, default=recipe.RESULTS, metavar="FOLDER",
                        help="where DEVICE.jsonl is written (default bench/results)")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)  # one part, in this process
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parsed(arguments)
    if args.part:
        in_child(args.part, args.device)
        return
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit(f"gpu_check: torch {torch.__version__} sees no CUDA device, so no GPU row can be measured here; "
                 "`--device cpu` rehearses the same code")
    recipe.RESULTS = args.out
    gpu = recipe.device_name()
    name = results_name(args.device, gpu)
    print(f"{gpu}; {', '.join(f'{package} {version}' for package, version in recipe.versions().items())}", flush=True)
    rows = [row for row in keep(check(args.device), name) if "passed" in row]
    reached = sum(row["passed"] for row in rows)
    print(f"{reached} of {len(rows)} rows reached; written to {recipe.RESULTS / f'{name}.jsonl'}")
    sys.exit(reached < len(rows))


if __name__ == "__main__":
    main()
