"""The synthetic corpus: real video files that show what the questions ask, golds that score, and reasoning that the
rules judge reads as it is meant (the demo rests on all three)."""

from __future__ import annotations

import json
from collections import Counter
from functools import cache
from pathlib import Path

import av
import numpy as np
import pytest

from veripo_fast.config.inputs import DataConfig
from veripo_fast.config.objectives import RewardConfig
from veripo_fast.data.prompts import load_prompts
from veripo_fast.demo.corpus import record, write_corpus
from veripo_fast.demo.questions import Question, questions
from veripo_fast.demo.run import demo_config
from veripo_fast.demo.world import COLOURS, SECONDS, SIZE, Clip, random_clip, render
from veripo_fast.errors import DataError
from veripo_fast.reward.score import score
from veripo_fast.types import Completion, Prompt, RolloutGroup
from veripo_fast.verifier.judge_rules import RulesJudge
from veripo_fast.verifier.judges import no_progress
from veripo_fast.video.contract import frame_indices

KINDS = {"direction", "distance", "seconds", "place", "count", "last"}
FPS, FRAMES, SEED, TRAIN, HELDOUT = 8, 29, 3, 60, 24


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus") / "new"
    write_corpus(folder, TRAIN, HELDOUT, SEED)
    return folder


def records(corpus: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (corpus / f"{name}.jsonl").read_text().splitlines()]


