"""bench/gpu_check.py without a GPU: the whole of it on a bare machine, and parts that hang, crash, or do not fit.

It runs as a whole on CPU tensors with interpreted kernels, so that a visit to a GPU needs no debugging.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import gpu_check, gpu_parts, recipe
from bench.kernels import sweep
from tests.support.bare import bare_python
from tests.support.children import PATIENCE_SECONDS, run, wait_until
from tests.support.paths import PYTHONPATH, REPOSITORY

CPU = torch.device("cpu")


@pytest.fixture
def results(tmp_path, monkeypatch):
    """An empty results folder; called with a name it gives the lines written there."""
    monkeypatch.setattr(recipe, "RESULTS", tmp_path / "results")
    return lambda name: [json.loads(line) for line in (tmp_path / "results" / f"{name}.jsonl").read_text().splitlines()]


def test_without_a_gpu_it_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = run(sys.executable, REPOSITORY / "bench" / "gpu_check.py")
    assert done.returncode == 1 and "sees no CUDA device" in done.stderr and "Traceback" not in done.stderr


# -- a bare machine --------------------------------------------------------------------------------------------------

HANGS = "import sys, time\nif sys.argv[-2:] == ['--part', 'sweep']:\n    time.sleep(3600)\n"
"""sitecustomize.py: the process of this part hangs as soon as it starts."""
DRIVER = """
from dataclasses import replace
from bench import gpu_check
gpu_check.BUDGET_SECONDS = {patience}
for name, part in gpu_check.PARTS.items():
    gpu_check.PARTS[name] = replace(part, seconds=6 if name == "sweep" else {patience})
gpu_check.main(["--device", "cpu", "--out", {out!r}])
"""


def test_a_bare_machine_runs_every_part_that_it_can(tmp_path):
    """torch, triton, numpy and what torch requires. The sweep hangs, which also spares the suite its minute."""
    python = bare_python(tmp_path / "bare", "torch", "triton", "numpy")
    site, = tmp_path.glob("bare/lib/python*/site-packages")
    (site / "sitecustomize.py").write_text(HANGS)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = run(python, "-c", DRIVER.format(out=str(tmp_path / "new" / "out"), patience=PATIENCE_SECONDS), cwd=tmp_path,
               env={**environment, "PYTHONPATH": PYTHONPATH})
    rows = [json.loads(line) for line in (tmp_path / "new" / "out" / "cpu.jsonl").read_text().splitlines()]
    by_part: dict[str, list[dict]] = {}
    for row in rows:
        by_part.setdefault(row["part"], []).append(row)
    assert list(by_part) == [*gpu_check.PARTS, "tests"]
    assert list(by_part)[:5] == ["smoke", "trainable-head", "gather", "frozen-head", "losses"]
    assert [row["row"] for row in by_part["smoke"]] == [f"smoke: {name}" for name in sweep.smoke(CPU)]
    assert all(row["passed"] for name in ("smoke", "accuracy") for row in by_part[name]), done.stdout
    assert by_part["smoke"][0]["ran"] == "triton, interpreted, on cpu"
    for name in ("trainable-head", "gather", "frozen-head", "losses", "memory", "idle"):
        assert all(row["value"] > 0 and "passed" not in row for row in by_part[name])
        assert all(row["ran"] in ("torch on cpu", "cpp on cpu") for row in by_part[name])
    hung, = by_part["sweep"]
    assert hung["not_measured"] == "took longer than 6 seconds" and not hung["passed"]
    assert by_part["video"][0]["left_out"] == "av is not installed"
    assert by_part["engine"][0]["left_out"] == "av, transformers, vllm are not installed"
    assert all("left_out" in row for row in by_part["tests"])
    assert all({"command", "versions", "device", "commit", "at_seconds"} <= row.keys() for row in rows)
    assert "transformers" not in rows[0]["versions"] and "torch" in rows[0]["versions"]
    assert done.returncode == 1  # the sweep is missing
    marks = ("reached", "MISSED", "ran", "not measured", "left out")
    printed = [line for line in done.stdout.splitlines() if line.startswith(marks)]
    assert len(printed) == len(rows), done.stdout


# -- parts that go wrong ---------------------------------------------------------------------------------------------

CHILD = """
import json, pathlib, subprocess, sys, time
part = sys.argv[-1]
print("RESULT " + json.dumps({"row": part, "passed": True}), flush=True)
if part == "gather":
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
    pathlib.Path(__file__).with_name("sleeper").write_text(str(sleeper.pid))
    time.sleep(3600)
if part == "losses":
    sys.exit("illegal memory access")
