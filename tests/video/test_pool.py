"""Parallel decoding: order, bounds, time limit, clean shutdown."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image as PilImage

from bench.video import clips
from tests.support.children import PATIENCE_SECONDS, wait_until
from veripo_fast.config.inputs import VideoConfig
from veripo_fast.errors import MediaError
from veripo_fast.types import Frames, Image, Video
from veripo_fast.video import decode as module
from veripo_fast.video.deadline import run_with_deadline
from veripo_fast.video.decode import decode, decode_image
from veripo_fast.video.pool import MediaPool


def test_results_keep_their_order_and_errors_their_place(tmp_path: Path) -> None:
    clips.make_clip(tmp_path / "a.mp4", frames=12)
    PilImage.fromarray(clips.frame_pixels(7, 56, 56)).save(tmp_path / "b.png")
    media = [Video(str(tmp_path / "a.mp4")), Image(str(tmp_path / "b.png")), Video(str(tmp_path / "gone.mp4"))] * 4
    contract = VideoConfig(workers=3)

    def one(medium: Video | Image) -> Frames | torch.Tensor:
        return decode(medium, contract, 28) if isinstance(medium, Video) else decode_image(medium, contract, 28)

    with MediaPool(contract) as pool:
        results = list(pool.map(one, media))
    kinds = [Frames, torch.Tensor, MediaError] * 4
    assert [type(result) for result in results] == kinds
    assert "gone.mp4 does not exist" in str(results[2])
    assert isinstance(results[0], Frames)
    assert clips.read_indices(results[0].pixels) == list(results[0].indices)


def test_at_most_workers_run_and_twice_as_many_are_in_flight() -> None:
    running, most, taken = 0, 0, 0
    lock, pair = threading.Lock(), threading.Barrier(2)

    def work(item: int) -> int:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        pair.wait(PATIENCE_SECONDS)
        with lock:
            running -= 1
        return item

    def items() -> Iterator[int]:
        nonlocal taken
        while taken < 20:
            taken += 1
            yield taken

    with MediaPool(VideoConfig(workers=2)) as pool:
        for number, result in enumerate(pool.map(work, items()), start=1):
            assert result == number
            assert taken <= number + 3
    assert most == 2


def test_an_unexpected_error_is_raised_and_leaving_early_is_clean() -> None:
    with MediaPool(VideoConfig(workers=2)) as pool:
        with pytest.raises(ZeroDivisionError):
            list(pool.map(lambda item: 1 // item, [1, 1, 0, 1]))
        for _ in pool.map(lambda item: item, range(1000)):
            break
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("veripo-media")]


def test_a_decoder_that_watches_its_deadline_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = clips.make_clip(tmp_path / "a.mp4", frames=300)
    monkeypatch.setattr(module, "torchcodec_decoder", lambda: None)
    before = threading.active_count()
    with pytest.raises(MediaError, match=r"a\.mp4 took longer"):
        decode(Video(str(path)), VideoConfig(timeout_seconds=1e-6), 28)
    wait_until(lambda: threading.active_count() == before, "the decoder's thread to end")


def test_a_stuck_decoder_is_left_behind_and_its_slot_is_free_again(tmp_path: Path) -> None:
    stuck = threading.Event()
    behind: list[int] = []

    def one(item: int) -> int:
        return run_with_deadline(lambda deadline: item or behind.append(stuck.wait() and item) or 0,
                                 f"clip-{item}.mp4", PATIENCE_SECONDS if item else 0.05)

    with MediaPool(VideoConfig(workers=1)) as pool:
        first, *others = pool.map(one, [0, 1, 2])
    assert not behind
    stuck.set()
    wait_until(lambda: behind, "the thread that was left behind")
    assert isinstance(first, MediaError)
    assert str(first) == "clip-0.mp4 took longer than 0.05 s (video.timeout_seconds) to decode"
    assert others == [1, 2]


def test_a_pipe_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(MediaError, match="is not a regular file"):
        decode(Video(str(tmp_path / "pipe.mp4")), VideoConfig(), 28)
