"""Decoders on a GPU: right frames, near pixels, the right stream; and the bench of them, which also runs on a CPU."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu_check, gpu_parts
from bench.video import clips, gpu
from tests.support.children import PATIENCE_SECONDS
from veripo_fast.video import dali
from veripo_fast.video.ffmpeg import torchcodec_decoder
from veripo_fast.video.probe import gpu_refusal
from veripo_fast.video.readers import CHUNK, RefusedError, read_pyav, read_torchcodec
from veripo_fast.video.timeline import scan_packets

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
X265 = "log-level=none:pools=1:keyint=12:min-keyint=12:scenecut=0:bframes=3:open-gop=0"
CLIPS: dict[str, dict[str, Any]] = {
    "closed.mp4": {"options": clips.closed_gop()},
    "open.mp4": {"options": clips.open_gop()},
    "long-groups.mkv": {"options": {"preset": "veryfast", "x264-params": "keyint=250"}, "frames": 120},
    "late-start.mp4": {"times": [5 + index / 30 for index in range(60)]},
    "hevc.mp4": {"codec": "libx265", "options": {"preset": "ultrafast", "x265-params": X265}},
    "hevc-10-bit.mp4": {"codec": "libx265", "pixel_format": "yuv420p10le",
                        "options": {"preset": "ultrafast", "x265-params": X265}},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"cpu-used": "8", "deadline": "realtime"}},
    "turned.mp4": {"rotation": 90},
}
SIZE = (270, 480)
"""Above NVDEC's smallest picture."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("clips")
    for name, arguments in CLIPS.items():
        clips.make_clip(made / name, size=SIZE, **arguments)
    return made


def soon() -> float:
    return time.monotonic() + PATIENCE_SECONDS


def read(way: str, path: Path, wanted: list[int], device: torch.device) -> Iterator[torch.Tensor]:
    timeline = scan_packets(str(path), soon())
    if way == "dali":
        return dali.read_dali(str(path), timeline, wanted, soon(), device)
    return read_torchcodec(torchcodec_decoder(), str(path), timeline, wanted, soon(), str(device))


# -- on a GPU ---------------------------------------------------------------------------------------------------------


@needs_gpu
@pytest.mark.parametrize("way", ["nvdec", "dali"])
@pytest.mark.parametrize("name", CLIPS)
def test_frames_from_a_gpu_are_those_of_the_cpu(folder: Path, name: str, way: str) -> None:
    path, turns = folder / name, CLIPS[name].get("rotation", 0) // 90
    if (name, way) == ("vp9.webm", "dali"):
        with pytest.raises(RefusedError, match="show an earlier picture"):
            next(read(way, path, [0], CUDA))
        return
    for wanted in ([*range(0, 60, 7)], [29], list(range(60)), [58, 59]):
        pixels = torch.cat(list(read(way, path, wanted, CUDA)))
        assert (pixels.device, pixels.dtype) == (CUDA, torch.uint8)
        assert clips.read_indices(torch.rot90(pixels.cpu(), -turns, (2, 3))) == wanted
        truth = torch.cat([chunk.clone() for chunk in
                           read_pyav(str(path), scan_packets(str(path), soon()), wanted, soon())])
        assert pixels.shape == truth.shape
        assert 10 * torch.log10(255 ** 2 / (pixels.cpu().float() - truth.float()).square().mean()) > 33


@needs_gpu
@pytest.mark.parametrize("way", ["nvdec", "dali"])
def test_frames_are_ready_on_the_stream_that_asked_for_them(folder: Path, way: str) -> None:
    wanted = list(range(0, 120, 3))
    found: dict[int, torch.Tensor] = {}

    def work(number: int) -> None:
        stream = torch.cuda.Stream(CUDA)
        with torch.cuda.stream(stream):
            chunks = [chunk.float().mean((1, 2, 3)) for chunk in read(way, folder / "long-groups.mkv", wanted, CUDA)]
            found[number] = torch.cat(chunks).cpu()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    truth = torch.cat(list(read(way, folder / "long-groups.mkv", wanted, CUDA))).cpu().float().mean((1, 2, 3))
    assert len(found) == 8
    assert all(torch.allclose(means, truth, atol=1e-3) for means in found.values())


@needs_gpu
@pytest.mark.parametrize("way", ["nvdec", "dali"])
def test_what_nvdec_cannot_decode_is_refused(tmp_path: Path, way: str) -> None:
    path = clips.make_clip(tmp_path / "a.mp4", size=SIZE, frames=12, pixel_format="yuv444p")
    with pytest.raises(RefusedError, match="NVDEC"):
        list(read(way, path, [0, 5], CUDA))


# -- the same code on a CPU -------------------------------------------------------------------------------------------


class FellBack:
    """A torchcodec decoder on CUDA whose frames came from the CPU."""

    cpu_fallback = type("Status", (), {"__bool__": lambda self: True, "__str__": lambda self: "Unsupported codec"})()

    def __init__(self, path: str, *, device: str, **options: Any) -> None:
        assert device == "cuda:0"
        self.inner = torchcodec_decoder()(path, device="cpu", **options)
        self.metadata = self.inner.metadata

    def get_frames_at(self, positions: list[int]) -> Any:
        return self.inner.get_frames_at(positions)


