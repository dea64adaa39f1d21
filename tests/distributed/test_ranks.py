"""The loop on several ranks is the loop of one process: same data, same rewards, same weights up to rounding.

Plain torch, gloo and FSDP2 on a CPU; `tests/support/ranks.py` starts the ranks.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest

from tests.support import children, ranks, runs
from tests.support.paths import PYTHONPATH
from tests.support.ranks import Fault, assert_close, codes, said, train
from tests.support.run_compare import assert_same, records, tree, written
from veripo_fast.run.folder import RunDir

GRPO = {"stages": [{"kind": "grpo"}], "eval__at": "never", "checkpoint__every": 50}
"""One stage of two steps."""


def trained(folder: Path, size: int, **options: object) -> Path:
    """The run folder of a run on so many ranks."""
    own = folder / str(size)
    own.mkdir()
    ended = train(size, written(runs.config(own / "run", **options), own))
    assert codes(ended) == [0] * size, ended
    return own / "run"


def test_two_ranks_give_what_one_process_gives() -> None:
    assert_close(ranks.whole(2), ranks.whole(1))


def test_rank_0_alone_writes_into_the_run_folder() -> None:
    """Checkpoints excepted, into which each rank writes its rows of the optimizer's state."""
    one, two = ([name for name in tree(ranks.whole(size)) if "tfevents" not in name] for size in (1, 2))
    assert set(two) - set(one) == {"checkpoints/step_000005/trainer/optimizer/__1_0.distcp"}
    assert not set(one) - set(two)
    media = [sorted((ranks.whole(size) / "media.jsonl").read_text().splitlines()) for size in (1, 2)]
    assert media[0] == media[1] != []
    assert len(list((ranks.whole(2) / "tensorboard").iterdir())) == 1


@pytest.mark.parametrize("options", [
    {"model__freeze_vision": False, "grpo__kl_coef": 0.05},
    {"grpo__updates_per_rollout": 2, "grpo__importance": "token_truncate", "optimizer__max_tokens": 400},
    {"grpo__dpo_rate": 0.5, "grpo__updates_per_rollout": 2, "optimizer__max_tokens": 400},
], ids=["trained tower and reference", "old log-probs and many micro-batches", "a preference term"])
def test_options(tmp_path: Path, options: dict[str, object]) -> None:
    one, two = (trained(tmp_path, size, **GRPO, **options) for size in (1, 2))
    assert_close(two, one)
    assert [row["grad_norm"] > 0 for row in records(RunDir(two).metrics)] == [True, True]


def test_more_ranks_than_prompts(tmp_path: Path) -> None:
    """The third rank has nothing to sample in any step, and of the evaluation's last batch only one has something: for
    its controls too."""
    options = {"eval__controls": ["blind", "shuffled"], "grpo__prompts_per_step": 2, "grpo__kl_coef": 0.05,
               "eval__at": "ends", "eval__prompts_per_batch": 3, "dpo__pairs_per_step": 2,
               "stages": [{"kind": "grpo"}, {"kind": "dpo"}]}
    one, three = (trained(tmp_path, size, **options) for size in (1, 3))
    assert_close(three, one)


def test_a_rank_whose_videos_are_bad_goes_on(tmp_path: Path) -> None:
    """Of each step rank 1 gets the second and the fourth prompt."""
    data = tmp_path / "data"
    shutil.copytree(runs.corpus(), data)
    bad = sorted(data.rglob("*.mp4"))[:3]
    for path in bad:
        path.write_bytes(b"no video")
    options = {**GRPO, "data__train": [str(data / "train.jsonl")], "grpo__steps": 4, "grpo__prompts_per_step": 4}
    one, two = (trained(tmp_path, size, **options) for size in (1, 2))
    assert_close(two, one)
    skipped = [[json.loads(line) for line in RunDir(run).skipped.read_text().splitlines()] for run in (one, two)]
    assert sorted(row["path"] for row in skipped[1]) == sorted(row["path"] for row in skipped[0])
    assert {Path(row["path"]) for row in skipped[1]} <= set(bad) and len(skipped[1]) >= 2


def test_resumed_on_other_numbers_of_ranks(tmp_path: Path) -> None:
    """Two ranks, four, one, two again: data order, weights, moments and the schedule go on."""
    options = {**GRPO, "checkpoint__every": 1, "grpo__steps": 4, "optimizer__schedule": "cosine"}
    whole = trained(tmp_path, 1, **options)
    config = written(runs.config(tmp_path / "run", **options), tmp_path)
    resume: list[str] = []
    for step, size in enumerate((2, 4, 1)):
        at = f"doing in update of step {step + 1}"
        ended = train(size, config, *resume, faults=[Fault(0, at)]) if size > 1 else [
            runs.forks().run("train", "--config", config, *resume, at=at)]
        assert ended[0].code == -9 and 0 not in codes(ended), ended
        resume = ["--resume"]
    ended = train(2, config, "--resume")
    assert codes(ended) == [0, 0], ended
    assert_close(tmp_path / "run", whole)
    ran = json.loads(RunDir(tmp_path / "run").inputs.read_text())["commands"]
    assert len(ran) == 4, "rank 0 alone notes a command"


def test_two_ranks_share_a_cache(tmp_path: Path) -> None:
    """No entry is torn, and a second run decodes nothing."""
    options = {**GRPO, "cache__folder": str(tmp_path / "cache"), "cache__frames": True}
    first = trained(tmp_path, 2, **options)
    (tmp_path / "again").mkdir()
    second = trained(tmp_path / "again", 2, **options)
    assert_same(second, first)
    decodes = [[json.loads(line)["video_decodes"] for line in RunDir(run).metrics.read_text().splitlines()]
               for run in (first, second)]
    assert sum(decodes[0]) > 0 == sum(decodes[1])
    assert not list((tmp_path / "cache").glob(".tmp-*"))


def test_torchrun(tmp_path: Path) -> None:
    """The command of the README, from the shell: one progress bar, one voice, exit code 0."""
    config = written(runs.config(tmp_path / "run"), tmp_path)
    done = children.run(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port",
                        str(ranks.free_port()), "-m", "veripo_fast", "train", "--config", config,
                        env={**os.environ, "PYTHONPATH": PYTHONPATH}, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert_same(tmp_path / "run", ranks.whole(2))
    lines = done.stderr.replace("\r", "\n").splitlines()
    assert not [line for line in lines if "rank 1" in line]
    ours = [line for line in lines if line.startswith("veripo: ")]
    assert len(ours) == len(set(ours)) > 0
    scores = [line for line in done.stdout.splitlines() if "accuracy" in line]
    assert len(scores) == len(set(scores)) == 8
    finished = re.findall(r"dpo-1: *100%[^\[]*", done.stderr)  # a library may have written into the line before it
    assert len(set(finished)) == 1, done.stderr


def test_nothing_is_said_twice(tmp_path: Path) -> None:
    ended = train(2, written(runs.config(tmp_path / "run", **GRPO), tmp_path))
    assert said(ended[0]) and not said(ended[1])
