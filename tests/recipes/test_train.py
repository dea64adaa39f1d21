"""Every shipped recipe trains three steps of each stage, and a run takes functions from a file of the user's."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest

from tests.support import runs, siglip
from tests.support.paths import REPOSITORY
from tests.support.run_compare import assert_same, written
from veripo_fast.config.load import load_config
from veripo_fast.config.schema import Config
from veripo_fast.errors import ConfigError, TrainingError
from veripo_fast.rollout.store import read_groups
from veripo_fast.run.folder import RunDir
from veripo_fast.run.metrics import read_records
from veripo_fast.trainer import train

RECIPES = sorted((REPOSITORY / "configs" / "recipes").glob("*.yaml"))
STEPS = 3
TINY: dict[str, dict[str, object]] = {
    "grpo": {"grpo.steps": STEPS, "grpo.prompts_per_step": 16, "grpo.learning_rate": 1e-4},
    "dpo": {"dpo.max_steps": STEPS, "dpo.pairs_per_step": 2},
    "sft": {"sft.max_steps": STEPS, "sft.prompts_per_step": 3, "sft.learning_rate": 1e-4}}
"""What a stage of a recipe is given in place of its sizes."""
OWN = '''
import json
import random

import torch

calls = []


def timed(asked, scale=1.0):
    assert asked.embeddings.ndim == 2 and len(asked.frame_seconds) == 1 if asked.prompt.media else True
    return [scale * c.num_tokens + sum(map(max, asked.frame_seconds)) for c in asked.completions]


def worded(question):
    return question.text + "\\nThink in <think></think>, then answer in <answer></answer>."


def hard_first(prompts, epoch, seed):
    return random.Random(f"{seed}/{epoch}").sample(range(len(prompts)), len(prompts) - 1)


def median(rewards):
    return (rewards - rewards.median()).clamp(-1, 1)


def teacher(model, started_from):
    return model
'''


def records_for_all(folder: Path) -> str:
    """The corpus with what recipes read of a record beside: a pass rate, another wording, a map, and reasoning."""
    lines = (runs.corpus() / "train.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    for number, row in enumerate(rows):
        row |= {"pass_rate": (number % 4 + 1) / 8, "new_questions": [f"Say: {row['problem']}"],
                "process": "<think>so it is.</think>", "data_source": ("SR_dataset", "other")[number % 2],
                "cognitive_map": {"square": [[1, 2]]}, "object_list": ["square"]}
        row["solution"] = row["solution"] if "<answer>" in row["solution"] else f"<answer>{row['solution']}</answer>"
    file = folder / "records.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def tiny(recipe: Path, run: Path) -> Config:
    """A recipe on the tiny model, by options as a user types them."""
    data = records_for_all(run.parent)
    options = ["--run-dir", str(run), "--threads", "1", "--model.path", str(runs.model()), "--model.device", "cpu",
               "--model.dtype", "float32", "--model.gradient-checkpointing", "false", "--cache.folder", "",
               "--data.train", data, "--data.eval", "", "--data.media-root", str(runs.corpus()), "--video.fps", "null",
               "--video.num-frames", "4", "--video.min-pixels", "1024", "--video.max-pixels", "4096",
               "--rollout.max-new-tokens", "24", "--rollout.group-size", "4", "--eval.at", "never"]
    config = load_config(recipe)
    if config.reward.vision_text:
        options += ["--reward.vision-text", str(siglip.folder())]
    for number, stage in enumerate(config.stages):
        for name, value in TINY[stage.kind].items():
            options += [f"--stages.{number}.set.{name}", str(value)]
        if stage.data:
            options += [f"--stages.{number}.data", data]
    return load_config(recipe, options)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_trains(recipe: Path, tmp_path: Path) -> None:
    config = tiny(recipe, tmp_path / "run")
    train(config)
    records = read_records(RunDir(tmp_path / "run").metrics)
    for stage in config.stages:
        own = [record for record in records if record["stage"] == stage.name]
        assert len(own) == STEPS and all(record.get("skipped_updates", 0) == 0 for record in own)
        assert any(record.get("grad_norm", 0) > 0 for record in own)  # a step without a signal has none


def test_recipes_say_what_is_second_hand() -> None:
    for recipe in RECIPES:
        text = recipe.read_text()
        assert "second-hand" in text and "arXiv" in text and "ours" in text, recipe
        assert f"--config configs/recipes/{recipe.name}" in text


def own_config(folder: Path, run: Path, **changes: object) -> Config:
    file = folder / "mine.py"
    file.write_text(OWN)
    defaults = {"data__template": f"{file}:worded", "grpo__sampler": f"{file}:hard_first",
                "grpo__advantage": f"{file}:median", "grpo__kl_coef": 0.01, "grpo__reference": f"{file}:teacher",
                "reward__terms": [{"use": "accuracy"}, {"use": f"{file}:timed", "weight": 0.01,
                                                         "options": {"scale": 2.0}}],
                "stages": [{"kind": "grpo"}], "grpo__steps": 3, "eval__at": "never"}
    return runs.config(run, **(defaults | changes))


def test_a_run_with_everything_of_ones_own(tmp_path: Path) -> None:
    config = own_config(tmp_path, tmp_path / "run")
    train(config)
    run = RunDir(tmp_path / "run")
    groups = [group for file in run.rollout_files("grpo-1") for group in read_groups(file)]
    for group in groups:
        assert group.prompt.text.endswith("Think in <think></think>, then answer in <answer></answer>.")
        for completion in group.completions:
            assert completion.reward == completion.accuracy + 0.01 * completion.columns["timed"]
            assert completion.columns["timed"] >= 2.0 * len(completion.token_ids)
        assert any(c.columns["timed"] > 2.0 * len(c.token_ids) for c in group.completions) or not any(
            part for part in group.prompt.media if hasattr(part, "start_seconds"))
    records = read_records(run.metrics)
    assert [set(record["columns"]) for record in records] == [{"timed"}] * 3
    assert json.loads((run.root / "inputs.json").read_text())["code"].keys() == {str(tmp_path / "mine.py")}
    (tmp_path / "mine.py").write_text(OWN + "\n# changed\n")
    with pytest.raises(ConfigError, match=r"begun with another code: .*mine.py has changed.*--allow-changes code"):
        train(config, resume=True)


def test_a_failing_reward_ends_the_run_in_a_sentence(tmp_path: Path) -> None:
    file = tmp_path / "bad.py"
    file.write_text("def bad(asked):\n    return [1 / len(c.text.split('zzz')[1:]) for c in asked.completions]\n")
    options = {"reward__terms": [{"use": f"{file}:bad"}], "stages": [{"kind": "grpo"}], "eval__at": "never"}
    with pytest.raises(TrainingError, match=r"bad.py:bad failed on prompt .*, completion 0 of 4: ZeroDivisionError"):
        train(runs.config(tmp_path / "run", **options))
    counted = runs.config(tmp_path / "counted", **options, reward__on_error="count")
    train(counted)
    assert [record["reward_errors"] for record in read_records(RunDir(tmp_path / "counted").metrics)] == [4, 4]


def test_killed_and_resumed_it_is_bitwise_the_same(tmp_path: Path) -> None:
    """With functions of one's own, tokens that are left out by chance, and the rollouts that are used again."""
    forks = runs.forks()
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    (tmp_path / "code").mkdir()
    options = {"grpo__tokens__covariance": "clip", "grpo__tokens__covariance_share": 0.3,
               "grpo__tokens__covariance_range": [-50.0, 50.0], "grpo__updates_per_rollout": 2}
    configs = {name: written(own_config(tmp_path / "code", tmp_path / name / "run", **options), tmp_path / name)
               for name in ("whole", "killed")}
    ended = forks.run("train", "--config", configs["whole"])
    assert ended.code == 0, ended.output
    ended = forks.run("train", "--config", configs["killed"], at="rename .*tmp-step_000002")
    assert ended.code == -signal.SIGKILL, ended.output
    ended = forks.run("train", "--config", configs["killed"], "--resume")
    assert ended.code == 0 and "are used again" in ended.output, ended.output
    assert_same(tmp_path / "killed" / "run", tmp_path / "whole" / "run")
    shutil.rmtree(tmp_path / "killed")
