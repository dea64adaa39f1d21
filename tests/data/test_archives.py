"""Media inside tar archives: the frames of a member are those of the loose file, and what is broken says so."""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import subprocess
import tarfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image as PilImage

from bench.video import clips
from tests.support.paths import PYTHONPATH
from veripo_fast.config.inputs import DataConfig, VideoConfig
from veripo_fast.config.schema import Config
from veripo_fast.data import archives
from veripo_fast.data.archives import ffmpeg_source, find_member, locate, read_index
from veripo_fast.data.prompts import load_prompts
from veripo_fast.data.webdataset import samples
from veripo_fast.errors import DataError, MediaError
from veripo_fast.inspect.corpus import PolicySizes, find_media, inspect_medium
from veripo_fast.types import Image, Video
from veripo_fast.video.decode import decode, decode_image
from veripo_fast.video.ffmpeg import torchcodec_decoder
from veripo_fast.video.patches import fingerprint

torch.set_num_threads(1)
CLIPS: dict[str, dict[str, Any]] = {
    "open.mp4": {"options": clips.open_gop()},
    "index-last.mp4": {"faststart": False},
    "variable.mkv": {"times": np.cumsum([(0.02, 0.05, 0.1)[i % 3] for i in range(60)]).tolist()},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"cpu-used": "8", "deadline": "realtime"}, "frames": 24},
    "stream.ts": {},
}
LONG = "a-folder-with-a-rather-long-name/" * 8 + "clip-ä.mp4"
"""More than the 100 bytes of a plain header: GNU tar writes a long name, POSIX an extended header."""
EIGHT = VideoConfig(fps=None, num_frames=8)


