"""Every registered Triton kernel compiles for an H100 without spilling: testing/sm90.py in its own process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from filelock import FileLock
from veripo_kernels.testing.sm90 import MAX_SHARED_BYTES, cases_of, faults, jit_modules

from tests.support.children import run
from tests.support.paths import PYTHONPATH

NAMES = [name for module in jit_modules() for name, _ in cases_of(module)]


GREEDY = """
import triton
import triton.language as tl

@triton.jit(do_not_specialize=["stride"])
def greedy(source, target, stride, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    values = tl.load(source + at)
    tl.store(target + at, values * tl.sum(values, 0) + stride)

@triton.jit
def broken(source, BLOCK: tl.constexpr):
    tl.store(source, tl.arange(0, BLOCK + 1))

def case(kernel, block, **signature):
    return {"name": kernel.__name__, "kernel": kernel, "signature": signature, "constexprs": {"BLOCK": block},
            "divisible_by_16": tuple(signature), "num_warps": 1, "num_stages": 1, "wgmma": True}

SM90_CASES = [case(greedy, 8192, source="*fp32", target="*fp32", stride="i32"), case(broken, 4, source="*fp32")]
"""
FINE = {"registers": 255, "stack_bytes": 0, "spill_loads": 0, "spill_stores": 0, "shared_bytes": MAX_SHARED_BYTES,
        "wgmma": 1, "mma": 0}


def compile_all(*modules: str, path: str = PYTHONPATH) -> subprocess.CompletedProcess[str]:
    """`python -m veripo_kernels.testing.sm90` with Triton's interpreter off."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = (sys.executable, "-m", "veripo_kernels.testing.sm90", *modules)
    return run(*command, env={**environment, "PYTHONPATH": path})


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """Report of each case by name; under xdist the first worker compiles for all."""
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
    file = tmp_path_factory.getbasetemp().parent / f"sm90-{run}.jsonl"
    with FileLock(f"{file}.lock"):
        if not file.exists():
            compiled = compile_all()
            assert "Traceback" not in compiled.stderr, compiled.stderr
            file.write_text(compiled.stdout, "utf-8")
    return {row["case"]: row for row in map(json.loads, file.read_text("utf-8").splitlines())}


@pytest.mark.parametrize("name", NAMES)
def test_compiles_without_faults(name: str, reports: dict[str, dict]) -> None:
    assert reports[name]["faults"] == []


def test_names_are_unique_and_all_are_compiled(reports: dict[str, dict]) -> None:
    assert len(set(NAMES)) == len(NAMES) and set(reports) == set(NAMES)


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("gather.") and "unaligned" not in name])
def test_logits_move_16_bytes_at_a_time(name: str, reports: dict[str, dict]) -> None:
    assert reports[name]["wide_loads"] and (reports[name]["wide_stores"] or "forward" in name)


@pytest.mark.parametrize("name", [name for name in NAMES if "logit_tile_bf16" in name and "entropy" not in name])
def test_a_tile_of_logits_leaves_registers_free(name: str, reports: dict[str, dict]) -> None:
    assert reports[name]["registers"] <= 205


def test_a_kernel_that_spills_and_one_that_does_not_compile_are_caught(tmp_path: Path) -> None:
    (tmp_path / "greedy_kernels.py").write_text(GREEDY, "utf-8")
    result = compile_all("greedy_kernels", path=os.pathsep.join([str(tmp_path), PYTHONPATH]))
    greedy, broken = map(json.loads, result.stdout.splitlines())
    assert result.returncode == 1 and greedy["spill_loads"] > 0
    told = " ".join(greedy["faults"])
    assert all(word in told for word in ("spill_loads", "spill_stores", "stack_bytes", "warp-group", "`stride`"))
    assert len(broken["faults"]) == 1 and "does not compile" in broken["faults"][0]


@pytest.mark.parametrize(("change", "message"), [
    ({}, None), ({"registers": 256}, "256 registers"), ({"spill_loads": 1}, "1 spill_loads"),
    ({"spill_stores": 2}, "2 spill_stores"), ({"stack_bytes": 8}, "8 stack_bytes"), ({"wgmma": 0}, "no warp-group"),
    ({"shared_bytes": MAX_SHARED_BYTES + 1}, "shared_bytes, more than"),
])
def test_each_fault_has_its_sentence(change: dict, message: str | None) -> None:
    case = {"kernel": SimpleNamespace(params=[]), "divisible_by_16": ("source",), "wgmma": True}
    found = faults(case, FINE | change)
    assert len(found) == (message is not None) and all(message in sentence for sentence in found)
