"""Processes that the video bench measures in: one with veripo, one with the libraries it is compared with.

Each stays alive, is pinned to the cores it is given, and does one task after the other, so rounds of both can be
interleaved while neither sees the other's imports or threads. Tasks and answers are JSON lines. Imports no veripo.
"""

from __future__ import annotations

import json
import os
import re
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bench.tied import PATHS, tied

FOLDER = Path(__file__).resolve().parent
Answer = dict[str, Any]
Task = Callable[..., Answer]


class WorkerError(RuntimeError):
    """A task that failed, crashed its process, or hung; says what was said last."""


class Worker:
    """A script of bench/video/ that serves tasks; a context manager.

    Args:
        script: file name in bench/video/.
        cores: processor numbers that it may run on; its thread pools get as many threads.
        environment: added to this process's own.
    """

    def __init__(self, script: str, cores: set[int], environment: Mapping[str, str] | None = None) -> None:
        self._log = tempfile.TemporaryFile("w+b")  # noqa: SIM115 (closed in close)
        threads = str(len(cores))
        self._process = subprocess.Popen(
            tied(sys.executable, FOLDER / script), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
            env={**os.environ, "OMP_NUM_THREADS": threads, "TORCHCODEC_NUM_THREADS": threads,
                 "BENCH_CORES": ",".join(map(str, sorted(cores))), "HF_HUB_OFFLINE": "1",
                 "PYTHONPATH": os.pathsep.join([*PATHS, *filter(None, [os.environ.get("PYTHONPATH")])]),
                 **(environment or {})})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()

    def call(self, task: str, *, timeout_seconds: float = 1800, **arguments: Any) -> Answer:
        """Do a task.

        Raises:
            WorkerError: it raised (with its message), or the process ended or was killed after `timeout_seconds`.
        """
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(json.dumps({"task": task, **arguments}).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise WorkerError(self._last_words()) from None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(timeout_seconds):
                self._process.kill()
                raise WorkerError(f"took longer than {timeout_seconds:.0f} seconds")
        line = self._process.stdout.readline()
        if not line:
            raise WorkerError(self._last_words())
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def close(self) -> None:
        assert self._process.stdin
        try:
            self._process.stdin.close()
        except BrokenPipeError:
            self._process.kill()
        self._process.wait()
        self._log.close()

    def _last_words(self) -> str:
        code = self._process.wait()
        self._log.seek(0)
        lines = [line for line in self._log.read().decode(errors="replace").splitlines() if line.strip()]
        return f"ended with exit code {code}" + (f": {lines[-1].strip()}" if lines else "")


def serve(tasks: Mapping[str, Task], failures: tuple[type[Exception], ...]) -> None:
    """Answer tasks from standard input until it ends; an error among `failures` is an answer, any other ends it."""
    cores = {int(core) for core in os.environ["BENCH_CORES"].split(",")}
    os.sched_setaffinity(0, cores)
    import torch

    torch.set_num_threads(len(cores))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not get between the answers
    for line in sys.stdin:
        arguments = json.loads(line)
        try:
            answer = tasks[arguments.pop("task")](**arguments)
        except failures as error:
            first = next((text.strip() for text in str(error).splitlines() if text.strip()), "")
            answer = {"error": f"{type(error).__name__}: {first[:300]}"}
        print(json.dumps(answer), file=answers, flush=True)


def measured(run: Callable[[], Any]) -> tuple[Any, Answer]:
    """What a call gives, and its wall seconds and the CPU seconds of all threads of this process meanwhile."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = run()
    return result, {"wall_seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}


def bundled_ffmpeg(folder: Path) -> dict[str, str]:
    """Environment in which torchcodec finds the FFmpeg of the `av` wheel without veripo: the same library for all.

    Links with plain names are made in `folder`; {} where the wheel brings no FFmpeg.
    """
    import av

    libraries = Path(av.__file__).parent.parent / "av.libs"
    if not libraries.is_dir():
        return {}
    folder.mkdir(parents=True, exist_ok=True)
    for path in libraries.iterdir():
        if found := re.match(r"(lib(?:av|sw)[a-z]+)-[0-9a-f]+(\.so\.\d+)", path.name):
            link = folder / (found[1] + found[2])
            link.unlink(missing_ok=True)
            link.symlink_to(path)
    return {"LD_LIBRARY_PATH": os.pathsep.join(
        [str(folder), str(libraries), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])])}
