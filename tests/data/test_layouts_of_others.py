"""Data that people have: frames as pictures, base64, embedded bytes, LLaVA, ShareGPT, ms-swift, verl."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image as PilImage

from veripo_fast.config.inputs import DataConfig, VideoConfig
from veripo_fast.config.schema import Config
from veripo_fast.data.prompts import load_prompts
from veripo_fast.errors import MediaError
from veripo_fast.inspect.corpus import PolicySizes, Target, inspect_medium
from veripo_fast.types import Image, Message, Prompt, Video
from veripo_fast.video.decode import decode
from veripo_fast.video.patches import fingerprint

BARE = DataConfig(template="none")
CONTRACT = VideoConfig(fps=2.0, min_frames=2, max_frames=8, min_pixels=784, max_pixels=16 * 784)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that is only there, a picture, and a folder of frames whose grey is ten times their number."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "a.mp4").touch()
    (tmp_path / "frames").mkdir()
    for number in range(12):
        PilImage.fromarray(np.full((56, 84, 3), 10 * number, np.uint8)).save(tmp_path / "frames" / f"{number}.png")
    PilImage.new("RGB", (56, 56), "red").save(tmp_path / "c.jpg")
    return tmp_path


def one(folder: Path, row: dict[str, Any], config: DataConfig = BARE) -> Prompt:
    (folder / "one.jsonl").write_text(json.dumps(row) + "\n")
    (prompt,), skipped = load_prompts([str(folder / "one.jsonl")], config)
    assert not skipped
    return prompt


def video(folder: Path) -> Video:
    return Video(str(folder / "a.mp4"))


# -- frames -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [
    {"video": "frames/"}, {"videos": ["frames"]}, {"path": "frames", "data_type": "video"},
    {"videos": [[f"frames/{number}.png" for number in range(12)]]}, {"frames": [f"frames/{n}.png" for n in range(12)]},
    {"video": [f"frames/{number}.png" for number in range(12)]},
    {"videos": [{"video": [f"frames/{number}.png" for number in range(12)], "sample_fps": 2.0}]}])
def test_frames_are_a_video_of_two_per_second(folder: Path, row: dict[str, Any]) -> None:
    (medium,) = one(folder, {"problem": "What?", "answer": "red"} | row).media
    assert isinstance(medium, Video)
    frames = decode(medium, CONTRACT, 28)
    assert frames.indices == (0, 2, 3, 5, 6, 8, 9, 11) and frames.decoder == "pillow"
    assert frames.pixels[:, 0, 5, 5].tolist() == [10 * index for index in frames.indices]
    assert frames.pts_seconds.tolist() == [index / 2 for index in frames.indices]


def test_rate_part_and_sampling_of_frames(folder: Path) -> None:
    entry = {"video": "frames", "sample_fps": 4, "video_start": 1, "fps": 1}
    (medium,) = one(folder, {"problem": "What?", "answer": "red", "videos": [entry]}).media
    assert isinstance(medium, Video)
    frames = decode(medium, CONTRACT, 28)
    assert frames.indices == (4, 11) and frames.pts_seconds.tolist() == [0.0, 1.75]
    row = inspect_medium(Target(medium, 1), Config(video=CONTRACT), PolicySizes(14, 2, 200)).row
    assert (row["status"], row["taken_frames"], row["tokens"]) == ("ok", 2, 2 * 3)


def test_frames_that_cannot_be_used(folder: Path) -> None:
    (folder / "none").mkdir()
    with pytest.raises(MediaError, match="without a picture"):
        decode(Video(str(folder / "none")), CONTRACT, 28)
    files = tuple(str(folder / "frames" / f"{number}.png") for number in range(3))
    with pytest.raises(MediaError, match=r"c\.jpg is 56x56, and the frames before it are 84x56"):
        decode(Video(files[0], frames=(*files, str(folder / "c.jpg"))), CONTRACT, 28)
    with pytest.raises(MediaError, match="sample_fps, which frames have"):
        decode(Video(str(folder / "a.mp4"), frame_fps=2.0), CONTRACT, 28)
    gone = {"problem": "?", "answer": 1, "videos": [["frames/0.png", "frames/99.png"]]}
    (folder / "d.jsonl").write_text(json.dumps(gone) + "\n" + json.dumps(gone | {"videos": ["frames"]}))
    _, (skipped,) = load_prompts([str(folder / "d.jsonl")], BARE)
    assert skipped.path == str(folder / "frames/99.png") and "does not exist" in skipped.reason


def test_each_picture_is_in_the_key(folder: Path) -> None:
    medium = Video(str(folder / "frames"))
    before = fingerprint(medium, CONTRACT)
    assert fingerprint(Video(str(folder / "frames"), frame_fps=4.0), CONTRACT) != before
    PilImage.new("RGB", (84, 56), "blue").save(folder / "frames" / "7.png")
    assert fingerprint(medium, CONTRACT) != before


# -- bytes ------------------------------------------------------------------------------------------------------------


def test_base64_and_bytes_are_kept_by_content(folder: Path) -> None:
    content = (folder / "c.jpg").read_bytes()
    text = base64.b64encode(content).decode()
    ask = {"problem": "<image>?", "answer": "red"}
    for row in (ask | {"image": f"data:image/jpeg;base64,{text}"}, ask | {"images": [text]},
                {"answer": "red", "messages": [{"role": "user", "content": [
                    {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{text}"}}, "?"]}]}):
        (image,) = one(folder, row).media
        assert isinstance(image, Image) and Path(image.path).read_bytes() == content
    embedded = {"problem": "?", "answer": "red", "video": {"bytes": content, "path": "x.mp4"}}
    pq.write_table(pa.Table.from_pylist([embedded]), folder / "d.parquet")
    (prompt,), _ = load_prompts([str(folder / "d.parquet")], BARE)
    assert isinstance(prompt.media[0], Video) and Path(prompt.media[0].path).read_bytes() == content
    assert len(list((folder / "cache" / "veripo-fast" / "media").iterdir())) == 1


# -- chat -------------------------------------------------------------------------------------------------------------


def test_conversations(folder: Path) -> None:
    llava = {"id": "v1", "video": "a.mp4", "conversations": [
        {"from": "human", "value": "<image>\nWhat moves?"}, {"from": "gpt", "value": "a cube"}]}
    prompt = one(folder, llava)
    assert prompt.messages == (Message("user", (video(folder), "What moves?")),)
    assert (prompt.prompt_id, prompt.gold) == ("v1", "a cube")
    sharegpt = {"videos": ["a.mp4"], "system": "Be brief.", "conversations": [
        {"from": "human", "value": "<video>Who?"}, {"from": "gpt", "value": "Ann"},
        {"from": "human", "value": "And then?"}, {"from": "gpt", "value": "Bob"}]}
    prompt = one(folder, sharegpt)
    assert [message.role for message in prompt.messages] == ["system", "user", "assistant", "user"]
    assert prompt.messages[1].parts == (video(folder), "Who?") and prompt.gold == "Bob"


def test_query_and_response(folder: Path) -> None:
    row = {"query": "<video>What moves?", "response": "a cube", "videos": ["a.mp4"]}
    assert one(folder, row).messages == (Message("user", (video(folder), "What moves?")),)
    assert one(folder, row).gold == "a cube"
    earlier = one(folder, row | {"query": "And now?", "history": [["<video>Who?", "Ann"]], "system": "Be brief."})
    assert [message.role for message in earlier.messages] == ["system", "user", "assistant", "user"]
    assert one(folder, {"problem": "?", "answer": "x", "response": "<answer>y</answer>", "path": "a.mp4"}).gold == "x"


def test_verl_rows_of_parquet(folder: Path) -> None:
    row = {"data_source": "x", "prompt": [{"role": "user", "content": "<video>How many?"}], "ability": "count",
           "videos": [{"video": "a.mp4", "fps": 1.0, "max_pixels": None}],
           "reward_model": {"style": "rule", "ground_truth": "7"}, "extra_info": {"index": 3, "split": "train"}}
    pq.write_table(pa.Table.from_pylist([row]), folder / "d.parquet")
    (prompt,), _ = load_prompts([str(folder / "d.parquet")], BARE)
    (medium,) = prompt.media
    assert isinstance(medium, Video) and medium.sampling is not None and medium.sampling.fps == 1.0
    assert (prompt.prompt_id, prompt.gold, prompt.problem_type) == ("3", "7", "number")


def test_addresses_of_files(folder: Path) -> None:
    (folder / "a b.mp4").touch()
    for address in (f"file://{folder}/a%20b.mp4", f"file://localhost{folder}/a%20b.mp4", f"file://{folder}/a b.mp4"):
        assert one(folder, {"problem": "?", "answer": "x", "path": address}).media[0].path == str(folder / "a b.mp4")
