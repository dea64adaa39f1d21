"""No wrong frame: every clip of the set through every CPU decoder, and the packets that are left out change no bit.

Which frame came back is read from its bar code and compared with how the clip was made (clips.py), never with another
decoder. Picking packets is compared with decoding every frame from the start, bit by bit.
"""

import random
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from bench.video import clips
from tests.support.children import PATIENCE_SECONDS
from veripo_fast.config.inputs import VideoConfig
from veripo_fast.errors import MediaError
from veripo_fast.types import Video
from veripo_fast.video import packets as module
from veripo_fast.video import units
from veripo_fast.video.decode import decode
from veripo_fast.video.decoders import HD_HEIGHT, HD_WIDTH, nvdec_refuses, readers, refuses, untagged_hd
from veripo_fast.video.packets import decoded_frames, open_video
from veripo_fast.video.readers import read_pyav
from veripo_fast.video.timeline import Stream, Timeline, scan_packets

torch.set_num_threads(1)
NAMES = [*clips.PLAIN, *clips.MADE]
TAKEN_OVER = {"pyav": {"mpeg4-b.avi", "torn-stream.ts"},
              "torchcodec": {"mpeg4-b.avi", "stream.ts", "torn-stream.ts", "untagged.mp4", "edit-list.mp4",
                             "h264-refresh.mkv"}}
"""Clips that a decoder refuses, or must not be given."""
SPARE = {"h264-closed.mp4": 0.3, "h264-open.mp4": 0.2, "h264-long.mp4": 0.25, "h264-weighted.mp4": 0.15,
         "h264-10-bit.mp4": 0.15, "h264-444.mp4": 0.3, "h264-odd.mp4": 0.3, "hevc.mp4": 0.05, "hevc-open.mp4": 0.5,
         "hevc-layers.mp4": 0.4, "hevc-10-bit.mp4": 0.4, "variable-rate.mp4": 0.2, "matroska.mkv": 0.2,
         "late-start.mp4": 0.3, "turned.mp4": 0.3, "edit-list.mp4": 0.2, "half-hour.mp4": 0.3}
