"""Where this checkout is, and what a fresh interpreter needs on its path to import from it."""

import os
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PYTHONPATH = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "kernels")])
