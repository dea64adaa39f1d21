"""The last checkpoint of a run, as others use it: transformers writes what our engine writes, and the card is one that
the hub reads. tests/engines/test_drop_in.py is the same with vLLM."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from tests.support import policies, runs
from tests.support.drop_in_prompts import our_texts, texts_of_others, trained
from tests.video.test_patches import oracle_folder
from veripo_fast.config.inputs import ModelConfig
from veripo_fast.model.encoding import PromptEncoder
from veripo_fast.model.policy import load_policy, save_policy
from veripo_fast.run.card import NAME
from veripo_fast.run.checkpoint import verify_checkpoint
from veripo_fast.trainer import train


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: trained(family, tmp_path_factory.mktemp(family)) for family in policies.FAMILIES}


@pytest.mark.parametrize("family", policies.FAMILIES)
def test_transformers_writes_the_same(checkpoints: dict[str, Path], family: str, tmp_path: Path) -> None:
    folder = checkpoints[family]
    ours = our_texts(folder)
    assert len(set(ours)) > 2 and all(text.endswith("</answer>") for text in ours)
    assert texts_of_others("transformers", folder, PromptEncoder(folder).vision.factor, tmp_path,
                           oracle_folder()) == ours


def test_the_hub_reads_the_card(checkpoints: dict[str, Path]) -> None:
    folder = checkpoints["qwen3_vl"]
    card = ModelCard.load(folder / NAME)
    assert (card.data.base_model, card.data.pipeline_tag) == ("qwen3_vl", "video-text-to-text")
    assert card.data.library_name == "transformers" and card.data.license is None
    assert card.data.tags == ["veripo-fast", "grpo", "video", "qwen3_vl"]
    inputs = json.loads((folder.parents[1] / "inputs.json").read_text())
    for mark in (*inputs["data"].values(), *inputs["model"].values(), *inputs["versions"].values()):
        assert mark in card.text
    assert "| grpo-1 | grpo | 1 |" in card.text and "learning_rate: 0.001" in card.text
    assert "| grpo-1 | greedy | 4 |" in card.text and "train.jsonl | training |" in card.text
    for path in (runs.folder(), folder.parents[2], Path.cwd(), Path.home()):
        assert str(path) not in card.text
    verify_checkpoint(folder)
    assert NAME not in json.loads((folder / "manifest.json").read_text())["files"]


def test_a_card_is_written_once(checkpoints: dict[str, Path]) -> None:
    """A finished run that is resumed leaves it alone; where a kill came before, it is written then, and the same."""
    from veripo_fast.config.load import load_config

    folder = checkpoints["qwen2_5_vl"]
    before, config = (folder / NAME).read_text(), load_config(folder.parents[1] / "config.yaml")
    (folder / NAME).write_text("mine")
    train(config, resume=True)
    assert (folder / NAME).read_text() == "mine"
    (folder / NAME).unlink()
    train(config, resume=True)
    assert (folder / NAME).read_text() == before


# -- what the checkpoint that training began with lacks --------------------------------------------------------------


def saved_from(start: Path, out: Path) -> Path:
    save_policy(load_policy(ModelConfig(path=str(start), device="cpu")), out)
    return out


@pytest.fixture
def start(tmp_path: Path) -> Path:
    return shutil.copytree(policies.checkpoint("qwen2_5_vl"), tmp_path / "start")


def test_processor_files_hold_the_mean(start: Path, tmp_path: Path) -> None:
    """vLLM gives raw bytes to a tower whose mean and deviation stand in no file."""
    for file in start.glob("*preprocessor_config.json"):
        assert "image_mean" not in file.read_text()
    vision = PromptEncoder(start).vision
    out = saved_from(start, tmp_path / "out")
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        stored, before = (json.loads((folder / name).read_text()) for folder in (out, start))
        assert stored["image_mean"] == list(vision.mean) and stored["image_std"] == list(vision.std)
        assert {key: stored[key] for key in before} == before
    assert PromptEncoder(out).vision == vision


def test_missing_files_are_written(start: Path, tmp_path: Path) -> None:
    """A template that is in tokenizer_config.json alone, no processor files, no generation_config.json."""
    template = (start / "chat_template.jinja").read_text()
    tokenizer = json.loads((start / "tokenizer_config.json").read_text())
    (start / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"chat_template": template}))
    for name in ("chat_template.jinja", "preprocessor_config.json", "video_preprocessor_config.json",
                 "generation_config.json"):
        (start / name).unlink()
    out = saved_from(start, tmp_path / "out")
    assert (out / "chat_template.jinja").read_text() == template
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == PromptEncoder(out).eos_id
    stored = json.loads((out / "preprocessor_config.json").read_text())
    assert stored["processor_class"] == "Qwen2_5_VLProcessor" and stored["patch_size"] == 14
    assert PromptEncoder(out).vision == PromptEncoder(start).vision


def test_the_end_of_turn_ends_a_completion_for_others_too(start: Path, tmp_path: Path) -> None:
    stored = json.loads((start / "generation_config.json").read_text())
    (start / "generation_config.json").write_text(json.dumps(stored | {"eos_token_id": 0, "top_k": 7}))
    out = json.loads((saved_from(start, tmp_path / "out") / "generation_config.json").read_text())
    assert out["eos_token_id"] == [0, 2] and out["top_k"] == 7


def test_files_that_say_it_all_are_copied(tmp_path: Path) -> None:
    start = policies.checkpoint("qwen3_vl")
    out = saved_from(start, tmp_path / "out")
    for name in ("generation_config.json", "preprocessor_config.json", "video_preprocessor_config.json",
                 "chat_template.jinja"):
        assert (out / name).read_bytes() == (start / name).read_bytes()
