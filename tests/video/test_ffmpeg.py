"""torchcodec finds the FFmpeg of the av wheel, in a thread of a new process; and says so where it cannot be loaded."""

import logging
import multiprocessing
import sys
import threading
from multiprocessing.queues import Queue
from pathlib import Path

import pytest

from tests.support.children import PATIENCE_SECONDS
from veripo_fast.video import ffmpeg


def load_in_a_thread(queue: "Queue[dict[str, object]]") -> None:
    """Runs in a fresh process: what torchcodec found, and how many libavcodec are mapped."""
    loaded: list[type] = []
    thread = threading.Thread(target=lambda: loaded.append(ffmpeg.torchcodec_decoder()))
    thread.start()
    thread.join()
    from torchcodec._core import get_ffmpeg_library_versions

    maps = Path("/proc/self/maps").read_text().split()
    queue.put({"name": loaded[0].__name__, "version": get_ffmpeg_library_versions()["libavcodec"][0],
               "copies": len({word for word in maps if "libavcodec" in word})})


def test_thread_of_a_spawned_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    child = context.Process(target=load_in_a_thread, args=(queue,))
    child.start()
    found = queue.get(timeout=PATIENCE_SECONDS)
    child.join(PATIENCE_SECONDS)
    assert found["name"] == "VideoDecoder"
    assert found["version"] >= 58  # FFmpeg 4 or later
    assert found["copies"] == 1  # PyAV and torchcodec share it
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("veripo-ffmpeg")]  # links are gone


def test_a_torchcodec_that_cannot_be_loaded_is_said_once(monkeypatch: pytest.MonkeyPatch,
                                                         caplog: pytest.LogCaptureFixture) -> None:
    ffmpeg.torchcodec_decoder.cache_clear()
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    with caplog.at_level(logging.WARNING):
        assert ffmpeg.torchcodec_decoder() is None
        assert ffmpeg.torchcodec_decoder() is None
    ffmpeg.torchcodec_decoder.cache_clear()
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1
    assert "torchcodec cannot be loaded" in said[0]
    assert "PyAV" in said[0]


def test_only_ffmpeg_libraries_get_plain_names(tmp_path: Path) -> None:
    assert ffmpeg._plain_names(tmp_path / "av.libs") == {}
    for name in ("libavcodec-5e6b81c2.so.62.28.102", "libx264-d6533a8d.so.165", "libswscale-88e9f973.so.9.5.102"):
        (tmp_path / name).touch()
    assert sorted(ffmpeg._plain_names(tmp_path)) == ["libavcodec.so.62", "libswscale.so.9"]