def tar(path: Path, members: dict[str, bytes | Path], format: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as archive:
        for name, content in members.items():
            if isinstance(content, Path):
                archive.add(content, name)
                continue
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def record(**fields: object) -> bytes:
    return json.dumps({"problem": "What moves?", "answer": "red"} | fields).encode()


@pytest.fixture(scope="module")
def loose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips and a picture as files."""
    folder = tmp_path_factory.mktemp("loose")
    for name, arguments in CLIPS.items():
        clips.make_clip(folder / name, **arguments)
    pixels = np.random.default_rng(0).integers(0, 255, (64, 96, 3), np.uint8)
    PilImage.fromarray(pixels).save(folder / "still.png")
    return folder


@pytest.fixture(scope="module", params=["gnu", "pax", "command"])
def archive(loose: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """The same inside a tar whose name holds what URLs and options are split at, some under a long name."""
    path = tmp_path_factory.mktemp("a, b:c") / "shard,0:1 %20.tar"
    names = [*CLIPS, "still.png"]
    if request.param == "command":
        (loose / LONG).parent.mkdir(parents=True)
        shutil.copy(loose / "open.mp4", loose / LONG)
        subprocess.run(["tar", "cf", path, "-C", loose, *(f"./{name}" for name in names), f"./{LONG}"], check=True)
        shutil.rmtree(loose / LONG.split("/")[0])
        return path
    members: dict[str, bytes | Path] = {name: loose / name for name in names}
    return tar(path, members | {LONG: loose / "open.mp4"},
               tarfile.GNU_FORMAT if request.param == "gnu" else tarfile.PAX_FORMAT)


# --- members ----------------------------------------------------------------------------------------------------------


def frames(source: str) -> list[tuple[int, bytes]]:
    """By PyAV: time stamp and pixels of every frame."""
    with av.open(source) as container:
        return [(frame.pts, frame.to_ndarray(format="rgb24").tobytes()) for frame in container.decode(video=0)]


@pytest.mark.parametrize("name", CLIPS)
def test_ffmpeg_reads_a_member_as_the_file(archive: Path, loose: Path, name: str) -> None:
    source = ffmpeg_source(f"{archive}/{name}")
    assert source != f"{archive}/{name}" and ffmpeg_source(str(loose / name)) == f"file:{loose / name}"
    assert frames(source) == frames(str(loose / name))


@pytest.mark.parametrize("name", [name for name in CLIPS if name != "stream.ts"])  # which torchcodec refuses anywhere
def test_torchcodec_reads_a_member_as_the_file(archive: Path, loose: Path, name: str) -> None:
    decoders = [torchcodec_decoder()(source, seek_mode="exact")
                for source in (ffmpeg_source(f"{archive}/{name}"), str(loose / name))]
    wanted = [20, 3, 11, 23]
    ours, theirs = (decoder.get_frames_at(wanted) for decoder in decoders)
    assert torch.equal(ours.data, theirs.data) and torch.equal(ours.pts_seconds, theirs.pts_seconds)
    assert clips.read_indices(ours.data) == wanted


@pytest.mark.parametrize("name", CLIPS)
def test_decode_gives_the_frames_of_the_file(archive: Path, loose: Path, name: str) -> None:
    ours = decode(Video(f"{archive}/{name}", start_seconds=0.2), EIGHT, 28)
    theirs = decode(Video(str(loose / name), start_seconds=0.2), EIGHT, 28)
    assert torch.equal(ours.pixels, theirs.pixels) and torch.equal(ours.pts_seconds, theirs.pts_seconds)
    assert (ours.indices, ours.decoder) == (theirs.indices, theirs.decoder)


def test_an_image_and_a_long_name(archive: Path, loose: Path) -> None:
    assert torch.equal(decode_image(Image(f"{archive}/still.png"), EIGHT, 28),
                       decode_image(Image(str(loose / "still.png")), EIGHT, 28))
    member = locate(f"{archive}/{LONG}")
    assert member is not None and member.read() == (loose / "open.mp4").read_bytes()
    assert member.read(8) == (loose / "open.mp4").read_bytes()[:8]


def test_a_bad_member_is_named_as_a_bad_file_is(tmp_path: Path, loose: Path) -> None:
    whole = (loose / "open.mp4").read_bytes()
    made = tar(tmp_path / "x.tar", {"page.mp4": b"<!DOCTYPE html>", "empty.mp4": b"",
                                    "half.mp4": whole[:len(whole) // 2], "noise.png": b"noise", "good.mp4": whole})
    for name, words in (("page.mp4", "web page"), ("empty.mp4", r"empty \(0 bytes\)"), ("half.mp4", "truncated"),
                        ("gone.mp4", "has no such member")):
        with pytest.raises(MediaError, match=words) as caught:
            decode(Video(f"{made}/{name}"), EIGHT, 28)
        assert str(made) in str(caught.value)
    with pytest.raises(MediaError, match="not an image"):
        decode_image(Image(f"{made}/noise.png"), EIGHT, 28)


def test_paths_that_lead_through_no_archive(tmp_path: Path) -> None:
    (tmp_path / "folder.tar").mkdir()
    (tmp_path / "folder.tar" / "a.mp4").write_bytes(b"x")
    made = tar(tmp_path / "x.tar", {"a.mp4": b"x"})
    for path in (tmp_path / "folder.tar" / "a.mp4", tmp_path / "none.tar" / "a.mp4", made, tmp_path / "a.mp4"):
        assert locate(str(path)) is None and ffmpeg_source(str(path)) == f"file:{path}"
    inner = tar(tmp_path / "folder.tar" / "in.TAR", {"b/a.mp4": b"yz"})
    assert locate(f"{inner}/b/a.mp4").read() == b"yz"
    assert locate(f"{inner}//./b/a.mp4") == locate(f"{inner}/b/a.mp4")
    link = tmp_path / "link.tar"
    link.symlink_to(made)
    assert locate(f"{link}/a.mp4") == locate(f"{made}/a.mp4")


def test_the_last_of_two_members_of_one_name_counts(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for content in (b"old", b"newer"):
            info = tarfile.TarInfo("./a.mp4")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    assert locate(f"{tmp_path}/x.tar/a.mp4").read() == b"newer"


def test_the_fingerprint_changes_with_the_archive(tmp_path: Path, loose: Path) -> None:
    clip = loose / "open.mp4"
    made = tar(tmp_path / "x.tar", {"a.mp4": clip, "b.mp4": clip})

    def key(name: str) -> str:
        return fingerprint(Video(f"{made}/{name}"), EIGHT)

    first = key("a.mp4")
    assert first == key("a.mp4") == key("./a.mp4") and key("b.mp4") != first
    os.utime(made, ns=(1, 1))
    later = key("a.mp4")
    assert later != first
    tar(made, {"c.mp4": b"x" * 20_000, "a.mp4": clip})
    os.utime(made, ns=(1, 1))
    assert key("a.mp4") not in (first, later)
    with pytest.raises(MediaError, match="no such member"):
        key("b.mp4")


# --- broken archives --------------------------------------------------------------------------------------------------


def members(count: int = 6) -> dict[str, bytes | Path]:
    return {f"{number}.mp4": bytes([65 + number]) * 1000 for number in range(count)}


def test_archives_that_cannot_be_used(tmp_path: Path) -> None:
    plain = tar(tmp_path / "x.tar", members()).read_bytes()
    (tmp_path / "empty.tar").touch()
    (tmp_path / "text.tar").write_text("no tar" * 200)
    (tmp_path / "short.tar").write_bytes(plain[:300])
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(plain))
    (tmp_path / "named-tar.tar").write_bytes(gzip.compress(plain))
    (tmp_path / "z.tar.zst").write_bytes(b"\x28\xb5\x2f\xfd" + bytes(600))
    for name, words in (("empty.tar", r"is empty \(0 bytes\)"), ("text.tar", "is not a tar archive"),
                        ("short.tar", "is not a tar archive"), ("x.tar.gz", r"is compressed \(gzip\).*plain tar"),
                        ("named-tar.tar", r"compressed \(gzip\)"), ("z.tar.zst", r"compressed \(zstd\)")):
        for ask in (locate, ffmpeg_source):
            with pytest.raises(MediaError, match=words):
                ask(f"{tmp_path / name}/0.mp4")
        with pytest.raises(DataError, match=f"data file .*{words}") as caught:
            load_prompts([str(tmp_path / name)], DataConfig())
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_links_and_folders_are_no_media(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.mp4").write_bytes(b"x")
    (tmp_path / "in" / "b.mp4").symlink_to("a.mp4")
    (tmp_path / "in" / "c.mp4").hardlink_to(tmp_path / "in" / "a.mp4")
    made = tar(tmp_path / "x.tar", {"in": tmp_path / "in"})
    assert sum(offset >= 0 for offset, _ in read_index(made).places.values()) == 1
    refused = 0
    for name in ("in", "in/a.mp4", "in/b.mp4", "in/c.mp4"):
        try:
            locate(f"{made}/{name}")
        except MediaError as error:
            refused += "is no regular file" in str(error)
    assert refused == 3


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_cut_serves_what_lies_before_it(tmp_path: Path, format: int) -> None:
    whole = tar(tmp_path / "x.tar", members() | {LONG: b"long"}, format).read_bytes()
    places = read_index(tmp_path / "x.tar").places
    end = max(offset + 512 for offset, _ in places.values())
    for size in range(0, end, 97):
        cut = tmp_path / f"{size}.tar"
        cut.write_bytes(whole[:size])
        left = {name: place for name, place in places.items() if sum(place) <= size}
        if size <= 512:
            with pytest.raises(MediaError, match=r"not a tar|0 bytes|truncated"):
                locate(f"{cut}/5.mp4")
            continue
        index = read_index(cut)
        assert index.places == left and str(cut) in index.problem, size
        assert any(word in index.problem for word in ("truncated", "damaged after its member")), index.problem
        for name in left:
            assert locate(f"{cut}/{name}").read() == whole[left[name][0]:sum(left[name])]
        for name in places.keys() - left:
            with pytest.raises(MediaError, match=r"does not exist: .*(truncated|damaged)"):
                locate(f"{cut}/{name}")


def test_damage_is_reported_and_never_a_crash(tmp_path: Path) -> None:
    whole = tar(tmp_path / "x.tar", members() | {LONG: b"long"}).read_bytes()
    rng = np.random.default_rng(0)
    path = tmp_path / "damaged.tar"
    reported = 0
    for _ in range(400):
        data = bytearray(whole)
        for place in rng.integers(0, len(data), 3):
            data[place] = rng.integers(0, 256)
        for start in range(0, len(data), 512):  # right checksums, so that wrong fields are believed
            if data[start + 257:start + 262] == b"ustar" and rng.random() < 0.7:
                data[start + 148:start + 156] = b" " * 8
                data[start + 148:start + 156] = b"%06o\0 " % sum(data[start:start + 512])
        path.write_bytes(data)
        try:
            index = read_index(path)
        except MediaError:
            reported += 1
            continue
        reported += bool(index.problem)
        assert all(0 <= offset <= len(data) - size for offset, size in index.places.values() if offset >= 0)
    assert reported > 100
    data = bytearray(whole)
    data[read_index(tmp_path / "x.tar").places["1.mp4"][0] - 500] ^= 1  # in its header: the next ones are lost
    path.write_bytes(data)
    assert list(read_index(path).places) == ["0.mp4"] and "damaged after its member 0.mp4" in read_index(path).problem


def test_an_archive_without_its_end_mark_and_a_size_below_zero(tmp_path: Path) -> None:
    made = tar(tmp_path / "x.tar", members())
    data = bytearray(made.read_bytes())
    offset, size = read_index(made).places["5.mp4"]
    made.write_bytes(data[:offset + size + -size % 512])
    assert len(read_index(made).places) == 6 and "no end mark after its member 5.mp4" in read_index(made).problem
    header = memoryview(data)[offset - 512:offset]
    header[124:136] = (-512).to_bytes(12, "big", signed=True)  # GNU's form of large and negative numbers
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    made.write_bytes(data)
    assert len(read_index(made).places) == 5 and "damaged" in read_index(made).problem


def test_a_member_of_an_archive_that_shrinks_meanwhile(tmp_path: Path) -> None:
    made = tar(tmp_path / "x.tar", members())
    member = locate(f"{made}/5.mp4")
    os.truncate(made, member.offset + 10)
    with pytest.raises(MediaError, match="become shorter"):
        member.read()


# --- the index --------------------------------------------------------------------------------------------------------


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Archives that were read, in order."""
    seen: list[str] = []
    plain = archives._read

    def read(file: Any, archive: Path, size: int) -> Any:
        seen.append(archive.name)
        time.sleep(0.05)
        return plain(file, archive, size)

    monkeypatch.setattr(archives, "_read", read)
    return seen


def test_an_index_is_read_once_by_many_threads(tmp_path: Path, reads: list[str]) -> None:
    made = [tar(tmp_path / f"{number}.tar", members()) for number in range(2)]
    failures: list[BaseException] = []

    def ask() -> None:
        try:
            for path in made:
                assert locate(f"{path}/3.mp4").read() == b"D" * 1000
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=ask) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == [] and sorted(reads) == ["0.tar", "1.tar"]
    os.utime(made[0], ns=(5, 5))
    locate(f"{made[0]}/3.mp4")
    assert reads.count("0.tar") == 2
    with made[1].open("ab") as file:
        file.write(bytes(512))
    os.utime(made[1], ns=(1, 1))
    locate(f"{made[1]}/3.mp4")
    assert reads.count("1.tar") == 2


