"""`veripo inspect`: each fact is read from a real file made to have it, and the page is opened in a real browser."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image as PilImage

from bench.video import clips
from tests.support.browser import Browser
from tests.support.children import PATIENCE_SECONDS, run, start, wait_until
from tests.support.paths import PYTHONPATH
from veripo_fast.cli import main
from veripo_fast.config.inputs import DataConfig, ModelConfig, VideoConfig
from veripo_fast.config.schema import Config
from veripo_fast.inspect import command, corpus
from veripo_fast.inspect.corpus import PolicySizes, Target, find_media, inspect_medium, policy_sizes
from veripo_fast.inspect.journal import NAME, Journal
from veripo_fast.inspect.page import duration, histogram
from veripo_fast.text import memory
from veripo_fast.types import Video
from veripo_fast.video.probe import Probe, probe_video

torch.set_num_threads(1)
ENVIRONMENT = {**os.environ, "PYTHONPATH": PYTHONPATH}
IRREGULAR = np.cumsum([0.0] + [(0.02, 0.05, 0.1)[i % 3] for i in range(59)]).tolist()
HEVC = {"preset": "ultrafast", "x265-params": "log-level=none:bframes=3:keyint=12:min-keyint=12:scenecut=0:pools=1"}
NO_B = {"preset": "ultrafast", "x264-params": "keyint=12:min-keyint=12:scenecut=0:bframes=0"}
TAGS = {"preset": "ultrafast", "x264-params": "colorprim=bt709:transfer=bt709:colormatrix=bt709:keyint=12"}
CLIPS: dict[str, dict[str, Any]] = {
    "plain.mp4": {"options": NO_B},
    "open.mp4": {"options": clips.open_gop()},
    "closed.mp4": {},
    "variable.mp4": {"times": IRREGULAR},
    "variable.mkv": {"times": IRREGULAR},
    "milliseconds.mkv": {"fps": 120.0},
    "rotated.mp4": {"rotation": 90},
    "odd.mp4": {"size": (107, 191), "pixel_format": "yuv444p"},
    "ten-bit.mp4": {"pixel_format": "yuv420p10le"},
    "tagged.mp4": {"options": TAGS},
    "sound.mp4": {"audio": True},
    "late.mp4": {"times": [5 + i / 30 for i in range(60)]},
    "hevc.mp4": {"codec": "libx265", "options": HEVC},
    "hevc-10.mp4": {"codec": "libx265", "options": HEVC, "pixel_format": "yuv420p10le"},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"cpu-used": "8", "deadline": "realtime", "g": "30"}},
    "av1.mp4": {"codec": "libsvtav1", "options": {"preset": "12", "svtav1-params": "lp=1"}},
    "stream.ts": {},
    "long.mp4": {"frames": 300, "options": NO_B},
}
SIZES = PolicySizes(patch_size=14, merge_size=2, bytes_per_token=200)
EIGHT = Config(video=VideoConfig(fps=None, num_frames=8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good clips, and bad ones in `bad/`."""
    made = tmp_path_factory.mktemp("corpus")
    for name, arguments in CLIPS.items():
        clips.make_clip(made / name, **arguments)
    packets = range(12, 60)
    clips.cut_without_recoding(made / "plain.mp4", made / "edited.mp4", packets, start_seconds=16 / 30)
    bad = made / "bad"
    bad.mkdir()
    clips.truncated(made / "long.mp4", bad / "truncated.mp4", 0.6)
    clips.truncated(clips.make_clip(bad / "index-last.mp4", faststart=False), bad / "no-index.mp4", 0.5)
    (bad / "index-last.mp4").unlink()
    clips.make_audio(bad / "sound-only.mp4")
    (bad / "page.mp4").write_text("<!DOCTYPE html><html><script>document.title='owned'</script></html>")
    (bad / "empty.mp4").touch()
    (bad / "noise.mkv").write_bytes(np.random.default_rng(0).bytes(5000))
    (made / "notes.txt").write_text("no video")
    return made


def probe(path: Path) -> Probe:
    return probe_video(str(path), time.monotonic() + PATIENCE_SECONDS)


def row(path: Path, config: Config = EIGHT, **part: float) -> dict[str, Any]:
    return inspect_medium(Target(Video(str(path), **part), 1), config, SIZES).row


