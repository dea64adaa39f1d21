"""One task of the kernel benches in a process of its own: memory counted from a clean start, the interpreter on or off.

    python bench/kernels/child.py '{"task": "accuracy", "shape": [64, 32, 512]}'

Prints one JSON object. Letters: T tokens, V vocabulary, D hidden.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":  # bench/ itself on the path would offer bench/kernels as `kernels`, a Hugging Face package
    sys.path[0] = __file__.rpartition("/bench/")[0]

from bench.tied import PATHS, tied

if TYPE_CHECKING:
    import torch


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
    command = tied(sys.executable, __file__, json.dumps({"task": task, **arguments}))
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


def peak_of(op: str, peer: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, *, idle: float = 0.0,
            workspace_bytes: int | None = None) -> dict[str, Any]:
    """`rows.peak_here`, on a CPU in a process of its own; on a GPU here, because its allocator keeps count."""
    if device.type == "cuda":
        from bench.kernels.rows import peak_here

        return peak_here(op, peer, shape, dtype, device, idle=idle, workspace_bytes=workspace_bytes)
    return call("peak", op=op, peer=peer, shape=list(shape), dtype=str(dtype).removeprefix("torch."), idle=idle,
                workspace_bytes=workspace_bytes)


def peak(op: str, peer: str, shape: list[int], dtype: str, idle: float, workspace_bytes: int | None) -> dict[str, Any]:
    """`rows.peak_here` on this process's CPU."""
    import torch

    from bench.kernels.rows import peak_here

    return peak_here(op, peer, tuple(shape), getattr(torch, dtype), torch.device("cpu"), idle=idle,
                     workspace_bytes=workspace_bytes)


def accuracy(**arguments: Any) -> dict[str, Any]:
    """`rows.accuracy` in this process."""
    from bench.kernels.rows import accuracy as row

    return row(**arguments)


TASKS = {"peak": peak, "accuracy": accuracy}


def main() -> None:
    use_interpreter()
    arguments = json.loads(sys.argv[1])
    print(json.dumps(TASKS[arguments.pop("task")](**arguments)))


if __name__ == "__main__":
    main()
