"""`veripo precompute`: a run afterwards decodes nothing, and neither kill -9 nor a bad video costs what is done."""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
import shutil
import signal
import tarfile
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load

from bench.video import clips
from tests.support import policies, runs
from tests.support.children import PATIENCE_SECONDS
from veripo_fast.cache import precompute
from veripo_fast.cache.loader import PromptLoader
from veripo_fast.cli import main
from veripo_fast.config.describe import to_yaml
from veripo_fast.config.inputs import DataConfig
from veripo_fast.config.schema import Config
from veripo_fast.data.prompts import load_prompts
from veripo_fast.model import encoding
from veripo_fast.model.tower import Tower
from veripo_fast.run.folder import RunDir
from veripo_fast.run.metrics import read_records
from veripo_fast.trainer import train
from veripo_fast.types import Video

torch.set_num_threads(1)


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., list[str]]:
    """Arguments of the command line for data and options; the cache is tmp_path/cache unless they say otherwise."""
    def make(data: list[Path] | Path, *arguments: object, **changes: Any) -> list[str]:
        path = tmp_path / f"{len(list(tmp_path.glob('*.yaml')))}.yaml"
        path.write_text(to_yaml(configured(tmp_path, **changes)))
        paths = data if isinstance(data, list) else [data]
        return ["precompute", *map(str, paths), "--config", str(path), *map(str, arguments)]

    return make