"""


def alive(pid: int) -> bool:
    """Whether a process runs; one that ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_part_that_hangs_is_ended_and_its_rows_stay(results, monkeypatch, tmp_path):
    """A process that it started holds the pipe open; that one ends too, and the other parts run."""
    (tmp_path / "child.py").write_text(CHILD)
    monkeypatch.setattr(gpu_check, "__file__", str(tmp_path / "child.py"))
    parts = {name: gpu_parts.Part(part.run, 4 if name == "gather" else PATIENCE_SECONDS)
             for name, part in gpu_check.PARTS.items() if name in ("smoke", "gather", "losses", "memory")}
    monkeypatch.setattr(gpu_check, "PARTS", parts)
    monkeypatch.setattr(gpu_check, "BUDGET_SECONDS", PATIENCE_SECONDS)
    monkeypatch.setattr(gpu_check, "GPU_TESTS", ())
    rows = gpu_check.keep(gpu_check.check("cuda"), "h200")
    assert [(row["part"], row["row"], row.get("not_measured")) for row in rows] == [
        ("smoke", "smoke", None), ("gather", "gather", None),
        ("gather", "gather", "took longer than 4 seconds, after 1 rows"),
        ("losses", "losses", None), ("losses", "losses", "illegal memory access"), ("memory", "memory", None)]
    assert [row["row"] for row in results("h200")] == [row["row"] for row in rows]
    assert "not measured" in gpu_check.told(rows[2])
    wait_until(lambda: not alive(int((tmp_path / "sleeper").read_text())), "the end of what the part had started")


def test_a_row_is_stored_before_the_next_one_is_measured(results):
    seen = []

    def rows():
        for number in range(3):
            yield {"part": "smoke", "row": str(number), "passed": True}
            seen.append(len(results("h200")))

    gpu_check.keep(rows(), "h200")
    assert seen == [1, 2, 3]


def test_what_does_not_fit_the_budget_is_named(monkeypatch):
    monkeypatch.setattr(gpu_check, "BUDGET_SECONDS", 1)
    rows = list(gpu_check.check("cuda", lambda *_: pytest.fail("started"), lambda *_: pytest.fail("started")))
    assert len(rows) == len(gpu_check.PARTS) + len(gpu_check.GPU_TESTS)
    assert not any(row.get("passed") for row in rows)
    assert rows[0]["not_measured"] == "the 1 seconds were over"


def test_every_part_may_take_what_is_left(monkeypatch):
    """Eight minutes in all, whatever hangs; the first five parts are sure of theirs."""
    asked: dict[str, float] = {}
    clock = iter(range(0, 10_000, 50))
    monkeypatch.setattr(gpu_check, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    monkeypatch.setattr(gpu_check, "absent", lambda needs: None)

    def part(name, device, seconds):
        asked[name] = seconds
        return [{"row": name, "passed": True}]

    tests = [gpu_check.tests_row("a", "...\nFAILED tests/test_a.py::test_b - x\n1 failed, 3 passed in 2s\n", 1)]
    rows = list(gpu_check.check("cuda", part, lambda file, seconds: tests[0]))
    assert gpu_check.BUDGET_SECONDS == 480
    assert all(asked[name] <= min(gpu_check.PARTS[name].seconds, 480 - 50 * place) for place, name in
               enumerate(asked, 1))
    assert list(asked) == list(gpu_check.PARTS)[:len(asked)] and len(asked) == 9
    assert [row["not_measured"] for row in rows[9:]] == ["the 480 seconds were over"] * 5
    assert sum(part.seconds for part in list(gpu_check.PARTS.values())[:5]) < 480


def test_the_row_of_a_test_file():
    row = gpu_check.tests_row("tests/a.py", "...\nFAILED tests/a.py::test_b - x\n1 failed, 3 passed in 2s\n", 1)
    assert (row["failures"], row["summary"]) == (["tests/a.py::test_b - x"], "1 failed, 3 passed in 2s")
    assert "MISSED" in gpu_check.told(row)


def test_a_test_file_runs_in_its_own_process(monkeypatch, tmp_path):
    (tmp_path / "test_slow.py").write_text("import time\ndef test_slow():\n    time.sleep(3600)\n")
    (tmp_path / "test_quick.py").write_text("def test_quick():\n    pass\n")
    monkeypatch.setattr(gpu_check, "REPOSITORY", tmp_path)
    started = time.monotonic()
    assert gpu_check.run_tests("test_slow.py", 2)["not_measured"] == "took longer than 2 seconds"
    assert time.monotonic() - started < PATIENCE_SECONDS
    assert gpu_check.run_tests("test_quick.py", PATIENCE_SECONDS)["passed"]


def test_the_sweep_as_a_part_names_what_is_wrong(monkeypatch):
    def wrong():
        raise AssertionError("dhead: relative error 1")

    monkeypatch.setattr(sweep, "sweep", lambda device, sizes: iter([("bad", wrong), ("good", lambda: None)]))
    row, = gpu_parts.part_sweep(CPU, gpu_parts.TINY)
    assert (row["cases"], row["passed"], row["wrong"]) == (2, False, {"bad": "AssertionError: dhead: relative error 1"})
    monkeypatch.setattr(sweep, "smoke", lambda device: {"grpo_loss": wrong, "dpo_loss": lambda: None})
    bad, good = gpu_parts.part_smoke(CPU, gpu_parts.TINY)
    assert bad["wrong"].endswith("relative error 1") and not bad["passed"] and good["passed"]


@pytest.mark.parametrize(("device", "gpu", "name"), [
    ("cuda", "NVIDIA H200", "h200"), ("cuda", "NVIDIA H100 80GB HBM3", "h100-80gb-hbm3"), ("cpu", "AMD EPYC", "cpu")])
def test_results_are_named_after_the_device(device, gpu, name):
    assert gpu_check.results_name(device, gpu) == name


def test_the_named_gpu_tests_use_a_gpu():
    for file in gpu_check.GPU_TESTS:
        assert "cuda" in (REPOSITORY / file).read_text("utf-8"), file
