"""`pytest bench`: the benches that pytest-benchmark times; what they take is in kernels/test_speed.py."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

_HERE = str(Path(__file__).parent)
sys.path[:] = [folder for folder in sys.path if folder != _HERE]  # it would offer bench/kernels as `kernels`, a package


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--divisor", type=int, metavar="N",
                     help="divide the sizes of `veripo bench kernels` by N (default: 1 on a GPU, 4 on a CPU)")
