"""What stands in a medium's place is named as what it is, and a whole file that starts late is whole."""

import zipfile
from dataclasses import replace
from pathlib import Path

import av
import pytest
import torch
from PIL import Image as PilImage

from bench.video import clips
from veripo_fast.config.inputs import VideoConfig
from veripo_fast.errors import MediaError
from veripo_fast.types import Image, Video
from veripo_fast.video.decode import decode, decode_image

torch.set_num_threads(1)
EIGHT = VideoConfig(fps=None, num_frames=8)
VP9 = {"codec": "libvpx-vp9", "options": {"cpu-used": "8", "deadline": "realtime"}}


@pytest.mark.parametrize(("name", "arguments"), [("late.mkv", {}), ("late.webm", VP9)])
@pytest.mark.parametrize("decoder", ["auto", "pyav", "torchcodec"])
def test_a_late_start_is_no_lost_end(tmp_path: Path, name: str, arguments: dict, decoder: str) -> None:
    times = [5 + index / 30 for index in range(90)]
    path = clips.make_clip(tmp_path / name, times=times, **arguments)
    frames = decode(Video(str(path)), replace(EIGHT, decoder=decoder), 28)
    assert clips.read_indices(frames.pixels) == list(frames.indices) and frames.indices[-1] == 89
    cut = clips.truncated(path, tmp_path / f"cut-{name}", 0.5)
    with pytest.raises(MediaError, match=r"is truncated: it holds .* s of the 3\.0 s"):
        decode(Video(str(cut)), replace(EIGHT, decoder=decoder), 28)


def test_what_is_no_medium_is_named(tmp_path: Path) -> None:
    clip = clips.make_clip(tmp_path / "clip.mp4", frames=4)
    (tmp_path / "lfs.mp4").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with zipfile.ZipFile(tmp_path / "zip.mp4", "w") as file:
        file.write(clip, "clip.mp4")
    (tmp_path / "salted.mp4").write_bytes(b"Salted__" + bytes(100))
    for name, words in (("lfs.mp4", "is a Git LFS pointer, not the file itself: run `git lfs pull`"),
                        ("zip.mp4", "is a zip archive"), ("salted.mp4", r"is encrypted \(openssl\)")):
        for ask in (lambda path: decode(Video(path), EIGHT, 28), lambda path: decode_image(Image(path), EIGHT, 28)):
            with pytest.raises(MediaError, match=f"{name} {words}"):
                ask(str(tmp_path / name))


@pytest.mark.parametrize("decoder", ["auto", "torchcodec"])
def test_an_encrypted_mp4_is_called_so(tmp_path: Path, decoder: str) -> None:
    path, plain = tmp_path / "secret.mp4", clips.make_clip(tmp_path / "plain.mp4", frames=12)
    options = {"encryption_scheme": "cenc-aes-ctr", "encryption_key": "00" * 16, "encryption_kid": "11" * 16}
    with av.open(str(plain)) as old, av.open(str(path), "w", options=options) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(video=0):
            if packet.size:
                packet.stream = stream
                new.mux(packet)
    assert b"encv" in path.read_bytes()
    with pytest.raises(MediaError, match=r"is encrypted \(common encryption, DRM\)"):
        decode(Video(str(path)), replace(EIGHT, decoder=decoder), 28)


@pytest.mark.parametrize("suffix", ["webp", "gif", "png"])
def test_an_animation_is_no_image(tmp_path: Path, suffix: str) -> None:
    pictures = [PilImage.new("RGB", (80, 80), colour) for colour in ("red", "green", "blue")]
    pictures[0].save(tmp_path / f"moving.{suffix}", save_all=True, append_images=pictures[1:])
    pictures[0].save(tmp_path / f"still.{suffix}")
    assert decode_image(Image(str(tmp_path / f"still.{suffix}")), EIGHT, 28).shape[0] == 2
    with pytest.raises(MediaError, match="is an animation of 3 frames, not an image"):
        decode_image(Image(str(tmp_path / f"moving.{suffix}")), EIGHT, 28)
    if suffix == "webp":
        with pytest.raises(MediaError, match="is a WebP picture or animation"):
            decode(Video(str(tmp_path / "moving.webp")), EIGHT, 28)
