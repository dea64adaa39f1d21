"""kill -9 anywhere, Ctrl-C, and `--resume`: bitwise what an uninterrupted run gives. Everything goes through the CLI.

The moment of a kill is the moment before a named change in the run folder, so it is the same one in every test run.
"""

import shutil
import signal

import pytest

from tests.support import runs
from tests.support.run_compare import assert_same, records, tree, written
from veripo_fast.run.folder import RunDir


@pytest.fixture(scope="module")
def forks():
    return runs.forks()


@pytest.fixture(scope="module")
def whole(forks, tmp_path_factory):
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    ended = forks.run("train", "--config", written(runs.config(folder / "run"), folder))
    assert ended.code == 0, ended.output
    return folder / "run"


MOMENTS = (
    "open .*rollouts/grpo-1/.tmp-step_000000",  # before there is a checkpoint
    r"mkdir .*\.tmp-step_000001$",  # a metrics line is written, its step not saved
    "open .*step_000001/trainer/state.json",  # half a checkpoint
    "rename .*tmp-latest",  # a checkpoint that `latest` does not name yet
    "rename .*eval/grpo-1_sampled",
    "rename .*tmp-evals.jsonl",
    "rename .*verifier/dpo-1/pairs",
    "rename .*ref_logprobs",
    r"mkdir .*\.tmp-step_000003$",  # inside DPO
    "rename .*tmp-delete",  # while an old checkpoint is deleted
    "rename .*tmp-step_000004",  # between the stages
    "rename .*rollouts/grpo-2/step_000001",
    "rename .*eval/grpo-2_greedy",  # everything is trained
)


def test_killed_at_every_stage(forks, whole, tmp_path):
    """One run, killed thirteen times."""
    config = written(runs.config(tmp_path / "run"), tmp_path)
    for moment in MOMENTS:
        resume = ["--resume"] if (tmp_path / "run" / "config.yaml").exists() else []
        ended = forks.run("train", "--config", config, *resume, at=moment)
        assert ended.code == -signal.SIGKILL, (moment, ended.output)
    ended = forks.run("train", "--config", config, "--resume")
    assert ended.code == 0, ended.output
    assert_same(tmp_path / "run", whole)
    assert forks.run("train", "--config", config, "--resume").code == 0  # there is nothing left to do
    assert_same(tmp_path / "run", whole)


@pytest.mark.parametrize(("moment", "used"), [(MOMENTS[0], False), (MOMENTS[1], True),
                                              ("rename .*tmp-step_000002", True)])
def test_finished_rollouts_are_used_again(forks, whole, tmp_path, moment, used):
    """Those of the first step behind the checkpoint, whose update was lost."""
    config = written(runs.config(tmp_path / "run"), tmp_path)
    assert forks.run("train", "--config", config, at=moment).code == -signal.SIGKILL
    ended = forks.run("train", "--config", config, "--resume")
    assert ended.code == 0 and ("are used again" in ended.output) == used, ended.output
    assert_same(tmp_path / "run", whole)


@pytest.mark.parametrize("moment", [MOMENTS[1], MOMENTS[2], MOMENTS[3], "open .*step_000001/trainer/optimizer/",
                                    "rename .*tmp-step_000003"])
def test_killed_while_a_checkpoint_is_written_behind(forks, whole, tmp_path, moment):
    config = written(runs.config(tmp_path / "run", checkpoint__asynchronous=True), tmp_path)
    ended = forks.run("train", "--config", config, at=moment)
    assert ended.code == -signal.SIGKILL, ended.output
    assert forks.run("train", "--config", config, "--resume").code == 0
    assert_same(tmp_path / "run", whole)


