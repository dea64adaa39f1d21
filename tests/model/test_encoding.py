"""Prompts as the policy reads them, against the real Hugging Face processors and M-RoPE; and checkpoints in and out,
read back by a process that knows nothing of veripo."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support import policies
from tests.support.children import run
from tests.support.paths import PYTHONPATH
from tests.video.test_patches import oracle_folder
from veripo_fast.config.families import names
from veripo_fast.config.inputs import ModelConfig
from veripo_fast.errors import CheckpointError, DataError
from veripo_fast.model.encoding import PromptEncoder
from veripo_fast.model.packing import pack
from veripo_fast.model.policy import Policy, load_policy, save_policy
from veripo_fast.model.positions import GridSpan, TextSpan, mrope_positions
from veripo_fast.types import EncodedPrompt, Image, Message, Prompt, Video


class Clip(NamedTuple):
    """Frames taken every `step` source frames; sides in units of the factor. An image has one frame and fps 0."""

    frames: int
    height: int
    width: int
    fps: float
    step: int = 1

    @property
    def kind(self) -> str:
        return "video" if self.fps else "image"


PICTURE, SHORT, LONG = Clip(1, 2, 3, 0.0), Clip(4, 3, 2, 2.0), Clip(18, 2, 2, 8.0, 3)
CASES: dict[str, list[tuple[str, list[str | Clip]]]] = {
    "text": [("user", ["Which way does it move?\n(A) left\n"])],
    "video": [("user", [LONG, "\nWhich way?"])],
    "video after text": [("user", ["Look:", SHORT, "Which way?"])],
    "video after a space": [("user", ["This is it: ", SHORT, " Which way?"])],
    "odd number of frames": [("user", [Clip(5, 2, 3, 2.0), "What?"])],
    "one frame": [("user", [Clip(1, 2, 2, 2.0), "What?"])],
    "29.97 fps": [("user", [Clip(6, 2, 2, 30000 / 1001, 17), "What?"])],
    "image": [("user", ["a", PICTURE, "b"])],
    "two videos": [("user", [SHORT, " then ", Clip(6, 2, 3, 25.0, 10), " Which is longer?"])],
    "image between videos": [("user", [SHORT, PICTURE, LONG, "?"])],
    "several turns": [("system", ["Be brief."]), ("user", [SHORT, "What?"]), ("assistant", ["A circle."]),
                      ("user", ["And here? ", PICTURE])],
}


def clips_of(case: str) -> list[Clip]:
    return [part for _, parts in CASES[case] for part in parts if isinstance(part, Clip)]


def pixels(clip: Clip, encoder: PromptEncoder) -> torch.Tensor:
    factor, generator = encoder.vision.factor, torch.Generator().manual_seed(clip.frames * clip.width)
    return torch.randint(0, 256, (clip.frames, 3, clip.height * factor, clip.width * factor), dtype=torch.uint8,
                         generator=generator)


def encode(encoder: PromptEncoder, case: str) -> EncodedPrompt:
    media = {"video": Video(""), "image": Image("")}
    turns = tuple(Message(role, tuple(media[part.kind] if isinstance(part, Clip) else part for part in parts))
                  for role, parts in CASES[case])
    frames = [(clip.kind, pixels(clip, encoder), torch.arange(clip.frames) * clip.step / (clip.fps or 1.0))
              for clip in clips_of(case)]
    return encoder.encode(Prompt(case, turns, "text", "yes"), encoder.media_inputs(frames, case) if frames else None)


def oracle_case(policy: Policy, case: str, run_model: bool = False) -> tuple:
    encoder, videos = policy.encoder, [clip for clip in clips_of(case) if clip.fps]
    messages = [{"role": role, "content": [{"type": part.kind} if isinstance(part, Clip) else
                                           {"type": "text", "text": part} for part in parts]}
                for role, parts in CASES[case]]
    metadata = [{"fps": clip.fps, "total_num_frames": clip.frames * clip.step,
                 "frames_indices": [i * clip.step for i in range(clip.frames)]} for clip in videos]
    return (str(encoder.path), messages, [pixels(clip, encoder)[0] for clip in clips_of(case) if not clip.fps],
            [pixels(clip, encoder) for clip in videos], metadata, run_model)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Policy]:
    """Policies whose weights moved away from their checkpoint, saved, and pointed at the folder they were saved to."""
    policies_saved = {}
    for family in policies.ALL_FAMILIES:
        policy, folder = load_policy(config_of(policies.checkpoint(family))), tmp_path_factory.mktemp(family)
        with torch.no_grad():
            for _, parameter in policy.parameters():
                parameter.mul_(1.1)
        save_policy(policy, folder)
        policy.encoder = PromptEncoder(folder)
        policies_saved[family] = policy
    return policies_saved


@pytest.fixture(scope="module")
def oracle(saved: dict[str, Policy], tmp_path_factory: pytest.TempPathFactory) -> dict:
    """(family, case) -> (inputs, None), and family -> (inputs, logits) of the saved policies for an image prompt; all
    in one process: it takes seconds to start."""
    folder = tmp_path_factory.mktemp("oracle")
    cases = {(family, case): oracle_case(policies.policy(family), case)
             for family in policies.ALL_FAMILIES for case in CASES}
    cases |= {family: oracle_case(policy, "image", run_model=True) for family, policy in saved.items()}
    torch.save(list(cases.values()), folder / "cases.pt")
    done = run(sys.executable, "-m", "tests.support.processor_oracle", folder / "cases.pt", folder / "answers.pt",
               env={**os.environ, "VERIPO_TEST_ORACLE": oracle_folder() or "", "PYTHONPATH": PYTHONPATH})
    assert done.returncode == 0, done.stderr
    return dict(zip(cases, torch.load(folder / "answers.pt"), strict=True))


# -- token ids, patches, positions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", policies.ALL_FAMILIES)
@pytest.mark.parametrize("case", CASES)
def test_token_ids_and_patches_are_the_processors(oracle: dict, family: str, case: str) -> None:
    encoder = policies.policy(family).encoder
    ours, (theirs, _) = encode(encoder, case), oracle[family, case]
    assert encoder.tokenizer.decode(ours.token_ids) == encoder.tokenizer.decode(theirs["input_ids"][0])
    assert ours.token_ids.tolist() == theirs["input_ids"][0].tolist()
    for kind, values, grid in (("image", "pixel_values", "image_grid_thw"),
                               ("video", "pixel_values_videos", "video_grid_thw")):
        rows = [] if ours.media is None else [i for i, name in enumerate(ours.media.kinds) if name == kind]
        assert bool(rows) == (values in theirs)
        if rows:
            split = ours.media.pixel_values.split(ours.media.grid_thw.prod(-1).tolist())
            assert torch.equal(ours.media.grid_thw[rows], theirs[grid])
            torch.testing.assert_close(torch.cat([split[i] for i in rows]), theirs[values], rtol=1e-6, atol=1e-6)


def test_every_pair_of_frames_has_its_time_in_qwen3_prompts() -> None:
    encoder = policies.policy("qwen3_vl").encoder
    text = encoder.tokenizer.decode(encode(encoder, "29.97 fps").token_ids)
    stamps = [f"<{17 * (2 * pair + 0.5) * 1001 / 30000:.1f} seconds><|vision_start|>" for pair in range(3)]
    assert [text.count(stamp) for stamp in stamps] == [1, 1, 1], text
    assert len(set(stamps)) == 3


@pytest.mark.parametrize(("family", "case"), [("qwen3_vl", case) for case in CASES] + [
    ("qwen2_5_vl", "text"), ("qwen2_5_vl", "image"), ("qwen2_5_vl", "one frame")])
def test_positions_are_hugging_faces(oracle: dict, family: str, case: str) -> None:
    policy, (theirs, _) = policies.policy(family), oracle[family, case]
    ours = encode(policy.encoder, case)
    positions, delta = policy.model.model.get_rope_index(
        theirs["input_ids"], theirs["mm_token_type_ids"], image_grid_thw=theirs.get("image_grid_thw"),
        video_grid_thw=theirs.get("video_grid_thw"))
    assert torch.equal(ours.positions, positions[:, 0])
    assert ours.next_position == len(ours.token_ids) + int(delta)


def positions_by_the_reference_rule(types: list[int], images: list[list[int]], videos: list[list[int]],
                                    seconds_per_grid: list[float], tokens_per_second: float) -> list[list[int]]:
    """Token by token; types 0 text, 1 image, 2 video; grids in patches before merging by 2 x 2."""
    triples: list[list[int]] = []
    following = number = 0
    grids = {1: iter(images), 2: iter(zip(videos, seconds_per_grid, strict=True))}
    while number < len(types):
        if types[number] == 0:
            triples.append([following] * 3)
            following, number = following + 1, number + 1
            continue
        (times, height, width), seconds = (next(grids[1]), 0.0) if types[number] == 1 else next(grids[2])
        visual = [[math.floor(t * seconds * tokens_per_second), h, w]
                  for t in range(times) for h in range(height // 2) for w in range(width // 2)]
        triples += [[following + axis for axis in triple] for triple in visual]
        following += 1 + max(max(triple) for triple in visual)
        number += len(visual)
    return [list(axis) for axis in zip(*triples, strict=True)]


@pytest.mark.parametrize("case", [case for case in CASES if case != "odd number of frames"])
def test_positions_of_qwen25_follow_the_reference_rule(oracle: dict, case: str) -> None:
    encoder, (theirs, _) = policies.policy("qwen2_5_vl").encoder, oracle["qwen2_5_vl", case]
    ours = encode(encoder, case)
    expected = positions_by_the_reference_rule(
        theirs["mm_token_type_ids"][0].tolist(), theirs.get("image_grid_thw", torch.zeros(0, 3)).tolist(),
        theirs.get("video_grid_thw", torch.zeros(0, 3)).tolist(),
        theirs.get("second_per_grid_ts", torch.zeros(0)).tolist(), encoder.config.vision_config.tokens_per_second)
    assert ours.positions.tolist() == expected
    assert ours.next_position == expected[0][-1] + 1


def test_text_after_a_long_video_continues_past_its_time() -> None:
    """What transformers 5.17 gets wrong: 9 grids 0.75 s apart reach 12 on the time axis, but only 2 on the others."""
    encoder = policies.policy("qwen2_5_vl").encoder
    prompt = encode(encoder, "video")
    visual = prompt.token_ids == encoder.pad_ids["video"]
    start = int(prompt.positions[0, visual][0])
    assert sorted(set((prompt.positions[0, visual] - start).tolist())) == [0, 1, 3, 4, 6, 7, 9, 10, 12]
    after = int(visual.nonzero()[-1]) + 1
    assert prompt.positions[:, after].tolist() == [start + 13] * 3


def test_spans_without_tokens_take_no_position() -> None:
    positions, following = mrope_positions([TextSpan(0), GridSpan((0, 5), 1, 1), TextSpan(0), TextSpan(2)])
    assert positions.tolist() == [[0, 5, 6, 7], [0, 0, 6, 7], [0, 0, 6, 7]] and following == 8
    assert mrope_positions([])[0].shape == (3, 0) and mrope_positions([])[1] == 0


# -- what cannot be read ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pad", ["<|video_pad|>", "<|image_pad|>"])
def test_a_pad_token_in_the_text_is_refused(pad: str) -> None:
    encoder = policies.policy("qwen3_vl").encoder
    with pytest.raises(DataError, match=f"'p7' holds the special token {pad}".replace("|", r"\|")):
        encoder.encode(policies.prompt_of(f"What is {pad}?", prompt_id="p7"), None)


def test_media_that_do_not_match_the_prompt_are_refused() -> None:
    encoder = policies.policy("qwen3_vl").encoder
    with pytest.raises(DataError, match="shows 1 media in the chat template but brings 0"):
        encoder.encode(policies.prompt_of(Video("a.mp4"), "What?"), None)
    with pytest.raises(DataError, match="shows 0 media in the chat template but brings 1"):
        encoder.encode(policies.prompt_of("What?"), policies.random_media(encoder, [("image", 1, 2, 2)]))


def config_of(folder: Path, **fields: object) -> ModelConfig:
    return ModelConfig(path=str(folder), device="cpu", freeze_vision=False, **fields)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of a checkpoint that a test may damage."""
    return shutil.copytree(policies.checkpoint("qwen3_vl"), tmp_path / "checkpoint")


