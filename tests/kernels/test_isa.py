"""Every path on one machine: each clone of the compiled op, forced, under each path that torch has for the processor.

A path is a process of pytest on a selection of the other files, 10 s of processor time each, a resumed run 35 s. What
the processor lacks is skipped, by name.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from veripo_kernels import cpp

from tests.kernels.test_csrc import COMPILER, FLAGS, library, supported  # noqa: F401  library: a fixture that builds the op
from tests.support.paths import PYTHONPATH, REPOSITORY

CAPABILITIES = {"avx512": "AVX512", "avx2": "AVX2", "baseline": "DEFAULT"}
"""What torch calls the paths of FLAGS, in ATEN_CPU_CAPABILITY in small letters."""

SELECTION = [
    "kernels/test_isa.py::test_the_paths_are_those_that_were_asked_for",
    "kernels/test_csrc.py::test_random_logits", "kernels/test_csrc.py::test_extreme_logits",
    "kernels/test_csrc.py::test_rows_without_a_probability_are_nan",
    "kernels/test_csrc.py::test_every_16_bit_number_is_read_exactly",
    "kernels/test_csrc.py::test_gradients_are_rounded_as_torch_rounds", "kernels/test_csrc.py::test_rows_with_a_stride",
    "kernels/test_csrc.py::test_random_rows_stay_within_the_bound_and_average_no_more_than_twice_torchs_error",
    "kernels/test_gather.py::test_over_many_rows_errors_average_no_more_than_twice_torchs[cpp]",
    "kernels/test_gather.py::test_over_many_rows_errors_average_no_more_than_twice_torchs[torch]",
    "kernels/test_gather.py::test_each_gradient_alone[cpp]", "kernels/test_gather.py::test_each_gradient_alone[torch]",
    "kernels/test_frames_to_patches.py::test_equals_the_definition",
    "kernels/test_frames_to_patches.py::test_geometries",
    "kernels/test_frames_to_patches.py::test_planes_equal_the_definition",
    "kernels/test_frames_to_patches.py::test_the_definition_holds_where_torch_fails_on_planes",
    "kernels/test_frames_to_patches.py::test_every_level_is_normalised_as_torch_does",
    "kernels/test_slices.py::test_equals_the_definition",
    "kernels/test_slices.py::test_every_float_is_rounded_as_torch_does",
    "kernels/test_linear_logprobs.py::test_torch_is_as_exact_as_the_definition",
]
RESUME = ["kernels/test_isa.py::test_the_paths_are_those_that_were_asked_for",
          "test_resume.py::test_killed_between_two_checkpoints"]

pytestmark = [COMPILER, pytest.mark.skipif(os.uname().machine != "x86_64", reason="the paths are those of x86-64")]


def test_the_paths_are_those_that_were_asked_for() -> None:
    assert cpp.isa() == os.environ.get("VERIPO_ISA", supported())
    if asked := os.environ.get("ATEN_CPU_CAPABILITY"):
        assert torch.backends.cpu.get_cpu_capability() == asked.upper()


def run_on(isa: str, torchs: str, selection: list[str]) -> None:
    """The selected tests in a process of their own; skipped where the processor lacks a path."""
    order = list(FLAGS)
    for owner, path in (("the op", isa), ("torch", torchs)):
        if order.index(path) < order.index(supported()):
            pytest.skip(f"this processor has {supported()} and lacks {path}, which {owner} would run with")
    if (isa, CAPABILITIES[torchs]) == (cpp.isa(), torch.backends.cpu.get_cpu_capability()):
        pytest.skip("the files themselves are run on these paths, by the same pytest")
    environment = {**os.environ, "VERIPO_ISA": isa, "ATEN_CPU_CAPABILITY": CAPABILITIES[torchs].lower(),
                   "PYTHONPATH": PYTHONPATH}
    result = subprocess.run([sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "-p", "no:xdist",
                             *(f"tests/{name}" for name in selection)], cwd=REPOSITORY, capture_output=True, text=True,
                            env=environment)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert "SKIPPED" not in result.stdout, result.stdout


@pytest.mark.parametrize("torchs", CAPABILITIES)
@pytest.mark.parametrize("isa", FLAGS)
def test_each_path_holds_the_bounds(isa: str, torchs: str) -> None:
    run_on(isa, torchs, SELECTION)


@pytest.mark.parametrize("path", FLAGS)
def test_a_run_resumes_bitwise_on_each_path(path: str) -> None:
    """Op and torch on the same path: what a run computes is compared with itself, so mixtures would tell nothing."""
    run_on(path, path, RESUME)
