"""Two ranks with a judge each, and with AdamW's rows in host memory while they sample."""

from __future__ import annotations

import json
from pathlib import Path

from tests.support import judges, ranks, runs
from tests.support.ranks import codes, train
from tests.support.run_compare import records, written
from veripo_fast.run.folder import RunDir

RUNNING = ("seconds", "speed", "offloaded_bytes")


def test_ranks_share_the_judging(tmp_path: Path) -> None:
    """Every completion is counted once; until the judge works, the run is bitwise the one that moves nothing."""
    config = runs.config(tmp_path / "run", optimizer__offload=True, verifier__judge="llm",
                         verifier__llm_path=str(judges.judge_folder()), verifier__llm_max_failures=1.0)
    ended = train(2, written(config, tmp_path))
    assert codes(ended) == [0, 0], ended
    run, plain = RunDir(tmp_path / "run"), RunDir(ranks.whole(2))
    ours, theirs = ([{name: value for name, value in row.items() if name not in RUNNING}
                     for row in records(one.metrics) if row["stage"] == "grpo-1"] for one in (run, plain))
    assert ours == theirs and len(ours) == 2
    assert records(run.metrics)[1]["offloaded_bytes"] > 0
    folder = run.verifier("dpo-1")
    account = json.loads((folder / "account.json").read_text())
    assert sum(account["verdicts"].values()) == account["completions"] == 32
    assert sum(account["no_verdict"].values()) == account["verdicts"]["unknown"] < 32
    kept = [(folder / name).read_text().splitlines() for name in ("judge_cache.jsonl", "judge_cache_1.jsonl")]
    first, second = ({row["key"]: row["supported_answer"] for row in map(json.loads, lines)} for lines in kept)
    assert first.keys() - second.keys() and second.keys() - first.keys(), "each rank judged some of its own"
    # what was written twice, in groups of both ranks, is asked by each, and the answer is the same
    assert all(first[key] == second[key] for key in first.keys() & second.keys())
