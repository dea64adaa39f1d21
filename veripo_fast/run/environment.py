"""Environment of a command, set before libraries that read it while they are imported."""

from __future__ import annotations

import os

from veripo_fast.text import rank_prefix


def set_environment() -> None:
    """Set defaults; what the user has set stays."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded at run time
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads warn after every fork
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # TensorBoard looks for TensorFlow, which then talks
    if os.environ.get("WORLD_SIZE", "1") != "1":
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # of a lost rank c10d warns in 60 lines; we do in one
    if rank_prefix():
        os.environ.setdefault("TQDM_DISABLE", "1")  # rank 0 shows how far all are