@cache
def frames(path: Path) -> np.ndarray:
    """uint8 [T, H, W, 3], decoded by PyAV."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


# -- files -----------------------------------------------------------------------------------------------------------


def test_clips_are_h264_files_and_the_demo_sees_every_half_second(corpus: Path) -> None:
    clips = sorted((corpus / "clips").iterdir())
    assert len(clips) == (TRAIN + HELDOUT) // 2
    for path in clips:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            assert (stream.codec_context.name, stream.width, stream.height) == ("h264", SIZE, SIZE)
            assert stream.average_rate == FPS
            times = [float(frame.time) for frame in container.decode(video=0)]
        assert times == [index / FPS for index in range(FRAMES)]
    sampled = frame_indices(times, demo_config(Path("out"), 0, quick=True).video)
    assert [times[index] for index in sampled] == [half / 2 for half in range(2 * SECONDS)]


def test_every_record_loads_through_the_data_layer(corpus: Path) -> None:
    for name, wanted in (("train", TRAIN), ("heldout", HELDOUT)):
        prompts, skipped = load_prompts([str(corpus / f"{name}.jsonl")], DataConfig())
        assert skipped == []
        assert len({prompt.prompt_id for prompt in prompts}) == len(prompts) == wanted
        for prompt, row in zip(prompts, records(corpus, name), strict=True):
            assert row.keys() >= {"problem_id", "problem", "data_type", "problem_type", "options", "solution", "path",
                                  "data_source"}
            assert [media.path for media in prompt.media] == [str(corpus / row["path"])]
            assert prompt.problem_type == {"count": "number", "seconds": "estimate", "distance": "estimate"}.get(
                row["data_source"].removeprefix("synth-"), "choice")


def test_kinds_are_equally_frequent(corpus: Path) -> None:
    for name, wanted in (("train", TRAIN), ("heldout", HELDOUT)):
        counts = Counter(row["data_source"].removeprefix("synth-") for row in records(corpus, name))
        assert counts.keys() == KINDS
        assert max(counts.values()) - min(counts.values()) <= wanted / 6 * 0.4, counts


def test_train_and_heldout_share_no_clip(corpus: Path) -> None:
    train, heldout = ({row["path"] for row in records(corpus, name)} for name in ("train", "heldout"))
    assert not train & heldout
    assert train | heldout == {f"clips/{path.name}" for path in (corpus / "clips").iterdir()}
    pictures = [frames(corpus / path).tobytes() for path in sorted(train | heldout)]
    assert len(set(pictures)) == len(pictures)


def test_the_seed_decides(corpus: Path, tmp_path: Path) -> None:
    write_corpus(tmp_path / "again", 6, 4, SEED)
    write_corpus(tmp_path / "same", 6, 4, SEED)
    write_corpus(tmp_path / "other", 6, 4, SEED + 1)
    content = {name: {str(file.relative_to(tmp_path / name)): file.read_bytes()
                      for file in (tmp_path / name).rglob("*.*")} for name in ("again", "same", "other")}
    assert content["again"] == content["same"]
    assert content["again"]["clips/000000.mp4"] == (corpus / "clips/000000.mp4").read_bytes()
    assert not {*content["again"].values()} & {*content["other"].values()}


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("mine")
    with pytest.raises(DataError, match="exists and is not empty"):
        write_corpus(tmp_path, 2, 2, 0)
    assert (tmp_path / "train.jsonl").read_text() == "mine"


# -- what the files show ---------------------------------------------------------------------------------------------


def clip_of(path: str) -> Clip:
    """The clip behind a file: they are numbered in the order of their seeds."""
    return random_clip((SEED << 20) + int(Path(path).stem))


def seen(frame: np.ndarray, colour: str) -> tuple[float, float] | None:
    """Centre (x, y) of a colour in percent of the frame, None when it is not there."""
    rows, columns = np.nonzero((np.abs(frame.astype(int) - COLOURS[colour]) < 45).all(-1))
    return (columns.mean() / SIZE * 100, rows.mean() / SIZE * 100) if len(rows) > 60 else None


def third(percent: float, words: tuple[str, str, str]) -> str:
    return words[int(percent > 36) + int(percent > 64)]


def answer_by_looking(row: dict, video: np.ndarray) -> str:
    """The answer that the frames give, from colours alone: every colour stands for one shape."""
    start = {c: [seen(video[second * FPS], c) for second in range(SECONDS)] for c in COLOURS}
    shown = {c: [place for place in places if place] for c, places in start.items()}
    kind, asked = row["data_source"].removeprefix("synth-"), row["problem"]
    if kind == "count":
        return str(sum(bool(places) for places in shown.values()))
    if kind == "last":
        first = {c: next(s for s in range(SECONDS) if places[s]) for c, places in start.items() if shown[c]}
        return max(first, key=lambda c: first[c])
    places = shown[next(colour for colour in COLOURS if colour in asked)]
    (x, y), (before_x, before_y) = places[-1], places[0]
    if kind == "seconds":
        return str(len(places))
    if kind == "place":
        return f"{third(y, ('top', 'center', 'bottom'))} {third(x, ('left', 'middle', 'right'))}"
    if kind == "distance":
        return str(round(max(abs(x - before_x), abs(y - before_y)) / 10) * 10)
    if abs(x - before_x) > abs(y - before_y):
        return "right" if x > before_x else "left"
    return "down" if y > before_y else "up"


def test_golds_are_what_the_frames_show(corpus: Path) -> None:
    checked: Counter[str] = Counter()
    for row in records(corpus, "train") + records(corpus, "heldout"):
        clip = clip_of(row["path"])
        if len({shape.colour for shape in clip.shapes}) < len(clip.shapes):
            continue  # a colour stands for two shapes
        answer = answer_by_looking(row, frames(corpus / row["path"]))
        gold = row["solution"].removeprefix("<answer>").removesuffix("</answer>")
        if row["options"]:
            gold = next(option for option in row["options"] if option.startswith(f"{gold}. ")).removeprefix(f"{gold}. ")
        assert answer in (gold, gold.split()[0]), (row, answer)
        checked[row["data_source"]] += 1
    assert len(checked) == len(KINDS) and min(checked.values()) >= 3, checked


def test_shapes_stand_where_and_when_the_world_says(corpus: Path) -> None:
    paths = sorted(path.name for path in (corpus / "clips").iterdir())
    for name in paths[:12]:
        clip, video = clip_of(name), frames(corpus / "clips" / name)
        for index in range(0, len(video), 3):
            for shape in clip.shapes:
                x, y = clip.centre(shape, index / FPS)
                pixel = video[index, round(y * SIZE / 100), round(x * SIZE / 100)].astype(int)
                is_there = (np.abs(pixel - COLOURS[shape.colour]) < 40).all()
                assert is_there == shape.visible(index / FPS), (name, index, shape, pixel)


def test_kinds_of_shapes_can_be_told_apart() -> None:
    """Shares of the surrounding box that a circle, a square and a triangle fill, within a few percent."""
    filled: dict[str, list[float]] = {}
    for seed in range(40):
        clip = random_clip(seed)
        for shape in clip.shapes:
            frame = render(clip, [shape.appears])[0]
            rows, columns = np.nonzero((np.abs(frame.astype(int) - COLOURS[shape.colour]) < 45).all(-1))
            x, y = (value * SIZE / 100 for value in clip.centre(shape, shape.appears))
            own = (abs(rows - y) < 16) & (abs(columns - x) < 16)
            box = (np.ptp(rows[own]) + 1) * (np.ptp(columns[own]) + 1)
            filled.setdefault(shape.kind, []).append(own.sum() / box)
    assert min(filled["circle"]) > 0.72 and max(filled["circle"]) < 0.86
    assert min(filled["square"]) > 0.9
    assert max(filled["triangle"]) < 0.65


# -- questions, rewards, and the judge -------------------------------------------------------------------------------


@cache
def asked() -> tuple[Question, ...]:
    return tuple(question for seed in range(60) for question in questions(random_clip(seed), seed))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> list[Prompt]:
    """The prompt of each question of `asked`, through the files and the data layer."""
    folder = tmp_path_factory.mktemp("asked")
    (folder / "any.mp4").touch()
    lines = [json.dumps(record(question, "any.mp4", str(number))) for number, question in enumerate(asked())]
    (folder / "all.jsonl").write_text("\n".join(lines))
    loaded, skipped = load_prompts([str(folder / "all.jsonl")], DataConfig())
    assert not skipped
    return loaded


def written(question: Question, conclusion: str, answer: str) -> str:
    return f"<think>{question.reasoning(conclusion)}</think><answer>{question.tag(answer)}</answer>"


def test_every_kind_is_asked_and_every_answer_is_a_candidate() -> None:
    assert {question.kind for question in asked()} == KINDS
    for question in asked():
        assert question.answer in question.candidates
        assert len(set(question.candidates)) == len(question.candidates) > 1
        assert question.options == () or question.candidates == question.options
    letters = Counter(question.gold for question in asked() if len(question.options) == 4)
    assert letters.keys() == set("ABCD") and min(letters.values()) > max(letters.values()) / 2, letters


def test_the_gold_scores_and_no_other_candidate_does(prompts: list[Prompt]) -> None:
    for question, prompt in zip(asked(), prompts, strict=True):
        for candidate in question.candidates:
            scored = score(written(question, candidate, candidate), prompt, RewardConfig())
            assert scored.format == 1
            if candidate == question.answer:
                assert scored.accuracy == 1, (question, prompt)
            elif question.problem_type == "estimate":
                assert scored.accuracy < 0.75, (question, candidate)  # 50 for 60 is 0.7
            else:
                assert scored.accuracy == 0, (question, candidate)


def judged(prompt: Prompt, texts: list[str]) -> list[bool | None]:
    group = RolloutGroup(prompt, [Completion([0], text, [0.0], "stop", 0) for text in texts])
    return [judgement.consistent for judgement in RulesJudge().judge([group], no_progress)[0]]


def test_the_rules_judge_reads_every_conclusion_as_it_is_meant(prompts: list[Prompt]) -> None:
    for question, prompt in zip(asked(), prompts, strict=True):
        pairs = [(said, given) for said in question.candidates for given in question.candidates]
        texts = [written(question, said, given) for said, given in pairs]
        assert judged(prompt, texts) == [said == given for said, given in pairs], (question, texts)


def test_the_judge_needs_no_other_completion_of_the_group(prompts: list[Prompt]) -> None:
    for question, prompt in zip(asked(), prompts, strict=True):
        wrong = next(candidate for candidate in question.candidates if candidate != question.answer)
        assert judged(prompt, [written(question, question.answer, question.answer)]) == [True], question
        assert judged(prompt, [written(question, question.answer, wrong)]) == [False], question
        assert judged(prompt, [written(question, wrong, question.answer)]) == [False], question
