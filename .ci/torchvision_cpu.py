"""Lets torchvision's build for CUDA be imported beside torch's build for CPUs; PyPI has no torchvision for CPUs.

Its compiled operators cannot load there, and its Python part then fails because two of them were never declared. This
appends their declarations to `torchvision/extension.py`. Image transforms, which is what transformers uses, are plain
Python. Run it with the Python of the environment; a second run changes nothing.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

MARK = "# -- declared by veripo-fast for torch without CUDA"
DECLARATIONS = f'''

{MARK}
if not _has_ops():
    _declared = torch.library.Library("torchvision", "DEF")
    _declared.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
'''


def main() -> None:
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        raise SystemExit("torchvision is not installed")
    path = Path(spec.origin).with_name("extension.py")
    text = path.read_text()
    if MARK not in text:
        path.write_text(text + DECLARATIONS)


if __name__ == "__main__":
    main()
