"""Flat records are read by a faster way: the same prompts and the same reasons as layouts.py gives alone."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from veripo_fast.config.inputs import DataConfig
from veripo_fast.data import prompts as module
from veripo_fast.data.files import json_object
from veripo_fast.data.flat import read_flat
from veripo_fast.data.keys import plan_of
from veripo_fast.data.prompts import read_prompts

VALUES: dict[str, list[Any]] = {
    "question": ["What?", "<video>What?", "<image>\nWhat?", "<video><video>What?", "a < b?", " What?\n", "\nWhat?\n",
                 "", "   ", "[{x", '[{"role": "user", "content": "Hi?"}]', "<video>", "<video> \n", "Why?\n\n", "Why? ",
                 None, 3, ["What?"], [{"role": "user", "content": "What?"}], "A. cat B. dog?", "say <answer>",
                 "Which?\nA. cat\nB. dog", "Which? (A) cat (B) dog"],
    "media": ["a.mp4", "./a.mp4", "b.PNG", "", None, ["a.mp4"], ["a.mp4", "b.mp4"], [], 3, {"video": "a.mp4"},
              "http://x/a.mp4", ["b.png"], "/abs//a.mp4", "x\ny", [["1.png", "2.png"]], [None]],
    "gold": ["B", "<answer>B</answer>", "<answer> a red cube </answer>", "<answer></answer>", "<answer>", " 2 ", 2, 0,
             2.0, True, "", "cat", "dog", ["B"], None, "C", "D", {"a": 1}, "$2\\sqrt{3}$", 10**30],
    "options": [None, [], "", {}, ["cat", "dog"], ["A. cat", "B. dog"], ["(A) cat", "(B): dog"], ["A. cat", "C. dog"],
                ["A.", "B."], ["A cat", "B dog"], [" cat ", "dog", ""], ["cat", None], ["cat", 3], [1, 2], 0, False,
                '["cat", "dog"]', {"A": "x", "B": "y"}, ["x"] * 27, ["A)  cat", "B)\tdog"], ["\u00a0cat", "dog"]],
    "data_type": [None, "", "video", "videos", "image", "text", "sound", 3, []],
    "problem_type": [None, "", "multiple choice", "numerical", "regression", "free-form", "OCR", "math", "strange", 3,
                     "multi-select", "time_span"],
    "data_source": [None, "", "STAR", 3, ["x"]], "id": [None, 0, 7, "seven", 7.5, ["x"]]}
KEYS = {"question": ["problem", "question", "prompt", "query"],
        "media": ["path", "video", "videos", "image", "images", "video_path", "frames"],
        "gold": ["answer", "solution", "ground_truth"], "options": ["options", "choices", "candidates"],
        "id": ["problem_id", "id"]}
EXTRA: list[dict[str, Any]] = [{}] * 12 + [
    {"extra_info": {"index": 3}}, {"extra_info": {"answer": "C"}}, {"fps": 2}, {"video_start": 1},
    {"system": "Be brief."}, {"response": "A"}, {"notes": "x"}, {"vidoes": "a.mp4"}, {"a0": "x", "a1": "y"},
    {"process": "<think>"}, {"ability": "x"}, {"history": [["a", "b"]]}, {"clip": "c.mp4"}]


def rows(count: int) -> list[dict[str, Any]]:
    """Mostly plain records, in which one or two values are anything."""
    dice = random.Random(0)
    made = []
    for number in range(count):
        row: dict[str, Any] = {}
        strange = set(dice.sample(sorted(VALUES), dice.randrange(4)))
        for name, values in VALUES.items():
            key = dice.choice(KEYS.get(name, [name])) if name in strange else KEYS.get(name, [name])[0]
            row[key] = dice.choice(values) if name in strange else values[0]
        if dice.random() < 0.3:
            row |= {"options": ["cat", "dog"], KEYS["gold"][0]: "B"}
        row |= dice.choice(EXTRA)
        if dice.random() < 0.1:
            row["id"] = number % 5
        made.append(row)
    return made


@pytest.mark.parametrize("config", [DataConfig(), DataConfig(template="none", answer_index=1, text_only=True),
                                    DataConfig(media_root="/data", ignore_keys=("notes",))])
def test_both_ways_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: DataConfig) -> None:
    monkeypatch.setattr(module, "LOOKED_UP", -1)  # no file is there
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows(20_000)))
    quick = read_prompts([str(file)], config)
    taken = []

    def plainly(*arguments: Any) -> None:
        taken.append(read_flat(*arguments) is not None)

    monkeypatch.setattr(module, "read_flat", plainly)
    plain = read_prompts([str(file)], config)
    assert quick[0] == plain[0] and quick[1] == plain[1]
    assert len(plain[0]) > 4000 and len(plain[1]) > 4000 and sum(taken) > 4000


@pytest.mark.parametrize("row", [
    {"problem_id": 1, "problem": "What?", "data_type": "video", "problem_type": "multiple choice",
     "options": ["A. x", "B. y"], "solution": "<answer>A</answer>", "path": "./a.mp4", "data_source": "STAR"},
    {"problem": "<video>What?", "answer": "red", "videos": ["a.mp4"]},
    {"question": "What?", "answer": 3, "image": "b.png"}])
def test_the_usual_layouts_are_flat(row: dict[str, Any]) -> None:
    plan = plan_of(row)
    assert plan.flat is not None and read_flat(row, plan.flat, str, DataConfig()) is not None


@pytest.mark.parametrize("line", [b'{"a": 1}', b'{"a": 1}\r\n', b'{"a": 1} \t\n', b' {"a": 1}',
                                  b'\xef\xbb\xbf{"a": 1}\n', b'{"a": 1.0, "a": 1}'])
def test_a_line_with_space_around_it(line: bytes) -> None:
    assert json_object(line) == json.loads(line)
