"""gather_logprobs in every implementation against its definition in float64, judged by what its roundings allow.

Letters: T rows, V vocabulary. The last tests break the Triton kernels on purpose: the checker must reject each.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from veripo_kernels import gather, reference
from veripo_kernels.dispatch import interpreted, refusal
from veripo_kernels.gather import gather_logprobs, gather_logprobs_fused
from veripo_kernels.jit import gather as kernels
from veripo_kernels.scalars import as_tensor

from bench.kernels import rounding
from bench.kernels.rounding import Case
from tests.support.children import run
from tests.support.paths import PYTHONPATH, REPOSITORY

DEVICE = torch.device("cuda" if torch.cuda.is_available() and not interpreted() else "cpu")
IMPLS = [pytest.param(name, marks=[pytest.mark.skip(reason=why)] if (why := refusal(name, DEVICE)) else [])
         for name in ("torch", "cpp", "triton")]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]

Results = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""logprobs [T], entropy [T], dlogits [T, V]."""


NAMES = ("logprobs", "entropy", "dlogits")


def rand(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(DEVICE)


def case(logits: torch.Tensor, temperature: float = 1.0, seed: int = 0) -> Case:
    """The likeliest, the unlikeliest, the first, the last and random tokens of logits [T, V]; random gradients."""
    rows, vocabulary = logits.shape
    token_ids = torch.randint(vocabulary, (rows,), generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    chosen = [logits[0].argmax(), logits[min(1, rows - 1)].argmin(), *torch.tensor([0, vocabulary - 1]).to(DEVICE)]
    token_ids[:4] = torch.stack(chosen)[:rows]
    return Case(logits, token_ids, rand(rows, seed=seed + 1), rand(rows, seed=seed + 2), temperature)


def run_op(impl: str, data: Case) -> Results:
    leaf = data.logits.detach().requires_grad_()
    logprobs, entropy = gather_logprobs(leaf, data.token_ids, temperature=data.temperature, entropy=True, impl=impl)
    (logprobs @ data.dlogprobs + entropy @ data.dentropy).backward()
    return logprobs.detach(), entropy.detach(), leaf.grad


def run_definition(dtype: torch.dtype | None, data: Case) -> Results:
    """The definition in float64, or as it is for None; impossible tokens are left out and get gradient 0."""
    leaf = data.logits.detach().to(dtype or data.logits.dtype).requires_grad_()
    shown = leaf.masked_fill(leaf == -torch.inf, torch.finfo(leaf.dtype).min / 4)
    logprobs = reference.gather_logprobs(shown, data.token_ids, temperature=data.temperature)
    entropy = reference.entropy(shown, temperature=data.temperature)
    (logprobs @ data.dlogprobs.to(logprobs) + entropy @ data.dentropy.to(entropy)).backward()
    return logprobs.detach(), entropy.detach(), leaf.grad


def complaints(run: Callable[[Case], Results], data: Case, impl: str = "triton") -> list[str]:
    """Outputs that err by more than roundings in float32 allow (`rounding.float32_bounds`)."""
    exact = dict(zip(NAMES, run_definition(torch.float64, data), strict=True))
    allowed = rounding.float32_bounds(data, exact, scaled_first=impl == "torch")
    ratios = rounding.ratios(dict(zip(NAMES, run(data), strict=True)), exact, allowed)
    return [f"{name}: {ratio.amax():.2f} of the bound" for name, ratio in ratios.items() if not (ratio <= 1).all()]


SHAPES = [(1, 1), (5, 7), (6, 128), (4, 129), (3, 4096), (4, 4097), (3, 9000)]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_random_logits(impl: str, dtype: torch.dtype, shape: tuple[int, int], temperature: float) -> None:
    data = case(rand(*shape, scale=4.0).to(dtype), temperature)
    assert complaints(partial(run_op, impl), data, impl) == []


@pytest.mark.parametrize("impl", IMPLS)
def test_the_vocabulary_of_qwen(impl: str) -> None:
    assert complaints(partial(run_op, impl), case(rand(2, 151_936, scale=3.0).bfloat16(), 0.9), impl) == []


def extremes(name: str, vocabulary: int) -> torch.Tensor:
    """float32 [4, V] rows that break a careless sum of exponentials."""
    noise = rand(4, vocabulary)
    ramp = torch.linspace(-1, 1, vocabulary, device=DEVICE).expand(4, -1)
    half = torch.arange(vocabulary, device=DEVICE) < vocabulary // 2
    return {"rising to 6e4": 6e4 * ramp, "falling from 6e4": -6e4 * ramp, "spread 300": 300 * noise,
            "far below 0": noise - 3e4, "far above 0": noise + 3e4, "equal": torch.full_like(noise, -7.5),
            "one sure token": noise.masked_fill(torch.arange(vocabulary, device=DEVICE) == vocabulary - 3, 50.0),
            "first half impossible": noise.masked_fill(half, -torch.inf),
            "last half impossible": noise.masked_fill(~half, -torch.inf),
            "first half lowest number": noise.masked_fill(half, -65504.0)}[name]


EXTREMES = ["rising to 6e4", "falling from 6e4", "spread 300", "far below 0", "far above 0", "equal", "one sure token",
            "first half impossible", "last half impossible", "first half lowest number"]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", EXTREMES)
def test_extreme_logits(impl: str, dtype: torch.dtype, name: str) -> None:
    data = case(extremes(name, 8200).to(dtype), 0.7)
    possible = data.logits.gather(-1, data.token_ids[:, None])[:, 0] > -torch.inf
    data = data._replace(token_ids=data.token_ids.where(possible, data.logits.argmax(-1)))
    assert complaints(partial(run_op, impl), data, impl) == []


@pytest.mark.parametrize("impl", IMPLS)
def test_impossible_and_unknown_tokens(impl: str) -> None:
    logits = rand(5, 130)
    logits[0, 3] = logits[4] = -torch.inf
    logits[1, 3] = torch.nan
    leaf = logits.clone().requires_grad_()
    logprobs, entropy = gather_logprobs(leaf, torch.tensor([3, 5, 130, -1, 2], device=DEVICE), entropy=True, impl=impl)
    assert logprobs[0] == -torch.inf and logprobs[1:].isnan().all()
    assert entropy[[0, 2, 3]].isfinite().all() and entropy[[1, 4]].isnan().all()
    logprobs[2:4].backward(torch.tensor([0.0, 2.0], device=DEVICE))  # a row that a mask takes out, and one it forgot
    assert (leaf.grad[[0, 2]] == 0).all()
    torch.testing.assert_close(leaf.grad[3], -2 * logits[3].softmax(-1), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(1, 1), (5, 129), (3, 16_385), (2, 33_000)])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_fused_gradient_is_that_of_the_definition(impl: str, dtype: torch.dtype, shape: tuple[int, int],
                                                  temperature: float) -> None:
    def fused(data: Case) -> Results:
        logprobs, dlogits = gather_logprobs_fused(data.logits, data.token_ids, data.dlogprobs,
                                                  temperature=data.temperature, impl=impl)
        return logprobs, run_definition(None, data)[1], dlogits

    data = case(rand(*shape, scale=4.0).to(dtype), temperature)
    assert complaints(fused, data._replace(dentropy=torch.zeros_like(data.dentropy)), impl) == []


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", EXTREMES)
def test_fused_agrees_with_forward_and_backward(impl: str, name: str) -> None:
    data = case(extremes(name, 20_000), 0.7)
    leaf = data.logits.requires_grad_()
    expected = gather_logprobs(leaf, data.token_ids, temperature=0.7, impl=impl)
    expected.backward(data.dlogprobs)
    logprobs, dlogits = gather_logprobs_fused(leaf, data.token_ids, data.dlogprobs, temperature=0.7, impl=impl)
    assert not logprobs.requires_grad and not dlogits.requires_grad
    torch.testing.assert_close(logprobs, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(dlogits, leaf.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("impl", IMPLS)
def test_each_gradient_alone(impl: str) -> None:
    data = case(rand(4, 300, scale=3.0), 0.8)
    for half in (data._replace(dentropy=0 * data.dentropy), data._replace(dlogprobs=0 * data.dlogprobs)):
        assert complaints(partial(run_op, impl), half, impl) == []
    leaf = data.logits.clone().requires_grad_()
    gather_logprobs(leaf, data.token_ids, temperature=0.8, impl=impl).backward(data.dlogprobs)
    expected = run_op(impl, data._replace(dentropy=0 * data.dentropy))[2]
    torch.testing.assert_close(leaf.grad, expected, rtol=1e-5, atol=1e-7)


# -- layouts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("layout", ["every second row", "a part of wider rows", "the same row", "columns first",
                                    "all but the last position", "leading dimensions", "one row", "no row"])
def test_layouts(impl: str, layout: str) -> None:
    whole = rand(6, 4, 260, scale=3.0)
    logits = {"every second row": whole[::2, 0], "a part of wider rows": whole[:, 0, 3:250], "one row": whole[0, 0],
              "the same row": whole[0, :1].expand(5, -1), "columns first": whole[:, 0, :9].T, "no row": whole[:0, 0],
              "all but the last position": whole[:, :-1], "leading dimensions": whole}[layout]
    ids = torch.arange(logits[..., 0].numel(), device=DEVICE).view(logits.shape[:-1]) % logits.shape[-1]
    leaf = logits.detach().requires_grad_()
    logprobs, entropy = gather_logprobs(leaf, ids, temperature=0.7, entropy=True, impl=impl)
    (3 * logprobs + entropy).sum().backward()
    twin = logits.detach().double().requires_grad_()
    expected = torch.log_softmax(twin / 0.7, -1)
    chosen = expected.gather(-1, ids[..., None])[..., 0]
    (3 * chosen - (expected.exp() * expected).sum(-1)).sum().backward()
    assert logprobs.shape == ids.shape and leaf.grad.shape == logits.shape
    torch.testing.assert_close(logprobs.double(), chosen, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(leaf.grad.double(), twin.grad, rtol=1e-4, atol=1e-5)
    assert gather_logprobs_fused(logits, ids, ids.float(), impl=impl)[1].shape == logits.shape


def test_offsets_beyond_two_to_the_31() -> None:
    stride, rows, vocabulary = 2**29 + 16, 5, 64
    try:  # 4.3 GB of which only the pages of five rows are touched
        wide = [torch.empty((rows - 1) * stride + vocabulary, dtype=torch.bfloat16, device=DEVICE)
                .as_strided((rows, vocabulary), (stride, 1)) for _ in range(2)]
    except RuntimeError as error:
        pytest.skip(f"no room for the address range: {error}")
    data = case(rand(rows, vocabulary, scale=3.0).bfloat16())
    logits, dlogits = wide[0].copy_(data.logits), wide[1]
    assert (rows - 1) * stride > 2**31
    assert complaints(partial(run_op, "triton"), data._replace(logits=logits)) == []
    expected = run_op("triton", data)[2]
    _, entropy, normalizer = kernels.forward(logits, data.token_ids, 1.0, True)
    kernels.backward_kernel[(rows,)](logits, data.token_ids, *normalizer, entropy, data.dlogprobs, data.dentropy,
                                     dlogits, vocabulary, stride, stride, 1.0, BLOCK=64, ENTROPY=True)
    assert torch.equal(dlogits, expected)


def test_rows_are_on_the_axis_of_the_grid_that_has_no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    grids = []
    for kernel in (kernels.forward_kernel, kernels.backward_kernel, kernels.fused_kernel):
        monkeypatch.setattr(kernel, "run", lambda *_, grid, **__: grids.append(grid))
    data = case(rand(70_000, 2))
    run_op("triton", data)
    gather_logprobs_fused(*data[:3], impl="triton")
    assert grids == [(70_000,)] * 3


# -- the op ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("entropy", [False, True])
def test_opcheck(impl: str, entropy: bool) -> None:
    data = case(rand(4, 70))
    temperature = as_tensor(0.7)
    wanted = [data.logits.clone().requires_grad_(), data.token_ids, temperature, entropy, impl]
    torch.library.opcheck(torch.ops.veripo.gather_logprobs.default, wanted)
    torch.library.opcheck(torch.ops.veripo.gather_logprobs_fused.default, [*data[:3], temperature, impl])


@pytest.mark.parametrize("impl", IMPLS)
def test_compiles_as_one_graph_for_all_lengths(impl: str) -> None:
    @partial(torch.compile, fullgraph=True, dynamic=True, backend="aot_eager")
    def loss(logits: torch.Tensor, ids: torch.Tensor, temperature: float) -> torch.Tensor:
        logprobs, entropy = gather_logprobs(logits * 2, ids, temperature=temperature, entropy=True, impl=impl)
        return (logprobs - 0.1 * entropy).sum()

    for rows, vocabulary, temperature in ((4, 70, 0.7), (5, 33, 1.3)):
        data = case(rand(rows, vocabulary))
        leaf, twin = (data.logits.clone().requires_grad_() for _ in range(2))
        loss(leaf, data.token_ids, temperature).backward()
        logprobs, entropy = gather_logprobs(twin * 2, data.token_ids, temperature=temperature, entropy=True, impl=impl)
        (logprobs - 0.1 * entropy).sum().backward()
        torch.testing.assert_close(leaf.grad, twin.grad)


def test_gradcheck() -> None:
    logits = rand(4, 6).double().requires_grad_()
    ids = torch.tensor([0, 5, 2, 2], device=DEVICE)
    assert torch.autograd.gradcheck(lambda x: gather_logprobs(x, ids, temperature=0.7, entropy=True), (logits,))


@pytest.mark.parametrize("impl", IMPLS)
def test_a_second_backward_gives_the_same(impl: str) -> None:
    data = case(rand(4, 300))
    leaf = data.logits.clone().requires_grad_()
    logprobs, entropy = gather_logprobs(leaf, data.token_ids, entropy=True, impl=impl)
    total = logprobs @ data.dlogprobs + entropy @ data.dentropy
    first, second = (torch.autograd.grad(total, leaf, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second) and torch.equal(leaf, data.logits) and leaf._version == 0


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
def test_dtypes_of_the_results(dtype: torch.dtype) -> None:
    logits = rand(3, 9).to(dtype).requires_grad_()
    logprobs, entropy = gather_logprobs(logits, torch.tensor([0, 1, 2], device=DEVICE), entropy=True)
    logprobs.sum().backward()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert (logprobs.dtype, entropy.dtype, logits.grad.dtype) == (wide, wide, dtype)


IDS = torch.zeros(3, dtype=torch.int64, device=DEVICE)


@pytest.mark.parametrize(("changes", "message"), [
    ({"logits": torch.zeros(3, 5, dtype=torch.int64)}, "logits must be bfloat16.*int64"),
    ({"logits": torch.zeros(3, 0)}, r"V of at least 1, got \(3, 0\)"),
    ({"token_ids": IDS.int()}, "token_ids must be int64, got torch.int32"),
    ({"token_ids": IDS[:2]}, r"token_ids must have shape \[3\], got \[2\]"),
    ({"token_ids": IDS.to("meta")}, "token_ids must be on"),
    ({"temperature": 0.0}, "temperature must be positive and finite, got 0.0"),
    ({"temperature": float("inf")}, "temperature"),
    ({"temperature": float("nan")}, "temperature"),
    ({"impl": "cuda"}, "gather_logprobs has no implementation 'cuda'"),
    ({"logits": torch.zeros(3, 5, dtype=torch.float64), "impl": "triton"}, "impl='triton' has no float64"),
])
def test_errors_name_the_argument_and_its_value(changes: dict, message: str) -> None:
    arguments = {"logits": torch.zeros(3, 5), "token_ids": IDS, "temperature": 1.0, "impl": "auto"} | changes
    logits, ids = arguments.pop("logits").to(DEVICE), arguments.pop("token_ids")
    with pytest.raises(ValueError, match=message):
        gather_logprobs(logits, ids, **arguments)


def test_coefficient_must_fit() -> None:
    with pytest.raises(ValueError, match=r"coefficient must have shape \[3\], got \[4\]"):
        gather_logprobs_fused(torch.zeros(3, 5, device=DEVICE), IDS, torch.zeros(4, device=DEVICE))


def test_torch_temporaries_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    class Largest(TorchDispatchMode):
        live_bytes: list[int]

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = function(*args, **kwargs or {})
            self.live_bytes.append(out.numel() * out.itemsize if isinstance(out, torch.Tensor) else 0)
            return out

    monkeypatch.setattr(gather, "_CHUNK_BYTES", 100_000)
    logits, ids, slopes = rand(1000, 64).bfloat16(), torch.arange(1000, device=DEVICE) % 64, rand(1000)
    with Largest() as seen:
        seen.live_bytes = []
        _, entropy, normalizer = gather._Torch.forward(logits, ids, 1.0, True)
        assert max(seen.live_bytes) <= 100_000 / 5
        gather._Torch.backward(logits, ids, normalizer, entropy, slopes, slopes, 1.0)
    assert [size for size in seen.live_bytes if size > 100_000 / 5] == [1000 * 64 * 2]  # dlogits alone


# -- properties ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLS)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(rows=st.integers(1, 9), vocabulary=st.integers(1, 300), seed=st.integers(0, 99),
       dtype=st.sampled_from(FLOATS), temperature=st.floats(0.05, 20.0))
def test_any_shape_and_temperature(impl: str, rows: int, vocabulary: int, seed: int, dtype: torch.dtype,
                                   temperature: float) -> None:
    data = case(rand(rows, vocabulary, seed=seed, scale=4.0).to(dtype), temperature, seed)
    assert complaints(partial(run_op, impl), data, impl) == []


@pytest.mark.parametrize("impl", IMPLS)
@settings(max_examples=10, deadline=None, derandomize=True)
@given(data=st.data())
def test_rows_do_not_know_of_each_other(impl: str, data: st.DataObject) -> None:
    rows = data.draw(st.integers(2, 8))
    order = torch.tensor(data.draw(st.permutations(range(rows))), device=DEVICE)
    given_case = case(rand(rows, data.draw(st.integers(1, 200)), scale=3.0))
    moved = Case(*(values[order] for values in given_case[:4]), 1.0)
    for value, expected in zip(run_op(impl, moved), run_op(impl, given_case), strict=True):
        torch.testing.assert_close(value, expected[order], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
@settings(max_examples=10, deadline=None, derandomize=True)
@given(shift=st.integers(-500, 500), seed=st.integers(0, 99))
def test_a_constant_added_to_all_logits_changes_nothing(impl: str, shift: int, seed: int) -> None:
    plain = case((rand(4, 200, seed=seed) * 64).round() / 64)  # sums of 64ths are exact in float32
    for value, expected in zip(run_op(impl, plain._replace(logits=plain.logits + shift)), run_op(impl, plain),
                               strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)


# -- compilation -----------------------------------------------------------------------------------------------------

COUNT_KEYS = """
import json, torch
from veripo_kernels.jit import gather as kernels
from veripo_kernels.testing.sm90 import launch_keys

def launches(sizes):
    for rows, vocabulary, temperature in sizes:
        logits, ids = torch.empty(rows, vocabulary, dtype=torch.bfloat16), torch.empty(rows + 1, dtype=torch.int64)[1:]
        slopes = torch.empty(rows + 1)[1:]
        _, entropy, normalizer = kernels.forward(logits, ids, temperature, True)
        kernels.backward(logits, ids, normalizer, entropy, slopes, slopes, temperature)
        kernels.fused(logits, ids, slopes, temperature)

def cut_rows():
    for vocabulary in (65535, 65536, 65521, 65520):
        kernels.forward(torch.empty(2, 65600, dtype=torch.bfloat16)[:, :vocabulary], torch.zeros(2).long(), 1.0, True)

bodies = [kernels.forward_kernel, kernels.backward_kernel, kernels.fused_kernel]
aligned = [(3, 151936, 1.0), (1, 151936, 0.7), (16, 152064, 2), (17, 16384, 1 / 3), (2, 65536, 1e-3)]
ragged = [(3, 151935, 1.0), (1, 16389, 0.7), (8, 100001, 16.0)]
counts = [len(launch_keys(bodies, lambda: launches(sizes))) for sizes in (aligned, ragged, aligned + ragged)]
print(json.dumps([*counts, len(launch_keys(bodies, cut_rows))]))
"""


def test_no_length_and_no_temperature_compiles_again() -> None:
    """Three kernels, once for rows that are 16-byte aligned and once for others; wherever vectors of [T] start."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    counted = run(sys.executable, "-c", COUNT_KEYS, cwd=REPOSITORY, env={**environment, "PYTHONPATH": PYTHONPATH})
    assert counted.returncode == 0, counted.stderr
    assert json.loads(counted.stdout) == [3, 3, 6, 1]


@pytest.mark.parametrize("impl", IMPLS)
def test_over_many_rows_errors_average_no_more_than_twice_torchs(impl: str) -> None:
    """Of one row the error of torch is luck."""
    squares: dict[str, list[torch.Tensor]] = {name: [] for name in NAMES}
    for seed in range(10):
        data = case(rand(32, 300, seed=seed, scale=3.0), 0.8, seed)
        exact = run_definition(torch.float64, data)
        for name, *values in zip(NAMES, exact, run_op(impl, data), run_definition(None, data), strict=True):
            squares[name].append(torch.stack([(value - values[0]).square().mean() for value in values[1:]]))
    for name, parts in squares.items():
        ours, torchs = torch.stack(parts).mean(0).sqrt()
        assert ours <= 2 * torchs, name


# -- proof that the checker bites ------------------------------------------------------------------------------------

MUTANTS = {
    "no running maximum": ("old_peak, peak = peak, tl.maximum(peak, tl.max(x, 0))", "old_peak, peak = 0.0, 0.0"),
    "maximum without rescaling": ("return peak, shrink * total + power, moment", "return peak, total + power, moment"),
    "moment without rescaling": ("moment = shrink * (moment + step * total)", "moment = moment"),
    "columns beyond V count": ('< V, other=float("-inf")', "< V, other=0.0"),
    "ragged end left out": ("if whole < V:", "if whole < 0:"),
    "impossible tokens poison the entropy": ("power * tl.maximum(z, _NOTHING)", "power * z"),
    "entropy in bits": ("moment / (others + own) * _LN_2", "moment / (others + own)"),
    "next token": ("token = tl.load(token_ids + number)", "token = tl.load(token_ids + number) + 1"),
    "temperature ignored forward": ("_read_row(row, V, token, logit, inverse_temperature * _LOG2_E",
                                    "_read_row(row, V, token, logit, _LOG2_E"),
    "no 1/temperature in backward": ("push = tl.load(dlogprobs + number) * inverse_temperature",
                                     "push = tl.load(dlogprobs + number)"),
    "entropy gradient without the entropy": ("push += tilt * tl.load(entropy + number)", "push += 0.0"),
    "entropy gradient of the wrong sign": ("push, tilt * _LN_2", "push, -tilt * _LN_2"),
    "no gradient at the token": ("tl.where(columns == token, mine, -tl.exp2(log2_p) * weight)",
                                 "-tl.exp2(log2_p) * weight"),
    "token counted twice": ("x = tl.where(whole + columns == token, float(\"-inf\"), x)", "pass"),
    "entropy without the token": ("all_moments += ", "lost = "),
    "entropy's slope left out at the token": ("mine -= ", "lost = "),
}
HIGHER_LATER = rand(4, 8200) + 2.0 * (torch.arange(8200, device=DEVICE) >= 4096)  # both blocks have weight
DISTINGUISHING = [case(rand(4, 4097, scale=4.0), 0.6), case(HIGHER_LATER), case(extremes("rising to 6e4", 8200), 0.7),
                  (case(extremes("first half impossible", 8200), 0.7)._replace(
                      token_ids=torch.full((4,), 8000, device=DEVICE)))]


def rejected(bodies: object) -> bool:
    """Whether the checker complains about kernels on at least one of the inputs above."""

    def run(data: Case) -> Results:
        logprobs, entropy, normalizer = bodies.forward(data.logits, data.token_ids, data.temperature, True)
        return logprobs, entropy, bodies.backward(data.logits, data.token_ids, normalizer, entropy, data.dlogprobs,
                                                  data.dentropy, data.temperature)

    return any(complaints(run, data) for data in DISTINGUISHING)


@pytest.mark.parametrize("name", MUTANTS)
def test_checker_rejects(name: str, tmp_path: Path) -> None:
    right, wrong = MUTANTS[name]
    source = Path(kernels.__file__).read_text("utf-8")
    assert right in source, f"the kernels no longer contain `{right}`"
    file = tmp_path / "mutant.py"
    file.write_text(source.replace(right, wrong), "utf-8")
    specification = importlib.util.spec_from_file_location("mutant", file)
    mutant = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(mutant)
    assert rejected(mutant)


def test_checker_accepts_the_kernels_themselves() -> None:
    assert not rejected(kernels)