def test_a_failure_is_not_kept(tmp_path: Path, reads: list[str]) -> None:
    made = tar(tmp_path / "x.tar", members())
    made.chmod(0)
    if not os.access(made, os.R_OK):
        with pytest.raises(MediaError, match="Permission denied"):
            locate(f"{made}/3.mp4")
    made.chmod(0o600)
    whole = made.read_bytes()
    made.write_bytes(b"no tar at all" + whole[13:])
    os.utime(made, ns=(7, 7))
    with pytest.raises(MediaError, match="not a tar"):
        locate(f"{made}/3.mp4")
    made.write_bytes(whole)
    os.utime(made, ns=(7, 7))
    assert locate(f"{made}/3.mp4").size == 1000


def test_the_least_recently_used_indexes_are_forgotten(tmp_path: Path, reads: list[str],
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "_INDEXES", type(archives._INDEXES)())
    monkeypatch.setattr(archives, "MAX_MEMBERS", 13)
    made = [tar(tmp_path / f"{number}.tar", members()) for number in range(3)]
    for number in (0, 1, 0, 2, 0, 1):
        locate(f"{made[number]}/0.mp4")
    assert reads == ["0.tar", "1.tar", "2.tar", "1.tar"]
    big = tar(tmp_path / "big.tar", members(20))
    assert locate(f"{big}/19.mp4") == locate(f"{big}/19.mp4") and reads[4:] == ["big.tar"]
    assert len(archives._INDEXES) == 1


