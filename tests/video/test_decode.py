"""The right frames come back, from both decoders, and a bad file is one clear sentence.

Clips are real H.264, HEVC, AV1 and VP9 files whose frames carry their own index (clips.py), so "which frame" is read
from the pixels. Each odd kind of clip is one that some decoder in use is known to get wrong.
"""

import gc
import logging
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image as PilImage

from bench.video import clips
from veripo_fast.config.inputs import VideoConfig
from veripo_fast.errors import MediaError
from veripo_fast.types import Frames, Image, Video
from veripo_fast.video import decode as module
from veripo_fast.video.decode import decode, decode_image
from veripo_fast.video.readers import CHUNK

torch.set_num_threads(1)
SIXTEEN = VideoConfig(fps=None, num_frames=16)
IRREGULAR = np.cumsum([0.0] + [(0.01, 0.033, 0.1, 0.5)[i * 7 % 4 if i % 3 else 0] for i in range(59)]).tolist()
HEVC = {"preset": "ultrafast", "x265-params": "log-level=none:bframes=4:keyint=12:pools=1"}
CLIPS = {
    "closed-gop.mp4": {},
    "open-gop.mp4": {"options": clips.open_gop()},
    "variable-rate.mp4": {"options": clips.open_gop(), "times": IRREGULAR},
    "late-start.mp4": {"times": [5 + i / 30 for i in range(60)]},
    "odd-size.mp4": {"size": (107, 191), "pixel_format": "yuv444p"},
    "hevc.mp4": {"codec": "libx265", "options": HEVC},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"cpu-used": "8", "deadline": "realtime"}},
    "sound.mkv": {"audio": True},
    "stream.ts": {},
    "no-times.h264": {"options": clips.open_gop()},
    "one-frame.mp4": {"frames": 1},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("clips")
    for name, arguments in CLIPS.items():
        clips.make_clip(made / name, **arguments)
    clips.make_clip(made / "long.mp4", frames=300)
    return made


@pytest.fixture(params=["torchcodec", "pyav"])
def sixteen(request: pytest.FixtureRequest) -> VideoConfig:
    return replace(SIXTEEN, decoder=request.param)


@pytest.mark.parametrize("name", CLIPS)
def test_the_frames_asked_for_come_back(folder: Path, sixteen: VideoConfig, name: str) -> None:
    frames = decode(Video(str(folder / name)), sixteen, 28)
    assert clips.read_indices(frames.pixels) == list(frames.indices)
    assert len(frames.indices) == min(16, CLIPS[name].get("frames", 60))
    assert frames.pixels.dtype == torch.uint8
    assert tuple(frames.pixels.shape[1:]) == (3, 112, 196)
    rate = 25 if name == "no-times.h264" else 30  # a bare stream has no times: FFmpeg takes 25 frames a second
    times = CLIPS[name].get("times", [index / rate for index in range(60)])
    expected = [times[index] - times[0] for index in frames.indices]
    assert frames.pts_seconds.dtype == torch.float64
    assert frames.pts_seconds.tolist() == pytest.approx(expected, abs=0.0011)  # Matroska keeps milliseconds
    if name == "no-times.h264":
        assert frames.decoder == "pyav-sequential"
    elif name != "stream.ts":
        assert frames.decoder == sixteen.decoder


@pytest.mark.parametrize("name", ["open-gop.mp4", "variable-rate.mp4", "hevc.mp4"])
def test_both_decoders_give_the_same_pixels(folder: Path, name: str) -> None:
    one = decode(Video(str(folder / name)), replace(SIXTEEN, decoder="torchcodec"), 28)
    other = decode(Video(str(folder / name)), replace(SIXTEEN, decoder="pyav"), 28)
    assert (one.decoder, other.decoder) == ("torchcodec", "pyav")
    assert torch.equal(one.pixels, other.pixels)
    assert one.indices == other.indices
    assert torch.equal(one.pts_seconds, other.pts_seconds)


