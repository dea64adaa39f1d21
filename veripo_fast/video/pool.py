"""Decoding in parallel and within a time limit.

FFmpeg releases the GIL, so threads are enough and frames need not be copied between processes.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import torch

from veripo_fast.config.schema import VideoConfig
from veripo_fast.errors import MediaError
from veripo_fast.types import Frames, Media, Video

Item = TypeVar("Item")
Result = TypeVar("Result")
GRACE_SECONDS = 1.0
"""How long a decoder that watches its deadline may take to notice it before its thread is left behind."""


class MediaPool:
    """Threads that decode, `contract.workers` at a time; a context manager.

    At most twice as many items are in flight (running, or done and not yet fetched), so memory stays bounded when the
    consumer is slower than the decoders.
    """

    def __init__(self, contract: VideoConfig) -> None:
        self.contract = contract
        self._threads = ThreadPoolExecutor(contract.workers, thread_name_prefix="veripo-media")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Drop what has not started and wait for what has (at most `timeout_seconds`)."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    def decode_all(self, media: Iterable[Media], factor: int) -> Iterator[Frames | torch.Tensor | MediaError]:
        """For each medium, in order: Frames of a video, uint8 [2, 3, H, W] of an image, or the MediaError."""
        from veripo_fast.video.decode import decode, decode_image

        def one(medium: Media) -> Frames | torch.Tensor:
            if isinstance(medium, Video):
                return decode(medium, self.contract, factor)
            return decode_image(medium, self.contract, factor)

        return self.map(one, media)

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result | MediaError]:
        """`function(item)` of every item in order, computed ahead; a MediaError is handed over in place of a result.

        Any other error is raised, after what has not started was dropped.
        """
        pending: deque[Future[Result]] = deque()
        try:
            for item in items:
                pending.append(self._threads.submit(function, item))
                if len(pending) == 2 * self.contract.workers:
                    yield _result(pending.popleft())
            while pending:
                yield _result(pending.popleft())
        finally:
            for future in pending:
                future.cancel()


def run_with_deadline(function: Callable[[float], Result], path: str, timeout_seconds: float) -> Result:
    """`function(deadline)` in a thread of its own, its errors raised here; MediaError after `timeout_seconds`.

    A thread cannot be stopped from outside. One that watches its deadline ends by itself; one that is stuck inside
    FFmpeg or the file system (a dead network mount) is left behind as a daemon and keeps its memory until it returns.
    """
    call = _Call(function, time.monotonic() + timeout_seconds)
    call.start()
    call.join(timeout_seconds + GRACE_SECONDS)
    if call.is_alive():
        raise MediaError(f"{path} took longer than {timeout_seconds:g} s (video.timeout_seconds) to decode")
    if call.error is not None:
        raise call.error
    return call.results[0]


class _Call(threading.Thread, Generic[Result]):
    def __init__(self, function: Callable[[float], Result], deadline: float) -> None:
        super().__init__(name="veripo-decode", daemon=True)
        self.function, self.deadline = function, deadline
        self.results: list[Result] = []
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.results.append(self.function(self.deadline))
        except BaseException as error:  # handed to the waiting thread, which raises it
            self.error = error


def _result(future: Future[Any]) -> Any:
    try:
        return future.result()
    except MediaError as error:
        return error