# --- WebDataset samples as data ---------------------------------------------------------------------------------------


@pytest.fixture
def shard(tmp_path: Path, loose: Path) -> Path:
    """Samples of every kind; the order inside a sample is free."""
    clip = (loose / "open.mp4").read_bytes()
    still = (loose / "still.png").read_bytes()
    chat = {"messages": [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "Which?"}]}]}
    named = {"messages": [{"role": "user", "content": [{"type": "video", "video": "0.mp4"}, "Which?"]}]}
    (tmp_path / "beside.mp4").write_bytes(clip)
    return tar(tmp_path / "train-0.tar", {
        "./0.mp4": clip, "./0.json": record(problem_id="zero"),
        "sub/1.json": record(problem="<image>Which?"), "sub/1.png": still, "sub/1.txt": b"a caption",
        "2.webm": clip, "2.jpg": still, "2.json": record(**chat),
        "3.json": record(path="0.mp4"), "3.mp4": clip,
        "4.json": record(**named), "4.mkv": clip,
        "5.json": record(videos=["1.png"], data_type="video"),
        "6.left.MP4": clip, "6.right.mp4": clip, "6.json": record(problem="<video>before<video>after"),
        "7.json": record(), "8.mp4": clip, "9.json": b"{oops", "9.mp4": clip,
        "10.json": record(path="beside.mp4"), "11.json": record(path="gone.mp4"),
        "._0.mp4": b"a resource fork", "README": b"text",
        "12.json": record(path="sub/1.png")})


