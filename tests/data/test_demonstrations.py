"""Demonstrations from records as they are published: Video-R1-CoT, LLaVA, ShareGPT, ms-swift and plain chat data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from veripo_fast.config.inputs import DataConfig
from veripo_fast.data.demonstrations import Demonstrated, load_demonstrations
from veripo_fast.data.wording import INSTRUCTIONS
from veripo_fast.errors import DataError
from veripo_fast.types import Message, Video

COT = {"problem_id": 7, "problem": "What moves?", "data_type": "video", "problem_type": "multiple choice",
       "options": ["A. a ball", "B. a cube"], "process": "<think>It is round.</think>",
       "solution": "<answer>A</answer>", "path": "./a.mp4", "data_source": "CLEVRER"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).touch()
    return tmp_path


def load(folder: Path, *rows: dict[str, Any]) -> tuple[list[Demonstrated], list[str]]:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shown, skipped = load_demonstrations([str(path)], DataConfig())
    return shown, [one.reason for one in skipped]


def only(folder: Path, row: dict[str, Any]) -> Demonstrated:
    (one,), skipped = load(folder, row)
    assert not skipped
    return one


def turns(one: Demonstrated) -> list[tuple[str, str]]:
    (demonstration,) = one.demonstrations
    return [(turn.role, "".join(map(str, turn.parts))) for turn in demonstration.turns]


def test_video_r1_cot(folder: Path) -> None:
    """With its options and the instruction, as a rollout would be asked."""
    one = only(folder, COT)
    assert turns(one) == [("assistant", "<think>It is round.</think>\n<answer>A</answer>")]
    (message,) = one.prompt.messages
    assert isinstance(message.parts[0], Video) and message.parts[0].path.endswith("a.mp4")
    assert message.parts[1] == f"What moves?\nA. a ball\nB. a cube\n{INSTRUCTIONS['choice']}"
    assert one.prompt.prompt_id == "7" and one.prompt.data_source == "CLEVRER"


def test_llava(folder: Path) -> None:
    """Plain answers: no instruction, which would ask for tags that are not shown."""
    one = only(folder, {"id": "x", "video": "a.mp4", "conversations": [
        {"from": "human", "value": "<image>\nDescribe the clip."}, {"from": "gpt", "value": "A ball rolls."}]})
    assert turns(one) == [("assistant", "A ball rolls.")]
    assert one.prompt.messages[0].parts[1] == "Describe the clip."


def test_a_chat_of_several_turns(folder: Path) -> None:
    one = only(folder, {"videos": ["a.mp4"], "conversations": [
        {"from": "system", "value": "Be brief."}, {"from": "human", "value": "<video>Who?"},
        {"from": "gpt", "value": "A dog."}, {"from": "human", "value": "Where?"},
        {"from": "gpt", "value": "Outside."}]})
    assert [message.role for message in one.prompt.messages] == ["system", "user"]
    assert turns(one) == [("assistant", "A dog."), ("user", "Where?"), ("assistant", "Outside.")]
    assert one.demonstrations[0].answers == 2


def test_answers_before_a_later_medium_are_read(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        one = only(folder, {"messages": [
            {"role": "user", "content": [{"type": "video", "video": "a.mp4"}, {"type": "text", "text": "Who?"}]},
            {"role": "assistant", "content": "A dog."},
            {"role": "user", "content": [{"type": "video", "video": "b.mp4"}, {"type": "text", "text": "And here?"}]},
            {"role": "assistant", "content": "A cat."}]})
    assert [message.role for message in one.prompt.messages] == ["user", "assistant", "user"]
    assert turns(one) == [("assistant", "A cat.")]
    assert "1 answer before a later medium" in caplog.text


def test_ms_swift(folder: Path) -> None:
    row = {"query": "<video>Who?", "response": "A dog.", "videos": ["a.mp4"], "history": [["Hi", "Hello"]]}
    one = only(folder, row)
    assert [message.role for message in one.prompt.messages] == ["user", "assistant", "user"]
    assert turns(one) == [("assistant", "A dog.")]


def test_a_whole_completion_in_the_solution(folder: Path) -> None:
    row = {key: value for key, value in COT.items() if key != "process"} | {
        "solution": "<think>Round.</think><answer>A</answer>"}
    assert turns(only(folder, row)) == [("assistant", row["solution"])]


def test_several_answers_to_one_question(folder: Path) -> None:
    other = COT | {"problem_id": 8, "process": "<think>A ball rolls.</think>"}
    shown, skipped = load(folder, COT, COT | {"problem_id": 9, "path": "b.mp4"}, other)
    assert [len(one.demonstrations) for one in shown] == [2, 1] and not skipped
    assert [one.prompt.prompt_id for one in shown] == ["7", "9"]


@pytest.mark.parametrize(("row", "words"), [
    ({key: value for key, value in COT.items() if key != "process"}, "shows no answer to learn"),
    (COT | {"process": 3}, "process must be a text, got int"),
    (COT | {"path": "gone.mp4"}, "gone.mp4"),
    ({"video": "a.mp4", "conversations": [{"from": "human", "value": "<video>Who?"}, {"from": "gpt", "value": "A dog."},
                                          {"from": "gpt", "value": "Sorry, a cat."}]}, "not the user's"),
    ({"video": "a.mp4", "conversations": [
        {"from": "human", "value": "<video>Who?"}, {"from": "gpt", "value": "A dog."},
        {"from": "human", "value": "No."}, {"from": "human", "value": "Look."},
        {"from": "gpt", "value": "A cat."}]}, "do not alternate"),
    ({"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]}, "text_only"),
])
def test_what_cannot_be_learnt_is_named(folder: Path, row: dict[str, Any], words: str) -> None:
    shown, reasons = load(folder, COT, row)
    assert len(shown) == 1 and len(reasons) == 1
    assert words in reasons[0]


def test_nothing_to_learn(folder: Path) -> None:
    with pytest.raises(DataError, match="shows no answer to learn"):
        load(folder, {key: value for key, value in COT.items() if key != "process"})


def test_messages_are_what_merges(folder: Path) -> None:
    """The same words about another clip are another prompt."""
    shown, _ = load(folder, COT, COT | {"path": "b.mp4"})
    assert len(shown) == 2 and all(isinstance(one.prompt.messages[0], Message) for one in shown)
