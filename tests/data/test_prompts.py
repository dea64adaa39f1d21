"""Data files in every accepted layout become prompts; whatever cannot be used is skipped with its reason."""

import json
import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from veripo_fast.config.inputs import DataConfig
from veripo_fast.data.prompts import load_prompts
from veripo_fast.data.wording import INSTRUCTIONS, question_text
from veripo_fast.errors import DataError
from veripo_fast.types import Image, Message, Prompt, Video

BARE = DataConfig(template="none", text_only=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data folder with media; files need not be decodable here, only exist."""
    (tmp_path / "clips").mkdir()
    for name in ("clips/a.mp4", "clips/b.mp4", "clips/c.jpg"):
        (tmp_path / name).write_bytes(b"media")
    return tmp_path


def write(path: Path, rows: list[Any]) -> str:
    """Rows as .jsonl (texts are written as they are), .json array or .parquet."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return str(path)


def one(folder: Path, row: dict[str, Any], config: DataConfig = BARE) -> Prompt:
    """The prompt of a single record."""
    (prompt,), skipped = load_prompts([write(folder / "one.jsonl", [row])], config)
    assert not skipped
    return prompt


def reason(folder: Path, row: Any) -> str:
    """Why a record is skipped."""
    rows = [row, {"problem": "2+2?", "answer": 4}]
    _, (skipped,) = load_prompts([write(folder / "bad.jsonl", rows)], BARE)
    assert skipped.record.startswith(f"{folder}/bad.jsonl:1")
    return skipped.reason


VIDEO_R1 = {"problem_id": 17, "problem": "What does the dog do?", "data_type": "video",
            "problem_type": "multiple choice", "options": ["A. sleeps", "B. runs"],
            "solution": "<answer>B</answer>", "path": "./clips/a.mp4", "data_source": "STAR"}


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_video_r1(folder: Path, suffix: str) -> None:
    number = {**VIDEO_R1, "problem_id": 18, "problem": "How many dogs?", "problem_type": "numerical", "options": [],
              "solution": "<answer>3</answer>"}
    image = {**VIDEO_R1, "problem_id": 19, "data_type": "image", "path": "clips/c.jpg"}
    prompts, skipped = load_prompts([write(folder / f"d.{suffix}", [VIDEO_R1, number, image])], BARE)
    assert not skipped
    first = prompts[0]
    assert first.prompt_id == "17"
    assert first.problem_type == "choice"
    assert first.gold == "B"
    assert first.options == ("sleeps", "runs")
    assert first.data_source == "STAR"
    assert first.messages == (Message("user", (Video(str(folder / "clips/a.mp4")),
                                               "What does the dog do?\nA. sleeps\nB. runs")),)
    assert (prompts[1].problem_type, prompts[1].gold, prompts[1].text) == ("number", "3", "How many dogs?")
    assert prompts[2].media == (Image(str(folder / "clips/c.jpg")),)


def test_cot_165k_has_a_trace_that_is_not_used(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    prompt = one(folder, {**VIDEO_R1, "process": "<think>secret</think>"})
    assert "secret" not in prompt.text
    assert "not used" not in caplog.text


def test_easyr1(folder: Path) -> None:
    row = {"problem": "<video>\nWhat is behind <image>?", "answer": "a door", "videos": ["clips/a.mp4"],
           "images": ["clips/c.jpg"]}
    prompt = one(folder, row)
    assert prompt.messages[0].parts == (Video(str(folder / "clips/a.mp4")), "What is behind ",
                                        Image(str(folder / "clips/c.jpg")), "?")
    assert prompt.problem_type == "text"
    assert prompt.prompt_id == "one.jsonl:1"


def test_verl(folder: Path) -> None:
    row = {"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "<video>How many?"}],
           "videos": [{"video": "clips/a.mp4", "video_start": 1.5, "video_end": 4}], "ability": "count",
           "reward_model": {"style": "rule", "ground_truth": "7"}, "extra_info": {"index": 5, "split": "train"},
           "data_source": "count"}
    for suffix in ("jsonl", "parquet"):
        (prompt,), _ = load_prompts([write(folder / f"verl.{suffix}", [row])], BARE)
        assert prompt.messages == (Message("system", ("Be brief.",)),
                                   Message("user", (Video(str(folder / "clips/a.mp4"), 1.5, 4.0), "How many?")))
        assert (prompt.prompt_id, prompt.gold, prompt.problem_type) == ("5", "7", "number")


def test_chat_messages(folder: Path) -> None:
    turns = [{"role": "user", "content": [{"type": "video", "video": f"file://{folder}/clips/b.mp4"},
                                          {"type": "text", "text": "Which colour?"}]}]
    expected = (Message("user", (Video(str(folder / "clips/b.mp4")), "Which colour?")),)
    for row in ({"messages": turns, "answer": "red"}, {"message": json.dumps(turns), "answer": "red"},
                {"messages": [*turns, {"role": "assistant", "content": "<think>t</think><answer>red</answer>"}]}):
        prompt = one(folder, row)
        assert prompt.messages == expected
        assert prompt.gold == "red"
    placeholder = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "Which colour?"}]}]
    assert one(folder, {"messages": placeholder, "videos": ["clips/b.mp4"], "answer": "red"}).messages == expected
    linked = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "clips/c.jpg"}}, "Which?"]}]
    assert one(folder, {"messages": linked, "answer": "red"}).media == (Image(str(folder / "clips/c.jpg")),)


