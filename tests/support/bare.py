"""An interpreter that sees few packages, as on a machine where this project's requirements are not installed."""

from __future__ import annotations

import re
import venv
from importlib import metadata
from pathlib import Path


def bare_python(folder: Path, *names: str) -> Path:
    """The interpreter of a virtual environment of links to distributions of this one, and to what those require."""
    venv.create(folder, symlinks=True)
    site, = folder.glob("lib/python*/site-packages")
    waiting, linked = list(names), set()
    while waiting:
        name = waiting.pop()
        if name in linked:
            continue
        linked.add(name)
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:  # a requirement of another Python or platform
            assert name not in names
            continue
        for file in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            link = site / file
            if not link.exists():
                link.symlink_to(Path(str(distribution.locate_file(file))))
        required = [text for text in distribution.requires or () if "extra ==" not in text]
        waiting += [re.split(r"[^\w.-]", text, maxsplit=1)[0] for text in required]
    return folder / "bin" / "python"