def test_variable_rate_is_sampled_evenly_in_time(folder: Path, sixteen: VideoConfig) -> None:
    contract = replace(sixteen, fps=1, num_frames=None, min_frames=2)
    frames = decode(Video(str(folder / "variable-rate.mp4")), contract, 28)
    assert abs(len(frames.indices) - IRREGULAR[-1]) <= 2
    gaps = frames.pts_seconds.diff()
    assert gaps.max() <= 1.5 + 0.5  # half a step on either side, and no frame lies closer than the longest gap of 0.5 s


@pytest.mark.parametrize("options", [clips.closed_gop(), clips.open_gop()])
def test_frames_hidden_by_an_edit_list_stay_hidden(tmp_path: Path, sixteen: VideoConfig,
                                                   options: dict[str, str]) -> None:
    whole = clips.make_clip(tmp_path / "whole.mp4", frames=84, options=options)
    cut = clips.cut_without_recoding(whole, tmp_path / "cut.mp4", range(24, 84), 30 / 30)
    frames = decode(Video(str(cut)), replace(sixteen, num_frames=10), 28)
    assert clips.read_indices(frames.pixels) == [30 + index for index in frames.indices]
    assert (frames.indices[0], frames.indices[-1]) == (0, 53)


@pytest.mark.parametrize("rotation", [90, 180, -90])
def test_rotation_is_applied(tmp_path: Path, sixteen: VideoConfig, rotation: int) -> None:
    path = clips.make_clip(tmp_path / "turned.mp4", frames=12, rotation=rotation)
    frames = decode(Video(str(path)), replace(sixteen, num_frames=4), 28)
    assert tuple(frames.pixels.shape[2:]) == ((112, 196) if rotation == 180 else (196, 112))
    turned_back = torch.rot90(frames.pixels, -rotation // 90, (2, 3))
    assert clips.read_indices(turned_back) == list(frames.indices)


def test_part_of_a_video(folder: Path, sixteen: VideoConfig) -> None:
    frames = decode(Video(str(folder / "long.mp4"), 4.0, 6.0), replace(sixteen, fps=4, num_frames=None), 28)
    assert clips.read_indices(frames.pixels) == list(frames.indices)
    assert len(frames.indices) == 8
    assert (frames.indices[0], frames.indices[-1]) == (120, 179)
    assert frames.pts_seconds[0] == 0
    with pytest.raises(MediaError, match=r"long\.mp4 has no frame from 11 s to its end: it is 10\.00 s long"):
        decode(Video(str(folder / "long.mp4"), 11.0), SIXTEEN, 28)


def test_more_frames_than_one_chunk_and_no_resize(folder: Path, sixteen: VideoConfig) -> None:
    contract = replace(sixteen, num_frames=3 * CHUNK + 1, max_pixels=10**6)
    frames = decode(Video(str(folder / "long.mp4")), contract, 12)
    assert tuple(frames.pixels.shape) == (3 * CHUNK + 1, 3, 108, 192)
    assert clips.read_indices(frames.pixels) == list(frames.indices)


def test_gpu_decoders_hand_over_what_they_cannot_take(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FALLBACKS", Counter())
    for decoder, name, taken_by in (("dali", "vp9.webm", "dali"), ("dali", "closed-gop.mp4", "pyav"),
                                    ("nvdec", "vp9.webm", "torchcodec")):
        frames = decode(Video(str(folder / name)), replace(SIXTEEN, decoder=decoder), 28, device="cpu")
        assert frames.decoder == taken_by
        assert clips.read_indices(frames.pixels) == list(frames.indices)
    assert module.fallbacks() == {"dali: DALI decodes vp#, vp#, mjpeg on a CPU, not h#": 1,
                                  "nvdec: NVDEC needs a GPU": 1}


def test_a_fall_back_is_counted_and_said_once(folder: Path, caplog: pytest.LogCaptureFixture,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FALLBACKS", Counter())
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            frames = decode(Video(str(folder / "stream.ts")), replace(SIXTEEN, decoder="torchcodec"), 28)
            assert frames.decoder == "pyav"
    said = [record.getMessage() for record in caplog.records if "refuses" in record.getMessage()]
    assert len(said) == 1
    assert "torchcodec refuses" in said[0] and "stream.ts" in said[0]
    ((kind, count),) = module.fallbacks().items()
    assert kind.startswith("torchcodec: ") and not re.search(r"\d", kind) and count == 2


def test_transport_stream_that_starts_inside_a_group(folder: Path, tmp_path: Path) -> None:
    data = (folder / "stream.ts").read_bytes()
    cut = tmp_path / "cut.ts"
    cut.write_bytes(data[:188 * 3] + data[len(data) // 3 // 188 * 188:])  # keeps the tables, loses the first group
    frames = decode(Video(str(cut)), VideoConfig(fps=None, num_frames=8), 28)
    seen = clips.read_indices(frames.pixels)
    assert -1 not in seen
    assert [index - seen[0] for index in seen] == [index - frames.indices[0] for index in frames.indices]


# -- bad files --------------------------------------------------------------------------------------------------------


def bad_file(folder: Path, kind: str, path: Path) -> str:
    """Make the bad file; returns the reason expected."""
    good = folder / "long.mp4"
    if kind == "missing":
        return "does not exist"
    if kind == "empty":
        path.write_bytes(b"")
        return "is empty (0 bytes)"
    if kind == "page":
        path.write_bytes(b"\n<!DOCTYPE html><html><body>404 Not Found</body></html>")
        return "is a web page (HTML or XML), not a media file; its download probably failed"
    if kind == "directory":
        path.mkdir()
        return "is a directory without a picture, neither a video nor a folder of frames"
    if kind == "audio":
        clips.make_audio(path)
        return "has no video stream (it holds audio)"
    if kind == "cover":
        clips.make_audio_with_cover(path)
        return "has no video stream (it holds a cover picture, audio)"
    if kind == "noise":
        path.write_bytes(bytes(range(256)) * 40)
        return "is not a video that FFmpeg can open (invalid data found when processing input)"
    if kind == "half":
        clips.truncated(good, path, 0.6)
        return "is truncated: it holds 5.9 s of the 10.0 s that its header promises"
    if kind == "no index":
        clips.make_clip(path, frames=30, faststart=False)
        clips.truncated(path, path, 0.5)
        return "is truncated: the index (moov atom) of its mp4 is missing"
    if kind == "head only":
        path.write_bytes(good.read_bytes()[:40])
        return "is truncated: the index (moov atom) of its mp4 is missing"
    if kind == "hole":
        data = bytearray(good.read_bytes())
        data[len(data) // 4: len(data) // 2] = bytes(len(data) // 2 - len(data) // 4)
        path.write_bytes(data)
        return r"is damaged: the frame at .* s cannot be decoded"
    no_frames(path)
    return "holds no video frame"


def no_frames(path: Path) -> None:
    with av.open(str(path), "w", options={"movflags": "frag_keyframe+empty_moov"}) as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        container.start_encoding()


@pytest.mark.parametrize("kind", ["missing", "empty", "page", "directory", "audio", "cover", "noise", "half",
                                  "no index", "head only", "hole", "zero frames"])
def test_a_bad_file_is_one_clear_sentence(folder: Path, tmp_path: Path, sixteen: VideoConfig, kind: str) -> None:
    path = tmp_path / "bad.mp4"
    reason = bad_file(folder, kind, path)
    with pytest.raises(MediaError) as caught:
        decode(Video(str(path)), sixteen, 28)
    said = str(caught.value)
    pattern = reason if ".*" in reason else re.escape(reason)
    assert re.fullmatch(f"{re.escape(str(path))} {pattern}", said), said


def test_a_file_that_may_not_be_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(self: Path, *_: object) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", forbidden)  # chmod would not stop root
    with pytest.raises(MediaError, match="may not be read by this user"):
        decode(Video(str(folder / "long.mp4")), SIXTEEN, 28)


def test_the_whole_part_of_a_truncated_file_is_used(folder: Path, tmp_path: Path, sixteen: VideoConfig) -> None:
    path = clips.truncated(folder / "long.mp4", tmp_path / "half.mp4", 0.6)
    frames = decode(Video(str(path), 1.0, 4.0), sixteen, 28)
    assert clips.read_indices(frames.pixels) == list(frames.indices)


def test_a_file_that_lacks_a_few_frames_gives_those_it_has(folder: Path, tmp_path: Path, sixteen: VideoConfig) -> None:
    """The last packet is cut through: its frame is no frame of the file, and the one shown after it is there."""
    path = clips.truncated(folder / "long.mp4", tmp_path / "tail.mp4", 0.97)
    frames = decode(Video(str(path)), sixteen, 28)
    assert frames.decoder == "pyav"
    assert clips.read_indices(frames.pixels) == [round(30 * seconds) for seconds in frames.pts_seconds.tolist()]
    assert frames.pts_seconds[-1] == pytest.approx(9.7)


def test_an_extreme_shape_is_refused(tmp_path: Path) -> None:
    path = clips.make_clip(tmp_path / "strip.mp4", frames=2, size=(16, 4096), options={"preset": "ultrafast"})
    with pytest.raises(MediaError, match="cannot be resized: 4096x16 is more than 200 times"):
        decode(Video(str(path)), SIXTEEN, 28)


# -- images -----------------------------------------------------------------------------------------------------------


def test_image_fills_a_temporal_patch(tmp_path: Path) -> None:
    for suffix in ("png", "jpg"):
        path = tmp_path / f"a.{suffix}"
        PilImage.fromarray(clips.frame_pixels(1234, 108, 192)).save(path)
        frames = decode_image(Image(str(path)), SIXTEEN, 28)
        assert frames.dtype == torch.uint8
        assert tuple(frames.shape) == (2, 3, 112, 196)
        assert clips.read_indices(frames) == [1234, 1234]


def test_image_transparency_is_white_and_orientation_applied(tmp_path: Path) -> None:
    PilImage.new("RGBA", (80, 80), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert decode_image(Image(str(tmp_path / "clear.png")), SIXTEEN, 28).unique().tolist() == [255]
    exif = PilImage.Exif()
    exif[0x0112] = 6  # a player turns it by a quarter
    PilImage.new("RGB", (160, 80)).save(tmp_path / "turned.jpg", exif=exif)
    height, width = decode_image(Image(str(tmp_path / "turned.jpg")), SIXTEEN, 28).shape[2:]
    assert height > width


def test_a_bad_image_is_one_clear_sentence(tmp_path: Path) -> None:
    good = tmp_path / "good.png"
    PilImage.fromarray(np.random.default_rng(0).integers(0, 256, (99, 99, 3), dtype=np.uint8)).save(good)
    (tmp_path / "half.png").write_bytes(good.read_bytes()[:9000])
    (tmp_path / "text.png").write_text("not an image")
    for name, words in (("half.png", "is not an image that Pillow can read"), ("gone.png", "does not exist"),
                        ("text.png", "is not an image that Pillow can read")):
        with pytest.raises(MediaError, match=f"{name} {words}"):
            decode_image(Image(str(tmp_path / name)), SIXTEEN, 28)


def test_frames_type(folder: Path) -> None:
    assert isinstance(decode(Video(str(folder / "one-frame.mp4")), VideoConfig(), 28), Frames)


# --- memory -----------------------------------------------------------------------------------------------------------


def packets_alive() -> int:
    return sum(type(item) is av.Packet for item in gc.get_objects())


def test_packets_do_not_outlive_a_failed_decode(folder: Path, tmp_path: Path) -> None:
    """Its error holds the frames of the calls that it passed, and prefetching holds the error."""
    broken = tmp_path / "broken.mp4"
    broken.write_bytes((folder / "long.mp4").read_bytes()[:-20_000])
    errors = []
    gc.disable()
    try:
        before = packets_alive()
        for _ in range(3):
            with pytest.raises(MediaError) as raised:
                decode(Video(str(broken)), SIXTEEN, 28)
            errors.append(raised.value)
        assert packets_alive() - before < 10
    finally:
        gc.enable()


def test_no_packets_are_held_for_a_decoder_that_reads_the_file_itself(folder: Path, monkeypatch: pytest.MonkeyPatch
                                                                      ) -> None:
    alive, plain, before = [], module.read_torchcodec, packets_alive()
    monkeypatch.setattr(module, "read_torchcodec", lambda *rest: alive.append(packets_alive() - before) or plain(*rest))
    assert decode(Video(str(folder / "vp9.webm")), SIXTEEN, 28).decoder == "torchcodec"
    assert alive[0] < 10
