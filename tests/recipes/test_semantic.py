"""VideoRFT's semantic reward: a tiny random SigLIP model, and transformers' own reading of frames and texts."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image as Picture

from tests.support import policies, runs, siglip
from tests.support.run_compare import assert_resumes
from veripo_fast.cache.loader import PromptLoader
from veripo_fast.config.objectives import RewardConfig
from veripo_fast.config.schema import Config
from veripo_fast.config.terms import RewardTerm
from veripo_fast.data.prompts import load_prompts
from veripo_fast.errors import ConfigError, UserError
from veripo_fast.model.policy import load_policy
from veripo_fast.model.vision_text import VisionText
from veripo_fast.recipes.semantic import semantic
from veripo_fast.recipes.view import MAIN, Completions, CompletionView, PromptView
from veripo_fast.reward.spans import parse_completion
from veripo_fast.rollout.store import read_groups
from veripo_fast.run.folder import RunDir
from veripo_fast.stages.frame_likeness import FrameLikeness, described
from veripo_fast.trainer import train
from veripo_fast.types import Completion, RolloutGroup

CPU = torch.device("cpu")


def test_the_bonus_by_hand() -> None:
    """Cosines 0.25 and 0.75 give 0.5 and 1; a negative one gives 0, no frames give 0."""
    rows = [[0.25, 0.75], [-0.5, 0.5], None, [0.1, 0.1]]
    views = [CompletionView("", {}, [], [], True, 1.0, 1.0, frame_likeness=row) for row in rows]
    asked = PromptView(policies.prompt_of("?"), {MAIN: Completions(views)})
    assert semantic(asked) == pytest.approx([0.75, 0.5, 0.0, 0.2])
    assert semantic(asked, scale=1.0) == pytest.approx([0.5, 0.25, 0.0, 0.1])


@pytest.mark.parametrize(("text", "expected"), [
    ("<think>What moves? A ball at 2.5 s. It rolls.</think><answer>A</answer>", "A ball at 2.5 s. It rolls."),
    ("<think>问题。一个球在滚。</think><answer>A</answer>", "一个球在滚。"),
    ("<think>A ball rolls.</think><answer>A</answer>", "A ball rolls."),
    ("A ball. No tags.", "A ball. No tags."),
])
def test_what_is_compared_is_the_description(text: str, expected: str) -> None:
    assert described(text, parse_completion(text)) == expected


def test_embeddings_are_those_of_transformers() -> None:
    from transformers import AutoTokenizer, SiglipModel
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    folder = siglip.folder()
    frames = torch.randint(90, 166, (35, 3, 40, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    texts = ["a red ball rolls to the left", "two", "so many words that the model does not read all of them " * 9]
    ours = VisionText(folder, "float32", CPU)
    with ours.on_device():
        seen, read, pixels = ours.of_frames(frames), ours.of_texts(texts), ours.pixels(frames)
    model = SiglipModel.from_pretrained(folder)
    processor = SiglipImageProcessorPil(size={"height": siglip.SIZE, "width": siglip.SIZE})
    pictures = [Picture.fromarray(frame.permute(1, 2, 0).numpy()) for frame in frames]
    theirs = processor(pictures, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels, theirs, rtol=0, atol=1.01 / 127.5)  # PIL rounds between its two passes too
    ids = AutoTokenizer.from_pretrained(folder)(texts, padding="max_length", truncation=True,
                                                max_length=siglip.POSITIONS, return_tensors="pt").input_ids
    with torch.no_grad():
        output = model(input_ids=ids, pixel_values=pixels)
    torch.testing.assert_close(seen, output.image_embeds, rtol=0, atol=1e-5)
    torch.testing.assert_close(read, output.text_embeds, rtol=0, atol=1e-6)
    assert (seen[0] - seen[1]).abs().max() > 1e-3


def test_frames_are_seen_once_and_scored_groups_are_left_alone(tmp_path: Path) -> None:
    config = runs.config(tmp_path / "run")
    loader = PromptLoader(load_policy(config.model), config.video, 4096, lambda prompt, reason: None)
    prompts, _ = load_prompts(config.data.train, config.data)
    items = dict(enumerate(loader.load(prompts)))

    def groups() -> dict[int, RolloutGroup]:
        return {number: RolloutGroup(item.prompt, [
            Completion([1], f"<think>Well. {word}</think><answer>A</answer>", [0.0], "stop", 0)
            for word in ("a red ball", "nothing")]) for number, item in items.items()}

    likeness = FrameLikeness(VisionText(siglip.folder(), "float32", CPU), loader)
    first, before = groups(), loader.work.video_decodes
    likeness.tell(items, first)
    with_media = [number for number, item in items.items() if item.encoded.media is not None]
    assert loader.work.video_decodes > before and 0 < len(with_media) < len(items)
    decoded = loader.work.video_decodes
    second = groups()
    second[with_media[0]].completions = [replace(row, reward=1.0) for row in second[with_media[0]].completions]
    likeness.tell(items, second)
    assert loader.work.video_decodes == decoded
    for number, group in first.items():
        for row, again in zip(group.completions, second[number].completions, strict=True):
            if number not in with_media:
                assert row.frame_likeness is again.frame_likeness is None
                continue
            count = sum(len(seconds) for _, _, seconds in loader.frames_of(group.prompt))
            assert len(row.frame_likeness) == count and all(-1.001 <= value <= 1.001 for value in row.frame_likeness)
            assert again.frame_likeness == (None if number == with_media[0] else row.frame_likeness)
    rows = first[with_media[0]].completions
    assert rows[0].frame_likeness != rows[1].frame_likeness
    loader.close()


def options(**changes: object) -> dict[str, object]:
    return {"stages": [{"kind": "grpo"}], "eval__at": "never", "grpo__steps": 3,
            "reward__vision_text": str(siglip.folder()),
            "reward__terms": [{"use": "accuracy"}, {"use": "semantic", "on": "accuracy > 0"}]} | changes


def test_a_run_is_rewarded_for_it_and_resumes_bitwise(tmp_path: Path) -> None:
    assert_resumes(tmp_path, "rename .*tmp-step_000002", lambda run: runs.config(run, **options()))
    run = RunDir(tmp_path / "whole" / "run")
    rows = [row for file in run.rollout_files("grpo-1") for group in read_groups(file) for row in group.completions]
    assert any(row.columns["semantic"] > 0 for row in rows)
    for row in rows:
        assert row.reward == pytest.approx(row.accuracy + (row.columns["semantic"] if row.accuracy > 0 else 0.0))
    inputs = json.loads((run.root / "inputs.json").read_text())
    assert "vision_text/model.safetensors" in inputs["model"]


def test_what_is_no_siglip_is_refused_before_a_run_begins(tmp_path: Path) -> None:
    terms = (RewardTerm("semantic"),)
    with pytest.raises(ConfigError, match=r"reward semantic compares a reasoning with frames; set reward.vision_text"):
        Config(reward=RewardConfig(terms=terms))
    other = str(policies.checkpoint("qwen3_vl"))
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(siglip.folder() / "config.json", bare)
    for folder, sentence in ((str(tmp_path / "none"), "is not a folder"), (str(bare), "has no tokenizer"),
                             (other, "holds a model of type qwen3_vl; take the folder of a SigLIP model")):
        with pytest.raises(UserError, match=sentence):
            train(runs.config(tmp_path / "run", **options(reward__vision_text=folder)))
        assert not (tmp_path / "run").exists()
    stages = [{"kind": "grpo"}, {"kind": "grpo", "set": {"reward.vision_text": str(siglip.folder(1))}}]
    with pytest.raises(ConfigError, match=r"reward.vision_text names 2 folders"):
        train(runs.config(tmp_path / "run", **options(stages=stages)))


def test_a_model_that_lacks_weights_is_named(tmp_path: Path) -> None:
    shutil.copytree(siglip.folder(), tmp_path / "siglip")
    (tmp_path / "siglip" / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"model.safetensors"):
        VisionText(tmp_path / "siglip", "float32", CPU)