# --- facts of a file --------------------------------------------------------------------------------------------------

VARIES = "its frame rate varies or frames are missing, and DALI numbers frames as they come out of the decoder"
NO_START = "its packets do not tell where decoding may begin"
FACTS: dict[str, dict[str, Any]] = {
    "plain.mp4": {"container": "mov", "codec": "h264", "pixel_format": "yuv420p", "bit_depth": 8, "width": 192,
                  "height": 108, "rotation": 0, "fps": pytest.approx(30), "container_fps": pytest.approx(30),
                  "variable": False, "seconds": pytest.approx(2.0), "promised_seconds": pytest.approx(2.0),
                  "frames": 60, "header_frames": 60, "hidden_frames": 0, "offset_seconds": 0.0, "damaged_packets": 0,
                  "damaged_seconds": None, "keyframes": 5, "gop_median": 12, "gop_max": 12, "open_gop": False,
                  "color_matrix": "untagged", "color_primaries": "untagged", "color_transfer": "untagged",
                  "audio": False, "nvdec_hopper": True, "auto_decoder": "pyav", "nvdec_refusal": None,
                  "dali_refusal": None},
    "open.mp4": {"open_gop": True, "damaged_packets": 0},
    "closed.mp4": {"open_gop": False},
    "variable.mp4": {"variable": True, "nvdec_refusal": None, "dali_refusal": VARIES,
                     "interval_spread": pytest.approx(0.08 / 0.05, rel=1e-3)},
    "variable.mkv": {"variable": True, "container": "matroska", "header_frames": None},
    "milliseconds.mkv": {"variable": False, "damaged_packets": 0},
    "rotated.mp4": {"rotation": 90, "width": 192, "height": 108},
    "odd.mp4": {"width": 191, "height": 107, "pixel_format": "yuv444p", "nvdec_hopper": False,
                "nvdec_refusal": "NVDEC does not decode h264 in yuv444p",
                "dali_refusal": "NVDEC does not decode h264 in yuv444p"},
    "ten-bit.mp4": {"bit_depth": 10, "codec": "h264", "nvdec_hopper": False},
    "tagged.mp4": {"color_matrix": "bt709", "color_primaries": "bt709", "color_transfer": "bt709"},
    "sound.mp4": {"audio": True},
    "late.mp4": {"offset_seconds": pytest.approx(5.0), "seconds": pytest.approx(2.0)},
    "hevc.mp4": {"codec": "hevc", "open_gop": True, "nvdec_hopper": True, "damaged_packets": 0, "nvdec_refusal": None,
                 "dali_refusal": "DALI gives other frames the times of those that NVDEC skips after seeking "
                                 "(open groups of pictures)"},
    "hevc-10.mp4": {"codec": "hevc", "bit_depth": 10, "nvdec_hopper": True},
    "vp9.webm": {"codec": "vp9", "open_gop": None, "nvdec_hopper": True, "gop_median": 30, "auto_decoder": "torchcodec",
                 "dali_refusal": "DALI gives a picture the time of the next packet, and VP9 has packets that show an "
                                 "earlier picture"},
    "av1.mp4": {"codec": "av1", "nvdec_hopper": False},
    "stream.ts": {"container": "mpegts", "open_gop": False, "damaged_packets": 0, "header_frames": None,
                  "nvdec_refusal": NO_START, "dali_refusal": NO_START},
    "edited.mp4": {"dali_refusal": "DALI counts the 4 frames that its edit list hides", "hidden_frames": 4,
                   "frames": 44, "header_frames": 48},
}


@pytest.mark.parametrize("name", FACTS)
def test_facts(folder: Path, name: str) -> None:
    facts = probe(folder / name).facts
    assert {key: getattr(facts, key) for key in FACTS[name]} == FACTS[name]


def test_closed_hevc_is_told_from_open(tmp_path: Path) -> None:
    """Pictures that lead a key frame without referring to the group before it (RADL) leave the group closed."""
    options = HEVC | {"x265-params": HEVC["x265-params"] + ":open-gop=0:radl=2"}
    made = clips.make_clip(tmp_path / "closed.mp4", codec="libx265", options=options)
    seen = probe(made)
    keys = list(zip(seen.timeline.key_places, seen.timeline.key_stamps, strict=True))
    frames = zip(seen.timeline.places, seen.timeline.keys, strict=True)
    assert any(place > key and stamp < key_stamp for place, stamp in frames for key, key_stamp in keys)
    assert seen.facts.open_gop is False


