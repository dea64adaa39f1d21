"""Tracebacks of users that became sentences: what is wrong, by name and value, and what to do."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.support import runs
from veripo_fast.config.describe import ELSEWHERE, option_names, to_yaml
from veripo_fast.data.places import cached
from veripo_fast.data.records import RecordError
from veripo_fast.errors import CheckpointError, ConfigError, DataError
from veripo_fast.model.checkpoint_files import resolve_device, resolve_path
from veripo_fast.rollout.store import read_groups, write_groups
from veripo_fast.run.folder import RunDir
from veripo_fast.stages.saves import read_state
from veripo_fast.trainer import train
from veripo_fast.types import Completion, Prompt, RolloutGroup


def test_the_newest_checkpoint_of_a_run_is_a_model_path(tmp_path: Path) -> None:
    train(runs.config(tmp_path / "run", eval__at="never", grpo__steps=1, stages=[{"kind": "grpo"}]))
    latest = RunDir(tmp_path / "run").checkpoints / "latest"
    assert resolve_path(str(latest)) == latest.with_name("step_000001") and resolve_path(str(latest)).is_dir()
    train(runs.config(tmp_path / "next", eval__at="never", grpo__steps=1, model__path=str(latest),
                      stages=[{"kind": "grpo"}]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_cuda_without_a_gpu() -> None:
    with pytest.raises(ConfigError, match=r"model\.device is cuda, but torch .* finds no GPU"):
        resolve_device("cuda")


def test_half_of_what_torchrun_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="WORLD_SIZE is set, as torchrun does, but RANK is ''"):
        train(runs.config(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", ["{", json.dumps({"stage": 0, "step": 1, "rank": 4}), "[]"])
def test_the_state_of_another_version(tmp_path: Path, content: str) -> None:
    (tmp_path / "trainer").mkdir()
    (tmp_path / "trainer" / "state.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"state\.json cannot be read .*another version"):
        read_state(tmp_path)


def test_an_evaluation_into_a_file(tmp_path: Path, veripo) -> None:
    (tmp_path / "out").write_text("")
    (tmp_path / "run.yaml").write_text(to_yaml(runs.config(tmp_path / "run")))
    done = veripo("eval", "--config", tmp_path / "run.yaml", "--out", tmp_path / "out")
    assert (done.returncode, done.stderr) == (2, f"veripo: error: --out {tmp_path}/out is not a folder\n")


@pytest.mark.parametrize(("option", "meant"), [("--num-generations", "rollout.group_size"),
                                               ("--beta", "grpo.kl_coef or --dpo.dpo_beta")])
def test_options_of_other_trainers(option: str, meant: str, veripo, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(to_yaml(runs.config(tmp_path / "run")))
    done = veripo("train", "--config", tmp_path / "run.yaml", option, "8")
    assert done.returncode == 2 and f"did you mean --{meant}?" in done.stderr


def test_every_option_that_is_suggested_exists() -> None:
    for names in ELSEWHERE.values():
        assert set(names.split(" or ")) <= set(option_names())


def test_rollouts_whose_prompt_is_broken(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    path = tmp_path / "step_000000.parquet"
    group = RolloutGroup(Prompt("a", (), "text", "x"), [Completion([1], "x", [0.0], "stop", 0, 1.0, 1.0, 1.0, 0.0)])
    write_groups(path, [group], "s", 0)
    table = pq.read_table(path)
    for broken in ("{", "[]", '{"messages": 3}'):
        pq.write_table(table.set_column(table.schema.get_field_index("prompt"), "prompt", [[broken]]), path)
        with pytest.raises(DataError, match="is not a rollout file of veripo"):
            read_groups(path)


def test_embedded_media_without_a_place_for_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(RecordError, match=r"cannot be written .*let XDG_CACHE_HOME name another folder"):
        cached(b"content")
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