def set_model_type(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "qwen2_vl"}))


def drop_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.language_model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(("damage", "words"), [
    (lambda folder: (folder / "config.json").unlink(), "checkpoint is not a checkpoint folder: it has no config.json"),
    (set_model_type, f"is a 'qwen2_vl' checkpoint; veripo trains {names()}; the closest is qwen2_5_vl"),
    (lambda folder: (folder / "model.safetensors").unlink(), "lacks the weight file model.safetensors"),
    (lambda folder: os.truncate(folder / "model.safetensors", 100_000), "model.safetensors is damaged"),
    (lambda folder: os.truncate(folder / "model.safetensors", 0), "model.safetensors is damaged"),
    (drop_a_tensor, "layers.1.mlp.up_proj.weight"),
])
def test_a_damaged_checkpoint_is_refused_by_name(folder: Path, damage: Callable[[Path], object], words: str) -> None:
    damage(folder)
    with pytest.raises(CheckpointError, match=words.replace(".", r"\.")):
        load_policy(config_of(folder))


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: os.truncate(path, path.stat().st_size - 1)])
def test_a_missing_or_cut_shard_is_refused_by_name(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    folder = tmp_path / "sharded"
    policy = policies.policy("qwen3_vl")
    policy.model.save_pretrained(folder, max_shard_size="1500KB")
    policies.tiny_model.save_processor(folder, "qwen3_vl", policy.encoder.tokenizer)
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    weights = load_policy(config_of(folder)).model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in policy.model.state_dict().items())
    damage(shards[1])
    with pytest.raises(CheckpointError, match=shards[1].name):
        load_policy(config_of(folder))


