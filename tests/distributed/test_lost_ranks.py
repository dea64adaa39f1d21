"""A rank that dies, hangs, fails or is told to stop: the others end by themselves and say why, and `--resume` gives
bitwise what an uninterrupted run of as many ranks gives.
"""

from __future__ import annotations

import re
import shutil
import signal
from pathlib import Path

import pytest

from tests.support import ranks, runs
from tests.support.forks import Ended
from tests.support.ranks import Fault, Rank, codes, said, train
from tests.support.run_compare import assert_same, written
from veripo_fast.run.folder import RunDir

KILLS = (
    (1, "doing evaluating after start", "evaluating after start"),
    (0, "doing in vision of step 0", "in vision of step 0"),
    (1, "doing in rollout of step 0", "in rollout of step 0"),
    (0, "doing in reward of step 0", "in reward of step 0"),
    (1, "doing in update of step 0", "in update of step 0"),
    (0, "open .*step_000001/trainer/state.json", "writing the checkpoint of step 1"),
    (1, r"open .*step_000001/trainer/optimizer/.*distcp", "writing the checkpoint of step 1"),
    (0, "rename .*tmp-latest", "writing the checkpoint of step 1"),  # before `latest` names it
    (1, "doing in verify", "in verify of step 2"),
    (0, "rename .*verifier/dpo-1/pairs", "in verify of step 2"),
    (0, "doing in vision of step 3", "in (vision|update) of step 3"),  # of DPO, where ranks load without an exchange
    (1, "doing evaluating after dpo-1", "evaluating after dpo-1"),
    (0, "rename .*tmp-evals.jsonl", "(evaluating after dpo-1|in vision of step 4)"),
)
"""Rank, moment, and what the other one was doing, as a pattern."""


def one_sentence(survivors: list[Ended], *parts: str) -> str:
    """All ended with an error, and one of them says why; returns what it says."""
    assert all(one.code not in (0, -signal.SIGALRM) for one in survivors), survivors
    errors = [line for one in survivors for line in said(one) if line.startswith("veripo: error: ")]
    assert len(errors) == 1, survivors
    assert not [one for one in survivors if "Traceback" in one.output or "frame #" in one.output], survivors
    for part in parts:
        assert part in errors[0]
    return errors[0]


def test_killed_in_every_phase(tmp_path: Path) -> None:
    """One run of two ranks, of which one is killed again and again."""
    config = written(runs.config(tmp_path / "run"), tmp_path)
    resume: list[str] = []
    for rank, moment, doing in KILLS:
        ended = train(2, config, *resume, faults=[Fault(rank, moment)])
        assert ended[rank].code == -signal.SIGKILL, (moment, ended)
        told = one_sentence([ended[1 - rank]], "--resume goes on from the last whole checkpoint")
        assert re.search(f"while this one was {doing}", told), told
        resume = ["--resume"]
    ended = train(2, config, "--resume")
    assert codes(ended) == [0, 0], ended
    assert_same(tmp_path / "run", ranks.whole(2))


@pytest.mark.parametrize("lost", [0, 2])
def test_one_of_two_that_are_left_speaks(tmp_path: Path, lost: int) -> None:
    """Where the rank that held the store is lost they cannot agree, and both may."""
    config = written(runs.config(tmp_path / "run"), tmp_path)
    ended = train(3, config, faults=[Fault(lost, "doing in update of step 0")])
    assert ended[lost].code == -signal.SIGKILL, ended
    left = [one for rank, one in enumerate(ended) if rank != lost]
    if lost:
        one_sentence(left, "no sign of life from rank 2 any more, while this one was in update of step 0")
    else:
        for one in left:
            assert one.code != 0 and len(said(one)) <= 1 and "Traceback" not in one.output
        assert any(map(said, left))


def test_killed_while_starting(tmp_path: Path) -> None:
    """The folder of a run that has not begun on all ranks is left free."""
    config = written(runs.config(tmp_path / "run"), tmp_path)
    ended = train(2, config, faults=[Fault(1, "doing loading")])
    one_sentence(ended[:1], "while this one was loading the policy", "start it again as before")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_hangs(tmp_path: Path, rank: int) -> None:
    """Stopped while it holds the store, and while another one does."""
    config = written(runs.config(tmp_path / "run"), tmp_path)
    ended = train(2, config, faults=[Fault(rank, "doing in update of step 0", signal.SIGSTOP)])
    assert codes(ended)[rank] == -signal.SIGKILL  # by the test, in the end
    silent = "rank 1 has" if rank else "the rank that holds the store, or its machine, has"
    one_sentence([ended[1 - rank]], f"{silent} been silent for 4 seconds, while this one was in update of step 0")
    assert ended[1 - rank].code == 75


@pytest.mark.parametrize(("faults", "code", "name"), [
    ([Fault(1, "doing in rollout of step 0", signal.SIGTERM)], 143, "SIGTERM"),
    ([Fault(rank, "doing in rollout of step 0", signal.SIGINT) for rank in (0, 1)], 130, "SIGINT"),
], ids=["one", "all"])
def test_told_to_stop(tmp_path: Path, faults: list[Fault], code: int, name: str) -> None:
    """The step is finished and saved, rank 0 says so for all, and all have one exit code."""
    config = written(runs.config(tmp_path / "run", checkpoint__every=50), tmp_path)
    ended = train(2, config, faults=faults)
    assert codes(ended) == [code, code], ended
    assert said(ended[0])[-1] == f"veripo: interrupted by {name}; --resume goes on" and not said(ended[1])
    assert [path.name for path in RunDir(tmp_path / "run").checkpoints.glob("step_*")] == ["step_000001"]
    ended = train(2, config, "--resume", "--checkpoint.every", "1")
    assert codes(ended) == [0, 0], ended
    assert_same(tmp_path / "run", ranks.whole(2))


def test_time_is_up(tmp_path: Path) -> None:
    """By the clock of any rank: all end with the code of a run that can be tried again."""
    config = written(runs.config(tmp_path / "run"), tmp_path)
    ended = train(2, config, "--train.max-hours", "1e-9")
    assert codes(ended) == [75, 75], ended
    assert "because train.max_hours does not allow another step" in said(ended[0])[-1] and not said(ended[1])


def test_a_medium_that_changed(tmp_path: Path) -> None:
    """A UserError in the middle, on the rank that loads the clip."""
    data = tmp_path / "data"
    shutil.copytree(runs.corpus(), data)
    config = written(runs.config(tmp_path / "run", data__train=[str(data / "train.jsonl")], grpo__steps=4,
                                 eval__at="never", stages=[{"kind": "grpo"}]), tmp_path)
    ended = train(2, config, faults=[Fault(0, "doing in update of step 3")])
    clips = sorted(data.rglob("*.mp4"))
    for one, other in zip(clips, reversed(clips), strict=True):
        shutil.copyfile(runs.corpus() / other.relative_to(data), one)
    ended = train(2, config, "--resume")
    one_sentence(ended, "has another content than when this run first used it", "--allow-changes media")
    assert codes(ended) == [2, 2]


def test_a_full_disk(tmp_path: Path) -> None:
    """Of the machine of rank 1, which writes its rows of the optimizer's state."""
    config = written(runs.config(tmp_path / "run", eval__at="never"), tmp_path)
    ended = train(2, config, ranks={1: Rank(limits={"RLIMIT_FSIZE": 1_000_000})})
    one_sentence(ended, f"cannot save the checkpoint {tmp_path}/run/checkpoints/step_000001")
    assert codes(ended) == [2, 2] and not list(RunDir(tmp_path / "run").checkpoints.iterdir())
