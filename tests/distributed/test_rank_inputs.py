"""What a user can get wrong about ranks: one sentence, an error on all of them, and no run folder."""

from __future__ import annotations

import shutil
import signal
import socket
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.test_lost_ranks import one_sentence
from tests.support import ranks, runs
from tests.support.ranks import Fault, Rank, codes, said
from tests.support.run_compare import written
from veripo_fast.run.folder import RunDir


def refused(tmp_path: Path, *parts: str, rank: Rank | None = None, **options: Any) -> None:
    """Two ranks, of which the second is another, end with one sentence and leave nothing behind."""
    config = written(runs.config(tmp_path / "run", **options), tmp_path)
    own = Rank() if rank is None else rank
    if own.arguments:
        own.arguments = ["train", "--config", config, *own.arguments]
    ended = ranks.run(2, "train", "--config", config, ranks={1: own})
    one_sentence(ended, *parts)
    assert codes(ended) == [2, 2]
    assert not (tmp_path / "run").exists()


def test_no_backend(tmp_path: Path) -> None:
    refused(tmp_path, "distributed.backend is none", "2 ranks were started", distributed__backend="none")


def test_another_configuration(tmp_path: Path) -> None:
    refused(tmp_path, "rank 1 started with a configuration other than rank 0's",
            rank=Rank(arguments=["--grpo.clip-high", "0.3"]))


def test_another_version(tmp_path: Path) -> None:
    refused(tmp_path, "rank 1 started with packages other than rank 0's; every machine needs the same",
            rank=Rank(constants={"veripo_fast.run.inputs:_PACKAGES": ["torch"]}))


@pytest.mark.parametrize(("change", "parts"), [
    ("data/train.jsonl", ("rank 1 started with data files other than rank 0's",)),
    ("model/config.json", ("rank 1 started with a model other than rank 0's",)),
    ("", ("rank 1: ", "data file data/train.jsonl does not exist")),
])
def test_another_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, parts: tuple[str, ...]) -> None:
    """Its files lie under the same names and are others, or are not there."""
    folders = [tmp_path / "0", tmp_path / "1"]
    for folder in folders:
        shutil.copytree(runs.corpus(), folder / "data")
        shutil.copytree(runs.model(), folder / "model")
    if change:
        with (folders[1] / change).open("a") as file:
            file.write("\n")
    else:
        (folders[1] / "data" / "train.jsonl").unlink()
    config = written(runs.config(tmp_path / "run", data__train=["data/train.jsonl"], model__path="model"), tmp_path)
    ended = ranks.run(2, "train", "--config", config,
                      ranks={number: Rank(folder=folder) for number, folder in enumerate(folders)})
    one_sentence(ended, *parts)
    assert codes(ended) == [2, 2] and not (tmp_path / "run").exists()


@pytest.mark.parametrize(("own", "part"), [
    (Rank(without="RANK"), "RANK is ''; start with torchrun, or set"),
    (Rank(environment={"RANK": "7"}), "RANK is 7, and there are 2 ranks"),
    (Rank(without="MASTER_ADDR"), "MASTER_ADDR"),
    (Rank(environment={"MASTER_ADDR": "no.such.host.invalid"}), "could not meet the others at no.such.host.invalid"),
])
def test_a_rank_that_does_not_come(tmp_path: Path, own: Rank, part: str) -> None:
    """It says why, and rank 0 that it waited: they have not met, so neither knows of the other's sentence."""
    config = written(runs.config(tmp_path / "run", distributed__timeout_seconds=1), tmp_path)
    ended = ranks.run(2, "train", "--config", config, ranks={1: own})
    assert codes(ended) == [2, 2], ended
    assert part in said(ended[1])[-1] and "rank 0 of 2 could not meet the others" in said(ended[0])[-1]
    for one in ended:
        assert len(said(one)) == 1 and "Traceback" not in one.output
    assert not (tmp_path / "run").exists()


def test_a_port_in_use(tmp_path: Path) -> None:
    """Rank 0 cannot open it, and rank 1 meets somebody else there."""
    config = written(runs.config(tmp_path / "run", distributed__timeout_seconds=2), tmp_path)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = {"MASTER_PORT": str(other.getsockname()[1])}
        ended = ranks.run(2, "train", "--config", config, ranks={0: Rank(environment=port), 1: Rank(environment=port)})
    assert codes(ended) == [2, 2], ended
    for one in ended:
        assert len(said(one)) == 1 and "could not meet the others" in said(one)[0] and "Traceback" not in one.output
    assert not (tmp_path / "run").exists()


def test_an_exchange_that_takes_too_long(tmp_path: Path) -> None:
    """`distributed.timeout_seconds`, where a rank hangs and the watch is slower."""
    config = written(runs.config(tmp_path / "run", distributed__timeout_seconds=5), tmp_path)
    ended = ranks.run(2, "train", "--config", config,
                      faults=[Fault(1, "doing in update of step 0", signal.SIGSTOP)],
                      constants={"veripo_fast.distributed.peers:SILENT_SECONDS": 500.0})
    one_sentence(ended[:1], "no sign of life from rank 1 any more, while this one was in update of step 0")
    assert RunDir(tmp_path / "run").config.exists()
