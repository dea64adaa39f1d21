"""DALI returns the frames asked for or refuses: real VP8, VP9 and MJPEG decodes on a CPU, and nothing in silence.

Its GPU graph is checked as far as a machine without a GPU allows (tests/video/test_gpu.py decodes on one).
"""

import random
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from av.video.reformatter import ColorRange, Colorspace

from bench.video import clips
from tests.support.children import PATIENCE_SECONDS
from tests.support.memory import held_bytes
from veripo_fast.errors import MediaError
from veripo_fast.video import dali
from veripo_fast.video.readers import CHUNK, RefusedError, read_pyav
from veripo_fast.video.timeline import Timeline, scan_packets

torch.set_num_threads(1)
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
REALTIME = {"cpu-used": "8", "deadline": "realtime"}
HIDDEN = {"cpu-used": "5", "deadline": "good", "auto-alt-ref": "1", "lag-in-frames": "16", "g": "20"}
CLIPS = {
    "vp9.webm": {"codec": "libvpx-vp9", "options": REALTIME},
    "vp9-hidden-references.webm": {"codec": "libvpx-vp9", "options": HIDDEN, "frames": 90},
    "vp9.mp4": {"codec": "libvpx-vp9", "options": HIDDEN, "frames": 45},
    "vp9-odd.webm": {"codec": "libvpx-vp9", "options": REALTIME, "size": (107, 191)},
    "vp9-sound.mkv": {"codec": "libvpx-vp9", "options": REALTIME, "audio": True},
    "vp9-late.webm": {"codec": "libvpx-vp9", "options": REALTIME, "times": [5 + index / 30 for index in range(60)]},
    "vp9-one.webm": {"codec": "libvpx-vp9", "options": REALTIME, "frames": 1},
    "vp8.webm": {"codec": "libvpx", "options": HIDDEN, "frames": 90},
    "large-vp8.webm": {"codec": "libvpx", "options": REALTIME, "size": (240, 320), "frames": 37},
    "mjpeg.mkv": {"codec": "mjpeg", "options": {}, "pixel_format": "yuvj420p"},
}
PSNR_LIMIT = 43.0
"""dB to PyAV's RGB; 45.2 is the lowest of these clips, 37 of one whose matrix is exchanged."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("clips")
    for name, arguments in CLIPS.items():
        clips.make_clip(made / name, **arguments)
    return made


@pytest.fixture
def runs_of_four(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four frames of 108 x 192 a run of the pipeline, two to a chunk."""
    monkeypatch.setattr(dali, "RUN_BYTES", 4 * 3 * 108 * 192)
    monkeypatch.setattr(dali, "CHUNK", 2)


def soon() -> float:
    return time.monotonic() + PATIENCE_SECONDS


def scan(path: Path) -> Timeline:
    return scan_packets(str(path), soon())


def read(path: Path, wanted: list[int], timeline: Timeline | None = None) -> torch.Tensor:
    return torch.cat(list(dali.read_dali(str(path), timeline or scan(path), wanted, soon(), CPU)))


def psnr(got: torch.Tensor, want: torch.Tensor) -> float:
    return 10 * float(np.log10(255 ** 2 / max(1e-9, (got.float() - want.float()).square().mean().item())))


