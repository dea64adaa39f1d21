"""The compiled gather_logprobs against float64, its door, its build, and the machine code of its CUDA kernels.

Letters: T rows, V vocabulary. The library is built into a temporary folder where the one in the tree is not up to date.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from veripo_kernels import cpp, reference

from bench.kernels import rounding
from bench.kernels.rounding import compiled
from tests.support.paths import PYTHONPATH, REPOSITORY

SOURCES = [REPOSITORY / "setup.py", *sorted((REPOSITORY / "csrc").iterdir())]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FLAGS = {"avx512": "x86-64-v4", "avx2": "x86-64-v3", "baseline": "x86-64"}
REGISTERS = {"avx512": "zmm", "avx2": "ymm"}
"""What the code of a clone uses and that of narrower ones cannot."""
LOOPS = {"block_max": 1, "block_sums": 1, "block_gradient": 1, "widen": 2, "narrow": 4, "sum_words": 1, "copy_words": 1}
"""Loops of gather_logprobs and copy_slices; how often each is there: once for each type in each source that uses it."""
COMPILER = pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="there is no C++ compiler")
CUDA_COMPILER = pytest.mark.skipif(not shutil.which("nvcc"), reason="there is no nvcc to compile the CUDA source with")

pytestmark = COMPILER


def build(folder: Path, **environment: str) -> str:
    """What `setup.py build_ext` prints; its libraries come to `folder`/veripo_kernels.

    The CUDA kernels take nvcc a minute, so they are left out unless asked for, whichever build of torch is here.
    """
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", folder, "--build-temp", folder / "temp"]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True,
                            env={**os.environ, "VERIPO_CUDA": "0", **environment})
    return result.stdout


def built(name: str, **environment: str) -> Path:
    """A built folder; one per content of the sources and the environment, shared by the processes of pytest-xdist."""
    content = b"".join(path.read_bytes() for path in SOURCES) + json.dumps([environment, torch.__version__]).encode()
    folder = REPOSITORY / "build" / f"test-{name}-{hashlib.sha256(content).hexdigest()[:16]}"
    if not folder.exists():
        own = folder.with_name(f"{folder.name}.{os.getpid()}")
        build(own, **environment)
        assert (own / "veripo_kernels" / "_cpp.so").exists(), f"the build {name} left the op out"
        if not folder.exists():
            own.rename(folder)
    return folder / "veripo_kernels"


@pytest.fixture(scope="module", autouse=True)
def library():
    """Loads the op into this process, from the tree when that build is newer than the sources."""
    original = cpp.LIBRARY
    newest = max(path.stat().st_mtime for path in SOURCES)
    loaded = hasattr(torch.ops.veripo_cpp, "isa")
    if not loaded and not (original.exists() and original.stat().st_mtime > newest):
        cpp.missing.cache_clear()
        cpp.LIBRARY = built("cpu") / original.name
    assert cpp.missing() is None
    yield
    cpp.LIBRARY = original


def rand(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ids_of(logits: torch.Tensor) -> torch.Tensor:
    rows, vocabulary = logits.shape
    ids = torch.randint(vocabulary, (rows,), generator=torch.Generator().manual_seed(1))
    ids[0], ids[-1] = logits[0].argmax(), vocabulary - 1
    return ids


# -- against float64 -------------------------------------------------------------------------------------------------


def worst(got: rounding.Results, case: rounding.Case) -> dict[str, float]:
    """For each result the largest error over the bound that the op's roundings allow."""
    exact = rounding.plain(case, torch.float64)
    ratios = rounding.ratios(got, exact, rounding.bounds(case, exact))
    return {name: ratio.max().item() for name, ratio in ratios.items()}


def compare(logits: torch.Tensor, temperature: float) -> None:
    rows = len(logits)
    case = rounding.Case(logits, ids_of(logits), rand(rows, seed=2), rand(rows, seed=3), temperature)
    found = worst(compiled(*case), case)
    assert max(found.values()) <= 1, found
    case = case._replace(dentropy=torch.zeros(rows))
    fused = dict(zip(("logprobs", "dlogits"), cpp.fused(*case[:3], temperature), strict=True))
    assert max(worst(fused, case).values()) <= 1, worst(fused, case)


