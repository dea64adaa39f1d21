"""The clips are what they say: read from their packets and, where a picture is needed, decoded from start to end.

What a clip shows is known from how it was made; a clip that has lost its difficulty would make every decoder look good.
"""

from __future__ import annotations

import os
from pathlib import Path

import av
import pytest
import torch

from bench.video import clips

NAMES = [name for name in (*clips.PLAIN, *clips.MADE) if name != "half-hour.mp4"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, clips.Clip]:
    return clips.make_clip_set(tmp_path_factory.mktemp("clips"), NAMES)


def packets(clip: clips.Clip) -> list[bytes]:
    """Coded pictures in decoding order."""
    with av.open(str(clip.path)) as container:
        return [bytes(packet) for packet in container.demux(video=0) if packet.size]


def pictures(clip: clips.Clip) -> tuple[torch.Tensor, list[float | None]]:
    """Every frame, upright uint8 [T, 3, H, W], and its time in seconds from the first."""
    with av.open(str(clip.path)) as container:
        frames = list(container.decode(video=0))
        pixels = torch.stack([torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in frames])
        seconds = [None if frame.pts is None else float((frame.pts - frames[0].pts) * frame.time_base)
                   for frame in frames]
    return torch.rot90(pixels.permute(0, 3, 1, 2), clip.rotation // 90, (2, 3)), seconds


def hevc_pictures(clip: clips.Clip) -> list[tuple[int, int]]:
    """(NAL type, temporal layer) of each coded slice."""
    found = []
    for data in packets(clip):
        at = 0
        while at < len(data):
            kind = data[at + 4] >> 1 & 63
            if kind < 32:
                found.append((kind, (data[at + 5] & 7) - 1))
            at += 4 + int.from_bytes(data[at:at + 4], "big")
    return found


def hidden_av1(data: bytes) -> bool:
    """Whether a temporal unit holds more coded frames than the one it shows."""
    at = frames = 0
    while at < len(data):
        kind, at, size, shift = data[at] >> 3 & 15, at + 1 + (data[at] >> 2 & 1), 0, 0
        while True:
            size |= (data[at] & 127) << shift
            shift, at = shift + 7, at + 1
            if data[at - 1] < 128:
                break
        frames += kind in (3, 6)  # a frame header, or a frame
        at += size
    return frames > 1


@pytest.mark.parametrize("name", NAMES)
def test_what_a_clip_shows_is_what_it_was_made_of(made: dict[str, clips.Clip], name: str) -> None:
    clip = made[name]
    pixels, seconds = pictures(clip)
    assert clip.read(pixels) == list(clip.frames)
    if clip.times is not None:
        assert seconds == pytest.approx(clip.times, abs=0.0006)


def test_a_clip_has_the_difficulty_that_it_is_named_after(made: dict[str, clips.Clip]) -> None:
    for name in ("hevc.mp4", "hevc-open.mp4", "hevc-10-bit.mp4"):
        kinds = {kind for kind, _ in hevc_pictures(made[name])}
        assert 21 in kinds and (kinds & {8, 9} or name == "hevc.mp4"), name  # open groups, with leading pictures
    assert {layer for _, layer in hevc_pictures(made["hevc-layers.mp4"])} == {0, 1, 2}
    assert sum(data[-1] & 0xE0 == 0xC0 for data in packets(made["vp9.webm"])) > 3  # a hidden frame beside the shown one
    assert sum(map(hidden_av1, packets(made["av1.mp4"]))) > 3
    with av.open(str(made["edit-list.mp4"].path)) as container:
        assert sum(packet.is_discard for packet in container.demux(video=0)) >= 6
    for name, tag in (("tagged.mp4", 1), ("untagged.mp4", 2)):
        with av.open(str(made[name].path)) as container:
            assert container.streams.video[0].codec_context.colorspace == tag


def test_a_longer_bar_code_is_read_and_a_turned_one_turned_back() -> None:
    for index in (0, 4097, 53_999):
        pixels = torch.from_numpy(clips.frame_pixels(index, 36, 64, clips.LONG_BITS)).permute(2, 0, 1)
        assert clips.read_index(pixels, clips.LONG_BITS) == index
    picture = torch.from_numpy(clips.frame_pixels(1234, 108, 192)).permute(2, 0, 1)[None]
    turned = clips.Clip(Path(), (), None, "", rotation=90)
    assert turned.read(torch.rot90(picture, 1, (2, 3))) == [1234]
    assert turned.read(torch.full_like(picture, 128)) == [-1]


def test_colours_tell_the_matrix(made: dict[str, clips.Clip]) -> None:
    """FFmpeg takes an untagged file for BT.601: right for the tagged one, visibly wrong for the other."""
    off = {name: (clips.read_colours(pictures(made[name])[0][3]) - torch.tensor(clips.COLOURS)).abs().max()
           for name in ("tagged.mp4", "untagged.mp4")}
    assert off["tagged.mp4"] < 4 and off["untagged.mp4"] > 15


def test_damage_is_where_it_is_said(made: dict[str, clips.Clip], tmp_path: Path) -> None:
    good = made["h264-closed.mp4"].path.read_bytes()
    bad = clips.damaged(tmp_path, made)
    data = {name: clip.path.read_bytes() for name, clip in bad.items()}
    media = good.index(b"mdat")
    assert sum(a != b for a, b in zip(good, data["flipped.mp4"], strict=True)) == 200
    assert all(data[name][:media] == good[:media] for name in ("truncated.mp4", "hole.mp4", "flipped.mp4"))
    assert len(data["hole.mp4"]) == len(good) and bytes(20_000) in data["hole.mp4"]
    assert b"moov" not in data["no-moov.mp4"] and data["no-moov.mp4"].endswith(good[media:])
    assert [name for name, clip in bad.items() if not clip.frames] == ["no-moov.mp4", "page.mp4", "empty.mp4"]


def test_making_clips_leaves_the_priority_of_the_process(tmp_path: Path) -> None:
    before = os.sched_getscheduler(0), os.sched_getparam(0)
    clips.make_clip_set(tmp_path, ["av1.mp4"])
    assert (os.sched_getscheduler(0), os.sched_getparam(0)) == before
