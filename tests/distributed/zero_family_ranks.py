"""Two ranks under torchrun: ZeRO against one process on families with experts or recurrent layers.

    python -m torch.distributed.run --nproc-per-node 2 -m tests.distributed.zero_family_ranks OUT FAMILY=FOLDER ...

The checkpoints have transformers' own spread of initial weights. With the demo's, which is four times as wide, one
process is itself off float64 by up to 7e-5 in the gradients of Qwen3.5 (bench/results/families.jsonl), and routers that
are that close to a tie choose other experts.
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from tests.distributed.zero_ranks import Ranks, updates_match


def main(out: Path, *named: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=300))
    folders = {family: Path(folder) for family, _, folder in (text.partition("=") for text in named)}
    ranks = Ranks(out, out, out)
    ranks.folders = folders
    for family in folders:
        for stage in (1, 2, 3):
            updates_match(ranks, stage, family, frozen=False, updates=10)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
