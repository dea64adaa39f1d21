"""What a model card says of paths, of the base model and of runs that were not evaluated."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, ModelCardData

from veripo_fast.config.load import apply_overrides
from veripo_fast.config.schema import Config
from veripo_fast.run.card import NAME, without_folders, write_card
from veripo_fast.run.folder import RunDir


@pytest.mark.parametrize(("written", "shown"), [
    ("/home/me/my data/train.jsonl", "train.jsonl"), ("~/a/b.jsonl", "b.jsonl"), ("../up/d.json", "d.json"),
    ("--model.path=/ck/Qwen 7B", "--model.path=Qwen 7B"), ("[/a/b.json, ~/c/d.json]", "[b.json, d.json]"),
    ("./own/rewards.py:fn", "rewards.py:fn"), ("s3://bucket/a/b", "s3://bucket/a/b"), ("accuracy > 0", "accuracy > 0"),
    ("configs/recipes/veripo.yaml", "configs/recipes/veripo.yaml"), ("http://node7:8000/v1", "http://HOST/v1")])
def test_folders_and_servers_are_left_out(written: str, shown: str) -> None:
    assert without_folders(written) == shown


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A finished run with a checkpoint that holds a configuration alone."""
    run = RunDir(tmp_path / "run")
    folder = run.checkpoints / "step_000003"
    folder.mkdir(parents=True)
    (run.checkpoints / "latest").write_text("step_000003\n")
    (folder / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    run.inputs.write_text(json.dumps({
        "data": {"/data/of/me/train.jsonl": "5:ab"}, "model": {"config.json": "7:cd"}, "versions": {"torch": "2.13.0"},
        "commands": [{"command": ["/usr/bin/veripo", "train", "--data.train", "/data/of/me/train.jsonl"]}] * 2}))
    return run


def base(folder: Path, config: str = "{}", card: str | None = None) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(config)
    if card is not None:
        (folder / NAME).write_text(card)
    return folder


def written(run: RunDir, base: Path, **options: object) -> ModelCard:
    config = apply_overrides(Config(), {"stages": [{"kind": "grpo"}, {"kind": "dpo"}], "model.path": str(base),
                                        "data.train": ["/data/of/me/train.jsonl"], **options})
    write_card(run, config, base)
    return ModelCard.load(run.checkpoints / "step_000003" / NAME)


OURS = "---\nbase_model: Org/First\nlicense: other\nlicense_name: own\ntags: [veripo-fast]\n---\n# It\n"


@pytest.mark.parametrize(("place", "config", "card", "name", "license"), [
    ("Qwen2.5-VL-7B", "{}", None, "Qwen2.5-VL-7B", None),
    ("mine", '{"_name_or_path": "Qwen/Qwen2.5-VL-7B-Instruct"}', None, "Qwen/Qwen2.5-VL-7B-Instruct", None),
    ("mine", '{"_name_or_path": "/ck/Qwen/of/me"}', None, "mine", None),
    ("models--Qwen--Qwen3-VL-2B/snapshots/0a1", "{}", "---\nlicense: apache-2.0\n---\n", "Qwen/Qwen3-VL-2B",
     "apache-2.0"),
    ("step_000009", "{}", OURS, "Org/First", "other"),
    ("broken", "{", "---\n[: \n---\n", "broken", None)])
def test_the_base_model_and_its_license(run: RunDir, tmp_path: Path, place: str, config: str, card: str | None,
                                        name: str, license: str | None) -> None:
    data: ModelCardData = written(run, base(tmp_path / place, config, card)).data
    assert (data.base_model, data.license) == (name, license)
    assert data.get("license_name") == ("own" if card is OURS else None)
    assert data.tags == ["veripo-fast", "grpo", "dpo", "video", "qwen2_5_vl"]


def test_the_text(run: RunDir, tmp_path: Path) -> None:
    (run.checkpoints / "step_000003" / "generation_config.json").write_text('{"repetition_penalty": 1.05}')
    text = written(run, base(tmp_path / "base"), **{"verifier.judge": "endpoint", "verifier.endpoint_model": "big",
                                                    "verifier.endpoint_url": "http://node7:8000/v1"}).text
    assert "Nothing was evaluated in this run." in text and "trained and evaluated with `repetition_penalty=1`" in text
    assert "| train.jsonl | training | `5:ab` |" in text and text.count("veripo train --data.train train.jsonl") == 1
    assert "node7" not in text and "/data" not in text and str(tmp_path) not in text


def test_a_card_that_cannot_be_written_is_said(run: RunDir, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (run.checkpoints / "latest").unlink()
    write_card(run, Config(), base(tmp_path / "base"))
    assert "the model card of" in caplog.text and "could not be written" in caplog.text
