"""A container that lies about key frames costs time, never a frame: what a packet says of itself counts.

Each clip is one key frame and frames that refer to it, copied without recoding so that every packet is called a key
frame, or the wrong ones are. Which frame came back is read from the pixels.
"""

import time
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import pytest
import torch

from bench.video import clips
from tests.support.children import PATIENCE_SECONDS
from veripo_fast.config.inputs import VideoConfig
from veripo_fast.errors import MediaError
from veripo_fast.types import Video
from veripo_fast.video.decode import decode
from veripo_fast.video.decoders import refuses
from veripo_fast.video.entries import HEAD_BYTES, entry_reader
from veripo_fast.video.timeline import scan_packets

torch.set_num_threads(1)
EIGHT = VideoConfig(fps=None, num_frames=8)
LONG = {"g": "250"}
SIZE_263 = {"size": (144, 176), "time_base": Fraction(1001, 30000), "fps": 30000 / 1001}
CODECS: dict[str, tuple[str, dict]] = {
    "mpeg4": (".mp4", {"options": LONG}),
    "mpeg4 with B frames": (".mp4", {"codec": "mpeg4", "options": LONG | {"bf": "2"}}),
    "mpeg2video": (".mp4", {"options": LONG}),
    "mpeg1video": (".mp4", {"options": LONG}),
    "h263": (".mov", {"options": LONG, **SIZE_263}),
    "h263p": (".avi", {"options": LONG, "size": (112, 192), "time_base": Fraction(1, 30)}),
    "flv": (".flv", {"options": LONG}),
    "msmpeg4v2": (".wmv", {"options": LONG}),
    "msmpeg4": (".mkv", {"options": LONG}),
    "wmv1": (".wmv", {"options": LONG}),
    "wmv2": (".wmv", {"options": LONG}),
    "svq1": (".mov", {"options": LONG, "pixel_format": "yuv410p"}),
    "snow": (".mkv", {"options": LONG}),
    "ffv1": (".mkv", {"options": LONG}),
    "cinepak": (".mov", {"options": LONG, "pixel_format": "rgb24"}),
    "libvpx": (".webm", {"options": clips.VPX | {"g": "250"}}),
    "libvpx-vp9": (".webm", {"options": clips.VPX | {"g": "250"}}),
    "libsvtav1": (".mp4", {"options": {"preset": "12", "svtav1-params": "lp=1:keyint=250"}}),
    "libx264": (".mp4", {"options": {"preset": "veryfast", "x264-params": "keyint=250:scenecut=0"}}),
    "libx265": (".mp4", {"options": {"preset": "ultrafast", "x265-params": f"{clips.X265}:keyint=250"}}),
    "mjpeg": (".mkv", {"options": {}, "pixel_format": "yuvj420p"}),
}


def relabelled(source: Path, path: Path, keys: range) -> Path:
    """A copy whose container calls the packets numbered so key frames, and no others.

    PyAV copies no AV1: of that, all are called so, by leaving out the table.
    """
    if "svtav1" in source.name:
        path.write_bytes(source.read_bytes().replace(b"stss", b"free" if len(keys) > 1 else b"stss"))
        return path
    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        number = 0
        for packet in old.demux(video=0):
            if packet.size:
                packet.stream, packet.is_keyframe = stream, number in keys
                new.mux(packet)
                number += 1
    return path


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = tmp_path_factory.mktemp("honest")
    paths = {}
    for name, (suffix, arguments) in CODECS.items():
        usual = {"codec": name, "time_base": Fraction(1, 30)}  # old encoders know no finer clock
        paths[name] = clips.make_clip(made / f"{name.replace(' ', '-')}{suffix}", **usual | arguments)
    return paths


@pytest.mark.parametrize("keys", [range(0, 1), range(60), range(0, 60, 7), range(3, 60, 11)],
                         ids=["honest", "every", "wrong", "wrong and not the first"])
@pytest.mark.parametrize("name", CODECS)
def test_no_frame_is_wrong_where_key_frames_are_not(honest: dict[str, Path], tmp_path: Path, name: str,
                                                    keys: range) -> None:
    path = relabelled(honest[name], tmp_path / f"lies{honest[name].suffix}", keys)
    for decoder in ("auto", "pyav", "torchcodec", "dali"):
        frames = decode(Video(str(path)), replace(EIGHT, decoder=decoder), 28, device="cpu")
        assert clips.read_indices(frames.pixels) == list(frames.indices), (decoder, frames.decoder)
        assert len(set(frames.indices)) == 8


@pytest.mark.parametrize("name", [name for name in CODECS if name not in ("svq1", "snow", "ffv1", "cinepak")])
def test_packets_say_what_the_encoder_wrote(honest: dict[str, Path], name: str) -> None:
    with av.open(str(honest[name])) as container:
        stream = container.streams.video[0]
        read = entry_reader(stream.codec_context)
        packets = [packet for packet in container.demux(stream) if packet.size]
    if name in ("libx264", "libx265"):
        assert read is None  # units.py reads them
        return
    assert read is not None
    assert [read(bytes(packet)[:HEAD_BYTES]) for packet in packets] == [name == "mjpeg" or number == 0
                                                                       for number in range(60)]


def test_an_mp4_without_its_table_of_key_frames(honest: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "no-stss.mp4"
    data = honest["mpeg4"].read_bytes()
    assert data.count(b"stss") == 1
    path.write_bytes(data.replace(b"stss", b"free"))
    timeline = scan_packets(str(path), time.monotonic() + PATIENCE_SECONDS)
    assert timeline.key_places == (0,)
    assert refuses("torchcodec", timeline) == "it calls frames key frames that refer to others"
    for decoder in ("auto", "pyav", "torchcodec"):
        frames = decode(Video(str(path)), replace(EIGHT, decoder=decoder), 28)
        assert frames.decoder == "pyav" and clips.read_indices(frames.pixels) == list(frames.indices)


@pytest.mark.parametrize("name", ["mpeg4", "mpeg2video", "h263", "wmv2", "libvpx", "libvpx-vp9", "msmpeg4", "svq1"])
@pytest.mark.parametrize("decoder", ["auto", "pyav", "torchcodec"])
def test_a_file_without_its_first_key_frame_is_refused(honest: dict[str, Path], tmp_path: Path, name: str,
                                                       decoder: str) -> None:
    """Decoders fill in grey for what is missing, without an error."""
    path = tmp_path / f"headless{honest[name].suffix}"
    with av.open(str(honest[name])) as old, av.open(str(path), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for number, packet in enumerate(old.demux(video=0)):
            if packet.size and number >= 5:
                packet.stream, packet.is_keyframe = stream, True
                new.mux(packet)
    with pytest.raises(MediaError, match=r"holds no video frame|is damaged"):
        decode(Video(str(path)), replace(EIGHT, decoder=decoder), 28)
