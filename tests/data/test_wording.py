"""How a question is put: instruction, system prompt, tags, per source, and a template of one's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from veripo_fast.config.inputs import DataConfig, SourceConfig
from veripo_fast.config.load import load_config
from veripo_fast.data.prompts import load_prompts
from veripo_fast.errors import ConfigError, DataError, TrainingError
from veripo_fast.rollout.store import prompt_from_json, prompt_to_json
from veripo_fast.types import Form, Message, Prompt, Video

CHOICE = {"problem": "Where to?", "options": ["left", "right"], "solution": "B", "path": "a.mp4", "data_source": "X"}
NUMBER = {"problem": "How many?", "solution": "3", "path": "a.mp4", "data_source": "Y"}
CHAT = {"messages": [{"role": "system", "content": "Be brief."},
                     {"role": "user", "content": ["Look: ", {"type": "video", "video": "a.mp4"}, "How many?"]}],
        "answer": "3"}


def read(folder: Path, config: DataConfig, *rows: dict[str, Any]) -> list[Prompt]:
    (folder / "a.mp4").touch()
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_prompts([str(folder / "data.jsonl")], config)[0]


def texts(prompt: Prompt) -> list[tuple[str, list[str]]]:
    return [(message.role, [part if isinstance(part, str) else "VIDEO" for part in message.parts])
            for message in prompt.messages]


def test_an_instruction_stands_behind_the_question(tmp_path: Path) -> None:
    config = DataConfig(instruction="Give the {kind} in <answer></answer>, {kind} only; {braces} stay.")
    choice, number, chat = read(tmp_path, config, CHOICE, NUMBER, CHAT)
    ending = "Give the {} in <answer></answer>, {} only; {{braces}} stay."
    assert texts(choice) == [("user", ["VIDEO", "Where to?\nA. left\nB. right\n" + ending.format("letter", "letter")])]
    assert texts(number) == [("user", ["VIDEO", "How many?\n" + ending.format("number", "number")])]
    assert texts(chat)[1] == ("user", ["Look: ", "VIDEO", "How many?\n" + ending.format("number", "number")])


def test_an_instruction_may_stand_around_the_question(tmp_path: Path) -> None:
    config = DataConfig(instruction="Think first. Question: {question}\nEnd with the {kind} in <answer></answer>.")
    choice, chat = read(tmp_path, config, CHOICE | {"problem": "Where {kind}?"}, CHAT)
    assert texts(choice) == [("user", ["VIDEO", "Think first. Question: Where {kind}?\nA. left\nB. right\nEnd with the "
                                                "letter in <answer></answer>."])]
    assert texts(chat)[1] == ("user", ["Look: ", "VIDEO", "Think first. Question: How many?\nEnd with the number in "
                                                          "<answer></answer>."])


def test_a_system_prompt_is_that_of_records_without_one(tmp_path: Path) -> None:
    number, chat = read(tmp_path, DataConfig(system="You reason."), NUMBER, CHAT)
    assert number.messages[0] == Message("system", ("You reason.",)) and number.messages[1].role == "user"
    assert chat.messages[0] == Message("system", ("Be brief.",))
    assert isinstance(number.media[0], Video)


def test_tags_and_pattern_are_the_form_of_a_prompt(tmp_path: Path) -> None:
    config = DataConfig(tags=("think", "boxed"), pattern=".*", instruction="The {kind} in \\boxed{}.")
    (prompt,) = read(tmp_path, config, NUMBER)
    assert prompt.form == Form(("think", "boxed"), ".*") and prompt.text.endswith("The number in \\boxed{}.")
    (asked,) = read(tmp_path, config, NUMBER | {"problem": "How many? Use \\boxed{}."})
    assert asked.text == "How many? Use \\boxed{}."  # it asks by itself
    assert prompt_from_json(prompt_to_json(prompt)) == prompt


def test_each_source_in_its_own_way(tmp_path: Path) -> None:
    config = DataConfig(instruction="All: <answer></answer>.", by_source=(
        SourceConfig("X", tags=("think", "map?", "answer"), instruction="Map: <map></map>."),
        SourceConfig("Z", template="none", system="Hm.")))
    x, y, z = read(tmp_path, config, CHOICE, NUMBER, NUMBER | {"data_source": "Z"})
    assert x.form.tags == ("think", "map?", "answer") and x.text.endswith("Map: <map></map>.")
    assert y.form == Form() and y.text == "How many?\nAll: <answer></answer>."
    assert z.text == "Hm.\nHow many?"


def test_by_source_can_be_set_by_name(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("data: {by_source: [{source: STAR, system: a}]}\n")
    config = load_config(tmp_path / "run.yaml", ["--data.by-source.STAR.system", "b", "--data.by-source.0.pattern=.*"])
    assert config.data.by_source == (SourceConfig("STAR", system="b", pattern=".*"),)


def test_side_data_travel_with_the_prompt(tmp_path: Path) -> None:
    row = NUMBER | {"pass_rate": 0.25, "map": {"table": [[0, 3]]}, "process": "<think>a</think>", "unused": 1}
    (prompt,) = read(tmp_path, DataConfig(keep_keys=("pass_rate", "map", "process", "absent")), row)
    assert json.loads(prompt.side) == {"pass_rate": 0.25, "map": {"table": [[0, 3]]}, "process": "<think>a</think>"}
    assert prompt_from_json(prompt_to_json(prompt)) == prompt
    assert read(tmp_path, DataConfig(), row)[0].side == ""
    with pytest.raises(DataError, match="a medium under the key"):  # a key that is not kept is looked at as before
        read(tmp_path, DataConfig(), NUMBER | {"clue": "b.mp4"})
    assert json.loads(read(tmp_path, DataConfig(keep_keys=("clue",)), NUMBER | {"clue": "b.mp4"})[0].side) == {
        "clue": "b.mp4"}


def own(folder: Path, body: str) -> str:
    file = folder / f"words_{len(list(folder.iterdir()))}.py"
    file.write_text(f"def worded(question):\n    {body}\n")
    return f"{file}:worded"


def test_a_template_of_ones_own(tmp_path: Path) -> None:
    name = own(tmp_path, "return f'{question.problem_type}/{question.data_source}/{len(question.options)}"
                         "/{question.side}: {question.text}'")
    choice, chat = read(tmp_path, DataConfig(template=name, keep_keys=("hint",)), CHOICE | {"hint": 1}, CHAT)
    assert texts(choice) == [("user", ["VIDEO", "choice/X/2/{'hint': 1}: Where to?"])]
    assert texts(chat)[1] == ("user", ["Look: ", "VIDEO", "number/data/0/{}: How many?"])


@pytest.mark.parametrize(("body", "sentence"), [
    ("raise ValueError('bad')", "failed: ValueError: bad (words_0.py, line 2); the question is 'How many?'"),
    ("return None", "returned None; it must return a text"), ("return ''", "must return a text")])
def test_a_broken_template_stops_and_is_named(tmp_path: Path, body: str, sentence: str) -> None:
    """It is no bad record, which would be skipped."""
    name = own(tmp_path, body)
    with pytest.raises(TrainingError) as caught:
        read(tmp_path, DataConfig(template=name), NUMBER)
    assert sentence in str(caught.value) and f"template {name}, on a question of Y," in str(caught.value)


@pytest.mark.parametrize(("options", "sentence"), [
    ({"template": "think_answer"}, "template think_answer is now called instruct"),
    ({"template": "nome"}, "template must be one of instruct, none, or a function of your own"),
    ({"template": "none", "instruction": "x"}, "instruction changes nothing while template is none"),
    ({"instruction": ""}, "template `none` leaves it out"),
    ({"tags": ("think", "boxed")}, "tags are think, boxed: write an instruction that asks for them"),
    ({"tags": ("think",)}, "one of tags must be answer or boxed"),
    ({"tags": ("answer", "boxed"), "instruction": "x"}, "one of tags must be answer or boxed"),
    ({"tags": ("think", "answer?"), "instruction": "x"}, "one of tags must be answer or boxed"),
    ({"tags": ("think", "think", "answer"), "instruction": "x"}, "tags name one twice"),
    ({"tags": ("<think>", "answer"), "instruction": "x"}, "got '<think>'"),
    ({"pattern": "("}, "pattern '(' is no regular expression"),
    ({"by_source": (SourceConfig("X", tags=("boxed",)),)}, "by_source.0: tags are boxed"),
    ({"by_source": (SourceConfig("X"), SourceConfig("X"))}, "by_source names X twice"),
])
def test_what_does_not_fit_is_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        DataConfig(**options)
    assert sentence in str(caught.value)
