"""A record of each system and suite in the form in which it is published: all that it says is found."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from veripo_fast.config.inputs import DataConfig
from veripo_fast.config.load import load_config
from veripo_fast.config.suites import SUITES, suite_named
from veripo_fast.data.choices import options_in_text
from veripo_fast.data.prompts import read_prompts
from veripo_fast.errors import ConfigError, UserError
from veripo_fast.recipes.view import side_of
from veripo_fast.reward import text_grades
from veripo_fast.reward.graders import answer_accuracy
from veripo_fast.types import Image, Prompt, Video

Row = dict[str, Any]


def read(folder: Path, row: Row, **data: Any) -> Prompt | str:
    """The prompt of a record, or the reason why it is skipped; files are not looked for."""
    (folder / "one.jsonl").write_text(json.dumps(row) + "\n")
    prompts, skipped = read_prompts([str(folder / "one.jsonl")], DataConfig(template="none", **data))
    return prompts[0] if prompts else skipped[0].reason


@pytest.fixture(autouse=True)
def no_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("veripo_fast.data.prompts.LOOKED_UP", -1)


def media(prompt: Prompt, folder: Path) -> list[str]:
    return [str(Path(medium.path).relative_to(folder)) for medium in prompt.media]


VIDEO_R1 = {"problem_id": 2, "problem": "Which object falls first?", "data_type": "video",
            "problem_type": "multiple choice", "options": ["A. The cup", "B. The plate", "C. The fork"],
            "solution": "<answer>B</answer>", "path": "./CLEVRER/video_1.mp4", "data_source": "CLEVRER"}
EGOPLAN = {"sample_id": 115, "video_source": "EpicKitchens", "task_goal": "store cereal",
           "question": "What action should I take next in order to store cereal?", "answer": "put box into cupboard",
           "video_basename": "P01_13_115.mp4", "current_observation_basename": "P01_13_760.png",
           "task_progress_metadata": [{"narration_text": "take bag", "start_frame": 36, "stop_frame": 105}]}
EGOPLAN_MEDIA = ("videos/{video_basename}", "images/{current_observation_basename}")
LETTERED = ["A. Apples.", "B. Candles.", "C. Berries.", "D. The three kinds are alike."]

PUBLISHED: dict[str, tuple[Row, dict[str, Any], tuple[Any, ...]]] = {
    # name: (record, options of `data`, (type, gold, options, media))
    "Video-R1, SpaceR, GRPO-CARE": (VIDEO_R1, {}, (
        "choice", "B", ("The cup", "The plate", "The fork"), ["CLEVRER/video_1.mp4"])),
    "Video-R1 regression": (
        VIDEO_R1 | {"problem_type": "regression", "options": [], "solution": "<answer>4.3</answer>"}, {},
        ("estimate", "4.3", (), ["CLEVRER/video_1.mp4"])),
    "VideoRFT": (
        {"problem_id": 7, "problem": "What does the man hold?\nOptions:\nA. A rope\nB. A ball\nC. Nothing\n",
         "data_type": "video", "problem_type": "multiple choice", "solution": "<answer>A</answer>",
         "path": "STAR/x.mp4", "data_source": "STAR"}, {},
        ("choice", "A", ("A rope", "A ball", "Nothing"), ["STAR/x.mp4"])),
    "SEED-Bench-R1, validation": (
        EGOPLAN | {"choice_a": "open cupboard", "choice_b": "put box into cupboard", "choice_c": "take bag",
                   "choice_d": "put bag into box", "golden_choice_idx": "B"}, {"media_patterns": EGOPLAN_MEDIA},
        ("choice", "put box into cupboard", ("open cupboard", "put box into cupboard", "take bag", "put bag into box"),
         ["videos/P01_13_115.mp4", "images/P01_13_760.png"])),
    "OneThinker, temporal grounding": (
        {"problem": "When does he wave?", "answer": '<answer>{"time": [1, 3.5]}</answer>', "videos": ["a.mp4"],
         "data_type": "video", "problem_type": "temporal grounding", "options": [], "problem_id": 1}, {},
        ("time_span", '{"time": [1, 3.5]}', (), ["a.mp4"])),
    "OneThinker, spatial grounding": (
        {"problem": "Where is the cat?", "answer": {"bbox_2d": [10, 20, 110, 220]}, "images": ["a.jpg"],
         "data_type": "image", "problem_type": "spatial grounding", "options": [], "problem_id": 1}, {},
        ("box", '{"bbox_2d": [10, 20, 110, 220]}', (), ["a.jpg"])),
    "TimeLens": (
        {"problem": "<video>When does the event happen?", "answer": "<answer> 7.0 to 11.0 </answer>",
         "problem_type": "temporal grounding", "data_type": "video", "videos": ["v.mp4"]}, {},
        ("time_span", "7.0 to 11.0", (), ["v.mp4"])),
    "LongVILA-R1": (
        {"problem": "Who wins?", "answer": "B", "videos": "shot/1.mp4", "reasoning": "<think>x</think>"}, {},
        ("choice", "B", (), ["shot/1.mp4"])),
    "R1-ShareVL": (
        {"problem": "<image>How many?", "answer": "12", "images": ["a.png"], "new_questions": ["What number?"]}, {},
        ("number", "12", (), ["a.png"])),
    "NExT-GQA, VideoChat-R1": (
        {"id": 4, "video": "4010069381", "question": "what did he do after sitting down", "duration": 39,
         "options": ["run", "wave", "eat", "turn", "jump"], "glue": [[5.1, 9.0]], "type": "TN", "answer": "wave"},
        {"media_patterns": ("{video}.mp4",)},
        ("choice", "wave", ("run", "wave", "eat", "turn", "jump"), ["4010069381.mp4"])),
    "VSI-Bench, a count": (
        {"id": 166, "dataset": "arkitscenes", "scene_name": "47430468", "question_type": "object_counting",
         "question": "How many chair(s) are in this room?", "ground_truth": "4", "options": None},
        {"media_patterns": ("{dataset}/{scene_name}.mp4",)},
        ("estimate", "4", (), ["arkitscenes/47430468.mp4"])),
    "VSI-Bench, a choice": (
        {"id": 3, "dataset": "scannet", "scene_name": "scene0011_00", "question_type": "object_rel_distance",
         "question": "Which is closest?", "ground_truth": "C", "options": ["A. table", "B. door", "C. sofa"]},
        {"media_patterns": ("{dataset}/{scene_name}.mp4",)},
        ("choice", "C", ("table", "door", "sofa"), ["scannet/scene0011_00.mp4"])),
    "Video-MME": (
        {"video_id": "001", "duration": "short", "domain": "Knowledge", "sub_category": "Humanity",
         "url": "https://www.youtube.com/watch?v=fFjv93ACGo8", "videoID": "fFjv93ACGo8", "question_id": "001-1",
         "task_type": "Counting Problem", "question": "What is used least?", "options": LETTERED, "answer": "C"},
        {"media_patterns": ("data/{videoID}.mp4",)},
        ("choice", "C", ("Apples.", "Candles.", "Berries.", "The three kinds are alike."), ["data/fFjv93ACGo8.mp4"])),
    "MMVU, a choice": (
        {"id": "validation_1", "video": "videos/Art/1.mp4", "youtube_url": "https://youtu.be/x", "metadata": {},
         "question": "Which school?", "question_type": "multiple-choice", "answer": "E",
         "choices": {"A": "Gongbi", "B": "Xieyi", "C": "Nanga", "D": "Lingnan", "E": "None"}}, {},
        ("choice", "E", ("Gongbi", "Xieyi", "Nanga", "Lingnan", "None"), ["videos/Art/1.mp4"])),
    "MMVU, open": (
        {"id": "validation_2", "video": "videos/Art/2.mp4", "question": "Which method?", "answer": "Bubble Sort",
         "question_type": "open-ended", "choices": {"A": "", "B": "", "C": "", "D": "", "E": ""}}, {},
        ("text", "Bubble Sort", (), ["videos/Art/2.mp4"])),
    "Video-MMMU": (
        {"id": "dev_1", "question": "What is the minimum?", "options": "['2', '4', '6']", "answer": "B",
         "question_type": "multiple-choice"}, {"media_patterns": ("{id}.mp4",)},
        ("choice", "B", ("2", "4", "6"), ["dev_1.mp4"])),
    "MVBench": (
        {"video": "166583.webm", "question": "What is the action?", "candidates": ["Not sure", "Scattering", "Piling"],
         "answer": "Piling"}, {}, ("choice", "Piling", ("Not sure", "Scattering", "Piling"), ["166583.webm"])),
    "TempCompass": (
        {"video_id": "1039693949", "question": "What happens?\nA. drinking water\nB. playing chess\nC. cooking",
         "answer": "C. cooking", "dim": "action"}, {"media_patterns": ("videos/{video_id}.mp4",)},
        ("choice", "C. cooking", ("drinking water", "playing chess", "cooking"), ["videos/1039693949.mp4"])),
    "TOMATO": (
        {"question": "Which direction?", "options": ["Down", "Left", "Up"], "answer": 2,
         "demonstration_type": "simulated", "variation": {"zoom": 0}, "key": "0153-15",
         "video_path": "simulated/0153-15.mp4"}, {"answer_index": 0},
        ("choice", "C", ("Down", "Left", "Up"), ["simulated/0153-15.mp4"])),
    "LVBench": (
        {"uid": "19", "question": "What year appears?\n(A) 1636\n(B) 1366\n(C) 1363", "answer": "B",
         "time_reference": "00:15-00:19", "key": "Cm73ma6Ibcs"}, {"media_patterns": ("{key}.mp4",)},
        ("choice", "B", ("1636", "1366", "1363"), ["Cm73ma6Ibcs.mp4"])),
    "LongVideoBench": (
        {"video_id": "86CxyhFV9MI", "question": "What else is on the screen?", "question_wo_referring_query": "What?",
         "candidates": ["A cup", "A shirt", "A hat"], "correct_choice": 1, "id": "86CxyhFV9MI_0",
         "video_path": "86CxyhFV9MI.mp4", "subtitle_path": "86CxyhFV9MI_en.json", "duration": 190.16,
         "starting_timestamp_for_subtitles": 0, "question_category": "TOS", "level": "L2-Relation"}, {},
        ("choice", "B", ("A cup", "A shirt", "A hat"), ["86CxyhFV9MI.mp4"])),
    "NExT-QA": (
        {"video": 4010069381, "frame_count": 369, "width": 640, "height": 480, "question": "how do they react",
         "answer": 3, "qid": 6, "type": "CH", "a0": "bow", "a1": "sit", "a2": "run", "a3": "laugh", "a4": "cry"},
        {"media_patterns": ("NExTVideo/{video}.mp4",)},
        ("choice", "D", ("bow", "sit", "run", "laugh", "cry"), ["NExTVideo/4010069381.mp4"])),
    "EgoSchema": (
        {"q_uid": "0074f737", "question": "What is c doing?", "option 0": "Cooking", "option 1": "Laundry",
         "option 2": "Cleaning", "answer": 2}, {"media_patterns": ("{q_uid}.mp4",)},
        ("choice", "C", ("Cooking", "Laundry", "Cleaning"), ["0074f737.mp4"])),
    "VerIPO's evaluation, letters doubled": (
        {"question_id": "001-1", "video_path": "videomme/a.mp4", "answer": "B", "processed_question": "What is it?",
         "question": "What is it?\nA. A. A dog.\nB. B. A cat.\nC. C. A cow.\nAnswer with the option's letter."}, {},
        ("choice", "B", ("A dog.", "A cat.", "A cow."), ["videomme/a.mp4"])),
    "VerIPO's evaluation, a choice of VSI-Bench": (
        {"question_id": 3, "video_path": "vsi/s.mp4", "question": "Which is closest?\nOptions:\nA. table\nB. sofa",
         "answer": "A", "options": ["A. table", "B. sofa"], "scene_name": "s"}, {},
        ("choice", "A", ("table", "sofa"), ["vsi/s.mp4"])),
    "VerIPO's evaluation": (
        {"question_id": 1, "video_path": "vsi/scene0011_00.mp4", "question": "How many?", "answer": "4",
         "processed_question": "How many? Give a number.", "scene_name": "scene0011_00"}, {},
        ("number", "4", (), ["vsi/scene0011_00.mp4"])),
}


SUITE_OF = {"VSI-Bench, a count": "vsi-bench", "VSI-Bench, a choice": "vsi-bench", "Video-MME": "video-mme",
            "MMVU, a choice": "mmvu", "MMVU, open": "mmvu", "Video-MMMU": "video-mmmu", "MVBench": "mvbench",
            "TempCompass": "tempcompass", "TOMATO": "tomato", "LVBench": "lvbench", "LongVideoBench": "longvideobench",
            "NExT-QA": "next-qa", "EgoSchema": "egoschema", "SEED-Bench-R1, validation": "seed-bench-r1",
            "LongVILA-R1": "longvideo-reason", "VerIPO's evaluation": "veripo",
            "VerIPO's evaluation, letters doubled": "veripo"}


@pytest.mark.parametrize("name", SUITE_OF)
def test_a_suite_by_its_name_reads_its_records(tmp_path: Path, name: str) -> None:
    """With the options of the suite, typed as they would be, and the key of its tasks kept."""
    row, _, (problem_type, gold, options, paths) = PUBLISHED[name]
    suite = suite_named(SUITE_OF[name])
    config = load_config(None, suite.tokens())
    prompt = read(tmp_path, row, **{key: getattr(config.data, key) for key in (
        "media_patterns", "answer_index", "keep_keys")})
    assert isinstance(prompt, Prompt), prompt
    assert (prompt.problem_type, prompt.gold, prompt.options) == (problem_type, gold, options)
    assert [Path(path).name for path in media(prompt, tmp_path)] == [Path(path).name for path in paths]
    assert config.eval.task_key == suite.task and (not suite.task or side_of(prompt)[suite.task] == row[suite.task])


def test_suites_are_all_tried_and_misspelt_ones_named() -> None:
    assert set(SUITE_OF.values()) == set(SUITES)
    with pytest.raises(ConfigError, match=r"no suite 'vsibench'; did you mean vsi-bench\? there are vsi-bench"):
        suite_named("vsibench")
    with pytest.raises(ConfigError, match=r"eval.task_key kind is read of the records; name it in data.keep_keys"):
        load_config(None, ["--eval.task-key", "kind"])


def test_a_question_id_names_a_prompt(tmp_path: Path) -> None:
    prompt = read(tmp_path, PUBLISHED["VerIPO's evaluation, letters doubled"][0])
    assert isinstance(prompt, Prompt) and prompt.prompt_id == "001-1"


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_record_as_published(tmp_path: Path, name: str) -> None:
    row, data, (problem_type, gold, options, paths) = PUBLISHED[name]
    prompt = read(tmp_path, row, **data)
    assert isinstance(prompt, Prompt), prompt
    assert (prompt.problem_type, prompt.gold, prompt.options) == (problem_type, gold, options)
    assert media(prompt, tmp_path) == paths
    assert [type(medium) for medium in prompt.media] == [
        Image if path.endswith(("png", "jpg")) else Video for path in paths]
    assert answer_accuracy(gold, prompt, 1e-6) == 1


@pytest.mark.parametrize("name", [name for name, (_, data, _) in PUBLISHED.items() if data.get("media_patterns")])
def test_without_a_pattern_it_is_refused_and_never_text(tmp_path: Path, name: str) -> None:
    row = {key: value for key, value in PUBLISHED[name][0].items() if key != "video"}
    for data in ({}, {"text_only": True}):
        result = read(tmp_path, row, **data)
        if isinstance(result, str):
            assert "names no video or image" in result or "not read" in result
        else:  # it was asked for, and no key speaks of a medium
            assert data and not any(word in key for key in row for word in ("video", "scene"))
    result = read(tmp_path, row)
    assert isinstance(result, str)


# -- patterns ---------------------------------------------------------------------------------------------------------


def test_patterns_name_what_is_wrong(tmp_path: Path) -> None:
    row = {"problem": "?", "answer": "3", "scene": "x", "clip_id": None}
    assert "lacks the key 'scnee'" in str(read(tmp_path, row, media_patterns=("{scnee}.mp4",)))
    assert "names no video" in str(read(tmp_path, row, media_patterns=("{clip_id}.mp4",)))
    assert "holds 2.5 under 'scene'" in str(read(tmp_path, row | {"scene": 2.5}, media_patterns=("{scene}.mp4",)))
    both = read(tmp_path, row, media_patterns=("{scene}.mp4", "{clip_id}.png"))
    assert isinstance(both, Prompt) and media(both, tmp_path) == ["x.mp4"]
    outside = read(tmp_path, row | {"scene": "../../x"}, media_patterns=("{scene}.mp4",), confine=True)
    assert "lies outside" in str(outside)
    with pytest.raises(ConfigError, match="must name a key of the records in braces"):
        DataConfig(media_patterns=("a.mp4",))


def test_keys_of_a_pattern_are_not_named_as_unused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        read(tmp_path, {"problem": "?", "answer": "3", "scene": "x", "other": 1}, media_patterns=("{scene}.mp4",))
    assert [record.getMessage() for record in caplog.records] == ["keys not used: other"]


# -- options ----------------------------------------------------------------------------------------------------------

CHOICE = {"problem": "Which?", "path": "a.mp4"}


@pytest.mark.parametrize(("more", "gold"), [
    ({"options": {"0": "x", "1": "red"}, "answer": 1}, "B"), ({"options": {"1": "x", "2": "red"}, "answer": "2"}, "B"),
    ({"options": [{"label": "A", "text": "x"}, {"label": "B", "text": "red"}], "answer": "B"}, "B"),
    ({"options": [{"key": "(a)", "value": "x"}, {"key": "(b)", "value": "red"}], "answer": "red"}, "red"),
    ({"options": [{"text": "x"}, {"text": "red"}], "answer": 1}, "B"),
    ({"options": "A. x\nB. red", "answer": "B"}, "B"), ({"options": "['x', \"red\"]", "answer": "B"}, "B"),
    ({"problem": "Which?\n(A) x\n(B) red\nGive the letter.", "answer": "B"}, "B"),
    ({"problem": "Which? (A) x (B) red", "answer": "(B)"}, "(B)"),
    ({"problem": "Which?\nA) x\nB) red", "answer": "red", "problem_type": "multiple choice"}, "red"),
    ({"problem": "A. B. wrote:\nA. y\nB. z\n\nA: x\nB: red", "answer": "B"}, "B"),
])
def test_options_in_all_forms(tmp_path: Path, more: Row, gold: str) -> None:
    prompt = read(tmp_path, CHOICE | more, answer_index=0 if isinstance(more["answer"], int) else None)
    assert isinstance(prompt, Prompt), prompt
    assert (prompt.options, prompt.gold, prompt.problem_type) == (("x", "red"), gold, "choice")
    assert answer_accuracy("B. red", prompt, 1e-6) == 1 and answer_accuracy("A. red", prompt, 1e-6) == 0


@pytest.mark.parametrize(("more", "words"), [
    ({"options": {"0": "x", "2": "y"}, "answer": 0}, "numbered from 0 or 1 without a gap"),
    ({"options": {"2": "x", "3": "y"}, "answer": 2}, "numbered from 0 or 1 without a gap"),
    ({"options": [{"label": "B", "text": "x"}], "answer": "B"}, "mappings of label (A) and text"),
    ({"options": [{"label": "A", "text": "x", "why": "z"}], "answer": "A"}, "mappings of label (A) and text"),
    ({"options": "[x, y", "answer": "A"}, "not valid JSON"), ({"options": "x or y", "answer": "A"}, "must be a list"),
    ({"options": ["x", "y", "z"], "answer": [0, 2]}, "data.answer_index"),
    ({"options": ["x", "y", "z"], "answer": ["x", 2.5]}, "must list texts or numbers"),
    ({"negative_answers": "x", "answer": "y"}, "negative_answers must be a list of texts"),
    ({"problem_type": "spatial-temporal grounding", "answer": "x"}, "did you mean"),
    ({"problem_type": "trakcing", "answer": "x"}, "'trakcing' is not known"),
    ({"problem_type": "time_span", "answer": [7, 3]}, "cannot be read as time_span"),
    ({"problem_type": "box", "answer": [1, 2, 3]}, "cannot be read as box"), ({"answer": [1, 2]}, "a text or a number"),
    ({"problem_type": "number", "answer": True}, "a text or a number"),
])
def test_what_cannot_be_read_is_refused_by_name(tmp_path: Path, more: Row, words: str) -> None:
    result = read(tmp_path, CHOICE | more)
    assert isinstance(result, str) and words in result, result


@pytest.mark.parametrize("text", [
    "Which?", "A. one option", "A. x\nA. y", "A. x\nB. x", "B. x\nC. y", "Plan A. Then B. it ends", "(A) (B)", "A.\nB.",
    "Vitamin A: x", "A. x\n" * 9000])
def test_texts_that_list_no_options(text: str) -> None:
    assert options_in_text(text) == ()


def test_a_question_that_lists_letters_stays_what_it_is(tmp_path: Path) -> None:
    text = "How many points lie between\nA. the left one\nB. the right one?"
    prompt = read(tmp_path, {"problem": text, "path": "a.mp4", "answer": "3"})
    assert isinstance(prompt, Prompt) and (prompt.problem_type, prompt.options) == ("number", ())
    asked = read(tmp_path, CHOICE | {"problem": "Which?\nA. x\nB. red", "answer": "B"})
    assert isinstance(asked, Prompt) and asked.text == "Which?\nA. x\nB. red"  # not named twice


def test_several_right_answers(tmp_path: Path) -> None:
    row = CHOICE | {"options": ["x1", "y1", "z1"]}
    for answer, index in (("A, C", None), (["A", "C"], None), ([0, 2], 0), ([1, 3], 1), ("AC", None),
                          (["x1", "z1"], None)):
        prompt = read(tmp_path, row | {"answer": answer}, answer_index=index)
        assert isinstance(prompt, Prompt), prompt
        assert prompt.problem_type == "multi_select"
        assert [answer_accuracy(text, prompt, 1e-6) for text in ("A and C", "A", "A, B, C")] == [1, 0, 0]
    soft = read(tmp_path, row | {"answer": ["A", "C"], "problem_type": "multi-select"},
                problem_types=("multi-select=soft_select",))
    assert isinstance(soft, Prompt) and answer_accuracy("A", soft, 1e-6) == 0.5


def test_the_gold_of_seed_bench_r1_stands_among_three_of_its_negatives(tmp_path: Path) -> None:
    row = EGOPLAN | {"negative_answers": ["wash cup", "open door", "cut onion", "close tap", "put box into cupboard"]}
    first, again = (read(tmp_path, row, media_patterns=EGOPLAN_MEDIA) for _ in range(2))
    assert isinstance(first, Prompt) and first == again
    assert len(first.options) == 4 and first.gold in first.options and set(first.options) < set(row["negative_answers"])
    places = set()
    for number in range(20):
        prompt = read(tmp_path, row | {"question": f"Question {number}?"}, media_patterns=EGOPLAN_MEDIA)
        assert isinstance(prompt, Prompt)
        places.add(prompt.options.index(prompt.gold))
    assert places == {0, 1, 2, 3}
    image = read(tmp_path, row | {"video_basename": ""}, media_patterns=EGOPLAN_MEDIA)
    assert isinstance(image, Prompt) and media(image, tmp_path) == ["images/P01_13_760.png"]


# -- types ------------------------------------------------------------------------------------------------------------


def test_golds_that_are_no_text(tmp_path: Path) -> None:
    for row, kind, right in ((CHOICE | {"answer": True}, "boolean", "Yes, it does."),
                             (CHOICE | {"answer": False, "problem_type": "true/false"}, "boolean", "False"),
                             (CHOICE | {"answer": [3, 7.5], "problem_type": "time_span"}, "time_span", "3 to 7.5"),
                             (CHOICE | {"answer": [[3, 7], [9, 10]], "problem_type": "time span"}, "time_span",
                              "[[3, 7], [9, 10]]"),
                             (CHOICE | {"answer": 83, "problem_type": "timestamp"}, "timestamp", "1:23"),
                             (CHOICE | {"answer": [[1, 2, 3, 4]], "problem_type": "boxes"}, "boxes", "[1, 2, 3, 4]")):
        prompt = read(tmp_path, row)
        assert isinstance(prompt, Prompt), prompt
        assert prompt.problem_type == kind and answer_accuracy(right, prompt, 1e-6) == 1


def test_types_may_be_renamed(tmp_path: Path) -> None:
    row = {"problem": "?", "path": "a.mp4", "answer": "0.67", "problem_type": "numerical"}
    prompt = read(tmp_path, row, problem_types=("numerical=rounded", "ratio=number"))
    assert isinstance(prompt, Prompt) and prompt.problem_type == "rounded"
    ratio = read(tmp_path, row | {"problem_type": "Ratio"}, problem_types=("ratio=number",))
    assert isinstance(ratio, Prompt) and ratio.problem_type == "number"
    for wrong in ("numerical", "numerical=round", "=number"):
        with pytest.raises(ConfigError, match="problem_types must be NAME=TYPE"):
            DataConfig(problem_types=(wrong,))


def test_a_missing_library_stops_the_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "rouge_score.rouge_scorer", None)
    text_grades._rouge.cache_clear()
    try:
        with pytest.raises(UserError, match="needs the package rouge-score"):
            read(tmp_path, CHOICE | {"answer": "a dog that no other test has", "problem_type": "rouge"})
    finally:
        text_grades._rouge.cache_clear()