def test_samples_become_prompts(shard: Path, tmp_path: Path) -> None:
    prompts, skipped = load_prompts([str(shard)], DataConfig(template="none", text_only=True))
    inside = {prompt.prompt_id.removeprefix("train-0.tar:"): [
        medium.path.removeprefix(f"{tmp_path}/").removeprefix("train-0.tar/") for medium in prompt.media]
        for prompt in prompts}
    assert inside == {
        "zero": ["0.mp4"], "1": ["sub/1.png"], "2": ["2.webm"], "3": ["0.mp4"], "4": ["0.mp4"], "5": ["sub/1.png"],
        "6": ["6.left.MP4", "6.right.mp4"], "7": [], "10": ["beside.mp4"], "12": ["sub/1.png"]}
    by_id = {prompt.prompt_id.removeprefix("train-0.tar:"): prompt for prompt in prompts}
    assert isinstance(by_id["1"].media[0], Image) and isinstance(by_id["2"].media[0], Video)
    assert by_id["6"].messages[0].parts[1] == "before"
    reasons = {item.record.removeprefix(str(shard)): (item.path, item.reason) for item in skipped}
    assert reasons[":8"] == (str(shard), "its sample has no .json")
    assert reasons[":9"][1].startswith("is not valid JSON")
    assert reasons[":11"] == (str(tmp_path / "gone.mp4"), f"media file {tmp_path}/gone.mp4 does not exist")


