"""GRPO -> verifier -> DPO -> GRPO on each family: it runs, and a run that was killed ends with the same bits."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.support import policies, ranks, runs
from tests.support.ranks import assert_close, codes
from tests.support.run_compare import assert_same, records, written
from veripo_fast.run.folder import RunDir

MOMENTS = ("open .*rollouts/grpo-1/.tmp-step_000001", r"mkdir .*\.tmp-step_000003$",
           "rename .*rollouts/grpo-2/step_000001")
"""Within GRPO, within DPO, and in the second GRPO."""


@pytest.mark.parametrize("family", policies.NEW_FAMILIES)
def test_a_killed_run_ends_as_a_whole_one(family: str, tmp_path: Path) -> None:
    forks = runs.forks()
    options: dict = {"model__path": str(runs.model(family)), "eval__at": "ends", "eval__samples": 0}
    if family.endswith("moe"):
        options["model__router_balance"] = 0.01
    (tmp_path / "whole").mkdir()
    ended = forks.run("train", "--config", written(runs.config(tmp_path / "whole" / "run", **options),
                                                   tmp_path / "whole"))
    assert ended.code == 0, ended.output
    assert "memory of grpo-1, predicted: load " in ended.output and "not predicted" not in ended.output
    config = written(runs.config(tmp_path / "run", **options), tmp_path)
    for number, moment in enumerate(MOMENTS):
        ended = forks.run("train", "--config", config, *(["--resume"] if number else []), at=moment)
        assert ended.code == -signal.SIGKILL, (moment, ended.output)
    ended = forks.run("train", "--config", config, "--resume")
    assert ended.code == 0, ended.output
    assert_same(tmp_path / "run", tmp_path / "whole" / "run")
    rows = records(RunDir(tmp_path / "run").metrics)
    assert [row["kind"] for row in rows] == ["grpo", "grpo", "dpo", "dpo", "grpo", "grpo"]
    assert all(row["parity_max"] < 1e-3 for row in rows if "parity_max" in row)


@pytest.mark.parametrize(("backend", "family"), [
    ("auto", "qwen3_5_moe"), ("auto", "qwen3_vl_moe"), ("deepspeed", "qwen3_5"), ("deepspeed", "qwen3_vl_moe")])
def test_two_ranks_give_what_one_process_gives(backend: str, family: str, tmp_path: Path) -> None:
    """On gloo, by FSDP2 unless told: experts and recurrent layers are gathered as other weights are."""
    options = {"model__path": str(runs.model(family)), "stages": [{"kind": "grpo"}], "eval__at": "never",
               "checkpoint__every": 50}
    folders = []
    for size in (1, 2):
        own = tmp_path / str(size)
        own.mkdir()
        sharded = {"distributed__backend": backend} if size > 1 else {}
        ended = ranks.train(size, written(runs.config(own / "run", **options, **sharded), own))
        assert codes(ended) == [0] * size, ended
        folders.append(own / "run")
    assert_close(folders[1], folders[0])