# -- what is written -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", policies.ALL_FAMILIES)
def test_a_saved_policy_is_an_ordinary_checkpoint(oracle: dict, saved: dict[str, Policy], family: str) -> None:
    policy, (inputs, theirs) = saved[family], oracle[family]
    prompt = encode(policy.encoder, "image")
    assert prompt.token_ids.tolist() == inputs["input_ids"][0].tolist()
    with torch.no_grad():
        ours = policy.head(policy.hidden(pack([(prompt, [[1]])]), [policy.vision_features(prompt.media)]))
        before = policies.plain_logits(policies.policy(family), prompt, [])
    assert (ours - theirs[-1]).abs().max() < 1e-4
    assert (before - theirs[-1]).abs().max() > 0.1, "the weights saved are those of the checkpoint it came from"


@pytest.mark.parametrize("family", policies.ALL_FAMILIES)
def test_a_saved_policy_names_nobody_but_hugging_face(saved: dict[str, Policy], family: str) -> None:
    folder = saved[family].encoder.path
    texts = {file.name: file.read_text() for file in folder.glob("*.json")}
    assert {"config.json", "generation_config.json", "tokenizer.json", "preprocessor_config.json",
            "video_preprocessor_config.json"} <= texts.keys()
    assert [name for name, text in texts.items() if "veripo" in text.lower()] == []
    assert {file.name for file in policies.checkpoint(family).iterdir()} <= {file.name for file in folder.iterdir()}


def test_a_bfloat16_policy_stays_one(tmp_path: Path) -> None:
    policy = load_policy(config_of(policies.checkpoint("qwen2_5_vl"), dtype="bfloat16"))
    save_policy(policy, tmp_path)
    assert {value.dtype for value in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    again = load_policy(config_of(tmp_path, dtype="bfloat16")).model.state_dict()
    assert all(torch.equal(value, again[name]) for name, value in policy.model.state_dict().items())