def configured(tmp_path: Path, **changes: Any) -> Config:
    return runs.config(tmp_path / "run", **({"model__path": str(policies.checkpoint("qwen3_vl")),
                                             "cache__folder": str(tmp_path / "cache"), "cache__prefetch_bytes": 1 << 22}
                                            | changes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight clips."""
    made = tmp_path_factory.mktemp("clips")
    for number in range(8):
        clips.make_clip(made / f"{number}.mp4", frames=12 + number, size=(64, 96))
    return made


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Names of media that were decoded, and how often."""
    seen: Counter[str] = Counter()
    for name in ("decode", "decode_image"):
        plain = getattr(encoding, name)
        monkeypatch.setattr(encoding, name, lambda medium, *rest, plain=plain: (
            seen.update([Path(medium.path).name]), plain(medium, *rest))[1])
    return seen


def entries(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.glob("*.safetensors")}


def same(one: bytes, other: bytes) -> bool:
    """Whether two entries hold the same tensors (the order of the header's lines is free)."""
    ours, theirs = load(one), load(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def work_of(run: Path) -> list[tuple[float, float]]:
    return [(row["video_decodes"], row["tower_runs"]) for row in read_records(RunDir(run).metrics)]


# --- what a run finds -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("freeze", "frames"), [(True, False), (True, True), (False, False)])
def test_a_run_afterwards_decodes_nothing(tmp_path: Path, command: Callable, decoded: Counter[str], freeze: bool,
                                          frames: bool) -> None:
    """And finds what it would have written itself: the same entries, the frames bitwise."""
    options = {"model__freeze_vision": freeze, "model__path": str(runs.model()), "cache__frames": frames,
               "stages": [{"kind": "grpo"}, {"kind": "dpo"}], "eval__samples": 1}
    decoded.clear()
    data = [runs.corpus() / "train.jsonl", runs.corpus() / "heldout.jsonl"]
    assert main(command(data, **options)) == 0
    files = {Path(medium.path).name for path in data
             for prompt in load_prompts([str(path)], DataConfig())[0] for medium in prompt.media}
    assert decoded == Counter(files) and len(files) >= 6
    made = entries(tmp_path / "cache")
    decoded.clear()
    train(configured(tmp_path, **options))
    assert decoded == Counter()
    rows = read_records(RunDir(tmp_path / "run").metrics)
    assert rows and all(row["video_decodes"] == 0 < row["cache_hits"] for row in rows)
    assert not freeze or all(row["tower_runs"] == 0 for row in rows)
    assert entries(tmp_path / "cache") == made
    train(configured(tmp_path, **options | {"run_dir": str(tmp_path / "other"),
                                            "cache__folder": str(tmp_path / "its-own")}))
    theirs = entries(tmp_path / "its-own")
    assert theirs.keys() == made.keys()
    assert {name.split(".")[1] for name in made} == {"tower"} | {"frames"} if frames else {
        "tower" if freeze else "frames"}
    assert all(same(made[name], theirs[name]) for name in made if ".frames." in name)


def test_a_tower_that_trains_is_not_loaded(command: Callable, folder: Path, monkeypatch: pytest.MonkeyPatch,
                                           capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(precompute, "load_tower", lambda *arguments: pytest.fail("the tower was loaded"))
    assert main(command(folder, model__freeze_vision=False)) == 0
    assert "8 media: 8 new, 0 already there, 0 skipped" in capsys.readouterr().out


def test_archives_and_a_run_from_them(tmp_path: Path, command: Callable, decoded: Counter[str]) -> None:
    source = runs.corpus()
    shard = tmp_path / "train-0.tar"
    with tarfile.open(shard, "w") as archive:
        for number, line in enumerate((source / "train.jsonl").read_text().splitlines()):
            row = json.loads(line)
            if "path" in row:
                archive.add(source / row["path"], f"{number}{Path(row.pop('path')).suffix}")
            (tmp_path / "row.json").write_text(json.dumps(row))
            archive.add(tmp_path / "row.json", f"{number}.json")
    options = {"data__train": [str(shard)], "eval__at": "never", "stages": [{"kind": "grpo"}], "grpo__steps": 3}
    assert main(command(shard, **options)) == 0
    assert sum(decoded.values()) == len(decoded) == 7, "six clips and a picture"
    decoded.clear()
    train(configured(tmp_path, **options))
    assert decoded == Counter() and set(work_of(tmp_path / "run")) == {(0, 0)}


def test_media_of_a_record_belong_together_and_parts_are_media(tmp_path: Path, command: Callable, folder: Path,
                                                               decoded: Counter[str]) -> None:
    question = {"problem": "What?", "answer": "1"}
    part = {"video": "1.mp4", "video_start": 0.1}
    both = {"videos": ["0.mp4", "1.mp4"]}
    rows: list[dict] = [both, both, {"videos": [part]}, {"videos": ["1.mp4"]}, {}]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(question | row) + "\n" for row in rows))
    data = [tmp_path / "data.jsonl", *(folder / f"{number}.mp4" for number in range(3))]
    arguments = command(data, data__media_root=str(folder))
    assert main(arguments) == 0
    assert decoded == {"0.mp4": 1, "1.mp4": 3, "2.mp4": 1} and len(entries(tmp_path / "cache")) == 4


# --- going on ---------------------------------------------------------------------------------------------------------


def test_of_a_shard_that_is_data_only_what_records_name(tmp_path: Path, command: Callable, folder: Path,
                                                        decoded: Counter[str],
                                                        capsys: pytest.CaptureFixture[str]) -> None:
    """A whole video is not made where training reads a part of it; an end that is cut off is named."""
    record = {"problem": "?", "answer": "red", "video": {"video": "a.mp4", "video_start": 0.1, "video_end": 0.3}}
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name, path in (("a.mp4", folder / "0.mp4"), ("b.mp4", folder / "1.mp4"), ("c.mp4", folder / "2.mp4")):
            archive.add(path, name)
            if name == "a.mp4":
                (tmp_path / "a.json").write_text(json.dumps(record))
                archive.add(tmp_path / "a.json", "a.json")
    data = (tmp_path / "x.tar").read_bytes()
    (tmp_path / "x.tar").write_bytes(data[:data.rindex(b"c.mp4") + 700])
    assert main(command(tmp_path / "x.tar")) == 0
    assert decoded == {"a.mp4": 1}
    assert "1 new, 0 already there, 1 skipped" in capsys.readouterr().out
    assert "truncated" in (tmp_path / "cache" / "precompute_skipped.jsonl").read_text()


def test_a_file_replaced_while_it_is_decoded_is_not_kept_as_the_new_one(
        tmp_path: Path, command: Callable, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(folder / "7.mp4", tmp_path / "a.mp4")
    decode = precompute.decode_frames

    def replaced(*arguments: Any) -> Any:
        frames = decode(*arguments)
        shutil.copy(folder / "0.mp4", tmp_path / "a.mp4")
        return frames

    monkeypatch.setattr(precompute, "decode_frames", replaced)
    arguments = command(tmp_path / "a.mp4", model__freeze_vision=False)
    assert main(arguments) == 0
    old = entries(tmp_path / "cache")
    monkeypatch.undo()
    assert main(arguments) == 0
    assert len(old) == 1 and len(entries(tmp_path / "cache")) == 2


def test_what_is_there_is_not_decoded_again(tmp_path: Path, command: Callable, folder: Path, decoded: Counter[str],
                                            capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(folder, "--limit", 3, cache__frames=True)) == 0
    assert re.search(r"3 media: 3 new, 0 already there, 0 skipped; [\d.]+ [KM]?B written in [\d.]+ s, [\d.]+ new",
                     capsys.readouterr().out)
    assert decoded == {"0.mp4": 1, "2.mp4": 1, "5.mp4": 1}, "evenly spread"
    cache = tmp_path / "cache"
    for path in cache.glob("*.safetensors"):
        os.utime(path, (1000, 1000))
    assert main(command(folder, cache__frames=True)) == 0
    captured = capsys.readouterr()
    assert "8 media: 5 new, 3 already there, 0 skipped" in captured.out
    assert "8/8" in captured.err and "38%" in captured.err, "the bar begins at 3 of 8"
    assert set(decoded.values()) == {1} and len(decoded) == 8
    assert all(path.stat().st_mtime > 1000 for path in cache.glob("*.safetensors")), "what is wanted counts as used"
    made = entries(cache)
    victim = next(cache.glob("*.frames.safetensors"))
    victim.unlink()
    of_another = [path for path in cache.glob("*.tower.safetensors") if path.name[:32] != victim.name[:32]]
    of_another[0].unlink()
    assert main(command(folder, cache__frames=True)) == 0
    assert "8 media: 2 new, 6 already there" in capsys.readouterr().out
    assert sum(decoded.values()) == 9, "the frames are decoded, the tower reads those that are there"
    again = entries(cache)
    assert again.keys() == made.keys() and same(again[victim.name], made[victim.name])


def test_kill_and_go_on(tmp_path: Path, command: Callable, folder: Path) -> None:
    """Killed where the sixth entry gets its name; entries that are there are whole, and the rest is made."""
    assert main(command(folder, cache__folder=str(tmp_path / "whole"))) == 0
    whole = entries(tmp_path / "whole")
    sixth = sorted((tmp_path / "whole").glob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns)[5]
    killed = runs.forks().run(*command(folder), at=f"rename .*/cache/{sixth.name}")
    assert killed.code == -signal.SIGKILL
    left = entries(tmp_path / "cache")
    assert len(left) == 5 and all(len(left[name]) == len(whole[name]) for name in left)
    again = runs.forks().run(*command(folder))
    assert again.code == 0 and "8 media: 3 new, 5 already there, 0 skipped" in again.output
    after = entries(tmp_path / "cache")
    assert after.keys() == whole.keys() and all(after[name] == left[name] for name in left)


def test_interrupt_and_go_on(tmp_path: Path, command: Callable, folder: Path) -> None:
    stopped = runs.forks().run(*command(folder, "--workers", 1, cache__prefetch_bytes=1), at="rename .*/cache/",
                               send=signal.SIGINT)
    assert stopped.code == 130 and "interrupted" in stopped.output and "Traceback" not in stopped.output
    count = len(entries(tmp_path / "cache"))
    assert 1 <= count < 8 and not list((tmp_path / "cache").glob(".tmp-*"))
    assert f"{8 - count} new, {count} already there" in runs.forks().run(*command(folder)).output


def test_two_ranks_make_everything_once(tmp_path: Path, command: Callable, folder: Path, decoded: Counter[str],
                                        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "page.mp4").write_text("<html>")
    data = [folder, tmp_path / "page.mp4"]
    assert main(command(data, "--rank", 0, "--world", 2)) == 0
    assert "5 media of rank 0 of 2: 4 new, 0 already there, 1 skipped" in capsys.readouterr().out
    assert len(decoded) == 5
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(command(data)) == 0
    assert "4 media of rank 1 of 2: 4 new, 0 already there, 0 skipped" in capsys.readouterr().out
    assert len(decoded) == 9 and set(decoded.values()) == {1} and len(entries(tmp_path / "cache")) == 8
    assert [path.name for path in (tmp_path / "cache").glob("*.jsonl")] == ["precompute_skipped-rank0.jsonl"]


@pytest.mark.parametrize("freeze", [True, False])
def test_decoding_goes_on_while_the_tower_runs(command: Callable, folder: Path, monkeypatch: pytest.MonkeyPatch,
                                               freeze: bool) -> None:
    """Batches of two. The first three media are decoded together; the fourth, which is of the second batch, while the
    tower runs on the first one. Each waits for that and would wait in vain."""
    monkeypatch.setattr(precompute, "MAX_BATCH", 2)
    numbers, three = itertools.count(), threading.Barrier(3)
    inside, decoded_inside = threading.Event(), threading.Event()
    plain_decode, plain_tower = encoding.decode, Tower.vision_features_of

    def decode(*arguments: Any) -> Any:
        number = next(numbers)
        if number < 3:
            three.wait(PATIENCE_SECONDS)
        if number == 3 and freeze:
            assert inside.wait(PATIENCE_SECONDS)
        frames = plain_decode(*arguments)
        if number == 3:
            decoded_inside.set()
        return frames

    def tower(*arguments: Any) -> Any:
        inside.set()
        assert decoded_inside.wait(PATIENCE_SECONDS)
        return plain_tower(*arguments)

    monkeypatch.setattr(encoding, "decode", decode)
    monkeypatch.setattr(Tower, "vision_features_of", tower)
    assert main(command(folder, "--workers", 3, model__freeze_vision=freeze)) == 0
    assert inside.is_set() == freeze and decoded_inside.is_set() and next(numbers) == 8


# --- what goes wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("freeze", [True, False])
def test_bad_media_are_named_and_counted(tmp_path: Path, command: Callable, folder: Path, freeze: bool,
                                         capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    data = tmp_path / "data"
    shutil.copytree(folder, data)
    (data / "page.mp4").write_text("<!DOCTYPE html>")
    (data / "broken.tar").write_bytes(b"no tar at all" * 100)
    clips.truncated(clips.make_clip(tmp_path / "long.mp4", frames=200), data / "cut.mp4", 0.5)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"problem": "?", "answer": "1", "path": path}) + "\n"
                                                 for path in ("gone.mp4", "gone.mp4", "data/0.mp4")))
    arguments = command([data, tmp_path / "rows.jsonl"], model__freeze_vision=freeze)
    listed = tmp_path / "cache" / "precompute_skipped.jsonl"
    for new in (8, 0):
        assert main(arguments) == 0
        captured = capsys.readouterr()
        assert f"12 media: {new} new, {8 - new} already there, 4 skipped ({listed} says why)" in captured.out
        assert caplog.text.count("page.mp4 is a web page") == 1
        caplog.clear()
        rows = [json.loads(line) for line in listed.read_text().splitlines()]
        assert {(Path(row["path"]).name, word) for row in rows for word in row["reason"].split()} >= {
            ("page.mp4", "web"), ("cut.mp4", "truncated:"), ("gone.mp4", "exist"), ("broken.tar", "tar")}
        assert len(rows) == 4
    (data / "page.mp4").unlink()
    assert main(arguments) == 0 and len(listed.read_text().splitlines()) == 3, "it names what is wrong now"