# -- the right frames -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLIPS)
def test_the_frames_asked_for_come_back_as_pyav_has_them(folder: Path, name: str) -> None:
    path, timeline = folder / name, scan(folder / name)
    count = CLIPS[name].get("frames", 60)
    for wanted in (list(range(count)), list(range(0, count, 7)), [count // 2], [count - 1]):
        pixels = read(path, wanted)
        assert clips.read_indices(pixels) == wanted
        truth = torch.cat([chunk.clone() for chunk in read_pyav(str(path), timeline, wanted, soon())])
        assert (pixels.dtype, pixels.shape) == (torch.uint8, truth.shape)
        assert psnr(pixels, truth) > PSNR_LIMIT


def test_many_runs_give_what_one_gives(folder: Path, request: pytest.FixtureRequest) -> None:
    wanted = [*range(0, 60, 7), 57, 58]
    once = read(folder / "vp9.webm", wanted)
    request.getfixturevalue("runs_of_four")
    chunks = list(dali.read_dali(str(folder / "vp9.webm"), scan(folder / "vp9.webm"), wanted, soon(), CPU))
    assert [len(chunk) for chunk in chunks] == [2, 2, 2, 2, 2, 1]
    assert torch.equal(torch.cat(chunks), once)  # also shows that an earlier run's frames outlive the later ones


def test_chunks_lie_in_memory_as_pictures_do(folder: Path) -> None:
    path = folder / "vp9.webm"
    chunk = next(dali.read_dali(str(path), scan(path), list(range(20)), soon(), CPU))
    assert len(chunk) == CHUNK
    assert chunk.permute(0, 2, 3, 1).is_contiguous()


@pytest.mark.parametrize("rotation", [90, 180, -90])
def test_rotation_is_applied(tmp_path: Path, rotation: int) -> None:
    path = clips.make_clip(tmp_path / "turned.mp4", codec="libvpx-vp9", options=REALTIME, frames=9, rotation=rotation)
    pixels = read(path, [0, 4, 8])
    assert tuple(pixels.shape[2:]) == ((108, 192) if rotation == 180 else (192, 108))
    assert clips.read_indices(torch.rot90(pixels, -rotation // 90, (2, 3))) == [0, 4, 8]


def test_one_pipeline_serves_all_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dali, "_IDLE", {})
    for name in ("vp9.webm", "large-vp8.webm", "vp9-odd.webm", "mjpeg.mkv", "vp9.webm"):
        assert clips.read_indices(read(folder / name, [3, 30])) == [3, 30]
    assert [len(idle) for idle in dali._IDLE.values()] == [1]


def test_threads_use_a_pipeline_each(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dali, "_IDLE", {})
    found: dict[str, list[list[int]]] = {"vp9.webm": [], "large-vp8.webm": []}
    together = threading.Barrier(2)

    def work(name: str) -> None:
        timeline = scan(folder / name)
        for number in range(15):
            chunks = dali.read_dali(str(folder / name), timeline, [number, 36], soon(), CPU)
            together.wait(PATIENCE_SECONDS)
            found[name].append(clips.read_indices(next(chunks)))
            together.wait(PATIENCE_SECONDS)  # both hold a pipeline here
            assert not list(chunks)

    threads = [threading.Thread(target=work, args=(name,)) for name in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {name: [[number, 36] for number in range(15)] for name in found}
    assert [len(idle) for idle in dali._IDLE.values()] == [2]


def test_memory_stays_flat(folder: Path) -> None:
    path, timeline = folder / "large-vp8.webm", scan(folder / "large-vp8.webm")
    wanted = list(range(0, 37, 3))  # 3 MB of RGB
    for number in range(110):
        if number == 10:
            before = held_bytes()
        read(path, wanted, timeline)
    assert held_bytes() - before < 20 << 20


# -- colour -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("matrix", ["ITU601", "ITU709"])
def test_colours_follow_the_tag(tmp_path: Path, matrix: str) -> None:
    path = one_coloured_frame(tmp_path / "colours.webm", matrix)
    timeline = scan(path)
    assert (timeline.stream.matrix == dali.BT709) is (matrix == "ITU709")
    pixels = read(path, [0])
    truth = torch.cat([chunk.clone() for chunk in read_pyav(str(path), timeline, [0], soon())])
    assert psnr(pixels, truth) > 37
    assert (clips.read_colours(pixels[0]) - torch.tensor(clips.COLOURS)).abs().max() < 5


def one_coloured_frame(path: Path, matrix: str) -> Path:
    """Saturated squares, converted by a matrix and tagged with it."""
    pixels = clips.frame_pixels(0, 240, 480)
    pixels[100:140] = np.repeat(np.array(clips.COLOURS, np.uint8), 80, axis=0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libvpx-vp9", rate=30, options={"crf": "4", "b": "0"} | REALTIME)
        stream.width, stream.height, stream.pix_fmt = 480, 240, "yuv420p"
        stream.codec_context.colorspace = getattr(Colorspace, matrix)
        stream.codec_context.color_range = ColorRange.MPEG
        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(
            format="yuv420p", dst_colorspace=getattr(Colorspace, matrix), dst_color_range=ColorRange.MPEG)
        frame.pts = 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def test_exchanging_the_matrix_leaves_greys_and_undoes_bt601() -> None:
    exchange = dali._bt709_of_bt601()
    assert np.allclose(exchange @ np.ones(3), 1)
    luma, blue, red = 0.4, 0.1, -0.2
    by_601 = [luma + 1.402 * red, luma - 0.344136 * blue - 0.714136 * red, luma + 1.772 * blue]
    by_709 = [luma + 1.5748 * red, luma - 0.187324 * blue - 0.468124 * red, luma + 1.8556 * blue]
    assert np.allclose(exchange @ by_601, by_709, atol=1e-5)


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_codecs_that_it_has_on_a_gpu_only(tmp_path: Path) -> None:
    path = clips.make_clip(tmp_path / "h264.mp4", frames=4)
    with pytest.raises(RefusedError, match="on a CPU, not h264"):
        read(path, [0])


def test_frames_hidden_by_an_edit_list(tmp_path: Path) -> None:
    whole = clips.make_clip(tmp_path / "whole.mp4", codec="libvpx-vp9", options=REALTIME | {"g": "12"}, frames=60)
    cut = clips.cut_without_recoding(whole, tmp_path / "cut.mp4", range(24, 60), 30 / 30)
    with pytest.raises(RefusedError, match=r"frames that its edit list hides|negative time"):
        read(cut, [0, 5])


def test_times_that_vary(tmp_path: Path) -> None:
    path = clips.make_clip(tmp_path / "a.webm", codec="libvpx-vp9", options=REALTIME,
                           times=[index / 30 + (index > 20) for index in range(40)])
    with pytest.raises(RefusedError, match="frame rate varies or frames are missing"):
        read(path, [0, 5])


@pytest.mark.parametrize(("frames", "words"), [(59, "more than its 59 frames"), (61, "fewer than its 61 frames")])
def test_another_number_of_frames_is_noticed(folder: Path, frames: int, words: str) -> None:
    numbers = tuple(range(frames))
    other = replace(scan(folder / "vp9.webm"), keys=numbers, seconds=numbers, places=numbers)
    with pytest.raises(RefusedError, match=f"DALI counts {words}"):
        read(folder / "vp9.webm", [0, 30], other)


def test_another_picture_size_is_noticed(folder: Path) -> None:
    timeline = scan(folder / "vp9.webm")
    with pytest.raises(RefusedError, match="DALI gives 192x108, not 96x108"):
        read(folder / "vp9.webm", [0], replace(timeline, stream=replace(timeline.stream, width=96)))


@pytest.mark.parametrize(("fields", "device", "words"), [
    ({"container": "mpegts"}, CPU, "not trusted in mpegts"),
    ({"container": "avi"}, CPU, "not trusted in avi"),
    ({"matrix": 9}, CPU, "does not convert colour matrix 9"),
    ({"width": 191}, CUDA, "191x108 in whole pairs"),
    ({"codec": "av1"}, CUDA, "does not decode av1"),
    ({"codec": "vp9"}, CUDA, "packets that show an earlier picture"),
    ({"codec": "h264", "pixel_format": "yuv420p10le"}, CUDA, "does not decode h264 in yuv420p10le"),
    ({"codec": "h264", "width": 5000}, CUDA, "up to 4096"),
])
def test_streams_that_it_gets_wrong(folder: Path, fields: dict[str, object], device: torch.device, words: str) -> None:
    timeline = scan(folder / "vp9.webm")
    timeline = replace(timeline, stream=replace(timeline.stream, codec="h264" if device == CUDA else "vp8"))
    assert dali.refusal(timeline, device) is None
    stream = replace(timeline.stream, **fields)
    assert words in dali.refusal(replace(timeline, stream=stream), device)
    assert "no time stamps" in dali.refusal(replace(timeline, places=()), device)
    assert "negative time" in dali.refusal(replace(timeline, keys=(-1, *timeline.keys[1:])), device)


@pytest.mark.parametrize(("codec", "options", "leads"), [
    ("libx265", {"preset": "ultrafast", "x265-params": "log-level=none:keyint=12:bframes=4:pools=1"}, True),
    ("libx265", {"preset": "ultrafast", "x265-params": "log-level=none:keyint=12:open-gop=0:pools=1"}, False),
    ("libx264", clips.open_gop(), True),
    ("libx264", clips.closed_gop(), False),
])
def test_open_groups_of_hevc_stay_off_the_gpu(tmp_path: Path, codec: str, options: dict[str, str], leads: bool) -> None:
    timeline = scan(clips.make_clip(tmp_path / "a.mp4", codec=codec, options=options))
    assert dali.leads(timeline) is leads
    reason = dali.refusal(timeline, CUDA)
    assert (reason is not None and "open groups" in reason) is (leads and codec == "libx265")


def test_a_file_too_large_to_hold(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dali, "MAX_FILE_BYTES", 1000)
    with pytest.raises(RefusedError, match="DALI needs a file in memory"):
        read(folder / "vp9.webm", [0])


@pytest.mark.usefixtures("runs_of_four")
def test_deadline_and_readers_left_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dali, "_IDLE", {})
    path, timeline = folder / "vp9.webm", scan(folder / "vp9.webm")
    with pytest.raises(MediaError, match="timeout_seconds"):
        next(dali.read_dali(str(path), timeline, [0], time.monotonic() - 1, CPU))
    taken, take = [], dali._take
    monkeypatch.setattr(dali, "_take", lambda *arguments: taken.append(arguments) or take(*arguments))
    chunks = dali.read_dali(str(path), timeline, list(range(60)), soon(), CPU)
    next(chunks)
    chunks.close()
    assert len(taken) == 2  # the run that was under way is waited for: it reads memory that is now given up
    assert not any(dali._IDLE.values())  # its pipeline is not used again
    past = soon()
    chunks = dali.read_dali(str(path), timeline, list(range(60)), past, CPU)
    next(chunks)
    with monkeypatch.context() as later, pytest.raises(MediaError, match="timeout_seconds"):
        later.setattr(time, "monotonic", lambda: past + 1)
        list(chunks)
    assert clips.read_indices(read(path, [0, 59])) == [0, 59]


def test_what_is_missing_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert dali.missing(CPU) is None
    if not torch.cuda.is_available():
        assert "sees no CUDA device" in dali.missing(CUDA)
        with pytest.raises(RefusedError, match="sees no CUDA device"):
            next(dali.read_dali(str(folder / "vp9.webm"), scan(folder / "vp9.webm"), [0], soon(), CUDA))
    dali.missing.cache_clear()
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    assert "pip install 'veripo-fast[dali]'" in dali.missing(CPU)
    dali.missing.cache_clear()


def test_a_pipeline_that_cannot_start_is_a_refusal(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a driver that is older than this DALI."""
    def broken(*_: object) -> None:
        raise RuntimeError("CUDA driver version is insufficient\nStack trace")

    monkeypatch.setattr(dali, "_IDLE", {})
    monkeypatch.setattr(dali, "make_pipeline", broken)
    with pytest.raises(RefusedError, match=r"DALI cannot start \(CUDA driver version is insufficient\)"):
        next(dali.read_dali(str(folder / "vp9.webm"), scan(folder / "vp9.webm"), [0], soon(), CPU))


# -- damage -----------------------------------------------------------------------------------------------------------


DAMAGED = """
import sys, time
from pathlib import Path
import torch
from tests.support.children import PATIENCE_SECONDS
from veripo_fast.errors import MediaError
from veripo_fast.video.dali import read_dali
from veripo_fast.video.readers import RefusedError
from veripo_fast.video.timeline import scan_packets

for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        timeline = scan_packets(str(path), time.monotonic() + PATIENCE_SECONDS)
        wanted = list(range(0, len(timeline.seconds), 9))
        chunks = read_dali(str(path), timeline, wanted, time.monotonic() + PATIENCE_SECONDS, torch.device("cpu"))
        frames = sum(len(chunk) for chunk in chunks)
        print("frames" if frames == len(wanted) else "WRONG COUNT")
    except (MediaError, RefusedError) as refusal:
        print("refused", refusal)
print("end")
"""


def test_damaged_files_neither_crash_nor_hang(folder: Path, tmp_path: Path, python: Callable) -> None:
    dice = random.Random(0)
    for name in ("vp9-hidden-references.webm", "vp9.mp4", "vp8.webm"):
        good = (folder / name).read_bytes()
        for number in range(3):
            cut = dice.randrange(len(good) // 4, len(good))
            holed, flipped = bytearray(good), bytearray(good)
            holed[cut:cut + 700] = bytes(len(holed[cut:cut + 700]))
            for _ in range(40):
                flipped[dice.randrange(400, len(good))] ^= dice.randrange(1, 256)
            for kind, data in (("cut", good[:cut]), ("hole", holed), ("flip", flipped)):
                (tmp_path / f"{kind}-{number}-{name}").write_bytes(data)
    done = python("-c", DAMAGED, str(tmp_path))
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr[-2000:]
    assert lines[-1] == "end"
    assert len(lines) == 28
    assert "WRONG COUNT" not in lines
    assert {"frames", "refused"} == {line.split()[0] for line in lines[:-1]}


# -- the graph for a GPU ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bt709", [False, True])
def test_graph_for_a_gpu(monkeypatch: pytest.MonkeyPatch, bt709: bool) -> None:
    """DALI checks the graph's operators, arguments and devices when it writes it down; running it takes a GPU."""
    import nvidia.dali

    def without_device(*arguments: object, device_id: int, **options: object) -> nvidia.dali.Pipeline:
        assert device_id == 1
        return pipeline_class(*arguments, device_id=None, **options)  # one with a device cannot be made here

    pipeline_class = nvidia.dali.Pipeline
    monkeypatch.setattr(nvidia.dali, "Pipeline", without_device)
    written = dali.make_pipeline(torch.device("cuda:1"), bt709).serialize()
    assert b"decoders__Video" in written
    assert b"mixed" in written
    assert (b"CoordTransform" in written) is bt709