def test_any_data_file_may_name_a_member(shard: Path, tmp_path: Path) -> None:
    rows = [{"problem": "?", "answer": "1", "path": path} for path in ("train-0.tar/0.mp4", "train-0.tar/none.mp4")]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (prompt,), (bad,) = load_prompts([str(tmp_path / "data.jsonl")], DataConfig())
    assert prompt.media == (Video(f"{shard}/0.mp4"),)
    assert bad.path == f"{tmp_path}/train-0.tar/none.mp4" and "has no such member" in bad.reason


def test_a_shard_that_is_cut_off_is_used_up_to_there_and_named(shard: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.tar"
    cut.write_bytes(shard.read_bytes()[:locate(f"{shard}/sub/1.png").offset + 100])
    (prompt,), skipped = load_prompts([str(cut)], DataConfig())
    assert prompt.prompt_id == "zero"
    assert [item.record for item in skipped] == [f"{cut}:sub/1", str(cut)]
    assert skipped[-1].reason.endswith("is truncated: it ends inside its member sub/1.png")


def test_names_within_an_archive(tmp_path: Path) -> None:
    made = str(tar(tmp_path / "x.tar", {"a/1.mp4": b"", "b/1.mp4": b"", "a/2.mp4": b"", "3.mp4": b""}))
    assert find_member(made, "./a/1.mp4") == f"{made}/a/1.mp4" and find_member(made, "2.mp4") == f"{made}/a/2.mp4"
    assert find_member(made, "1.mp4") == "", "two have that name"
    assert find_member(made, "c/2.mp4") == "" and find_member(made, "4.mp4") == ""
    assert [sample.key for sample in samples(made)[0]] == ["a/1", "b/1", "a/2", "3"]


def test_archives_are_sources_of_media_for_inspect(shard: Path, tmp_path: Path, loose: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    clip = (loose / "open.mp4").read_bytes()
    inner = tar(folder / "a.tar", {"x.mp4": clip, "x.json": b"{}", "y.jpg": b"", "y.mp4": clip, "z.jpg": b""})
    (folder / "bad.tar").write_bytes(gzip.compress(inner.read_bytes()))
    (folder / "cut.tar").write_bytes(inner.read_bytes()[:len(clip) + 700])
    (folder / "b.txt").touch()
    config = Config(video=EIGHT)
    corpus = find_media([folder], config, None)
    found = [one.media for one in corpus.targets]
    assert found == [Video(f"{inner}/x.mp4"), Video(f"{inner}/y.mp4"), Image(f"{inner}/z.jpg"),
                     Video(f"{folder}/cut.tar/x.mp4")]
    assert corpus.other_files == 1
    assert [(item.path, item.reason.split(" is ")[1].split()[0]) for item in corpus.records] == [
        (f"{folder}/bad.tar", "compressed"), (f"{folder}/cut.tar", "truncated")]
    uses = {one.media.path.removeprefix(f"{shard}/"): one.prompts for one in find_media([shard], config, None).targets}
    assert uses["0.mp4"] == 3 and uses["8.mp4"] == 0 and uses["9.mp4"] == 0, "media without a record, or a usable one"
    alone = tar(tmp_path / "alone.tar", {"x.mp4": clip, "x.json": b'{"caption": "a clip"}'})
    assert [one.media for one in find_media([alone], config, None).targets] == [Video(f"{alone}/x.mp4")]
    with pytest.raises(DataError, match=r"bad\.tar is compressed"):
        find_media([folder / "bad.tar"], config, None)
    row = inspect_medium(corpus.targets[0], config, PolicySizes(14, 2, 200)).row
    assert (row["status"], row["frames"], row["bytes"]) == ("ok", 60, len(clip))


def test_the_index_needs_no_torch(python: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    made = tar(tmp_path / "x.tar", {"a.mp4": b"x"})
    code = (f"import sys; sys.path[:0] = {PYTHONPATH.split(os.pathsep)!r}\n"
            "from veripo_fast.data.archives import locate\n"
            f"print(locate('{made}/a.mp4').size, 'torch' in sys.modules)")
    assert python("-c", code, check=True).stdout == "1 False\n"