@pytest.mark.parametrize("temperature", [1.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [1, 7, 1000, 2048, 2049, 4097])  # rows of one block, one and a bit, three
@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_random_logits(vocabulary: int, dtype: torch.dtype, temperature: float, scale: float) -> None:
    compare(rand(9, vocabulary, scale=scale).to(dtype), temperature)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_real_vocabulary(dtype: torch.dtype) -> None:
    compare(rand(3, 151936, scale=3.0).to(dtype), 0.7)


def extremes() -> torch.Tensor:
    """[8, 5000]: rows on which a sum without the largest logit subtracted, or with it too late, is infinite or NaN."""
    logits = rand(8, 5000)
    logits[0, 4999] = 1e4  # the largest comes last
    logits[1, 0] = 1e4
    logits[2] = -1e4
    logits[3] = 1e4
    logits[4] -= 1e4
    logits[5, :4000] = -torch.inf  # the first block has nothing else
    logits[6, 1:] = -torch.inf
    logits[7] *= 1e4
    return logits


@pytest.mark.parametrize("temperature", [1.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_logits(dtype: torch.dtype, temperature: float) -> None:
    compare(extremes().clamp(max=6e4).to(dtype), temperature)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_without_a_probability_are_nan(dtype: torch.dtype) -> None:
    logits = rand(4, 3000).to(dtype)
    logits[0] = -torch.inf
    logits[1, 2500] = torch.nan
    logits[2, 10] = torch.inf
    ids = torch.zeros(4, dtype=torch.int64)
    results = compiled(logits, ids, torch.ones(4), torch.ones(4), 1.0)
    results |= dict(zip(("fused", "dfused"), cpp.fused(logits, ids, torch.ones(4), 1.0), strict=True))
    for name, values in results.items():
        assert values[:3].isnan().all(), name
        assert not values[3].isnan().any(), name


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("logit", [5.0, 12.0, 25.0, 50.0])
def test_a_confident_token_keeps_its_digits(logit: float, temperature: float) -> None:
    """Relative accuracy of 1 - p, log p and the entropy, where a sum in float32 gives 0."""
    logits, ids = torch.zeros(1, 50), torch.tensor([40])
    logits[0, 40] = logit
    rest = 49 * torch.tensor(-logit / temperature, dtype=torch.float64).exp()
    logprob, entropy = -rest.log1p(), rest.log1p() + rest / (1 + rest) * logit / temperature
    slope = rest / (1 + rest) / temperature
    got = compiled(logits, ids, torch.ones(1), torch.zeros(1), temperature)
    fused_logprob, dlogits = cpp.fused(logits, ids, torch.ones(1), temperature)
    for value, exact in ((got["logprobs"], logprob), (fused_logprob, logprob), (got["entropy"], entropy),
                         (got["dlogits"][0, 40], slope), (dlogits[0, 40], slope)):
        assert value.item() == pytest.approx(exact.item(), rel=8e-7, abs=0)


def test_random_rows_stay_within_the_bound_and_average_no_more_than_twice_torchs_error() -> None:
    """The bound holds for each number; what a row of torch is off by is luck, so torch is compared over all of them."""
    found: dict[str, float] = {}
    squares = torch.zeros(2, 4, dtype=torch.float64)
    for case in rounding.random_cases(1000, seed=1):
        exact, got = rounding.plain(case, torch.float64), compiled(*case)
        bounds = rounding.bounds(case, exact)
        for name, ratio in rounding.ratios(got, exact, bounds).items():
            found[name] = max(found.get(name, 0.0), ratio.max().item())
        for way, results in enumerate((got, rounding.plain(case, torch.float32))):
            rounded = results | {"dlogits": results["dlogits"].to(case.logits.dtype)}
            squares[way] += torch.stack([((rounded[name].double() - exact[name]) / bounds[name]).square().mean()
                                         for name in got])
    assert max(found.values()) <= 1, found
    ours, torchs = squares.sqrt()
    assert (ours <= 2 * torchs).all(), (ours, torchs)


def in_bfloat16(case: rounding.Case) -> rounding.Results:
    """Exponentials added up in bfloat16."""
    z = (case.logits.double() - case.logits.double().amax(-1, keepdim=True)) / case.temperature
    total = z.exp().bfloat16().cumsum(-1)[:, -1].double()
    return {"logprobs": z.gather(-1, case.token_ids[:, None])[:, 0] - total.log()}


FAULTS: dict[str, Callable[[rounding.Case], rounding.Results]] = {
    "temperature ignored": lambda case: compiled(*case._replace(temperature=1.0)),
    "temperature 1e-6 off": lambda case: compiled(*case._replace(temperature=case.temperature * (1 + 1e-6))),
    "next token": lambda case: compiled(*case._replace(token_ids=(case.token_ids + 1) % case.logits.shape[1])),
    "one logit left out": lambda case: compiled(*case._replace(logits=case.logits.index_fill(
        -1, torch.tensor([3]), -torch.inf))),
    "no maximum": lambda case: {"lse": (case.logits / case.temperature).exp().sum(-1).log()},
    "sums in bfloat16": in_bfloat16,
    "logits in bfloat16": lambda case: compiled(*case._replace(logits=case.logits.bfloat16())),
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_bound_bites(name: str) -> None:
    logits = rand(9, 2049, scale=4.0)
    logits[0] += 100  # beyond what float32 has an exponential of
    case = rounding.Case(logits, ids_of(logits), rand(9, seed=2), rand(9, seed=3), 0.7)
    found = worst(FAULTS[name](case), case)
    assert max(found.values()) > 1.5, found


def test_gradients_that_underflow_are_zero() -> None:
    logits = torch.tensor([[0.0, -87.0, -88.0, -200.0, -torch.inf]])
    ids = torch.tensor([0])
    dlogits = compiled(logits, ids, torch.zeros(1), torch.ones(1), 1.0)["dlogits"][0].tolist()
    assert dlogits[1] != 0 and dlogits[2:] == [0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_number_is_read_exactly(dtype: torch.dtype) -> None:
    numbers = torch.arange(-2 ** 15, 2 ** 15).to(torch.int16).view(dtype)
    numbers = numbers[numbers.isfinite()][:, None]
    lse = cpp.forward(numbers, torch.zeros(len(numbers), dtype=torch.int64), 1.0)[2]
    assert torch.equal(lse, numbers[:, 0].float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_are_rounded_as_torch_rounds(dtype: torch.dtype) -> None:
    """With one column and no token in it the gradient is minus the coefficient: here any float32, ties and NaN too."""
    bits = torch.randint(-2 ** 31, 2 ** 31, (20000,), generator=torch.Generator().manual_seed(0))
    ties = torch.arange(-2 ** 15, 2 ** 15) * 2 ** 16 + 2 ** 15
    near_one = torch.cat([bits, ties]) // 8 + 0x38000000  # within and around the range of float16
    coefficient = torch.cat([bits, ties, near_one]).to(torch.int32).view(torch.float32)
    coefficient = coefficient[~coefficient.isinf()]
    none = torch.full((len(coefficient),), -1)
    dlogits = cpp.fused(torch.zeros(len(none), 1, dtype=dtype), none, coefficient, 1.0)[1][:, 0]
    torch.testing.assert_close(dlogits, (-coefficient).to(dtype), rtol=0, atol=0, equal_nan=True)


# -- layouts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_with_a_stride(dtype: torch.dtype) -> None:
    wide = rand(12, 1100).to(dtype)
    view = wide[::2, 3:1003]
    ids = ids_of(view)
    column = torch.stack((ids, ids), 1)[:, 0]
    upstream = rand(6, seed=2)
    one = torch.tensor(0.5).expand(6)
    dense = view.contiguous()
    got, expected = compiled(view, column, upstream, one, 0.7), compiled(dense, ids, upstream, one.clone(), 0.7)
    assert all(torch.equal(got[name], expected[name]) for name in got)
    assert got["dlogits"].is_contiguous()
    pairs = zip(cpp.fused(view, column, one, 0.7), cpp.fused(dense, ids, one, 0.7), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


def test_more_rows_than_16_bits_count() -> None:
    logits = rand(70_000, 3)
    ids = torch.arange(70_000) % 3
    expected = reference.gather_logprobs(logits.double(), ids)
    torch.testing.assert_close(cpp.forward(logits, ids, 1.0)[0].double(), expected, atol=1e-6, rtol=1e-6)


def test_offsets_beyond_31_bits() -> None:
    stride = 2 ** 30 + 8
    storage = torch.empty(2 * stride + 1000, dtype=torch.bfloat16)  # 4 GiB, of which three pages are ever touched
    logits = storage.as_strided((3, 1000), (stride, 1))
    values = rand(3, 1000).bfloat16()
    for row in range(3):
        logits[row] = values[row]
    ids, upstream = ids_of(values), rand(3, seed=2)
    got, expected = (compiled(tensor, ids, upstream, upstream, 1.0) for tensor in (logits, values))
    assert all(torch.equal(got[name], expected[name]) for name in got)


def test_no_rows() -> None:
    logits, ids, none = torch.empty(0, 5), torch.empty(0, dtype=torch.int64), torch.empty(0)
    assert [result.shape for result in cpp.forward(logits, ids, 1.0)] == [(0,)] * 3
    assert cpp.backward(logits, ids, none, none, none, none, 1.0).shape == (0, 5)
    assert [result.shape for result in cpp.fused(logits, ids, none, 1.0)] == [(0,), (0, 5)]


def test_token_ids_outside_of_the_vocabulary() -> None:
    logits = rand(5, 40)
    ids = torch.tensor([-1, 40, 2 ** 40, -2 ** 40, 3])
    logprobs, entropy, lse = cpp.forward(logits, ids, 1.0)
    assert logprobs.isnan().tolist() == [True] * 4 + [False]
    ones, zeros = torch.ones(5), torch.zeros(5)
    fused_logprobs, fused_dlogits = cpp.fused(logits, ids, ones, 1.0)
    assert fused_logprobs.isnan().tolist() == [True] * 4 + [False]
    for dlogits in (fused_dlogits, cpp.backward(logits, ids, lse, entropy, ones, zeros, 1.0)):
        torch.testing.assert_close(dlogits[:4], -logits.softmax(-1)[:4])  # the gradient of -lse alone


def test_threads_change_no_bit() -> None:
    logits, before = rand(64, 5000).bfloat16(), torch.get_num_threads()
    ids, upstream = ids_of(logits), rand(64, seed=2)
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append((*compiled(logits, ids, upstream, upstream, 0.7).values(),
                            *cpp.fused(logits, ids, upstream, 0.7)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


# -- the door --------------------------------------------------------------------------------------------------------


def good() -> dict[str, torch.Tensor | float]:
    vector = torch.zeros(4)
    return {"logits": torch.zeros(4, 10), "token_ids": torch.zeros(4, dtype=torch.int64), "lse": vector,
            "entropy": vector, "dlogprobs": vector, "dentropy": vector, "temperature": 1.0}


@pytest.mark.parametrize(("name", "value", "words"), [
    ("logits", torch.zeros(4, 10, dtype=torch.float64), "logits must be float32, bfloat16 or float16, got Double"),
    ("logits", torch.zeros(2, 4, 10), "logits must have shape [T, V] with V of at least 1, got [2, 4, 10]"),
    ("logits", torch.zeros(4, 0), "logits must have shape [T, V] with V of at least 1, got [4, 0]"),
    ("logits", torch.zeros(10, 4).T, "logits must be contiguous along V, got a stride of 4"),
    ("token_ids", torch.zeros(4, dtype=torch.int32), "token_ids must be Long, got Int"),
    ("token_ids", torch.zeros(3, dtype=torch.int64), "token_ids must have shape [4], got [3]"),
    ("lse", torch.zeros(4, 1), "lse must have shape [4], got [4, 1]"),
    ("entropy", torch.zeros(0), "entropy must have shape [4], got [0]"),
    ("dlogprobs", torch.zeros(4).double(), "dlogprobs must be Float, got Double"),
    ("dentropy", torch.zeros(5), "dentropy must have shape [4], got [5]"),
    ("temperature", 0.0, "temperature must be positive and finite, got 0"),
    ("temperature", float("inf"), "temperature must be positive and finite, got inf"),
    ("temperature", float("nan"), "temperature must be positive and finite, got nan"),
])
def test_wrong_arguments_are_named(name: str, value: torch.Tensor | float, words: str) -> None:
    arguments = good() | {name: value}
    with pytest.raises(RuntimeError, match=re.escape(words)):
        cpp.backward(**arguments)
    if name in ("logits", "token_ids", "temperature"):
        shared = [arguments["logits"], arguments["token_ids"]]
        for call in (lambda: cpp.forward(*shared, arguments["temperature"]),
                     lambda: cpp.fused(*shared, torch.zeros(4), arguments["temperature"])):
            with pytest.raises(RuntimeError, match=re.escape(words)):
                call()


def test_a_wrong_coefficient_is_named() -> None:
    with pytest.raises(RuntimeError, match=re.escape("coefficient must have shape [4], got [1]")):
        cpp.fused(torch.zeros(4, 10), torch.zeros(4, dtype=torch.int64), torch.zeros(1), 1.0)


@pytest.mark.parametrize("name", ["forward", "backward", "fused"])
def test_opcheck(name: str) -> None:
    arguments = good() | {"logits": rand(4, 10)}
    if name == "forward":
        values = [arguments["logits"], arguments["token_ids"], 1.0]
    elif name == "fused":
        values = [arguments["logits"], arguments["token_ids"], torch.ones(4), 1.0]
    else:
        values = list(arguments.values())
    torch.library.opcheck(getattr(torch.ops.veripo_cpp, f"gather_logprobs_{name}").default, values)


def test_compiles_into_one_graph() -> None:
    logits, ids = rand(4, 100), torch.arange(4)
    expected = [result * 2 for result in cpp.forward(logits, ids, 0.7)]
    traced = torch.compile(lambda x: [result * 2 for result in cpp.forward(x, ids, 0.7)], fullgraph=True,
                           backend="aot_eager")
    assert all(torch.equal(*pair) for pair in zip(traced(logits), expected, strict=True))


# -- instruction sets ------------------------------------------------------------------------------------------------

def supported() -> str:
    """The widest of FLAGS that this processor has."""
    flags = Path("/proc/cpuinfo").read_text("utf-8").split() if Path("/proc/cpuinfo").exists() else []
    v4 = {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
    return "avx512" if v4 <= {*flags} else "avx2" if "avx2" in flags else "baseline"


def test_the_widest_clone_runs() -> None:
    assert cpp.isa() == os.environ.get("VERIPO_ISA", supported())


ASK = """
import pathlib, sys
from veripo_kernels import cpp
cpp.LIBRARY = pathlib.Path(sys.argv[1])
try:
    print(cpp.missing() or cpp.isa())
except RuntimeError as error:
    print(error)
"""


def answer(binary: Path, isa: str) -> str:
    """What a process says that loads a library under VERIPO_ISA."""
    result = subprocess.run([sys.executable, "-c", ASK, binary], capture_output=True, text=True, check=True,
                            env={**os.environ, "PYTHONPATH": PYTHONPATH, "VERIPO_ISA": isa})
    return result.stdout.strip()


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the clones are of x86-64")
def test_a_clone_can_be_forced() -> None:
    binary = built("cpu") / "_cpp.so"
    assert answer(binary, "baseline") == "baseline"
    assert "VERIPO_ISA must be baseline, avx2 or avx512, got 'AVX2'" in answer(binary, "AVX2")
    if supported() != "avx512":
        assert f"VERIPO_ISA is 'avx512', but this processor has {supported()} at most" in answer(binary, "avx512")


@pytest.mark.skipif(supported() == "baseline", reason="this processor has x86-64 alone")
def test_a_library_compiled_for_one_instruction_set_has_no_other() -> None:
    binary = built("avx2", CXXFLAGS=f"-march={FLAGS['avx2']}") / "_cpp.so"
    assert answer(binary, "") == "avx2"
    assert "VERIPO_ISA is 'baseline', but the op was compiled for avx2" in answer(binary, "baseline")


def clones(binary: Path) -> list[tuple[str, str, str]]:
    """Instruction set, loop and machine code of each clone in a library."""
    text = subprocess.run(["objdump", "-dC", "--no-show-raw-insn", binary], capture_output=True, text=True,
                          check=True).stdout
    name = r"veripo::(?:\w+::|\(anonymous namespace\)::)*(\w+)<"
    return re.findall(rf"<auto veripo::on_(\w+)<{name}[^\n]*>:\n(.*?)\n\n", text, re.S)


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the clones are of x86-64")
def test_every_loop_is_simd_code() -> None:
    """A loop that the compiler gives up on is eight times slower, and no other test would see it."""
    bodies = [body for body in clones(built("cpu") / "_cpp.so") if body[1] in LOOPS]
    assert sorted((isa, name) for isa, name, _ in bodies) == sorted(
        (isa, name) for isa in FLAGS for name in LOOPS for _ in range(LOOPS[name]))
    for isa, name, body in bodies:
        wide = "ymm" if name.endswith("_words") else REGISTERS.get(isa)  # gcc takes 16 words of 16 bits at a time
        assert isa == "baseline" or body.count(wide) > 5, (isa, name)


# -- building --------------------------------------------------------------------------------------------------------


def test_the_library_has_no_python_in_it() -> None:
    symbols = subprocess.run(["nm", "-D", built("cpu") / "_cpp.so"], capture_output=True, text=True, check=True).stdout
    assert "torch_library_impl" in symbols and not re.search(r"\bPy", symbols)


def test_without_a_compiler_the_build_says_so_and_goes_on(tmp_path: Path) -> None:
    said = build(tmp_path, CXX="/nonexistent")
    assert said.splitlines()[0] == ("veripo-fast: going on without the compiled op: "
                                    "there is no C++ compiler (/nonexistent)")
    assert not list(tmp_path.rglob("*.so"))


def test_a_failing_compiler_is_no_failure(tmp_path: Path) -> None:
    said = build(tmp_path, CXX="false")
    assert "going on without the compiled op: false could not compile csrc/gather_logprobs.cpp" in said
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.parametrize(("torch_of", "asked", "compiled"), [
    ("cpu", "", False), ("cpu", "1", True), ("cuda", "", True), ("cuda", "0", False), ("cuda", "1", True)])
def test_when_the_cuda_kernels_are_compiled(tmp_path: Path, monkeypatch, torch_of: str, asked: str,
                                            compiled: bool) -> None:
    """Decided by the build of torch or by VERIPO_CUDA, with compilers that only fail, which is no failure either."""
    (tmp_path / "torch" / "lib").mkdir(parents=True)
    (tmp_path / "torch" / "__init__.py").touch()
    if torch_of == "cuda":
        (tmp_path / "torch" / "lib" / "libtorch_cuda.so").touch()
    (tmp_path / "nvcc").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "nvcc").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    said = build(tmp_path / "built", CXX="false", VERIPO_CUDA=asked)
    assert said.count("false could not compile") == 1
    assert said.count("nvcc could not compile csrc/gather_logprobs.cu") == compiled
    assert not list(tmp_path.rglob("_c*.so"))


def copy_of_the_sources(folder: Path) -> Path:
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, folder)
    for name in ("veripo_fast", "kernels", "csrc"):
        shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    return folder


def test_without_torch_the_metadata_and_the_build_work(tmp_path: Path) -> None:
    source = copy_of_the_sources(tmp_path)
    hidden = "import importlib.util as u, runpy, sys; find = u.find_spec; " \
             "u.find_spec = lambda name, *rest: None if name == 'torch' else find(name, *rest); " \
             "sys.argv[0] = 'setup.py'; runpy.run_path('setup.py'); assert 'torch' not in sys.modules"
    run: Callable[..., str] = lambda *arguments: subprocess.run(
        [sys.executable, "-c", hidden, *arguments], cwd=source, capture_output=True, text=True, check=True).stdout
    assert re.fullmatch(r"\d+\.\d+\S*\n", run("--version"))
    said = run("-q", "bdist_wheel")
    assert said.count("going on without the compiled op: torch cannot be imported here") == 1
    assert [path.name.endswith("-py3-none-any.whl") for path in (source / "dist").iterdir()] == [True]


@pytest.mark.parametrize("compiler", [None, "/nonexistent"])
def test_the_wheel(tmp_path: Path, compiler: str | None) -> None:
    source = copy_of_the_sources(tmp_path)
    command = [sys.executable, "-m", "pip", "wheel", source, "--no-deps", "--no-build-isolation", "-w", source / "dist"]
    environment = {**os.environ, "VERIPO_CUDA": "0", **({"CXX": compiler} if compiler else {})}
    subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    [wheel] = (tmp_path / "dist").glob("*.whl")
    names = subprocess.run([sys.executable, "-m", "zipfile", "-l", wheel], capture_output=True, text=True).stdout
    assert ("veripo_kernels/_cpp.so" in names) == (compiler is None)
    assert wheel.name.endswith("-py3-none-any.whl") == (compiler is not None) and "-py3-none-" in wheel.name


def test_a_library_of_an_older_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    """It lacks ops that were added since; torch takes over, and nothing fails inside of it."""
    monkeypatch.setattr(cpp, "OPS", (*cpp.OPS, "added_tomorrow"))
    assert "is older than this file: install again" in cpp.missing.__wrapped__()


@pytest.mark.parametrize(("content", "words"), [(None, "the extension was not built"),
                                                (b"", "_cpp.so cannot be loaded")])
def test_a_library_that_is_missing_or_broken(tmp_path: Path, content: bytes | None, words: str) -> None:
    if content is not None:
        (tmp_path / "_cpp.so").write_bytes(content)
    code = ("import sys, pathlib; from veripo_kernels import cpp; cpp.LIBRARY = pathlib.Path(sys.argv[1]);"
            "print(cpp.missing()); assert cpp.missing_cuda() == cpp.missing()")
    result = subprocess.run([sys.executable, "-c", code, tmp_path / "_cpp.so"], capture_output=True, text=True,
                            check=True, env={**os.environ, "PYTHONPATH": PYTHONPATH})
    assert words in result.stdout


# -- CUDA ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cuda_library() -> Path:
    return built("cuda", VERIPO_CUDA="1") / "_cuda.so"


@CUDA_COMPILER
def test_cuda_kernels_are_refused_where_they_cannot_run(cuda_library: Path, monkeypatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU, on which they run")
    monkeypatch.setattr(cpp, "CUDA_LIBRARY", cuda_library)
    cpp.missing_cuda.cache_clear()
    said = cpp.missing_cuda()
    cpp.missing_cuda.cache_clear()
    assert said is not None and ("libtorch_cuda.so" in said or "no GPU" in said)


@CUDA_COMPILER
def test_cuda_kernels_spill_nothing_and_use_clusters(cuda_library: Path) -> None:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    usage, code = (subprocess.check_output([tools / "cuobjdump", option, cuda_library], text=True)
                   for option in ("-res-usage", "-sass"))
    kernels = re.findall(r"Function (\S+_kernel\S*):\s+REG:(\d+) STACK:(\d+)", usage)
    of_frames = [name for name, _, _ in kernels if "6frames" in name]
    of_slices = [name for name, _, _ in kernels if "6slices" in name]
    assert len(of_frames) == 12  # two, for two sources and three results
    assert len(of_slices) == 2  # one that copies, one that reads back
    assert len(kernels) - len(of_frames) - len(of_slices) == 18  # three, for three dtypes, with and without wide loads
    assert all(int(stack) == 0 and int(registers) <= 128 for _, registers, stack in kernels)
    assert not re.search(r"\b(LDL|STL)\b", code)
    bodies = dict(re.findall(r"Function : (\S+)\n(.*?)(?=Function :|\Z)", code, re.S))
    for name, body in bodies.items():
        if name in of_slices:
            assert len(re.findall(r"LDG\.E\.128", body)) >= 8 and ("STG.E.128" in body) == ("ILb1E" in name), name
        if name in of_frames + of_slices:
            continue
        cluster = [bool(re.search(pattern, body)) for pattern in (r"UCGABAR_ARV", r"UCGABAR_WAIT", r"\bLD\.E\b")]
        assert cluster == ["fused_kernel" in name] * 3, name  # barriers, and loads that reach another block's memory
        if not re.search(r"Li1E", name):  # 16 bytes at a time, a batch of loads under way
            assert len(re.findall(r"LDG\.E\.128", body)) >= 4 and ("forward" in name or "STG.E.128" in body), name
