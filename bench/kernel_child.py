"""One task of the kernel benches in a process of its own: memory counted from a clean start, the interpreter on or off.

    python bench/kernel_child.py '{"task": "accuracy", "shape": [64, 32, 512]}'

Prints one JSON object. Letters: T tokens, V vocabulary, D hidden.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tied import tied

BENCH = Path(__file__).resolve().parent
PATHS = [str(path) for path in (BENCH, BENCH.parent / "tests", BENCH.parent / "kernels", BENCH.parent)]


class ChildError(RuntimeError):
    """A task whose process failed; says what it said last."""


def call(task: str, *, interpret: bool = False, timeout_seconds: float = 1800, **arguments: Any) -> dict[str, Any]:
    """Run a task; `interpret` has Triton kernels run in the interpreter.

    Raises:
        ChildError: the process failed or took longer than `timeout_seconds`.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([*PATHS, *filter(None, [os.environ.get("PYTHONPATH")])])
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    command = tied(sys.executable, BENCH / "kernel_child.py", json.dumps({"task": task, **arguments}))
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout_seconds,
                              check=False)
    except subprocess.TimeoutExpired:
        raise ChildError(f"took longer than {timeout_seconds:.0f} seconds") from None
    if done.returncode:
        raise ChildError(last_line(done.stderr) or f"ended with exit code {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def use_interpreter() -> None:
    """Repairs Triton's interpreter where TRITON_INTERPRET is 1; before kernels load."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        from veripo_kernels.testing import interpreter

        interpreter.install()


def peak(op: str, peer: str, shape: list[int], dtype: str, idle: float, workspace_bytes: int) -> dict[str, Any]:
    """`kernel_rows.peak_here` on this process's CPU."""
    import torch
    from kernel_rows import peak_here

    return peak_here(op, peer, tuple(shape), getattr(torch, dtype), torch.device("cpu"), idle=idle,
                     workspace_bytes=workspace_bytes)


def accuracy(**arguments: Any) -> dict[str, Any]:
    """`kernel_rows.accuracy` in this process."""
    from kernel_rows import accuracy as row

    return row(**arguments)


TASKS = {"peak": peak, "accuracy": accuracy}


def main() -> None:
    use_interpreter()
    arguments = json.loads(sys.argv[1])
    print(json.dumps(TASKS[arguments.pop("task")](**arguments)))


if __name__ == "__main__":
    main()