def test_records_of_one_file_may_differ_in_layout_and_types(folder: Path) -> None:
    rows = [VIDEO_R1, {"problem": "2+2?", "answer": 4},
            {"prompt": [{"role": "user", "content": "1+1?"}], "answer": "2"},
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "3?"}]}], "solution": "3"}]
    prompts, skipped = load_prompts([write(folder / "mixed.jsonl", rows)], BARE)
    assert [prompt.gold for prompt in prompts] == ["B", "4", "2", "3"]
    assert not skipped


def test_embedded_images_are_kept_by_content(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    row = {"problem": "<image>What?", "answer": "cat", "images": [{"bytes": b"picture", "path": None}]}
    for _ in range(2):
        (prompt,), _ = load_prompts([write(folder / "e.parquet", [row])], BARE)
        (image,) = prompt.media
        assert Path(image.path).read_bytes() == b"picture"
    assert len(list((folder / "cache" / "veripo-fast" / "media").iterdir())) == 1


def test_golds_are_found_where_they_stand(folder: Path) -> None:
    both = {"problem": "?", "solution": "Add the two: 40 + 2 = 42.", "answer": "42"}
    assert one(folder, both).gold == "42"
    assert one(folder, {**both, "solution": "<answer> 41 </answer>"}).gold == "41"
    assert one(folder, {"problem": "?", "solution": 42.0}).gold == "42"
    assert one(folder, {"problem": "?", "answer": ["42"]}).gold == "42"
    assert one(folder, {"problem": "?", "extra_info": {"answer": "42"}}).gold == "42"


def test_options_with_and_without_letters(folder: Path) -> None:
    for options in (["A. cat", "B. dog"], ["cat", "dog"], ["(A) cat", "(B) dog"], {"A": "cat", "B": "dog", "C": None}):
        prompt = one(folder, {"problem": "Which?", "options": options, "answer": "B"})
        assert prompt.options == ("cat", "dog")
        assert prompt.text == "Which?\nA. cat\nB. dog"
    for told in ("Which?\nA. cat\nB. dog", "Which? (A) cat (B) dog", "Which? A) cat B) dog"):
        assert one(folder, {"problem": told, "options": ["cat", "dog"], "answer": "B"}).text == told


def test_instruction_follows_the_problem_type_alone(folder: Path) -> None:
    think = DataConfig(text_only=True)
    choice = one(folder, {"problem": "Which?", "options": ["cat", "dog"], "answer": "B"}, think)
    assert choice.text == f"Which?\nA. cat\nB. dog\n{INSTRUCTIONS['choice']}"
    assert choice.text == question_text("Which?", ("cat", "dog"), "choice")
    for gold in ("3", "4"):
        number = one(folder, {"problem": "How many?", "problem_type": "numerical", "answer": gold}, think)
        assert number.text == f"How many?\n{INSTRUCTIONS['number']}"
    own = "Give it in <answer></answer>."
    assert one(folder, {"problem": own, "answer": "3"}, think).text == own
    picture = [{"role": "user", "content": ["How many?", {"type": "image", "image": "clips/c.jpg"}]}]
    assert one(folder, {"messages": picture, "answer": "3"}, think).messages[0].parts[2] == INSTRUCTIONS["number"]
    for text in INSTRUCTIONS.values():
        assert len(text.split()) <= 13
        assert "<think></think>" in text
        assert "<answer></answer>" in text


def test_media_root(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    file = write(elsewhere / "d.jsonl", [VIDEO_R1])
    (prompt,), _ = load_prompts([file], DataConfig(media_root=str(folder)))
    assert prompt.media[0].path == str(folder / "clips/a.mp4")
    with pytest.raises(DataError, match=r"all 1 records .* were skipped; the first, .*d\.jsonl:1 \(17\): media file"):
        load_prompts([file], DataConfig())


@pytest.mark.parametrize(("row", "words"), [
    ("{not json", "is not valid JSON: Expecting property name enclosed in double quotes at column 2"),
    ("[1, 2]", "must be a JSON object, got '[1, 2]'"),
    ({"answer": "4"}, "has no question: none of messages, message, conversations, prompt, problem, question, query"),
    ({"problem": "2+2?"}, "has no gold answer: none of answer, solution, ground_truth"),
    ({"problem": "?", "answer": ["a", "b"]}, "the gold answer must be a text or a number, got ['a', 'b']"),
    ({"problem": "?", "answer": "E", "options": ["x", "y"], "problem_type": "mcq"}, "cannot be read as choice"),
    ({"problem": "?", "answer": "4", "videos": ["gone.mp4"]}, "gone.mp4 does not exist"),
    ({"problem": "?", "answer": "4", "videos": ["https://x.org/a.mp4"]}, "media must be local files, not URLs"),
    ({"problem": "?", "answer": "4", "videos": [["1.jpg", 2]]}, "a video must be the path of a file"),
    ({"problem": "<video><video>?", "answer": "4", "videos": ["clips/a.mp4"]}, "more <video> markers than videos (1)"),
    ({"problem": "<video>?", "answer": "4", "videos": ["clips/a.mp4"] * 2}, "fewer <video> markers than videos (2)"),
    ({"problem": "?", "answer": "4", "path": "clips/a.mp4", "data_type": "audio"}, "data_type must be video, image or"),
    ({"problem": "?", "answer": "4", "options": "A or B"}, "options must be a list"),
    ({"message": "[{'role'", "answer": "4"}, "message is not valid JSON"),
    ({"messages": [{"role": "tool", "content": "?"}], "answer": "4"}, "role is not system, user or assistant"),
    ({"messages": [{"role": "user"}], "answer": "4"}, "holds a turn without content"),
    ({"messages": [{"role": "system", "content": "?"}], "answer": "4"}, "not the user's"),
    ({"messages": [{"role": "user", "content": [{"type": "audio"}]}], "answer": "4"}, "neither text, image nor video"),
    ({"messages": [{"role": "user", "content": ""}], "answer": "4"}, "the question is empty"),
    ({"problem": 5, "answer": "4"}, "problem must be a text or a list of chat turns, got int"),
    ({"problem": "?", "answer": "4", "videos": [{"video": "clips/a.mp4", "video_start": "x"}]}, "must be seconds"),
])
def test_a_bad_record_is_skipped_with_its_reason(folder: Path, row: Any, words: str) -> None:
    assert words in reason(folder, row)


def test_skipping_names_line_and_medium_and_loses_nothing_else(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = folder / "d.jsonl"
    rows = [json.dumps(VIDEO_R1), "", "{broken", json.dumps({**VIDEO_R1, "problem_id": 21, "path": "gone.mp4"}),
            json.dumps({**VIDEO_R1, "problem_id": 22, "problem": "a\u2028b", "colour": 1}, ensure_ascii=False)]
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(rows).encode() + b"\n{\"problem\": \"caf\xe9?\", \"answer\": 1}\n")
    with caplog.at_level(logging.WARNING):
        prompts, skipped = load_prompts([str(file)], BARE)
    assert [prompt.prompt_id for prompt in prompts] == ["17", "22"]
    assert [(item.record, item.path) for item in skipped] == [
        (f"{file}:3", str(file)), (f"{file}:4 (21)", str(folder / "gone.mp4")), (f"{file}:6", str(file))]
    assert skipped[2].reason == "is not valid UTF-8"
    assert caplog.text.count("keys not used: colour") == 1
    assert "3 of 5 records" in caplog.text


def test_ids_are_unique_over_files(folder: Path) -> None:
    one_file = write(folder / "a.jsonl", [VIDEO_R1, VIDEO_R1, {"problem": "?", "answer": 1}])
    other = write(folder / "b.jsonl", [VIDEO_R1, {**VIDEO_R1, "problem_id": "17#2"}])
    prompts, _ = load_prompts([one_file, other], BARE)
    assert [prompt.prompt_id for prompt in prompts] == ["17", "17#2", "a.jsonl:3", "17#3", "17#2#2"]


def test_files_that_cannot_be_used_at_all(folder: Path) -> None:
    (folder / "empty.jsonl").touch()
    (folder / "bad.parquet").write_bytes(b"not parquet at all")
    (folder / "bad.json").write_text('[{"problem": "?"},\n {oops]')
    (folder / "table.csv").touch()
    for name, words in (("gone.jsonl", "gone.jsonl does not exist"), ("empty.jsonl", "without a single record"),
                        ("bad.parquet", "bad.parquet cannot be read as parquet"),
                        ("bad.json", "bad.json is not valid JSON: .* line 2 column 3"),
                        ("table.csv", r"must end in \.jsonl, \.json or \.parquet")):
        with pytest.raises(DataError, match=words) as caught:
            load_prompts([str(folder / name)], BARE)
        assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="no data file given"):
        load_prompts([], BARE)