def test_frames_to_decode_by_hand(folder: Path) -> None:
    """Key frames at 0, 12, ..., 48, no B-frames: frame 30 is the 7th of its group."""
    seen = probe(folder / "plain.mp4")
    for decoder in ("torchcodec", "pyav"):
        assert seen.frames_to_decode([0], decoder) == 1
        assert seen.frames_to_decode([0, 30, 59], decoder) == 1 + 7 + 12
        assert seen.frames_to_decode([24, 30], decoder) == 7
    assert seen.frames_to_decode([0, 30], "pyav-sequential") == 31


def test_hidden_frames_are_decoded_too(folder: Path) -> None:
    """Four frames lie hidden before the first one shown: reaching it takes five."""
    assert probe(folder / "edited.mp4").frames_to_decode([0], "torchcodec") == 5


def test_leading_pictures_of_an_open_group_need_the_group_before(folder: Path) -> None:
    seen = probe(folder / "open.mp4")
    timeline = seen.timeline
    leading = timeline.keys.index(timeline.key_stamps[1]) - 1
    assert timeline.places[leading] > timeline.key_places[1]  # after the key frame in the file, before it on screen
    whole = timeline.places[leading] - timeline.key_places[0] + 1
    assert seen.frames_to_decode([leading], "torchcodec") == whole
    spare = [place for place in timeline.spare if place < timeline.places[leading]]
    assert spare and seen.frames_to_decode([leading], "pyav") == whole - len(spare)


# --- one medium under a contract --------------------------------------------------------------------------------------

def test_plan_by_hand(folder: Path) -> None:
    """8 frames of 192x108 become 196x112: 7 x 4 merged patches for each of 4 pairs."""
    found = row(folder / "plain.mp4")
    expected = {"status": "ok", "reason": "", "taken_frames": 8, "resized_width": 196, "resized_height": 112,
                "tokens": 4 * 7 * 4, "proxy_bytes": 8 * 3 * 196 * 112, "tower_bytes": 112 * 200,
                "decoder": "pyav", "sampled_frames": 3, "bytes": (folder / "plain.mp4").stat().st_size}
    assert {key: found[key] for key in expected} == expected
    # wanted: 0, 8, 17, 25, 34, 42, 51, 59
    assert found["decode_frames"] == 9 + 6 + 11 + 7 + 12
    assert found["sampled_decode_frames"] == 1 + 6 + 12  # 0, 29, 59
    assert 0 < found["proxy_jpeg_bytes"] < found["proxy_bytes"]


def test_rotation_turns_the_resized_size(folder: Path) -> None:
    found = row(folder / "rotated.mp4")
    assert (found["resized_width"], found["resized_height"]) == (112, 196)


