"""Decoding in parallel and within a time limit.

FFmpeg releases the GIL, so threads are enough and frames need not be copied between processes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self, TypeVar

from veripo_fast.config.inputs import VideoConfig
from veripo_fast.errors import MediaError

Item = TypeVar("Item")
Result = TypeVar("Result")


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


def _result(future: Future[Any]) -> Any:
    try:
        return future.result()
    except MediaError as error:
        return error
