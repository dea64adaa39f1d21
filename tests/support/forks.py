"""The command line in forked processes that may be killed: of one process that has imported everything, so that a start
costs no import. Several that are forked together are the ranks of one run (`tests/support/ranks.py`).
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from bench.tied import end_with
from tests.support.children import PATIENCE_SECONDS, start
from tests.support.paths import REPOSITORY

_WARM = ("datasets", "math_verify", "torch.utils.tensorboard", "torch.distributed.fsdp", "torch.distributed.checkpoint",
         "veripo_fast.trainer", "veripo_fast.distributed.fsdp")


class Ended(NamedTuple):
    """How a process ended."""

    code: int
    """Exit code, or minus the number of the signal that killed it."""
    output: str
    """What it wrote to stdout and stderr."""
    seconds: float = 0.0
    """From the start of all that were started with it to its end."""


@dataclass
class Job:
    """One process."""

    arguments: list[str]
    at: str = ""
    """The moment of the signal: searched in lines such as `rename RUN/a RUN/b`, `open RUN/a`, `mkdir RUN/a`, for files
    that the process is about to change, and `doing in update of step 3`, for what it tells its peers that it does."""
    send: int = signal.SIGKILL
    """What the process gets then. One that is stopped is killed when all others are gone."""
    after: float | None = None
    """Seconds after the start at which the signal comes instead."""
    limits: dict[str, int] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    folder: str = ""
    """Where it runs."""
    constants: dict[str, Any] = field(default_factory=dict)
    """`module:NAME` -> a value for this process."""
    output: str = ""


@cache
def forks() -> Forks:
    """One server per test process."""
    return Forks()


class Forks:
    """`veripo` in forks of one process."""

    def __init__(self) -> None:
        self._folder = TemporaryDirectory(prefix="veripo-forks-")
        # what the command line sets before torch is imported has to be there when the server imports it
        environment = {"TORCH_CPP_LOG_LEVEL": "ERROR", **os.environ,
                       "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self.server = start(sys.executable, "-c", "from tests.support import forks; forks.serve()",
                            stdin=subprocess.PIPE, cwd=REPOSITORY, env=environment)
        atexit.register(self.close)

    def close(self) -> None:
        self.server.stdin.close()
        self.server.wait()
        self._folder.cleanup()

    def run(self, *arguments: object, at: str = "", send: int = signal.SIGKILL,
            limits: Mapping[str, int] | None = None) -> Ended:
        """Run a command; send a signal to it at a moment (`Job.at`)."""
        [ended] = self.run_together([Job(list(map(str, arguments)), at, send, limits=dict(limits or {}))])
        return ended

    def run_together(self, jobs: Sequence[Job]) -> list[Ended]:
        """Run several commands at the same time, until all are gone."""
        for number, job in enumerate(jobs):
            job.output = str(Path(self._folder.name) / str(number))
        self.server.stdin.write(json.dumps([asdict(job) for job in jobs]) + "\n")
        self.server.stdin.flush()
        answers = json.loads(self.server.stdout.readline())
        return [Ended(code, Path(job.output).read_text(), seconds)
                for job, (code, seconds) in zip(jobs, answers, strict=True)]


def serve() -> None:
    """Forks for each line of stdin; answers with how they ended."""
    for name in _WARM:
        importlib.import_module(name)
    from transformers import Qwen3VLForConditionalGeneration  # noqa: F401

    for line in sys.stdin:
        print(json.dumps(_forked([Job(**job) for job in json.loads(line)])), flush=True)


def _forked(jobs: Sequence[Job]) -> list[tuple[int, float]]:
    """Code and seconds of each."""
    server, started = os.getpid(), time.monotonic()
    alive: dict[int, Job] = {}
    for job in jobs:
        child = os.fork()
        if child == 0:
            end_with(server)
            _run_command(job)
        alive[child] = job
    order, ended = list(alive), {}
    due = {child: job.after for child, job in alive.items() if job.after is not None}
    while alive:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            ended[child] = os.waitstatus_to_exitcode(status), time.monotonic() - started
            del alive[child]
            due.pop(child, None)
            continue
        for child in [child for child, seconds in due.items() if time.monotonic() - started > seconds]:
            os.kill(child, alive[child].send)
            del due[child]
        if all(job.send == signal.SIGSTOP and (job.at or job.after) for job in alive.values()):
            for child in alive:
                os.kill(child, signal.SIGKILL)
        time.sleep(0.003)
    return [ended[child] for child in order]


def _run_command(job: Job) -> None:
    from veripo_fast.cli import main

    output = os.open(job.output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    signal.alarm(int(PATIENCE_SECONDS))
    os.environ.update(job.environment)
    if job.folder:
        os.chdir(job.folder)
    for name, value in job.limits.items():
        resource.setrlimit(getattr(resource, name), (value, value))
    for name, value in job.constants.items():
        module, constant = name.split(":")
        setattr(importlib.import_module(module), constant, value)
    if job.at:
        moment = _Signal(job.at, job.send)
        sys.addaudithook(moment.on_change)
        moment.listen()
    code = 1
    try:
        code = main(job.arguments)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class _Signal:
    """Sends this process a signal at the first moment that matches."""

    def __init__(self, pattern: str, send: int) -> None:
        self.pattern, self.send = re.compile(pattern), send

    def on_change(self, event: str, arguments: tuple[Any, ...]) -> None:
        """An audit hook: changes of files."""
        writes = event == "open" and arguments[1] not in ("r", "rb")
        if not self.send or not (writes or event in ("os.rename", "os.mkdir", "os.remove")):
            return
        paths = (str(argument) for argument in arguments[:2] if isinstance(argument, str | os.PathLike))
        self._moment(" ".join((event.removeprefix("os."), *paths)))

    def listen(self) -> None:
        """Hear what this rank says that it does."""
        from veripo_fast.distributed.world import World

        say = World.doing

        def doing(world: World, what: str) -> None:
            say(world, what)
            self._moment(f"doing {what}")

        World.doing = doing  # type: ignore[method-assign]

    def _moment(self, line: str) -> None:
        if self.send and self.pattern.search(line):
            number, self.send = self.send, 0
            os.kill(os.getpid(), number)