@pytest.mark.parametrize("name", CLIPS)
def test_tokens_are_what_decoding_gives(folder: Path, name: str) -> None:
    from veripo_fast.video.decode import decode
    from veripo_fast.video.patches import patchify

    config = Config(video=VideoConfig(fps=3.0, max_frames=7))
    found = row(folder / name, config)
    pixels = decode(Video(str(folder / name)), config.video, 28).pixels
    _, grid = patchify(pixels, [0.5] * 3, [0.5] * 3, 14, 2)
    assert (found["status"], found["tokens"]) == ("ok", int(grid.prod()) // 4)
    assert found["taken_frames"] == len(pixels) and found["proxy_bytes"] == pixels.nbytes


def test_part_of_a_video(folder: Path) -> None:
    found = row(folder / "plain.mp4", Config(video=VideoConfig(fps=10.0)), start_seconds=0.5, end_seconds=1.5)
    assert found["taken_frames"] == 10 and found["start_seconds"] == 0.5
    behind = row(folder / "plain.mp4", start_seconds=9.0)
    assert behind["status"] == "skipped" and "2.00 s long" in behind["reason"] and behind["codec"] == "h264"


def test_more_tokens_than_a_prompt_may_have(folder: Path) -> None:
    config = Config(video=EIGHT.video, data=DataConfig(max_prompt_tokens=111))
    reason = row(folder / "plain.mp4", config)["reason"]
    assert reason == "its 112 tokens alone are more than data.max_prompt_tokens 111"


REASONS = {"truncated.mp4": "truncated", "no-index.mp4": "moov", "sound-only.mp4": "no video stream",
           "page.mp4": "web page", "empty.mp4": "empty", "noise.mkv": "FFmpeg"}


@pytest.mark.parametrize("name", REASONS)
def test_bad_files_say_why(folder: Path, name: str) -> None:
    found = row(folder / "bad" / name)
    assert found["status"] == "skipped" and REASONS[name] in found["reason"]
    assert ("codec" in found) == (name == "truncated.mp4")  # facts that could be read stay


@pytest.mark.parametrize("damage", ["hole", "flip"])
def test_damage_between_the_samples_is_found(folder: Path, tmp_path: Path, damage: str) -> None:
    """Three frames would not touch it; broken packets make every wanted frame be decoded."""
    data = bytearray((folder / "long.mp4").read_bytes())
    places = [place for place in range(len(data)) if data[place:place + 4] == b"mdat"]
    start = places[-1] + (len(data) - places[-1]) // 4
    if damage == "hole":
        data[start:start + 600] = bytes(600)
    else:
        for place in range(start, start + 600):
            data[place] ^= 0xFF
    path = tmp_path / "damaged.mp4"
    path.write_bytes(data)
    found = row(path, Config(video=VideoConfig(fps=None, num_frames=100)))
    assert found["damaged_packets"] > 0
    assert found["damaged_seconds"] == pytest.approx(2.5, abs=1.0)
    assert found["status"] == "skipped" or found["sampled_frames"] == 100
    if damage == "hole":
        assert found["status"] == "skipped" and "damaged" in found["reason"]


@pytest.mark.parametrize("place", ["length", "header"])
def test_one_wrong_byte_in_the_structure_of_a_packet(folder: Path, tmp_path: Path, place: str) -> None:
    with av.open(str(folder / "long.mp4")) as container:
        packet = next(packet for number, packet in enumerate(container.demux(video=0)) if number == 150)
        at = packet.pos
    data = bytearray((folder / "long.mp4").read_bytes())
    data[at + (1 if place == "length" else 4)] |= 0x80
    (tmp_path / "wrong.mp4").write_bytes(data)
    facts = probe(tmp_path / "wrong.mp4").facts
    assert (facts.damaged_packets, facts.damaged_seconds) == (1, pytest.approx(5.0))


def test_time_out_is_a_reason(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stuck, ended = threading.Event(), []
    monkeypatch.setattr(corpus, "probe_video", lambda *_: ended.append(stuck.wait(PATIENCE_SECONDS)))
    monkeypatch.setattr("veripo_fast.video.deadline.GRACE_SECONDS", 0.1)
    found = row(folder / "plain.mp4", Config(video=VideoConfig(timeout_seconds=0.2)))
    assert "longer than 0.2 s (video.timeout_seconds)" in found["reason"] and not ended
    stuck.set()  # or the thread would be there when later tests count theirs
    wait_until(lambda: ended, "the thread that was left behind")


# --- what DATA names --------------------------------------------------------------------------------------------------

@pytest.fixture
def data_file(folder: Path) -> Iterator[Path]:
    """Ten records: two media twice, an image, a missing file, and a record without an answer."""
    PilImage.new("RGB", (64, 48), "red").save(folder / "still.png")
    question = {"problem": "What is shown?", "answer": "red"}
    rows = [question | {"videos": ["plain.mp4"]}, question | {"videos": ["plain.mp4"]},
            question | {"video": {"video": "plain.mp4", "video_start": 1.0}}, question | {"images": ["still.png"]},
            question | {"videos": ["gone.mp4"]}, question | {"videos": ["gone.mp4"]},
            {"problem": "no answer", "videos": ["open.mp4"]}, question | {"videos": ["bad/empty.mp4"]}]
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    yield path
    path.unlink()
    (folder / "still.png").unlink()


def test_media_of_a_data_file(data_file: Path, folder: Path) -> None:
    corpus = find_media([data_file], EIGHT, None)
    seen = {(Path(one.media.path).name, getattr(one.media, "start_seconds", None)): one for one in corpus.targets}
    assert {key: one.prompts for key, one in seen.items()} == {
        ("plain.mp4", None): 2, ("plain.mp4", 1.0): 1, ("still.png", None): 1, ("gone.mp4", None): 2,
        ("empty.mp4", None): 1}
    assert "does not exist" in seen["gone.mp4", None].missing
    [record] = corpus.records
    assert record.record.startswith(f"{data_file}:7") and "no gold answer" in record.reason
    found = {one.media.path: inspect_medium(one, EIGHT, SIZES).row for one in corpus.targets}
    still = found[str(folder / "still.png")]
    assert (still["kind"], still["decoder"], still["tokens"]) == ("image", "pillow", 2 * 2)
    assert found[str(folder / "gone.mp4")]["kind"] == "missing"


def test_folder_and_limit(folder: Path) -> None:
    corpus = find_media([folder], EIGHT, None)
    names = [Path(one.media.path).name for one in corpus.targets]
    assert set(names) == {*CLIPS, "edited.mp4", *REASONS} and corpus.other_files == 1
    few = find_media([folder], EIGHT, 5)
    assert [one.media.path for one in few.targets] == [corpus.targets[i * len(names) // 5].media.path for i in range(5)]
    assert few.total == len(names) and len(find_media([folder], EIGHT, 999).targets) == len(names)
    assert len(find_media([folder, folder / "plain.mp4"], EIGHT, None).targets) == len(names)


def test_sizes_come_from_the_checkpoint() -> None:
    sizes = policy_sizes(Config(model=ModelConfig(path="tiny", dtype="bfloat16")))
    assert (sizes.factor, sizes.bytes_per_token) == (32, 2 * 128 * 2)  # embeddings and one deepstack level


@pytest.mark.parametrize(("arguments", "words"), [
    (["none.jsonl"], "none.jsonl does not exist"),
    (["."], "holds no video"),
    ([".", "--workers", "0"], "--workers must be at least 1, got 0"),
    ([".", "--limit", "-1"], "--limit must be at least 1, got -1"),
    ([".", "--out", "file"], "--out file is not a folder"),
    ([".", "--out", "file/deep"], "cannot be written"),
    ([".", "--video.fsp", "1"], "did you mean video.fps"),
    ([".", "--model.path", "nowhere"], "no config.json"),
    ([], "the following arguments are required: DATA"),
])
def test_wrong_options_are_one_sentence(arguments: list[str], words: str, tmp_path: Path, folder: Path, capsys: Any,
                                        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    if "--model.path" in arguments:
        arguments = [str(folder / "plain.mp4"), *arguments[1:]]
    assert main(["inspect", *arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(lines) == 1 and words in lines[0]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# --- the command ------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def result(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(folder of the result, last printed line) of one run over the whole corpus."""
    out = tmp_path_factory.mktemp("result") / "deep" / "inspect"
    done = run(sys.executable, "-m", "veripo_fast.cli", "inspect", folder, "--out", out, "--workers", "2",
               "--video.fps", "4", env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert "inspect: 100%" in done.stderr and "6 skipped" in done.stderr
    return out, done.stdout.splitlines()[-1]


def test_rows_and_skipped_file(result: tuple[Path, str]) -> None:
    out, last = result
    table = pq.read_table(out / "media.parquet")
    total = len(CLIPS) + 1 + len(REASONS)
    assert len(table) == total and table.schema == command.SCHEMA
    assert last == (f"{total} media: {total - 6} ok, 6 skipped; {out / 'inspect.html'}, {out / 'media.parquet'}, "
                    f"{out / 'skipped.jsonl'}")
    skipped = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert {Path(one["path"]).name for one in skipped} == set(REASONS)
    assert sorted(path.name for path in out.iterdir()) == ["inspect.html", "media.parquet", "skipped.jsonl"]


def test_page_says_what_the_rows_say(result: tuple[Path, str]) -> None:
    html = (result[0] / "inspect.html").read_text()
    table = pq.read_table(result[0] / "media.parquet").to_pylist()
    ok = [one for one in table if one["status"] == "ok"]
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html))
    assert f"{len(ok)} of {len(table)}" in text and "6 would be skipped" in text
    assert f"tokens {sum(one['tokens'] for one in ok):,}" in text
    assert f"frames decoded to take them {sum(one['decode_frames'] for one in ok):,}" in text
    for mark in ("variable frame rate 2", "frames hidden by an edit list 1", "more than 8 bits 2"):
        assert mark in text
    read = [one for one in table if one["auto_decoder"] is not None]
    assert f"auto begins with pyav {sum(one['auto_decoder'] == 'pyav' for one in read)}" in text
    for decoder in ("nvdec", "dali"):
        assert f"{decoder} is given {sum(one[f'{decoder}_refusal'] is None for one in read)}" in text
    assert "nvdec is not: NVDEC does not decode h264 in yuv444p 1" in text
    assert "1 file without the name of a video left out." in text
    assert "is a web page (HTML or XML)" in text
    assert html.count("data:image/jpeg;base64,") == 3 * len(ok)
    assert not re.search(r"https?://|@import|url\(|<script", html) and len(html) < 2_000_000


# --- a call that is stopped -------------------------------------------------------------------------------------------

@pytest.fixture
def many(tmp_path: Path, folder: Path) -> Path:
    """A corpus of 30 clips, small and large, good and bad."""
    made = tmp_path / "many"
    made.mkdir()
    for number in range(30):
        shutil.copy(folder / ("bad/noise.mkv" if number % 5 == 4 else "long.mp4"), made / f"{number:02}.mp4")
    return made


def stopped(many: Path, out: Path, signal_number: int) -> tuple[int, str]:
    """Exit code and messages of a call that gets a signal when it has written three findings."""
    process = start(sys.executable, "-m", "veripo_fast.cli", "inspect", many, "--out", out, "--workers", "2",
                    stderr=subprocess.PIPE, env=ENVIRONMENT)
    journal = out / NAME
    wait_until(lambda: process.poll() is not None or (journal.exists() and journal.read_bytes().count(b"\n") >= 3),
               "three findings")
    process.send_signal(signal_number)
    output, errors = process.communicate(timeout=PATIENCE_SECONDS)
    assert output == "" and [path.name for path in out.iterdir()] == [NAME], errors
    return process.returncode, errors


def inspect(many: Path, out: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> tuple[list[str], list[dict]]:
    """(names of the media that were inspected, rows of the result without times) of a whole call."""
    inspected: list[str] = []

    def noted(target: Target, *arguments: Any, **keywords: Any) -> Any:
        inspected.append(Path(target.media.path).name)
        return inspect_medium(target, *arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(command, "inspect_medium", noted)
        assert main(["inspect", str(many), "--out", str(out), "--workers", "2", *options]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["inspect.html", "media.parquet", "skipped.jsonl"]
    rows = pq.read_table(out / "media.parquet").to_pylist()
    return inspected, [{key: value for key, value in one.items() if key != "sampled_seconds"} for one in rows]


def test_a_killed_call_goes_on_where_it_stopped(tmp_path: Path, many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    assert stopped(many, out, signal.SIGKILL)[0] == -signal.SIGKILL
    with (out / NAME).open("a") as file:
        file.write('{"key": "torn')
    keys = [json.loads(line) for line in (out / NAME).read_text().splitlines()[:-1]]
    done = {Path(one["row"]["path"]).name for one in keys}
    inspected, rows = inspect(many, out, monkeypatch)
    assert sorted(inspected) == sorted({path.name for path in many.iterdir()} - done) and len(done) >= 3
    everything, whole = inspect(many, tmp_path / "whole", monkeypatch)
    assert len(everything) == 30 and rows == whole
    pages = [(tmp_path / name / "inspect.html").read_text().count("data:image") for name in ("out", "whole")]
    assert pages == [24 * 3, 24 * 3]


def test_control_c_keeps_what_is_done_and_says_how_to_go_on(tmp_path: Path, many: Path) -> None:
    code, errors = stopped(many, tmp_path / "out", signal.SIGINT)
    kept = (tmp_path / "out" / NAME).read_bytes().count(b"\n")
    assert code == 130 and "Traceback" not in errors
    assert errors.splitlines()[-1] == (f"veripo: interrupted; {tmp_path / 'out' / NAME} keeps {kept} of 30 media; "
                                       "the same command goes on")


def test_what_changed_is_inspected_again(tmp_path: Path, many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    stopped(many, out, signal.SIGKILL)
    journal = (out / NAME).read_bytes()
    first, second, *_ = (Path(json.loads(line)["row"]["path"]) for line in journal.splitlines())
    done = journal.count(b"\n")
    os.utime(first, ns=(1, 1))
    shutil.copystat(many / "04.mp4", second)
    second.write_bytes((many / "04.mp4").read_bytes())
    inspected, rows = inspect(many, out, monkeypatch)
    assert {first.name, second.name} <= set(inspected) and len(inspected) == 30 - done + 2
    assert {one["path"]: one["status"] for one in rows}[str(second)] == "skipped"
    (out / NAME).write_bytes(journal)
    assert len(inspect(many, out, monkeypatch, "--video.fps", "1")[0]) == 30


def test_findings_are_told_apart(tmp_path: Path, folder: Path) -> None:
    """Part of the video, number of prompts, pictures for the page, order of frames: each has a finding of its own."""
    clip, still = str(folder / "plain.mp4"), str(tmp_path / "still.png")
    PilImage.new("RGB", (64, 64)).save(still)
    journal = Journal(tmp_path, EIGHT, SIZES)
    targets = [Target(Video(clip), 1), Target(Video(clip), 2), Target(Video(clip, 0.5), 1),
               Target(Video(still, frames=(still, still)), 1), Target(Video(still, frames=(still,)), 1)]
    keys = {journal.key(target, thumbnails) for target in targets for thumbnails in (True, False)}
    assert len(keys) == 10 and "" not in keys
    assert journal.key(Target(Video(str(tmp_path / "gone.mp4")), 1), False) == ""


# --- the page ---------------------------------------------------------------------------------------------------------

def test_histogram_counts_every_value() -> None:
    chart = histogram([float(i) for i in range(100)] + [5000.0], "Duration", "seconds")
    assert chart is not None
    assert [bar[0] for bar in chart["bars"]][:2] == ["0", "10"] and chart["bars"][-1][0].endswith("and more")
    assert sum(bar[1] for bar in chart["bars"]) == 101 and chart["bars"][0][1] == 10
    assert max(bar[2] for bar in chart["bars"]) == 100.0
    whole = histogram([107, *[108] * 8], "Height", "")
    assert whole is not None and whole["bars"] == [("107", 1, 12.5), ("108", 8, 100.0)]
    single = histogram([30.0] * 5, "Frame rate", "")
    assert single is not None and single["bars"] == [("30", 5, 100.0)]
    assert histogram([], "Nothing", "") is None


def test_units_for_people() -> None:
    assert [memory(value) for value in (0, 999, 1500, 2_345_000_000)] == ["0 B", "999 B", "1.5 KB", "2.3 GB"]
    assert [duration(value) for value in (1.25, 150, 9000, 200_000)] == [
        "1.2 s", "2 min 30 s", "2 h 30 min", "2 days 8 h"]


def test_browser_shows_the_page(browser: Browser, result: tuple[Path, str]) -> None:
    page = result[0] / "inspect.html"
    browser.open(page)
    assert browser.messages() == []
    shown = "(async () => { const all = [...document.images]; await Promise.all(all.map(i => i.decode()));" \
            "return all.map(i => i.naturalWidth); })()"
    widths = browser.run(shown)
    assert len(widths) == 3 * (len(CLIPS) + 1) and min(widths) >= 80
    assert browser.run("[...document.querySelectorAll('.bar i')].some(bar => bar.getBoundingClientRect().width > 50)")
    assert browser.run("document.querySelectorAll('script').length") == 0
    assert browser.run("[...document.querySelectorAll('nav a')].every(a => document.querySelector(a.hash))")
    browser.open(page, width=400, height=800)
    assert browser.run("document.documentElement.scrollWidth") == 400


def test_names_cannot_bring_markup(folder: Path, tmp_path: Path, browser: Browser) -> None:
    shutil.copy(folder / "plain.mp4", tmp_path / "<img src=x onerror=alert(1)>.mp4")
    assert main(["inspect", str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    browser.open(tmp_path / "out" / "inspect.html")
    assert browser.run("document.querySelectorAll('img:not([src^=data])').length") == 0
    assert browser.messages() == []
