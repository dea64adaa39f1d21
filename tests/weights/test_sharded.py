"""Real processes that share a policy and its engines, over gloo: hand-overs, what they cost, and planted faults."""

from __future__ import annotations

import json
import os
import re
import sys

import pytest

from tests.support.children import run
from tests.support.paths import PYTHONPATH
from veripo_fast.weights.sharded import ShardedReport

Results = list[dict]
"""Of each rank, by the name of the case."""


@pytest.fixture(scope="module", params=[(2, "rows", "qwen3_vl", "tied", 1), (4, "flat", "qwen2_5_vl", "untied", 2),
                                        (4, "tower_whole", "qwen3_vl", "untied", 4),
                                        (4, "rows", "qwen3_5_moe", "tied", 2)], ids=str)
def ranks(request: pytest.FixtureRequest) -> Results:
    """What `sharded_ranks.py` found in a world of some ranks."""
    size, *arguments = map(str, request.param)
    done = run(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", size, "-m",
               "tests.weights.sharded_ranks", *arguments, env={**os.environ, "PYTHONPATH": PYTHONPATH})
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert sorted(result["rank"] for result in found) == list(range(int(size)))
    return sorted(found, key=lambda result: result["rank"])


def test_engines_follow_the_policy(ranks: Results) -> None:
    """After the self-test, which leaves no trace; frozen parameters move once, and again into a new engine."""
    for result in (rank["follow"] for rank in ranks):
        first, later, again = result["bytes"]
        assert result["wrong"] == [] and result["aliased"] == 0 and result["version"] == 2
        assert first == again > later > 0
        first, *later, again = result["between"]
        assert first == again >= later[0] == later[1] > 0 and first < result["full"]
        assert "between the ranks, where whole parameters would be" in result["line"]
    assert sum(rank["follow"]["received"] for rank in ranks) == ranks[0]["follow"]["between"][0]


def test_what_is_planned_is_what_moves(ranks: Results) -> None:
    """In buckets of at most the 5,000 bytes that were asked for."""
    for result in (rank["count"] for rank in ranks):
        assert result["given"] == result["planned"] and 0 < result["most"] <= 5000


def test_a_rank_that_holds_nothing(ranks: Results) -> None:
    assert [rank["nothing"]["wrong"] for rank in ranks] == [[]] * len(ranks)
    assert ranks[-1]["nothing"]["sent"] == 0 < ranks[0]["nothing"]["sent"]


def test_one_bit_of_a_buffer_is_found_on_every_rank(ranks: Results) -> None:
    """Both ends name the elements, others the round."""
    last = len(ranks) - 1
    for rank, result in enumerate(ranks):
        message = result["flip"]["message"]
        assert message.startswith(f"the engine of rank 0 does not hold the weights that rank {last} sent: ")
        where = r"from element [\d,]+ of model\.\S+ to element [\d,]+ of model\.\S+" if rank in (0, last) else \
            r"in round \d+ of \d+"
        assert re.search(where + r" the checksum is -?\d+, not -?\d+$", message), message


def test_a_loader_and_arguments_that_differ_are_found_on_every_rank(ranks: Results) -> None:
    last = len(ranks) - 1
    for result in (rank["spoil"] for rank in ranks):
        loader, names, sizes = result["messages"]
        assert loader == (f"rank {last}: language_model.model.norm.weight: the engine's reload writes other weights "
                          "than those of model.language_model.norm.weight") and result["restored"]
        assert names == f"rank {last} was given other trained names than rank 0"
        assert sizes == f"{len(ranks)} ranks cannot form engines of 3 tensor-parallel ranks each"


@pytest.mark.parametrize(("report", "line"), [
    (ShardedReport(1, 12_300_000, 0.004, 1.1, 2_000_000, 14_000_000),
     "12.3 MB in 4 ms, 1.1x a plain copy of the same bytes (measured at start); 2 MB between the ranks, where whole "
     "parameters would be 14 MB"),
])
def test_a_report_is_one_line(report: ShardedReport, line: str) -> None:
    assert str(report) == line
