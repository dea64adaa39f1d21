"""A run that is resumed with something else under it: every difference is named, and those that change results stop."""

import json
import shutil
import signal
from pathlib import Path

import pytest

from tests.support import runs
from veripo_fast.config.describe import to_yaml
from veripo_fast.run.folder import RunDir
from veripo_fast.run.metrics import read_records


class Stopped:
    """A run of two stages that was killed in its first step of the second one, on inputs of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copytree(runs.corpus() / "clips", folder / "clips")
        shutil.copytree(runs.model(), folder / "model")
        self.data = folder / "train.jsonl"
        self.data.write_text((runs.corpus() / "train.jsonl").read_text())
        self.config = folder / "run.yaml"
        self.config.write_text(to_yaml(runs.config(
            folder / "run", data__train=[str(self.data)], model__path=str(folder / "model"), eval__at="never",
            grpo__kl_coef=0.1, stages=[{"kind": "grpo"}, {"kind": "grpo"}])))
        self.run = RunDir(folder / "run")
        ended = self.train(at="open .*rollouts/grpo-2/.tmp-step_000001")
        assert ended.code == -signal.SIGKILL, ended.output

    def train(self, *options: str, at: str = "") -> runs.Ended:
        resume = ["--resume"] if self.run.config.exists() else []
        return runs.forks().run("train", "--config", self.config, *resume, *options, at=at)


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Stopped:
    return Stopped(tmp_path_factory.mktemp("stopped"))


@pytest.fixture
def stopped(template, tmp_path) -> Stopped:
    """The stopped run as it was, in its own place: what a test changes is put back."""
    shutil.copytree(template.folder, tmp_path / "kept")
    yield template
    shutil.rmtree(template.folder)
    shutil.copytree(tmp_path / "kept", template.folder)


def add_line(stopped: Stopped) -> None:
    with stopped.data.open("a") as file:
        file.write(json.dumps({"problem": "What?", "answer": "yes"}) + "\n")


def remove_line(stopped: Stopped) -> None:
    stopped.data.write_text("\n".join(stopped.data.read_text().splitlines()[:-1]) + "\n")


def swap_clips(stopped: Stopped) -> None:
    first, second = sorted((stopped.folder / "clips").glob("*.mp4"))[:2]
    first.rename(stopped.folder / "other")
    second.rename(first)
    (stopped.folder / "other").rename(second)


def change_template(stopped: Stopped) -> None:
    [path] = (stopped.folder / "model").glob("chat_template*")
    path.write_text(path.read_text() + " ")


def change_weights(stopped: Stopped) -> None:
    path = stopped.folder / "model" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(("change", "kind", "words"), [
    (add_line, "data", "begun with another data: {folder}/train.jsonl has changed"),
    (remove_line, "data", "begun with another data: {folder}/train.jsonl has changed"),
    (swap_clips, "media", "has another content than when this run first used it"),
    (change_template, "model", "begun with another model: chat_template"),
    (change_weights, "model", "begun with another model: model.safetensors has changed"),
])
def test_other_inputs_stop_unless_allowed(stopped: Stopped, change, kind: str, words: str) -> None:
    change(stopped)
    metrics = stopped.run.metrics.read_text()
    ended = stopped.train()
    assert ended.code == 2 and words.format(folder=stopped.folder) in ended.output, ended.output
    assert f"--allow-changes {kind}" in ended.output
    assert stopped.run.metrics.read_text() == metrics
    ended = stopped.train("--allow-changes", kind)
    assert ended.code == 0, ended.output
    assert [row["global_step"] for row in read_records(stopped.run.metrics)] == [1, 2, 3, 4]


def test_rollouts_that_are_gone(stopped: Stopped, tmp_path: Path) -> None:
    assert stopped.train().code == 0
    (stopped.run.root / "rollouts" / "grpo-1" / "step_000000.parquet").unlink()
    config = stopped.config.read_text().replace("kind: grpo\n  name: grpo-2", "kind: grpo\n  name: grpo-2")
    more = stopped.folder / "more.yaml"
    more.write_text(config + "- kind: dpo\n  rollouts_from: grpo-1\n")
    ended = runs.forks().run("train", "--config", more, "--resume")
    assert ended.code == 2 and "1 of 2 rollout files of stage grpo-1 are gone" in ended.output, ended.output
    ended = runs.forks().run("train", "--config", more, "--resume", "--allow-changes", "rollouts")
    assert ended.code == 0, ended.output


def test_another_version_is_named_and_goes_on(stopped: Stopped) -> None:
    inputs = json.loads(stopped.run.inputs.read_text())
    inputs["versions"]["torch"] = "1.0"
    stopped.run.inputs.write_text(json.dumps(inputs))
    ended = stopped.train()
    assert ended.code == 0 and "torch has changed (1.0 before, " in ended.output
    assert len(json.loads(stopped.run.inputs.read_text())["commands"]) == 2


def test_data_that_moved_hold_the_same_easy_prompts(stopped: Stopped, tmp_path: Path) -> None:
    from dataclasses import replace

    from veripo_fast.rollout.store import read_groups
    from veripo_fast.stages.grpo import easy_prompts, without_folders

    groups = read_groups(stopped.run.rollouts("grpo-1", 0))
    for group in groups:
        for completion in group.completions:
            completion.accuracy = 1.0
    easy = easy_prompts(groups)
    assert len(easy) == len(groups)
    for group in groups:
        parts = [[part if isinstance(part, str) else replace(part, path="/elsewhere/" + Path(part.path).name)
                  for part in message.parts] for message in group.prompt.messages]
        moved = replace(group.prompt, messages=tuple(
            replace(message, parts=tuple(own)) for message, own in zip(group.prompt.messages, parts, strict=True)))
        assert without_folders(moved) in easy


def test_a_change_that_nobody_knows_is_refused(stopped: Stopped) -> None:
    ended = stopped.train("--allow-changes", "everything")
    assert ended.code == 2 and "--allow-changes takes code, config, data, media, model, rollouts" in ended.output


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_slurm_and_a_closed_terminal_save_like_ctrl_c(tmp_path: Path, number: int, code: int) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(to_yaml(runs.config(tmp_path / "run", checkpoint__every=50, eval__at="never",
                                          stages=[{"kind": "grpo"}])))
    ended = runs.forks().run("train", "--config", config, at="open .*rollouts/grpo-1/.tmp-step_000000", send=number)
    assert ended.code == code, ended.output
    assert ended.output.splitlines()[-1] == f"veripo: interrupted by {signal.Signals(number).name}; --resume goes on"
    assert (tmp_path / "run" / "checkpoints" / "step_000001").is_dir()
    assert runs.forks().run("train", "--config", config, "--resume").code == 0


def test_a_limit_of_time_ends_with_a_checkpoint(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(to_yaml(runs.config(tmp_path / "run", checkpoint__every=50, eval__at="never",
                                          stages=[{"kind": "grpo"}])))
    ended = runs.forks().run("train", "--config", config, "--train.max-hours", "1e-9")
    assert ended.code == 75 and "because train.max_hours does not allow another step; --resume goes on" in ended.output
    assert (tmp_path / "run" / "checkpoints" / "step_000001").is_dir()
    assert runs.forks().run("train", "--config", config, "--resume").code == 0


def test_two_processes_do_not_share_a_run(stopped: Stopped) -> None:
    from veripo_fast.run.lock import RunLock

    with RunLock(stopped.run.root):
        ended = stopped.train()
    assert ended.code == 2 and "is in use by process" in ended.output
    assert stopped.train().code == 0
    assert [row["global_step"] for row in read_records(stopped.run.metrics)] == [1, 2, 3, 4]