class OnGpu(FellBack):
    cpu_fallback = type("Status", (), {"__bool__": lambda self: False})()


def test_a_fall_back_to_the_cpu_is_refused(folder: Path) -> None:
    path = str(folder / "closed.mp4")
    timeline = scan_packets(path, soon())
    with pytest.raises(RefusedError, match="Unsupported codec"):
        next(read_torchcodec(FellBack, path, timeline, [0], soon(), "cuda:0"))
    chunks = list(read_torchcodec(OnGpu, path, timeline, list(range(20)), soon(), "cuda:0"))
    assert [len(chunk) for chunk in chunks] == [CHUNK, CHUNK, 4]
    assert clips.read_indices(torch.cat(chunks)) == list(range(20))


ON_GPU: dict[str, tuple[str | None, str | None]] = {
    "closed.mp4": (None, None), "open.mp4": (None, None), "long-groups.mkv": (None, None),
    "late-start.mp4": (None, None), "hevc.mp4": (None, None), "hevc-10-bit.mp4": (None, None),
    "vp9.webm": (None, "show an earlier picture"), "turned.mp4": (None, None)}
"""Part of why NVDEC and DALI are not given each of CLIPS; None where they are."""


@pytest.mark.skipif(dali.missing(CPU) is not None, reason="DALI is not installed")
@pytest.mark.parametrize("name", CLIPS)
def test_the_graph_that_each_codec_would_take(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """DALI checks operators, arguments and devices of the file's graph when it writes it down; running takes a GPU."""
    import nvidia.dali

    def without_device(*arguments: object, device_id: int, **options: object) -> nvidia.dali.Pipeline:
        return pipeline_class(*arguments, device_id=None, **options)  # one with a device cannot be made here

    pipeline_class = nvidia.dali.Pipeline
    monkeypatch.setattr(nvidia.dali, "Pipeline", without_device)
    timeline = scan_packets(str(folder / name), soon())
    for decoder, words in zip(("nvdec", "dali"), ON_GPU[name], strict=True):
        reason = gpu_refusal(decoder, timeline)
        assert reason is None if words is None else words in (reason or ""), (decoder, reason)
    for stream in (timeline.stream, replace(timeline.stream, matrix=dali.BT709)):
        written = dali.make_pipeline(CUDA, dali.means_bt709(stream)).serialize()
        assert b"decoders__Video" in written and b"mixed" in written
        assert (b"CoordTransform" in written) is (stream.matrix == dali.BT709)


def test_the_bench_counts_frames_and_times_every_decoder() -> None:
    rows = list(gpu_parts.part_video(CPU, gpu_parts.TINY))
    assert json.loads(json.dumps(rows)) and all(gpu_check.told(row) for row in rows)
    *decoded, resized = rows
    assert [row["in_flight"] for row in decoded] == [1, 2]
    present = {"pyav", "torchcodec"} | ({"dali"} if dali.missing(CPU) is None else set())
    for row in decoded:
        assert set(row["frames_per_second"]) == present == set(row["psnr"])
        assert row["wrong_frames"] == dict.fromkeys(present, 0)
        assert all(row[key][name] > 0 for key in ("frames_per_second", "cpu_seconds_per_frame") for name in present)
        assert row["passed"] is ("dali" in present)
    assert resized["passed"] and set(resized["frames_per_second"]) == {"device", "cpu"}


def test_the_bench_sees_wrong_frames_other_colours_and_refusals(tmp_path: Path,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    path, = gpu.made(tmp_path, (96, 160), gpu.TINY)

    def shifted(name: str, timeline: Any, wanted: list[int], deadline: float) -> Iterator[torch.Tensor]:
        return read_pyav(name, timeline, [*wanted[:-1], wanted[-1] - 1], deadline)

    def tinted(*arguments: Any) -> Iterator[torch.Tensor]:
        return (chunk // 2 for chunk in read_pyav(*arguments))

    def refusing(*arguments: Any) -> Iterator[torch.Tensor]:
        raise RefusedError("no such codec")

    def row_with(way: Callable[..., Iterator[torch.Tensor]]) -> dict[str, Any]:
        ways = {"pyav": read_pyav, "dali": way}
        return next(gpu.decode_rows(str(path), CPU, ways, {}, (96, 160), gpu.TINY))

    assert row_with(read_pyav)["passed"]
    other, refused = row_with(tinted), row_with(refusing)
    with monkeypatch.context() as any_colour:
        any_colour.setattr(gpu, "PSNR_LIMIT", 0.0)
        wrong = row_with(shifted)
    assert not wrong["passed"] and wrong["wrong_frames"] == {"pyav": 0, "dali": 1}
    assert not other["passed"] and other["psnr"]["dali"] < gpu.PSNR_LIMIT
    assert not refused["passed"] and refused["not_timed"] == {"dali": "no such codec"}
    assert set(refused["frames_per_second"]) == {"pyav"}