def test_a_cache_too_small_is_said_before_and_refused_when_it_is_full(
        tmp_path: Path, command: Callable, folder: Path, caplog: pytest.LogCaptureFixture,
        capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(folder, cache__folder=str(tmp_path / "whole"))) == 0
    size = sum(map(len, entries(tmp_path / "whole").values()))
    assert not caplog.records and size > 8 * 1000
    with caplog.at_level(logging.WARNING):
        assert main(command(folder, "--workers", 1, cache__disk_bytes=size // 2, cache__prefetch_bytes=1)) == 2
    assert "may take up to" in caplog.text and f"cache.disk_bytes {size // 2}" in caplog.text
    assert f"cache.disk_bytes {size // 2} is too small for these media" in capsys.readouterr().err
    assert 2 <= len(entries(tmp_path / "cache")) <= 4
    for rank in ("0", "1"):  # each may fill its half: otherwise the second would delete what the first has made
        assert main(command(folder, "--rank", rank, "--world", "2", cache__disk_bytes=size * 3 // 4,
                            cache__folder=str(tmp_path / "shared"))) == 2
        assert f"(this rank's part is {size * 3 // 8})" in capsys.readouterr().err
    assert main(command(folder, cache__disk_bytes=1000)) == 2
    assert "cache.disk_bytes 1000 is too small" in capsys.readouterr().err
    caplog.clear()
    assert main(command(folder, cache__disk_bytes=size, cache__folder=str(tmp_path / "whole"))) == 0
    assert not caplog.records, "all is there"
    assert main(command(folder, cache__disk_bytes=size + 1, cache__folder=str(tmp_path / "exact"))) == 0
    assert entries(tmp_path / "exact").keys() == entries(tmp_path / "whole").keys()


def test_the_bound_is_what_the_largest_video_takes(tmp_path: Path, caplog: pytest.LogCaptureFixture,
                                                   command: Callable) -> None:
    """A square of max_pixels with more frames than the contract takes: nothing is smaller than the bound by much."""
    for number in range(3):
        clips.make_clip(tmp_path / f"{number}.mp4", frames=9, size=(64, 64))
    data = [tmp_path / f"{number}.mp4" for number in range(3)]
    options = {"cache__frames": True, "video__num_frames": 3}
    assert main(command(data, **options)) == 0
    size = sum(map(len, entries(tmp_path / "cache").values()))
    config = configured(tmp_path, **options)
    filler = precompute.Filler(config, 1, "none.jsonl")
    bound = sum(filler._most_bytes(policies.prompt_of(Video(str(path)))) for path in data)
    filler.close()
    pixels = 4096 * 3
    assert bound >= 3 * pixels * 3 and size - 6 * 1000 < bound < 1.5 * size


@pytest.mark.parametrize("name", ["", "7.mp4"])
def test_a_disk_that_takes_no_more_ends_it(command: Callable, folder: Path, name: str) -> None:
    """Also where only the last entry fails, after all was decoded."""
    ended = runs.forks().run(*command(folder / name, model__freeze_vision=False), limits={"RLIMIT_FSIZE": 20_000})
    assert ended.code == 2 and "takes no more entries" in ended.output and "File too large" in ended.output
    assert "Traceback" not in ended.output


@pytest.mark.parametrize(("arguments", "words"), [
    (["--cache.folder", ""], "name its folder, --cache.folder DIR"),
    (["--rank", "1"], "--rank and --world belong together"),
    (["--rank", "2", "--world", "2"], "--rank must be at least 0 and below --world, got 2 and 2"),
    (["--rank", "-1", "--world", "2"], "got -1 and 2"),
    (["--limit", "0"], "--limit must be at least 1, got 0"),
    (["--workers", "0"], "--workers must be at least 1, got 0"),
    (["--cache.folder", "/dev/null/x"], "cache.folder /dev/null/x cannot be made"),
    (["none.mp4"], "none.mp4 does not exist"),
    (["--wrold", "2"], "did you mean --world"),
])
def test_wrong_options_are_one_sentence(command: Callable, folder: Path, capsys: pytest.CaptureFixture[str],
                                        arguments: list[str], words: str) -> None:
    data = Path(arguments.pop()) if arguments[-1].endswith(".mp4") else folder
    assert main(command(data, *arguments)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("veripo: error: ")]
    assert len(lines) == 1 and words in lines[0]


def test_ranks_that_the_environment_names_wrongly(command: Callable, folder: Path, monkeypatch: pytest.MonkeyPatch,
                                                  capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "first")
    assert main(command(folder)) == 2
    assert "RANK and WORLD_SIZE in the environment must be whole numbers" in capsys.readouterr().err


def test_nothing_to_do(tmp_path: Path, command: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "none").mkdir()
    assert main(command(tmp_path / "none")) == 2
    assert "holds no video" in capsys.readouterr().err


def test_counts_of_the_loader_say_the_same(tmp_path: Path, command: Callable, folder: Path) -> None:
    """VideoWork of a loader that reads what was made: hits alone."""
    assert main(command(folder)) == 0
    config = configured(tmp_path)
    policy = policies.policy("qwen3_vl", freeze_vision=True)
    prompts = [policies.prompt_of(Video(str(path)), "What?", prompt_id=path.name) for path in folder.glob("*.mp4")]
    loader = PromptLoader(policy, config.video, 4096, lambda prompt, reason: pytest.fail(reason), config.cache)
    loaded = loader.load(prompts)
    loader.close()
    assert len(loaded) == 8
    assert (loader.work.video_decodes, loader.work.tower_runs, loader.work.cache_hits) == (0, 0, 8)
