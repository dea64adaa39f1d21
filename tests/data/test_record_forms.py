"""81 record forms: each key that was once lost, in three layouts, is taken as meant or refused by its name."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from veripo_fast.config.inputs import DataConfig
from veripo_fast.data.prompts import read_prompts
from veripo_fast.errors import ConfigError
from veripo_fast.types import Image, Prompt, Sampling, Video

CONFIG = DataConfig(template="none")
Row = dict[str, Any]


@dataclass(frozen=True)
class Layout:
    """Where a record says what it is about."""

    entry: Callable[[Any], Row]
    """A record whose video is this entry (a path or a mapping); None: without media."""
    top_level: bool
    """Whether keys of the video stand beside its path."""


def _video_r1(entry: Any) -> Row:
    row: Row = {"problem_id": 1, "problem": "What?", "solution": "<answer>red</answer>"}
    if entry is None:
        return row
    more = dict(entry) if isinstance(entry, dict) else {"video": entry}
    return row | {"data_type": "video", "path": more.pop("video")} | more


def _easy_r1(entry: Any) -> Row:
    row: Row = {"problem": "What?", "answer": "red", "data_source": "x"}
    return row if entry is None else row | {"videos": [entry]}


def _chat(entry: Any) -> Row:
    parts: list[Any] = [{"type": "text", "text": "What?"}]
    if entry is not None:
        more = dict(entry) if isinstance(entry, dict) else {"video": entry}
        parts.insert(0, {"type": "video", **more})
    return {"messages": [{"role": "user", "content": parts}], "answer": "red"}


LAYOUTS = {"video-r1": Layout(_video_r1, True), "easy-r1": Layout(_easy_r1, False), "chat": Layout(_chat, False)}
CHOICE = {"solution": None, "answer": "B"}
TWO = ("cat", "dog")


@dataclass(frozen=True)
class Form:
    """A record of a kind, and what must become of it."""

    beside: Row | None = None
    """Keys of the record."""
    inside: Row | None = None
    """Keys of the entry of its video."""
    media: bool = True
    refused: str = ""
    """What its reason holds; empty: it is taken."""
    refused_beside: str = ""
    """As `refused`, where the keys of the video stand beside it."""
    check: Callable[[Prompt], bool] = lambda prompt: True


def video_is(*arguments: Any, **fields: Any) -> Callable[[Prompt], bool]:
    return lambda prompt: [type(medium)(medium.path.rpartition("/")[2], *_rest(medium)) for medium in prompt.media] == [
        Video("a.mp4", *arguments, **fields)]


def _rest(medium: Any) -> tuple[Any, ...]:
    return (medium.start_seconds, medium.end_seconds, medium.sampling)


def options_are(gold: str, *texts: str) -> Callable[[Prompt], bool]:
    return lambda prompt: (prompt.options, prompt.gold, prompt.problem_type) == (texts, gold, "choice")


def sampled(**fields: Any) -> Form:
    (key, value), = fields.items()
    known = {"nframes": "num_frames"}.get(key, key)
    return Form(inside={key: value}, check=video_is(None, None, Sampling(**{known: value})), refused_beside=key)


FORMS: dict[str, Form] = {
    "vidoes": Form({"vidoes": ["a.mp4"]}, media=False, refused="'vidoes'"),
    "video_path": Form({"video_path": "a.mp4"}, media=False, check=video_is()),
    "videoID": Form({"videoID": "fFjv93ACGo8"}, media=False, refused="'videoID'"),
    "scene_name": Form({"scene_name": "scene0011_00"}, media=False, refused="'scene_name'"),
    "candidates": Form(CHOICE | {"candidates": ["cat", "dog"]}, check=options_are("B", *TWO)),
    "choices": Form(CHOICE | {"choices": ["cat", "dog"]}, check=options_are("B", *TWO)),
    "a0..a4": Form(CHOICE | {"answer": 1} | {f"a{i}": name for i, name in enumerate("vwxyz")},
                   check=options_are("B", *"vwxyz")),
    "options: {A: ..}": Form(CHOICE | {"options": {"B": "dog", "A": "cat"}}, check=options_are("B", *TWO)),
    "null options": Form(CHOICE | {"options": ["cat", None, "dog"]}, refused="options must hold texts, got None"),
    "answer: 2": Form({"solution": None, "answer": 2, "options": ["x", "y", "z"]}, refused="data.answer_index"),
    "problem_type": Form({"problem_type": "temporal groundng"}, refused="did you mean temporal grounding?"),
    "fps": sampled(fps=1.5),
    "nframes": sampled(nframes=6),
    "num_frames": sampled(num_frames=7),
    "min_frames": sampled(min_frames=6),
    "max_frames": sampled(max_frames=6),
    "min_pixels": sampled(min_pixels=784),
    "max_pixels": sampled(max_pixels=3136),
    "total_pixels": Form(inside={"total_pixels": 99999}, refused="total_pixels"),
    "resized_height": Form(inside={"resized_height": 280}, refused="resized_height"),
    "resized_width": Form(inside={"resized_width": 280}, refused="resized_width"),
    "start_time, end_time": Form(inside={"start_time": 1, "end_time": 2.5}, check=video_is(1.0, 2.5)),
    "video_start, video_end beside": Form({"video_start": 1, "video_end": 2.5}, check=video_is(1.0, 2.5)),
    "clock": Form(inside={"video_start": "00:00:02", "video_end": "1:04.5"}, check=video_is(2.0, 64.5)),
    "video_start: NaN": Form(inside={"video_start": math.nan}, refused="video_start must be seconds"),
    "path and videos": Form({"path": "./a.mp4", "videos": ["a.mp4"]}, check=video_is()),
    "videos beside text only": Form({"data_type": "text", "vidoe": ["a.mp4"]}, media=False, refused="'vidoe'"),
}


def test_there_are_81_forms() -> None:
    assert len(FORMS) * len(LAYOUTS) == 81


def read(folder: Path, row: Row, config: DataConfig = CONFIG) -> Prompt | str:
    """The prompt of a record, or the reason why it is skipped."""
    for name in ("a.mp4", "b.mp4", "c.jpg", "d.jpg"):
        (folder / name).touch()
    (folder / "one.jsonl").write_text(json.dumps(row) + "\n")
    prompts, skipped = read_prompts([str(folder / "one.jsonl")], config)
    return prompts[0] if prompts else skipped[0].reason


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", FORMS)
def test_no_form_is_lost_in_silence(tmp_path: Path, name: str, layout: str) -> None:
    form, how = FORMS[name], LAYOUTS[layout]
    entry = {"video": "a.mp4", **(form.inside or {})} if form.inside else "a.mp4"
    row = how.entry(entry if form.media else None) | (form.beside or {})
    result = read(tmp_path, row)
    refused = form.refused or (how.top_level and form.refused_beside)
    if refused:
        assert isinstance(result, str) and refused in result, result
    else:
        assert isinstance(result, Prompt) and form.check(result), result


# -- siblings ---------------------------------------------------------------------------------------------------------

PLAIN = {"problem": "What?", "answer": "red"}


@pytest.mark.parametrize(("row", "words"), [
    (PLAIN, "names no video or image under a known key"),
    (PLAIN | {"videos": []}, "set data.text_only: true, or data_type: text"),
    (PLAIN | {"data_type": "video"}, "says data_type video and names no video"),
    (PLAIN | {"data_type": "text", "path": "a.mp4"}, "data_type is text"),
    (PLAIN | {"data_type": "text", "videos": ["a.mp4"]}, "says data_type text and names 1 media"),
    (PLAIN | {"data_type": "video", "images": ["c.jpg"]}, "says data_type video and names no video"),
    (PLAIN | {"path": "a.mp4", "imgaes": ["c.jpg"]}, "the key 'imgaes', which is not read: write images"),
    (PLAIN | {"path": "a.mp4", "second": ["b.mp4"]}, "a medium under the key 'second'"),
    (PLAIN | {"extra_info": {"videos": ["a.mp4"]}}, "extra_info.videos"),
    (PLAIN | {"path": "a.mp4", "optoins": ["x", "y"]}, "'optoins', which is not read: write options"),
    (PLAIN | {"path": "a.mp4", "options": {"A": "x", "C": "y"}}, "A, B, C, ... without a gap"),
    (PLAIN | {"path": "a.mp4", "options": ["red", "x"], "choices": ["red", "y"]}, "different options under options"),
    (PLAIN | {"path": "a.mp4", "a0": "red", "a2": "x"}, "lacks an option between a0 and a2"),
    (PLAIN | {"path": "a.mp4", "options": [f"o{i}" for i in range(28)]}, "28 options, and letters end at Z"),
    (PLAIN | {"path": "a.mp4", "options": ["blue", "green"]}, "'red' is none of its 2 options"),
    (PLAIN | {"path": "a.mp4", "answer": "7", "a0": "x", "a1": "y"}, "no index of 2 options that count from 0"),
    (PLAIN | {"videos": [{"video": "a.mp4", "begin": 2}]}, "the key 'begin' in the entry of a video"),
    (PLAIN | {"videos": [{"video": "a.mp4", "path": "b.mp4"}]}, "names two files"),
    (PLAIN | {"videos": [{"video": "a.mp4", "fps": 1, "nframes": 4}]}, "by fps and by a number of frames"),
    (PLAIN | {"videos": [{"video": "a.mp4", "nframes": 4, "max_frames": 2}]}, "max_frames beside a number of frames"),
    (PLAIN | {"videos": [{"video": "a.mp4", "min_pixels": 9, "max_pixels": 4}]}, "min_pixels 9, above its max_pixels"),
    (PLAIN | {"videos": [{"video": "a.mp4", "fps": "2"}]}, "fps must be a number above 0"),
    (PLAIN | {"videos": [{"video": "a.mp4", "max_frames": 2.5}]}, "max_frames must be a whole number"),
    (PLAIN | {"videos": [{"video": "a.mp4", "video_start": -1}]}, "video_start must be seconds from 0 on"),
    (PLAIN | {"videos": [{"video": "a.mp4", "video_start": 4, "video_end": 3}]}, "from 4 s to 3 s, which is empty"),
    (PLAIN | {"videos": [{"video": "a.mp4", "video_start": 4, "start_time": 3}]}, "with different times"),
    (PLAIN | {"videos": ["a.mp4", "b.mp4"], "video_start": 1}, "video_start beside 2 videos"),
    (PLAIN | {"images": [{"image": "c.jpg", "fps": 1}]}, "asks for fps of an image"),
])
def test_what_would_be_lost_is_refused_by_name(tmp_path: Path, row: Row, words: str) -> None:
    result = read(tmp_path, row)
    assert isinstance(result, str) and words in result, result


def test_text_only_must_be_asked_for(tmp_path: Path) -> None:
    asked = DataConfig(template="none", text_only=True)
    assert isinstance(read(tmp_path, PLAIN, asked), Prompt)
    assert isinstance(read(tmp_path, PLAIN | {"data_type": "text"}), Prompt)
    for key, value in (("videoID", "x"), ("clip", "a"), ("file", "a.mp4")):
        result = read(tmp_path, PLAIN | {key: value}, asked)
        assert isinstance(result, str) and repr(key) in result, result


def test_an_index_counts_from_where_the_configuration_says(tmp_path: Path) -> None:
    row = {"problem": "?", "path": "a.mp4", "options": ["x", "y", "z"], "answer": 2}
    for base, letter in ((0, "C"), (1, "B")):
        prompt = read(tmp_path, row, DataConfig(answer_index=base))
        assert isinstance(prompt, Prompt) and (prompt.gold, prompt.problem_type) == (letter, "choice")
    numbers = read(tmp_path, row | {"options": [1, 2, 3]})
    assert isinstance(numbers, Prompt) and (numbers.gold, numbers.options) == ("2", ("1", "2", "3"))
    assert numbers.problem_type == "choice"
    number = read(tmp_path, row | {"problem_type": "numerical"})
    assert isinstance(number, Prompt) and number.problem_type == "number"
    with pytest.raises(ConfigError, match="answer_index must be 0, 1 or null, got 2"):
        DataConfig(answer_index=2)


def test_keys_may_be_ignored_by_name(tmp_path: Path) -> None:
    row = PLAIN | {"videos": [{"video": "a.mp4", "total_pixels": 4}], "problem_type": "colour", "fps": 30,
                   "thumbnail": "c.jpg"}
    assert isinstance(read(tmp_path, row), str)
    prompt = read(tmp_path, row, DataConfig(ignore_keys=("total_pixels", "problem_type", "fps", "thumbnail")))
    assert isinstance(prompt, Prompt) and prompt.media == (Video(str(tmp_path / "a.mp4")),)


@pytest.mark.parametrize("more", [
    {"options": ["A. x", "B. red"]}, {"options": '["x", "red"]'}, {"options": {"a": "x", "b": "red"}},
    {"choices": {"text": ["x", "red"], "label": ["A", "B"]}}, {"option_a": "x", "option_b": "red"},
    {"A": "x", "B": "red", "C": None}, {"option 0": "x", "option 1": "red", "answer": 1},
    {"options": ["x", "red", None, None]}, {"option1": "x", "option2": "red", "answer": "2"}])
def test_options_in_the_forms_that_people_have(tmp_path: Path, more: Row) -> None:
    prompt = read(tmp_path, PLAIN | {"path": "a.mp4"} | more)
    assert isinstance(prompt, Prompt), prompt
    assert prompt.options == ("x", "red") and prompt.problem_type == "choice"
    assert prompt.gold in ("B", "red")


def test_one_file_under_two_keys_is_one_medium(tmp_path: Path) -> None:
    part = {"role": "user", "content": [{"type": "video", "video": "a.mp4"}, {"type": "text", "text": "What?"}]}
    for row in (PLAIN | {"path": "a.mp4", "videos": [{"video": "./a.mp4", "video_start": 1}]},
                {"messages": [part], "answer": "red", "videos": [{"video": "a.mp4", "video_start": 1}]},
                PLAIN | {"video": {"video": "a.mp4", "video_start": 1}, "video_path": "a.mp4"}):
        prompt = read(tmp_path, row)
        assert isinstance(prompt, Prompt) and prompt.media == (Video(str(tmp_path / "a.mp4"), 1.0),), prompt
    twice = read(tmp_path, PLAIN | {"problem": "<video> or <video>?", "videos": ["a.mp4", "a.mp4"]})
    assert isinstance(twice, Prompt) and len(twice.media) == 2


def test_pixels_of_an_image(tmp_path: Path) -> None:
    prompt = read(tmp_path, PLAIN | {"images": [{"image": "c.jpg", "max_pixels": 784}]})
    assert isinstance(prompt, Prompt)
    assert prompt.media == (Image(str(tmp_path / "c.jpg"), Sampling(max_pixels=784)),)
