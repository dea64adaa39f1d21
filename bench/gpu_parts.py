"""The parts of gpu_check.py: what each measures on a device, in the order in which they run.

A part gives its rows one by one; what it needs is imported when it runs. Letters: T tokens, V vocabulary, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from bench.kernels import child

Row = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """What is measured."""

    shapes: tuple[tuple[int, int, int], ...] = ((8192, 2048, 151936), (8192, 3584, 152064))
    """T, D, V of the rows against bare products."""
    loss_tokens: int = 65536
    long_tokens: int = 32768
    accuracy: tuple[int, int, int] = (8192, 2048, 151936)
    rounds: int = 20
    workspace_bytes: int = 1 << 30
    tiny: bool = False


FULL = Sizes()
TINY = Sizes(shapes=((32, 16, 260),), loss_tokens=64, long_tokens=64, accuracy=(32, 16, 260), rounds=2,
             workspace_bytes=8 * 260 * 4, tiny=True)


def part_smoke(device: Any, sizes: Sizes) -> Iterator[Row]:
    """One row per op, on a small case: what is wrong here need not be timed."""
    from bench.kernels import sweep

    for name, check in sweep.smoke(device).items():
        wrong = wrong_of(check)
        yield {"row": f"smoke: {name}", "ran": _kernel(name, device), "passed": wrong is None,
               **({} if wrong is None else {"wrong": wrong})}


def part_sweep(device: Any, sizes: Sizes) -> list[Row]:
    """One row: how many cases are right, and what is wrong with the others."""
    from bench.kernels import sweep

    wrong, count = {}, 0
    for name, check in sweep.sweep(device, sweep.TINY if sizes.tiny else sweep.Sizes()):
        count += 1
        if (reason := wrong_of(check)) is not None:
            wrong[name] = reason
            print(f"wrong: {name}: {reason}", flush=True)
    return [{"row": "ops against float64", "ran": _triton(device), "cases": count, "wrong": wrong, "passed": not wrong}]


def wrong_of(check: Callable[[], None]) -> str | None:
    """What a check says; None where it passes."""
    try:
        check()
    except (AssertionError, RuntimeError, ValueError, TypeError) as error:
        return f"{type(error).__name__}: {child.last_line(str(error))}"
    return None


def part_accuracy(device: Any, sizes: Sizes) -> list[Row]:
    from bench.kernels.rows import accuracy

    return [{**accuracy(list(sizes.accuracy), str(device), "triton", rows=1024), "ran": _triton(device)}]


def _part_products(train_head: bool) -> Callable[[Any, Sizes], Iterator[Row]]:
    def part(device: Any, sizes: Sizes) -> Iterator[Row]:
        import torch

        from bench.kernels.cases import Shape
        from bench.kernels.rows import against_products

        for shape in sizes.shapes:
            yield {**against_products(Shape(*shape), device, torch.bfloat16, train_head=train_head,
                                      rounds=sizes.rounds), "ran": _chosen("linear_policy_loss", device)}

    return part


def part_gather(device: Any, sizes: Sizes) -> list[Row]:
    import torch

    from bench.kernels.cases import Shape
    from bench.kernels.rows import against_read

    return [{**against_read(Shape(*sizes.shapes[0]), device, torch.bfloat16, rounds=sizes.rounds),
             "ran": _chosen("gather_logprobs", device)}]


def part_losses(device: Any, sizes: Sizes) -> Iterator[Row]:
    from bench.kernels.rows import against_eager

    for op in ("grpo_loss", "dpo_loss"):
        yield {**against_eager(op, sizes.loss_tokens, device, rounds=sizes.rounds), "ran": _chosen(op, device)}


def part_idle(device: Any, sizes: Sizes) -> list[Row]:
    import torch

    from bench.kernels.cases import Shape
    from bench.kernels.rows import idle_tokens

    return [{**idle_tokens(Shape(*sizes.shapes[0]), device, torch.bfloat16, rounds=sizes.rounds,
                           workspace_bytes=sizes.workspace_bytes), "ran": _chosen("linear_policy_loss", device)}]


def part_memory(device: Any, sizes: Sizes) -> Iterator[Row]:
    import torch

    from bench.kernels.cases import Shape
    from bench.kernels.rows import memory

    for row in memory(Shape(*sizes.shapes[0]), device, torch.bfloat16, long_tokens=sizes.long_tokens,
                      peak=child.peak_of, workspace_bytes=sizes.workspace_bytes):
        yield {**row, "ran": _chosen("linear_policy_loss", device)}


def part_video(device: Any, sizes: Sizes) -> Iterator[Row]:
    from bench.video import gpu

    yield from gpu.rows(device, gpu.TINY if sizes.tiny else gpu.Sizes())


def not_measured(name: str, reason: str) -> Row:
    return {"row": name, "not_measured": reason[:400], "passed": False}


def part_engine(device: Any, sizes: Sizes) -> list[Row]:
    """vLLM beside the trainer on one GPU; the shapes of a 3B model with random weights."""
    from bench import bench_engine
    from veripo_fast.errors import ConfigError
    from veripo_fast.rollout.vllm_library import check_version

    try:
        check_version()
    except ConfigError as error:
        return [not_measured("engine", str(error))]
    return bench_engine.gpu_rows("30m" if sizes.tiny else "3b", 1 if sizes.tiny else 3)


def _triton(device: Any) -> str:
    from veripo_kernels.dispatch import interpreted

    return f"triton, {'interpreted' if interpreted() else 'compiled'}, on {device.type}"


def _chosen(op: str, device: Any) -> str:
    """What `auto` takes for an op here."""
    from veripo_kernels.dispatch import choose

    name = choose(op, "auto", device)
    return _triton(device) if name == "triton" else f"{name} on {device.type}"


def _kernel(op: str, device: Any) -> str:
    """What the smoke checks: the Triton kernel where the op has one."""
    from veripo_kernels.dispatch import OPS

    return _triton(device) if "triton" in OPS[op] else _chosen(op, device)


@dataclass(frozen=True)
class Part:
    """What runs in a process of its own, how long that may take, and the packages beside torch, triton and numpy."""

    run: Callable[[Any, Sizes], Iterable[Row]]
    seconds: float
    needs: tuple[str, ...] = ()


PARTS = {
    "smoke": Part(part_smoke, 75), "trainable-head": Part(_part_products(True), 90), "gather": Part(part_gather, 45),
    "frozen-head": Part(_part_products(False), 75), "losses": Part(part_losses, 45), "memory": Part(part_memory, 45),
    "accuracy": Part(part_accuracy, 60), "idle": Part(part_idle, 60), "sweep": Part(part_sweep, 90),
    "video": Part(part_video, 90, ("av",)), "engine": Part(part_engine, 120, ("av", "transformers", "vllm")),
}
"""In the order of what a short visit to a GPU should bring home first; all but `sweep` and `engine` take seconds."""
