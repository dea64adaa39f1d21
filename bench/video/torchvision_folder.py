"""torchvision from a folder of its own, for processes that run Hugging Face's processors; they never import veripo."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

_declared: list[torch.library.Library] = []


def add(folder: str) -> None:
    """Lets `import torchvision` find the one in `folder`, beside a CPU build of torch as well.

    torchvision on PyPI is a CUDA build. When it is imported it says more of operators that its library defines; a CPU
    build of torch cannot load that library, so the operators are declared here. Declared twice, they end the process.
    """
    sys.path.append(folder)
    try:
        torch.ops.load_library(Path(folder) / "torchvision" / "_C.so")
    except OSError:
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(library)  # a library that is freed takes its operators along
