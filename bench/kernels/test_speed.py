"""Each op and its peers under pytest-benchmark: groups, JSON, and a comparison that fails on a regression.

    pytest bench --benchmark-only --benchmark-save=before
    pytest bench --benchmark-only --benchmark-compare --benchmark-compare-fail=min:25%

The second command fails and names each op whose fastest round takes over 25 % more than in the newest stored run; runs
are stored in .benchmarks/. `-k "gather_logprobs and veripo"` chooses, `--benchmark-json=FILE` writes all rounds. Ops,
peers, shapes and the check of each peer are those of `veripo bench kernels`, whose paired rounds give the ratios that
README quotes; on a CPU the sizes are divided by 4 (`--divisor`), so that all takes minutes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

from bench import recipe
from bench.kernels.bench_kernels import Comparison
from bench.kernels.cases import Shape, shapes_of
from bench.kernels.peers import OURS, PEERS
from bench.kernels.rows import build, named
from bench.measure import L2_BYTES

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
ROUNDS, WARMUPS = 20, 2
"""On a GPU, where every round begins with a cold cache."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    divisor = metafunc.config.getoption("divisor") or (1 if DEVICE.type == "cuda" else 4)
    rows = []
    for op, peers in PEERS.items():
        for shape in shapes_of(op, DEVICE, divisor):
            rows += [pytest.param(op, shape, peer, id=f"{op}-{'x'.join(map(str, shape))}-{peer}") for peer in peers]
    metafunc.parametrize(("op", "shape", "peer"), rows)


@cache
def checked(op: str, shape: Shape) -> Comparison:
    """The peers of an op that compute what it does, on a small shape against float64."""
    comparison = Comparison(op, shape, DTYPE, DEVICE, 0.0, [])
    comparison.check()
    return comparison


def test_op(benchmark: Any, op: str, shape: Shape, peer: str) -> None:
    comparison = checked(op, shape)
    reason = comparison.unusable.get(peer)
    if reason is not None:
        assert peer != OURS, reason
        pytest.skip(f"not timed: {reason}")
    benchmark.group = f"{op} T={shape.tokens} D={shape.hidden} V={shape.vocabulary}"
    benchmark.extra_info.update(op=op, peer=peer, peer_version=PEERS[op][peer].version(), **named(shape, DTYPE),
                                device=recipe.device_name(), versions=recipe.versions(), commit=recipe.commit())
    case = build(op, shape, DTYPE, DEVICE)
    run: Callable[[Any], object] = PEERS[op][peer].run
    if DEVICE.type == "cpu":
        benchmark(run, case)
        return
    flush = torch.empty(L2_BYTES, dtype=torch.int8, device=DEVICE)

    def cold() -> None:
        flush.zero_()
        torch.cuda.synchronize()

    def timed() -> None:
        run(case)
        torch.cuda.synchronize()

    benchmark.pedantic(timed, setup=cold, rounds=ROUNDS, warmup_rounds=WARMUPS)