"""Clips with frames that nothing refers to, and the least share of them; the others have none, or do not tell."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, clips.Clip]:
    return clips.make_clip_set(tmp_path_factory.mktemp("set"))


def scan(clip: clips.Clip) -> Timeline:
    return scan_packets(str(clip.path), time.monotonic() + PATIENCE_SECONDS)


@pytest.mark.parametrize("decoder", ["auto", "pyav", "torchcodec"])
@pytest.mark.parametrize("name", NAMES)
def test_no_frame_is_wrong(made: dict[str, clips.Clip], name: str, decoder: str) -> None:
    clip = made[name]
    count = min(64 if name == "half-hour.mp4" else 32, len(clip.frames))
    contract = VideoConfig(fps=None, num_frames=count, decoder=decoder, max_pixels=256 * 28 * 28)
    frames = decode(Video(str(clip.path)), contract, 28)
    assert clip.read(frames.pixels) == [clip.frames[index] for index in frames.indices]
    assert len(set(frames.indices)) == count and frames.indices[-1] == len(clip.frames) - 1
    if clip.times is not None:
        expected = [clip.times[index] for index in frames.indices]
        assert frames.pts_seconds.tolist() == pytest.approx(expected, abs=0.0011)
    if decoder != "auto" and name not in TAKEN_OVER[decoder]:
        assert frames.decoder == decoder


@pytest.mark.parametrize("name", [name for name in NAMES if name not in TAKEN_OVER["pyav"]])
def test_what_is_left_out_changes_no_bit(made: dict[str, clips.Clip], name: str) -> None:
    timeline, dice = scan(made[name]), random.Random(name)
    total = min(len(timeline.seconds), 2000)
    subsets = [dice.sample(range(total), min(count, total)) for count in (1, 2, 5, 17)]
    subsets += [list(range(total))[-3:], list(range(1, min(total, 240), 2))]
    deadline = time.monotonic() + PATIENCE_SECONDS
    for wanted in map(sorted, subsets):
        picked = [frame.clone() for frame in read_pyav(str(made[name].path), timeline, wanted, deadline)]
        whole = [frame.clone() for frame in
                 read_pyav(str(made[name].path), timeline, wanted, deadline, sequential=True)]
        assert len(picked) == len(whole) == len(wanted)
        assert all(map(torch.equal, picked, whole)), wanted


@pytest.mark.parametrize("name", ["h264-open.mp4", "hevc-open.mp4", "av1.mp4", "stream.ts", "edit-list.mp4"])
def test_packets_that_are_kept_are_those_of_the_file(made: dict[str, clips.Clip], name: str,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    """The same frames, whether the file is read once or, being too large to keep, a second time for decoding."""
    opened: list[str] = []
    opener = module.av.open

    def counted(*arguments: object, **options: object) -> object:
        opened.append(name)
        return opener(*arguments, **options)

    monkeypatch.setattr(module.av, "open", counted)
    contract = VideoConfig(fps=None, num_frames=9, min_pixels=784, max_pixels=10**6, decoder="pyav")
    once = decode(Video(str(made[name].path)), contract, 28)
    times = len(opened)
    monkeypatch.setattr(module, "KEPT_BYTES", 1000)
    again = decode(Video(str(made[name].path)), contract, 28)
    assert torch.equal(once.pixels, again.pixels) and once.decoder == again.decoder
    assert len(opened) - times == times + (once.decoder == "pyav")


@pytest.mark.parametrize("name", NAMES)
def test_how_much_is_left_out(made: dict[str, clips.Clip], name: str) -> None:
    """Frames that come out of the decoder are counted, not packets that we believe to have left out."""
    timeline = scan(made[name])
    share = len(timeline.spare) / len(timeline.seconds)
    assert share >= SPARE[name] if name in SPARE else share == 0
    wanted = [max(range(min(240, len(timeline.seconds))), key=timeline.places.__getitem__)]
    runs, left_out = timeline.runs(wanted), timeline.left_out(wanted)
    with open_video(str(made[name].path)) as (container, stream):
        shown = [frame.pts for frame in decoded_frames(str(made[name].path), container, stream,
                                                       time.monotonic() + PATIENCE_SECONDS, runs, left_out)]
    fed = sum(number not in left_out for run in runs for number in run)
    assert len(shown) <= fed
    assert fed < timeline.places[wanted[0]] + 1 or len(timeline.key_places) <= 1
    assert timeline.keys[wanted[0]] in shown or name in TAKEN_OVER["pyav"]


def test_only_the_highest_temporal_layer_is_left_out(made: dict[str, clips.Clip]) -> None:
    """A frame without referrers in its own layer may still have some in a higher one (ITU-T H.265 7.4.2.2)."""
    with open_video(str(made["hevc-layers.mp4"].path)) as (container, stream):
        packets = module.read_packets("", container, stream, time.monotonic() + PATIENCE_SECONDS)
    timeline = scan(made["hevc-layers.mp4"])
    layers = {packet.units.layer for packet in packets if packet.units}
    assert len(layers) == 3
    assert {packets[number].units.layer for number in timeline.spare} == {max(layers)}  # type: ignore[union-attr]


def test_runs_are_ascending_and_disjoint(made: dict[str, clips.Clip]) -> None:
    """A packet that is fed twice, or after the decoder was emptied, gives a wrong picture in silence."""
    dice = random.Random(0)
    for name, clip in made.items():
        timeline = scan(clip)
        total = min(len(timeline.seconds), 300)
        for _ in range(200 if timeline.places else 0):
            wanted = dice.sample(range(total), dice.randint(1, min(total, 40)))
            runs = timeline.runs(wanted)
            assert all(before.stop < after.start for before, after in pairwise(runs)), name
            assert {timeline.places[position] for position in wanted} <= {number for run in runs for number in run}


def hand_made(stamps: list[int], keys: dict[int, int], spare: set[int]) -> Timeline:
    """Packets with these stamps in the order of the file; keys: stamp -> packet."""
    order = sorted(stamps)
    return Timeline(tuple(map(float, order)), tuple(order), True, order[-1] + 1.0, None,
                    Stream(0, "mov", "h264", "yuv420p", 64, 64, 1), tuple(stamps.index(stamp) for stamp in order),
                    tuple(sorted(keys)), tuple(keys[stamp] for stamp in sorted(keys)), frozenset(spare))


def test_runs_by_hand() -> None:
    """File order I0 P3 b1 b2 | I6 b4 b5 (they lead I6 and refer to P3) P8 b7; b: nothing refers to it."""
    timeline = hand_made([0, 3, 1, 2, 6, 4, 5, 8, 7], {0: 0, 6: 4}, {2, 3, 5, 6, 8})
    assert timeline.runs([0]) == [range(0, 1)]
    assert timeline.runs([2]) == [range(0, 4)] and timeline.left_out([2]) == {2, 5, 6, 8}
    assert timeline.runs([5]) == [range(0, 7)], "a frame that leads its key frame starts at the one before"
    assert timeline.runs([6]) == [range(4, 5)]
    assert timeline.runs([1, 7]) == [range(0, 3), range(4, 9)]
    assert timeline.runs([3, 5, 8]) == [range(0, 8)]
    assert timeline.runs([0, 6, 4]) == [range(0, 6)], "the frame that leads joins the runs before it"
    assert timeline.left_out([1, 7]) == {3, 5, 6}
    odd = hand_made([0, 1, 7, 6], {0: 0, 6: 3}, set())  # 7 stands before the key frame that it is shown after
    assert odd.runs([3]) == [range(0, 3)]


@pytest.mark.parametrize("name", ["untagged.mp4", "tagged.mp4"])
@pytest.mark.parametrize("decoder", ["auto", "pyav", "torchcodec"])
def test_colours_of_high_definition(made: dict[str, clips.Clip], name: str, decoder: str) -> None:
    """BT.709 is meant in both; taken as BT.601, saturated colours are off by 20 to 40 levels."""
    contract = VideoConfig(fps=None, num_frames=4, decoder=decoder, max_pixels=720 * 1280)
    frames = decode(Video(str(made[name].path)), contract, 20)
    seen = torch.stack([clips.read_colours(frame) for frame in frames.pixels])
    assert (seen - torch.tensor(clips.COLOURS)).abs().max() < 6
    if name == "untagged.mp4" or decoder == "pyav":
        assert frames.decoder == "pyav"


def test_untagged_below_high_definition_is_bt601() -> None:
    for width, height, matrix, expected in ((HD_WIDTH, 544, 2, True), (720, HD_HEIGHT, 2, True), (960, 540, 2, False),
                                            (1920, 1080, 1, False), (1920, 1080, 5, False)):
        assert untagged_hd(Stream(0, "mov", "h264", "yuv420p", width, height, matrix)) is expected


def test_the_order_of_decoders() -> None:
    h264 = hand_made([0, 1], {0: 0}, set())
    vp9 = replace(h264, stream=replace(h264.stream, codec="vp9"))
    assert readers(vp9, "auto") == ("torchcodec", "pyav")
    assert readers(h264, "auto") == ("pyav", "torchcodec")
    assert readers(vp9, "pyav") == ("pyav", "torchcodec")
    assert readers(h264, "dali") == ("dali", "pyav", "torchcodec")
    assert readers(replace(h264, has_stamps=False), "auto") == ()
    untagged = replace(vp9, stream=replace(vp9.stream, matrix=2, height=1080))
    assert readers(untagged, "auto")[0] == "pyav"
    assert refuses("pyav", untagged) is None and "BT.709" in (refuses("torchcodec", untagged) or "")
    assert refuses("torchcodec", vp9) is None
    troubled = replace(vp9, trouble="packets in it are damaged")
    assert refuses("torchcodec", troubled) == refuses("dali", troubled) == "packets in it are damaged"
    assert refuses("pyav", troubled) is None


def test_what_nvdec_takes() -> None:
    stream = Stream(0, "mov", "h264", "yuv420p", 1920, 1080, 1)
    assert nvdec_refuses(stream) is None
    assert nvdec_refuses(replace(stream, codec="hevc", pixel_format="yuv420p10le")) is None
    for change, words in (({"codec": "av1"}, "does not decode av1"), ({"pixel_format": "yuv420p10le"}, "yuv420p10le"),
                          ({"width": 7680}, "up to 4096")):
        assert words in (nvdec_refuses(replace(stream, **change)) or "")  # type: ignore[arg-type]


@pytest.mark.parametrize("decoder", ["auto", "pyav", "torchcodec"])
def test_a_damaged_file_is_refused_or_right(tmp_path: Path, decoder: str) -> None:
    good = clips.make_clip_set(tmp_path, ["h264-closed.mp4"])
    refused = set()
    for name, clip in clips.damaged(tmp_path, good).items():
        contract = VideoConfig(fps=None, num_frames=32, decoder=decoder, timeout_seconds=PATIENCE_SECONDS)
        try:
            frames = decode(Video(str(clip.path)), contract, 28)
        except MediaError as error:
            assert str(clip.path) in str(error)
            refused.add(name)
            continue
        assert clip.read(frames.pixels) == list(frames.indices)
    assert refused >= {"truncated.mp4", "hole.mp4", "no-moov.mp4", "page.mp4", "empty.mp4"}


@pytest.mark.parametrize("name", ["h264-closed.mp4", "h264-no-b.mp4", "h264-open.mp4", "hevc.mp4"])
def test_made_up_pictures_are_no_frames(made: dict[str, clips.Clip], tmp_path: Path, name: str) -> None:
    """FFmpeg conceals damage: of flipped bytes torchcodec alone shows what it made up, without a word."""
    data = made[name].path.read_bytes()
    media, dice = data.index(b"mdat") + 4, random.Random(1)
    refused: dict[str, list[int]] = {"auto": [], "pyav": [], "torchcodec": []}
    for number in range(12):
        flipped = bytearray(data)
        for place in dice.sample(range(media, len(data)), (3, 12, 100)[number % 3]):
            flipped[place] ^= dice.randrange(1, 256)
        (tmp_path / f"{number}.mp4").write_bytes(flipped)
        for decoder, numbers in refused.items():
            try:
                frames = decode(Video(str(tmp_path / f"{number}.mp4")),
                                VideoConfig(fps=None, num_frames=16, decoder=decoder), 28)
            except MediaError:
                numbers.append(number)
                continue
            assert made[name].read(frames.pixels) == list(frames.indices), decoder
    assert refused["torchcodec"] == refused["auto"] == refused["pyav"] and len(refused["auto"]) >= 6


def test_colours_that_swscale_does_not_know(tmp_path: Path) -> None:
    path = clips.make_clip(tmp_path / "ycgco.mp4", options={
        "preset": "veryfast", "x264-params": "keyint=12:bframes=2:colormatrix=YCgCo"})
    frames = decode(Video(str(path)), VideoConfig(fps=None, num_frames=8), 28)
    assert frames.decoder == "torchcodec"
    assert clips.read_indices(frames.pixels) == list(frames.indices)


def test_the_type_of_a_slice_is_read_from_its_first_byte_where_that_holds_it() -> None:
    """All bytes that can follow the first one of a slice, by the table and by the general rule."""
    for after in range(256):
        for rest in (b"", b"\x00" * 9, b"\xff" * 9):
            unit = bytes([0x41, after]) + rest
            general = units._slice_type(unit[1:].ljust(11, b"\0"))
            assert units._h264_sign(memoryview(unit), 0) == (0x41, general), (after, rest)
