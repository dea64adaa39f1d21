"""Two processes: one engine over both (tensor parallel), and an engine in each."""

from __future__ import annotations

import json
import os
import sys

import pytest

from tests.support import policies
from tests.support.children import run
from tests.support.paths import PYTHONPATH


def two_ranks(family: str, size: int, *options: str) -> list[dict]:
    """What each rank found; the checkpoint is made here, because transformers lets rank 0 alone write one."""
    folder = policies.checkpoint(family) if family == "qwen3_vl" else policies.untied_checkpoint(family)
    done = run(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m",
               "tests.engines.two_ranks", str(folder), str(size), *options,
               env={**os.environ, "PYTHONPATH": PYTHONPATH})
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert sorted(result["rank"] for result in found) == [0, 1]
    return found


@pytest.mark.parametrize("family", [*policies.FAMILIES, "qwen3_vl_moe", "qwen3_5_moe"])
def test_one_engine_of_two_ranks(family: str) -> None:
    """Shards are planned and copied; both ranks get the same completions; other prompts are refused, not hung."""
    most = 5e-5 if family in policies.FAMILIES else 1e-4  # at T = 0.7, on weights that noise has made sharper
    for result in two_ranks(family, 2):
        assert max(result["gaps"]) < most and result["same"]
        assert "rank 1 shares an engine with rank 0 and was given other prompts" in result["message"]


@pytest.mark.parametrize("family", ["qwen3_vl_moe", "qwen3_5_moe"])
def test_one_engine_of_two_ranks_tells_its_experts(family: str) -> None:
    """Both ranks the same, and the trainer that replays them agrees."""
    for result in two_ranks(family, 2, "router_replay"):
        assert max(result["gaps"]) < 1e-4 and result["same"] and result["tells"]


def test_an_engine_in_each_rank() -> None:
    """Each samples its own prompts; the process group is the trainer's and stays."""
    for result in two_ranks("qwen3_vl", 1):
        assert max(result["gaps"]) < 5e-5 and not result["same"] and result["world"] == 2
