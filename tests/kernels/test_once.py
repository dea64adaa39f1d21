"""First use of what is loaded once, from many threads at the same moment: it is loaded once, and all get it.

Each case runs in a fresh process (`python -m tests.kernels.test_once CASE`), because a process has one first use. What
a loader does is slowed down there, so that without `once` every thread is inside before one has a result.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable
from typing import Any

import pytest
from veripo_kernels.once import once

from tests.support.children import PATIENCE_SECONDS

THREADS = 12
SLOW_SECONDS = 0.2


def together(call: Callable[[int], Any]) -> list[Any]:
    """What `call(number)` gives in each of THREADS threads that call it at the same moment; errors too."""
    barrier = threading.Barrier(THREADS, timeout=PATIENCE_SECONDS)
    results: list[Any] = [None] * THREADS

    def work(number: int) -> None:
        barrier.wait()
        try:
            results[number] = call(number)
        except Exception as error:
            results[number] = error

    threads = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


class Slow:
    """A function that takes its time and counts its calls."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.calls = 0

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.calls += 1
        time.sleep(SLOW_SECONDS)
        return self.function(*arguments, **options)


# -- once --------------------------------------------------------------------------------------------------------------


def test_threads_that_ask_first_wait_for_one_result() -> None:
    slow = Slow(lambda number: [number])
    once_slow = once(slow)
    results = together(lambda number: once_slow(number % 2))
    assert slow.calls == 2 and {id(result) for result in results} == {id(once_slow(0)), id(once_slow(1))}
    once_slow.cache_clear()
    assert once_slow(0) == [0] and slow.calls == 3


def test_an_error_is_raised_and_not_kept() -> None:
    def fail_twice() -> int:
        if slow.calls <= 2:
            raise KeyError(slow.calls)
        return slow.calls

    slow = Slow(fail_twice)
    call = once(slow)
    results = together(lambda _: call())
    assert sorted(map(repr, results)) == ["3"] * (THREADS - 2) + ["KeyError(1)", "KeyError(2)"]


def test_a_function_may_call_itself_and_keeps_its_name() -> None:
    @once
    def factorial(number: int) -> int:
        """n!"""
        return number * factorial(number - 1) if number else 1

    assert factorial(5) == 120 and (factorial.__name__, factorial.__doc__) == ("factorial", "n!")
    assert factorial.__wrapped__(3) == 6


# -- loaders, each in a fresh process ----------------------------------------------------------------------------------


def compiled_op() -> None:
    """Loads the library and registers fakes; torch 2.11 raises at a second registration, torch 2.13 takes it."""
    import torch
    from veripo_kernels import cpp
    from veripo_kernels.dispatch import choose

    registered: set[str] = set()
    register = torch.library.register_fake

    def register_fake(name: str) -> Any:
        if name in registered:
            raise RuntimeError(f"the operator {name} already has an fake impl registered")
        registered.add(name)
        return register(name)

    torch.library.register_fake = register_fake
    torch.ops.load_library = slow = Slow(torch.ops.load_library)
    device = torch.device("cpu")
    assert together(lambda number: choose("resize_frames", "auto", device) if number % 2 else cpp.missing()) == [
        None, "cpp"] * (THREADS // 2)
    assert slow.calls == 1


def compiled_cuda_op() -> None:
    from pathlib import Path

    from veripo_kernels import cpp

    cpp.missing = lambda: None
    cpp.CUDA_LIBRARY = Path(__file__)
    cpp._load = slow = Slow(lambda library: "no")
    assert together(lambda _: cpp.missing_cuda()) == ["no"] * THREADS and slow.calls == 1


def torchcodec() -> None:
    """Loads FFmpeg by a stub library, and says once where torchcodec cannot be loaded."""
    from veripo_fast.video import ffmpeg

    said = listened(ffmpeg._LOG)
    ffmpeg.register_bundled_ffmpeg = slow = Slow(lambda: True)
    sys.modules["torchcodec.decoders"] = None
    assert together(lambda _: ffmpeg.torchcodec_decoder()) == [None] * THREADS
    assert slow.calls == 1 and len(said) == 1


def nvidia_dali() -> None:
    import torch

    from veripo_fast.video import dali

    for name in ("nvidia", "nvidia.dali"):
        sys.modules[name] = types.ModuleType(name)
    torch.cuda.is_available = lambda: True
    dali.CDLL = slow = Slow(lambda name: None)
    assert together(lambda _: dali.missing(torch.device("cuda"))) == [None] * THREADS and slow.calls == 1


def attention_backends() -> None:
    """Probes the backends and says which it is; compiles FlexAttention."""
    import torch

    from veripo_fast.model import attention, packed_attention

    said = listened(attention.log)
    attention.unusable = slow = Slow(lambda backend, shape: None if backend == "sdpa" else "no")
    shape = attention.AttentionShape(torch.device("cpu"), torch.float32, 4, 2, 16)
    assert together(lambda _: attention.select("auto", shape)) == ["sdpa"] * THREADS
    assert slow.calls == len(attention.PREFERENCE) and len(said) == 1
    torch.compile = slow = Slow(lambda function, dynamic: function)
    assert len(set(together(lambda _: packed_attention._flex_function("cuda")))) == 1 and slow.calls == 1


def worker_of_math_verify() -> None:
    from veripo_fast.reward import math_answers

    math_answers._Worker = slow = Slow(math_answers._Worker)
    assert together(lambda number: math_answers.math_equal(str(number), f"{number}.0")) == [True] * THREADS
    assert slow.calls == 1


def listened(log: logging.Logger) -> list[str]:
    """The messages of a log from now on."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    return said


CASES = {case.__name__: case for case in (compiled_op, compiled_cuda_op, torchcodec, nvidia_dali, attention_backends,
                                          worker_of_math_verify)}


@pytest.mark.parametrize("case", CASES)
def test_first_use_by_many_threads(case: str, python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    if case == "compiled_op":
        from veripo_kernels import cpp

        if not cpp.LIBRARY.exists():
            pytest.skip("the compiled op was not built")
    done = python("-m", "tests.kernels.test_once", case)
    assert done.returncode == 0, done.stderr[-3000:]


if __name__ == "__main__":
    CASES[sys.argv[1]]()
