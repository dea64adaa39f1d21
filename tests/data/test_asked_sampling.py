"""What a record asks for one video is honoured wherever frames are taken, and has a cache key of its own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PilImage

from bench.video import clips
from veripo_fast.cache.loader import PromptLoader
from veripo_fast.config.inputs import DataConfig, VideoConfig
from veripo_fast.config.schema import Config
from veripo_fast.data.prompts import load_prompts
from veripo_fast.inspect.corpus import PolicySizes, Target, inspect_medium
from veripo_fast.model.encoding import decode_frames
from veripo_fast.rollout.store import prompt_from_json, prompt_to_json
from veripo_fast.types import Image, Sampling, Video
from veripo_fast.video.contract import contract_of, most_frames, most_pixels, window
from veripo_fast.video.decode import decode, decode_image
from veripo_fast.video.patches import fingerprint

CONTRACT = VideoConfig(fps=2.0, min_frames=4, max_frames=16, min_pixels=784, max_pixels=4 * 784)
SIZES = PolicySizes(patch_size=14, merge_size=2, bytes_per_token=200)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("asked") / "a.mp4"
    clips.make_clip(path, frames=240)
    return str(path)


@pytest.mark.parametrize(("asked", "frames"), [
    (Sampling(), 16), (Sampling(fps=0.5), 4), (Sampling(num_frames=7), 7), (Sampling(max_frames=2), 2),
    (Sampling(fps=0.5, min_frames=6), 6), (Sampling(max_frames=40, fps=4.0), 32), (Sampling(min_frames=99), 16)])
def test_frames(clip: str, asked: Sampling, frames: int) -> None:
    video = Video(clip, sampling=asked)
    decoded = decode(video, CONTRACT, 28)
    assert len(decoded.indices) == frames
    plain = decode(Video(clip), contract_of(video, CONTRACT), 28)
    assert plain.indices == decoded.indices and (plain.pixels == decoded.pixels).all()
    [(_, pixels, _)] = decode_frames([video], CONTRACT, 28)
    assert len(pixels) == frames <= most_frames(video, CONTRACT)
    row = inspect_medium(Target(video, 1), Config(video=CONTRACT), SIZES).row
    assert (row["taken_frames"], row["status"]) == (frames, "ok")
    assert row["sampled_frames"] <= 3


def test_bounds_of_a_contract_by_number() -> None:
    eight = replace(CONTRACT, fps=None, num_frames=8)
    for asked, count in ((Sampling(max_frames=4), 4), (Sampling(min_frames=12), 12), (Sampling(max_pixels=784), 8)):
        assert contract_of(Video("a", sampling=asked), eight).num_frames == count
    assert contract_of(Video("a", sampling=Sampling(fps=1.0)), eight).num_frames is None


@pytest.mark.parametrize(("asked", "pixels"), [
    (Sampling(max_pixels=784), 784), (Sampling(min_pixels=9 * 784), 9 * 784),
    (Sampling(max_pixels=16 * 784), 16 * 784)])
def test_pixels(clip: str, tmp_path: Path, asked: Sampling, pixels: int) -> None:
    PilImage.fromarray(np.zeros((480, 480, 3), np.uint8)).save(tmp_path / "s.png")
    image = Image(str(tmp_path / "s.png"), asked)
    height, width = decode_image(image, CONTRACT, 28).shape[2:]
    assert height * width == pixels
    height, width = decode(Video(clip, sampling=asked), CONTRACT, 28).pixels.shape[2:]
    row = inspect_medium(Target(Video(clip, sampling=asked), 1), Config(video=CONTRACT), SIZES).row
    assert (row["resized_height"], row["resized_width"]) == (height, width)
    bound = contract_of(image, CONTRACT).max_pixels
    assert height * width <= bound and most_pixels([image], CONTRACT) == 2 * bound


def test_it_has_its_own_key_and_others_keep_theirs(clip: str) -> None:
    asked = [None, Sampling(fps=1.0), Sampling(num_frames=4), Sampling(max_pixels=784)]
    assert len({fingerprint(Video(clip, sampling=one), CONTRACT) for one in asked}) == len(asked)


def test_it_survives_the_rollouts(clip: str, tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text(json.dumps({"problem": "?", "answer": 1, "videos": [
        {"video": clip, "nframes": 5, "max_pixels": 784}, {"video": ["x.png", "y.png"], "sample_fps": 1}],
        "images": [{"image": "x.png", "min_pixels": 784}]}))
    for name in ("x.png", "y.png"):
        PilImage.new("RGB", (32, 32)).save(tmp_path / name)
    [prompt], skipped = load_prompts([str(tmp_path / "d.jsonl")], DataConfig())
    assert not skipped and prompt.media[0] == Video(clip, sampling=Sampling(num_frames=4, max_pixels=784))
    assert prompt_from_json(prompt_to_json(prompt)) == prompt


def test_memory_is_bounded_by_what_is_asked(clip: str) -> None:
    class Loader(PromptLoader):
        def __init__(self) -> None:  # the bound needs the contract alone
            self.contract = CONTRACT

    [prompt] = [prompt_from_json(json.dumps({
        "prompt_id": "1", "messages": [{"role": "user", "parts": [
            {"video": clip, "start_seconds": None, "end_seconds": None, "sampling": {"num_frames": 40}}]}],
        "problem_type": "text", "gold": "x", "options": [], "data_source": ""}))]
    assert Loader()._most_bytes(prompt) == 40 * 3 * CONTRACT.max_pixels


def test_no_number_is_no_time() -> None:
    times = [0.0, 1.0, 2.0]
    assert not window(times, float("nan"), None) and not window(times, None, float("nan"))
