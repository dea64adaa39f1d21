"""How the kernel benches measure: paired rounds, a clock per device, peak memory, launches, and the relative error.

Nothing is compared that was not measured in the same run: a round times every variant once, in an order that turns from
round to round, and ratios are those of one round.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from veripo_fast.run.memory import reset_resident_peak, return_freed_memory, status_bytes

Clock = Callable[[Callable[[], object]], float]
"""Runs a call and gives its seconds."""

L2_BYTES = 256 << 20
"""Written before each CUDA call, so that no input is left in the cache (50 MiB on an H100) by what ran before."""


def wall_clock(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def cuda_clock(calls: int = 1) -> Clock:
    """Seconds of a call between two events on an idle device with a cold cache: the mean of `calls` in a row."""
    flush = torch.empty(L2_BYTES, dtype=torch.int8, device="cuda")

    def clock(run: Callable[[], object]) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        flush.zero_()
        torch.cuda.synchronize()
        start.record()
        for _ in range(calls):
            run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3 / calls

    return clock


def clock_of(device: torch.device, calls: int = 1) -> Clock:
    return cuda_clock(calls) if device.type == "cuda" else wall_clock


def paired(ways: Mapping[str, Callable[[], object]], rounds: int, clock: Clock, *, warmups: int = 0
           ) -> dict[str, list[float]]:
    """Seconds of each way in each round."""
    for run in [run for run in ways.values() for _ in range(warmups)]:
        run()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            seconds[name].append(clock(ways[name]))
    return seconds


@dataclass(frozen=True)
class Ratio:
    """Seconds of one way over those of another, round by round."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, above: list[float], below: list[float]) -> Ratio:
        rounds = [a / b for a, b in zip(above, below, strict=True)]
        return cls(statistics.median(rounds), min(rounds), max(rounds))

    def fields(self, name: str) -> dict[str, float]:
        """As entries of a result line."""
        values = (f"{name}_median", self.median), (f"{name}_min", self.low), (f"{name}_max", self.high)
        return {key: digits(value) for key, value in values}


def digits(value: float) -> float:
    """Four significant ones."""
    return float(f"{value:.4g}")


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Peak memory of a call above what was in use before it: CUDA's allocator, or resident memory on Linux."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    return_freed_memory()  # what earlier calls freed must not hide what this one needs
    reset_resident_peak()
    before = status_bytes("VmRSS")
    run()
    return status_bytes("VmHWM") - before


def launches(run: Callable[[], object], device: torch.device) -> list[str] | None:
    """Names of what a call starts on a GPU, kernels, copies and fills alike; None on a CPU."""
    if device.type != "cuda":
        return None
    run()  # compiles and loads what is compiled and loaded once
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run()
        torch.cuda.synchronize()
    return [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Root mean square of the difference over that of what is wanted."""
    return float((got.double() - want.double()).norm() / want.double().norm())


def norms(result: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Norm of each tensor: what shows at full size that a variant still computes the same."""
    return {name: float(torch.linalg.vector_norm(value, dtype=torch.float32)) for name, value in result.items()}