def test_a_checkpoint_written_behind_that_fails_is_said(forks, tmp_path):
    """The disk is full in the thread: the step that comes next ends the run."""
    config = written(runs.config(tmp_path / "run", checkpoint__asynchronous=True, eval__at="never"), tmp_path)
    model = max(path.stat().st_size for path in runs.model().glob("*.safetensors"))
    ended = forks.run("train", "--config", config, limits={"RLIMIT_FSIZE": model // 2})
    assert ended.code == 2 and "cannot" in ended.output.splitlines()[-1], ended.output
    assert not list((tmp_path / "run" / "checkpoints").glob("*step*"))
    assert forks.run("train", "--config", config, "--resume").code == 0


def test_killed_between_two_checkpoints(forks, tmp_path):
    """bfloat16 weights with float32 masters, a trained tower, a reference model and two updates per rollout."""
    options = {"checkpoint__every": 2, "grpo__steps": 4, "grpo__prompts_per_step": 2, "grpo__updates_per_rollout": 2,
               "grpo__kl_coef": 0.05, "rollout__group_size": 4, "model__dtype": "bfloat16",
               "model__freeze_vision": False, "eval__at": "never", "optimizer__schedule": "cosine",
               "stages": [{"kind": "grpo"}]}
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    configs = {name: written(runs.config(tmp_path / name / "run", **options), tmp_path / name)
               for name in ("whole", "killed")}
    assert forks.run("train", "--config", configs["whole"]).code == 0
    ended = forks.run("train", "--config", configs["killed"], at="open .*rollouts/grpo-1/.tmp-step_000003")
    assert ended.code == -signal.SIGKILL
    assert forks.run("train", "--config", configs["killed"], "--resume").code == 0
    assert_same(tmp_path / "killed" / "run", tmp_path / "whole" / "run")
    assert sum(record["updates"] for record in records(tmp_path / "whole" / "run" / "metrics.jsonl")) > 4


@pytest.mark.parametrize(("moment", "saved"), [
    ("open .*rollouts/grpo-1/.tmp-step_000000", "step_000001"),  # inside a stage, where no checkpoint was due
    ("rename .*eval/start_greedy", None),  # in the first evaluation, before anything is trained
    ("open .*rollouts/grpo-1/.tmp-step_000001", "step_000002"),  # in the last step of a stage
])
def test_ctrl_c(forks, whole, tmp_path, moment, saved):
    config = written(runs.config(tmp_path / "run", checkpoint__every=50), tmp_path)
    ended = forks.run("train", "--config", config, at=moment, send=signal.SIGINT)
    assert ended.code == 130
    assert "Ctrl-C: finishing this step, then saving" in ended.output
    assert ended.output.splitlines()[-1] == "veripo: interrupted by SIGINT; --resume goes on"
    run = RunDir(tmp_path / "run")
    assert [path.name for path in run.checkpoints.glob("step_*")] == ([saved] if saved else [])
    if saved == "step_000001":
        assert forks.run("train", "--config", config, "--resume", "--checkpoint.every", "1").code == 0
        assert_same(run.root, whole)


def test_resume_refusals(forks, whole, tmp_path):
    config = written(runs.config(tmp_path / "run"), tmp_path)
    ended = forks.run("train", "--config", config, "--resume")
    assert (ended.code, ended.output) == (
        2, f"veripo: error: {tmp_path}/run is no run to resume: it has no config.yaml\n")
    for path in (whole, whole / "config.yaml"):
        before = tree(whole)
        ended = forks.run("train", "--config", config, "--run-dir", path)
        assert (ended.code, ended.output) == (
            2, f"veripo: error: run_dir {path} exists already; resume it with --resume or name another folder\n")
        assert tree(whole) == before


def test_resume_with_another_configuration_says_so(forks, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    config = written(runs.config(tmp_path / "run"), tmp_path)
    before = (tmp_path / "run" / "config.yaml").read_text()
    ended = forks.run("train", "--config", config, "--resume", "--grpo.clip-high", "0.3")
    assert ended.code == 2
    assert "begun with another config: grpo.clip_high was 0.2, is 0.3. The result would be" in ended.output
    ended = forks.run("train", "--config", config, "--resume", "--grpo.clip-high", "0.3", "--allow-changes", "config")
    assert ended.code == 0 and "going on with another config, as allowed: grpo.clip_high was 0.2" in ended.output
    assert (tmp_path / "run" / "config.yaml").read_text() == before, "a finished run never used the other value"
    assert forks.run("train", "--config", config, "--resume", "--cache.host-bytes", "1",
                     "--distributed.timeout-seconds", "9").code == 0
