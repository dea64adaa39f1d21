"""linear_logprobs in both implementations against its definition in float64, judged by the error of plain torch.

Letters: T rows, V vocabulary, D hidden. The last tests break the code on purpose: the checker must reject each.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from veripo_kernels import linear_torch, linear_triton
from veripo_kernels.jit import linear as kernels
from veripo_kernels.linear import linear_logprobs
from veripo_kernels.scalars import as_tensor

from tests.support.linear_cases import (
    Rows,
    assert_readme_bounds,
    check,
    complaints,
    counted,
    install,
    mutant,
    relative_rms,
    rows,
    use_small_blocks,
)
from tests.support.loss_cases import rand

IMPLS = ("torch", "triton")
SINGLE, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {}, "temperature": {"temperature": 0.6}, "bias": {"bias": True}, "softcap": {"softcap": 3.0},
    "entropy": {"entropy": True}, "all": {"temperature": 0.6, "bias": True, "softcap": 3.0, "entropy": True},
    "frozen head": {"frozen": "head", "temperature": 0.6, "bias": True},
    "frozen hidden": {"frozen": "hidden", "bias": True},
    "frozen head, entropy": {"frozen": "head", "entropy": True},
    "frozen head, softcap": {"frozen": "head", "softcap": 3.0}}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_blocks(monkeypatch)


# -- against the definition ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, SINGLE, BF16, FP16])
@pytest.mark.parametrize("name", OPTIONS)
def test_torch_is_as_exact_as_the_definition(name: str, dtype: torch.dtype) -> None:
    for count, width, vocabulary in ((13, 12, 70), (8, 5, 64), (17, 8, 33), (1, 1, 1), (9, 3, 17)):
        assert check(rows(count, width, vocabulary, dtype=dtype, **OPTIONS[name]), "torch") == []


@pytest.mark.parametrize("dtype", [SINGLE, BF16, FP16])
@pytest.mark.parametrize("name", OPTIONS)
def test_triton_is_as_exact_as_the_definition(name: str, dtype: torch.dtype) -> None:
    assert check(rows(dtype=dtype, **OPTIONS[name]), "triton") == []


@pytest.mark.parametrize("impl", IMPLS)
def test_over_many_rows_errors_average_no_more_than_twice_torchs(impl: str) -> None:
    """Of one row the error of torch is luck."""
    squares: dict[str, list[torch.Tensor]] = {}
    for seed in range(8):
        data = rows(24, 12, 70, seed=seed, entropy=True)
        exact, plain, got = data.define(torch.float64), data.define(), data.run(impl)
        for name, want in exact.items():
            errors = [(value[name].double() - want).square().mean() for value in (got, plain)]
            squares.setdefault(name, []).append(torch.stack(errors))
    for name, parts in squares.items():
        ours, torchs = torch.stack(parts).mean(0).sqrt()
        assert ours <= 2 * torchs, name


@pytest.mark.parametrize(("count", "width", "vocabulary"), [(17, 33, 129), (1, 1, 1), (16, 16, 32), (3, 5, 31)])
def test_triton_shapes(count: int, width: int, vocabulary: int) -> None:
    """Aligned, one more than a block, ragged; an odd D is padded, an odd V not."""
    for dtype in (SINGLE, BF16):
        assert check(rows(count, width, vocabulary, dtype=dtype, entropy=True), "triton") == []


@pytest.mark.parametrize("dtype", [SINGLE, BF16])
def test_the_blocks_of_hopper(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert check(rows(6, 20, 300, dtype=dtype, temperature=0.7), "triton") == []


def test_the_vocabulary_of_qwen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    data = rows(3, 16, 151_936, dtype=BF16, temperature=0.9)
    assert check(replace(data, token_ids=torch.tensor([151_935, 2047, 2048])), "torch") == []


def test_gradcheck() -> None:
    data = rows(6, 5, 35, dtype=torch.float64, bias=True)
    leaves = [value.clone().requires_grad_() for value in (data.hidden, data.head, data.bias)]

    def run(hidden: torch.Tensor, head: torch.Tensor, bias: torch.Tensor, **options: Any) -> Any:
        return linear_logprobs(hidden, head, data.token_ids, bias=bias, temperature=0.7, impl="torch", **options)

    assert torch.autograd.gradcheck(partial(run, entropy=True, softcap=2.0), leaves)
    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradcheck(run, [leaves[0], *(leaf.detach() for leaf in leaves[1:])])


@pytest.mark.parametrize("impl", IMPLS)
def test_bounds_that_readme_promises(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    data = rows(40, 64, 300, dtype=BF16, scale=0.5, temperature=0.8)
    assert_readme_bounds(data.run(impl), data.define(torch.float64))


# -- extremes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("frozen", ["", "head"])
@pytest.mark.parametrize("scale", [30.0, 1e4])
def test_extreme_logits(impl: str, frozen: str, scale: float) -> None:
    data = rows(scale=scale / 4, frozen=frozen, temperature=0.7)
    likely = data.logits()
    data.token_ids[:3] = torch.stack([likely[0].argmax(), likely[1].argmin(), likely[2].argmax()])
    assert check(data, impl) == []
    if not frozen:
        assert check(replace(data, entropy_slopes=rand(13)), impl) == []


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shift", [-3e4, 3e4])
def test_logits_far_from_zero(impl: str, shift: float) -> None:
    assert check(replace(rows(entropy=True), bias=torch.full((70,), shift)), impl) == []


def sure(dtype: torch.dtype, gap: float, frozen: str) -> Rows:
    """Tokens whose logit lies about `gap` above the others'."""
    hidden, head = 0.1 * rand(5, 12), rand(70, 12, seed=1)
    hidden[:, 0], head[:, 0], head[5, 0] = gap, 0, 1
    return Rows(hidden.to(dtype), head.to(dtype), torch.full((5,), 5), None, torch.ones(5), None, frozen=frozen)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("frozen", ["", "head"])
@pytest.mark.parametrize("gap", [8.0, 16.0, 21.0])
def test_a_sure_token_keeps_the_bits_of_its_doubt(impl: str, frozen: str, gap: float) -> None:
    """1 - p of 3e-2, 1e-5 and 1e-7, which the definition has lost in float32: 90 % off."""
    for dtype, allowed in ((SINGLE, 1e-5), (BF16, 3e-3 if frozen == "" or gap < 20 else 3e-2)):
        data = sure(dtype, gap, frozen)
        got, want = data.run(impl), data.define(torch.float64)
        torch.testing.assert_close(got["logprobs"].double(), want["logprobs"], rtol=1e-5, atol=0)
        assert relative_rms(got["dhidden"], want["dhidden"]) <= allowed


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [SINGLE, BF16])
@pytest.mark.parametrize("frozen", ["", "head"])
def test_a_token_of_probability_e_to_minus_60(impl: str, dtype: torch.dtype, frozen: str) -> None:
    data = sure(dtype, 60.0, frozen)
    data = replace(data, token_ids=torch.tensor([0, 1, 69, 31, 32]))
    assert data.define(torch.float64)["logprobs"].max() < -55
    assert check(data, impl) == []


@pytest.mark.parametrize("impl", IMPLS)
def test_impossible_tokens(impl: str) -> None:
    data = rows(bias=True, entropy=True, temperature=0.7)
    data.bias[:34] = data.bias[60:64] = -torch.inf  # a tile of which nothing is left, in both implementations
    ids = torch.where(data.token_ids < 34, 40, data.token_ids)
    ids[ids // 4 == 15] = 64
    assert check(replace(data, token_ids=ids), impl) == []
    ids[2] = 3
    for entropy_slopes in (None, data.entropy_slopes):
        got = replace(data, token_ids=ids, entropy_slopes=entropy_slopes).run(impl)
        assert got["logprobs"][2] == -torch.inf and got["logprobs"].isfinite().sum() == 12
        assert all(got[name].isfinite().all() for name in ("dhidden", "dhead", "dbias"))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("frozen", ["", "head"])
@pytest.mark.parametrize("entropy", [False, True])
def test_unknown_tokens_are_nan_and_silent_without_a_gradient(impl: str, frozen: str, entropy: bool) -> None:
    data = rows(7, frozen=frozen, entropy=entropy)
    data.token_ids[1:4] = torch.tensor([-1, 70, -100])
    data.slopes[1:4] = 0
    if entropy:
        data.entropy_slopes[1:4] = 0
    got = data.run(impl)
    assert got["logprobs"].isnan().tolist() == [False, True, True, True, False, False, False]
    keep = torch.tensor([0, 4, 5, 6])
    few = replace(data, hidden=data.hidden[keep], token_ids=data.token_ids[keep], slopes=data.slopes[keep],
                  entropy_slopes=data.entropy_slopes[keep] if entropy else None).run(impl)
    torch.testing.assert_close(got["dhidden"][keep], few["dhidden"])
    assert not got["dhidden"][1:4].any()
    if not frozen:
        torch.testing.assert_close(got["dhead"], few["dhead"])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("size", [1e-8, 1e4])
def test_small_and_large_upstream_gradients(impl: str, size: float) -> None:
    for data in (rows(dtype=BF16), rows(dtype=BF16, entropy=True)):
        data.slopes[:] *= size * 10.0 ** torch.linspace(-4, 0, 13)
        if data.entropy_slopes is not None:
            data.entropy_slopes[:] *= size
        assert check(data, impl) == []


# -- what is not done ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_without_a_gradient_cost_no_product(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    data = rows(13, 12, 30)
    hidden, head = data.hidden.requires_grad_(), data.head.requires_grad_()
    with counted(impl) as forward:
        logprobs = linear_logprobs(hidden, head, data.token_ids, impl=impl)
    with counted(impl) as backward:
        logprobs.backward(torch.where(torch.arange(13) % 3 == 0, data.slopes, 0).float())
    assert (forward.logits, forward.gradients) == ([13], [])
    assert (backward.logits, backward.gradients) == ([5], [5, 5])
    hidden.grad = None
    with counted(impl) as two:
        linear_logprobs(hidden, head.detach(), data.token_ids, impl=impl).sum().backward()
    assert (two.logits, two.gradients) == ([13], [13])
    with counted(impl) as one, torch.no_grad():
        linear_logprobs(hidden, head.detach(), data.token_ids, impl=impl)
    assert (one.logits, one.gradients) == ([13], [])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("options", [{}, {"entropy": True, "bias": True}, {"frozen": "head"}, {"frozen": "hidden"}])
def test_no_rows(impl: str, options: dict[str, Any]) -> None:
    assert check(rows(0, **options), impl) == []


# -- layouts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("frozen", ["", "head"])
def test_leading_dimensions(impl: str, frozen: str) -> None:
    data = rows(12, frozen=frozen)
    flat = data.run(impl)
    for shape in ((3, 4), (2, 1, 6)):
        leaf = data.hidden.view(*shape, 12).clone().requires_grad_()
        head = data.head.clone().requires_grad_(frozen == "")
        logprobs, entropy = linear_logprobs(leaf, head, data.token_ids.view(shape), impl=impl, entropy=True)
        (logprobs * data.slopes.view(shape)).sum().backward()
        assert logprobs.shape == entropy.shape == shape and leaf.grad.shape == leaf.shape
        assert torch.equal(logprobs.flatten(), flat["logprobs"])
        torch.testing.assert_close(leaf.grad.view(12, 12), flat["dhidden"], rtol=1e-5, atol=1e-6)
    one = linear_logprobs(data.hidden[0], data.head, data.token_ids[0], impl=impl)
    torch.testing.assert_close(one, flat["logprobs"][0])


@pytest.mark.parametrize("impl", IMPLS)
def test_strides_and_starts(impl: str) -> None:
    """Every input may be a part of something wider, or start at an address that the copy engine cannot take."""
    data = rows(width=16, dtype=BF16, bias=True, frozen="hidden")

    def spread(values: torch.Tensor) -> torch.Tensor:
        return torch.stack([values, torch.zeros_like(values)], -1)[..., 0]

    def shifted(values: torch.Tensor) -> torch.Tensor:
        return torch.cat([values.new_zeros(1), values.flatten()])[1:].view(values.shape)

    assert shifted(data.head).data_ptr() % 16
    want = data.run(impl)
    for change in (spread, shifted):
        moved = replace(data, hidden=change(data.hidden), head=change(data.head), bias=change(data.bias),
                        token_ids=change(data.token_ids))
        for name, value in moved.run(impl).items():
            assert torch.equal(value, want[name]), name
    same = linear_logprobs(data.hidden[:1].expand(5, -1), data.head, data.token_ids[:1].expand(5), impl=impl)
    assert torch.equal(same, linear_logprobs(data.hidden[:1], data.head, data.token_ids[:1], impl=impl).expand(5))


# -- the op ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("direction", [False, True])
def test_opcheck(impl: str, direction: bool) -> None:
    data = rows(3, 5, 20, bias=True)
    leaves = [data.hidden.requires_grad_(), data.head.requires_grad_(not direction)]
    arguments = [*leaves, data.token_ids, None if direction else data.bias, as_tensor(0.7, None), not direction,
                 direction, impl]
    torch.library.opcheck(torch.ops.veripo.linear_logprobs.default, arguments)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("frozen", ["", "head"])
def test_compiles_as_one_graph_for_all_lengths(impl: str, frozen: str) -> None:
    @partial(torch.compile, fullgraph=True, dynamic=True, backend="aot_eager")
    def loss(hidden: torch.Tensor, head: torch.Tensor, ids: torch.Tensor, temperature: float) -> torch.Tensor:
        return linear_logprobs(hidden * 2, head, ids, temperature=temperature, impl=impl).square().sum()

    for count, temperature in ((4, 0.7), (5, 1.3)):
        data = rows(count, 8, 40)
        leaf, twin = (data.hidden.clone().requires_grad_() for _ in range(2))
        head = data.head.clone().requires_grad_(frozen == "")
        loss(leaf, head, data.token_ids, temperature).backward()
        dhead, head.grad = head.grad, None
        linear_logprobs(twin * 2, head, data.token_ids, temperature=temperature, impl=impl).square().sum().backward()
        torch.testing.assert_close(leaf.grad, twin.grad)
        assert (dhead is None) == (frozen == "head")
        if dhead is not None:
            torch.testing.assert_close(dhead, head.grad)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("frozen", ["", "head"])
def test_a_second_backward_gives_the_same(impl: str, frozen: str) -> None:
    data = rows()
    leaves = [data.hidden.clone().requires_grad_(), data.head.clone().requires_grad_(frozen == "")]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    total = (linear_logprobs(*leaves, data.token_ids, impl=impl) * data.slopes).sum()
    first, second = (torch.autograd.grad(total, wanted, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(leaves[0], data.hidden) and torch.equal(leaves[1], data.head)


@pytest.mark.parametrize("impl", IMPLS)
def test_one_of_the_two_gradients_alone(impl: str) -> None:
    data = rows(entropy=True)
    for half in (replace(data, slopes=0 * data.slopes), replace(data, entropy_slopes=0 * data.entropy_slopes)):
        assert check(half, impl) == []
    leaf, head = data.hidden.clone().requires_grad_(), data.head.clone().requires_grad_()
    _, entropy = linear_logprobs(leaf, head, data.token_ids, entropy=True, impl=impl)
    (entropy * data.entropy_slopes).sum().backward()
    torch.testing.assert_close(leaf.grad, replace(data, slopes=0 * data.slopes).run(impl)["dhidden"])


@pytest.mark.parametrize(("changes", "message"), [
    ({"head": torch.zeros(7, 4)}, r"head must have shape \[V, 5\] for hidden \[3, 5\], got \[7, 4\]"),
    ({"head": torch.zeros(7, 5).bfloat16()}, "one floating point dtype, got torch.float32 and torch.bfloat16"),
    ({"token_ids": torch.zeros(3)}, r"token_ids must be int64 \[3\], got torch.float32"),
    ({"token_ids": torch.zeros(2, dtype=torch.int64)}, r"token_ids must be int64 \[3\], got torch.int64 \[2\]"),
    ({"bias": torch.zeros(6)}, r"bias must have shape \[7\], got \[6\]"), ({"temperature": 0.0}, "temperature"),
    ({"softcap": -1.0}, "softcap must be above 0, got -1.0"), ({"impl": "cpp"}, "no implementation 'cpp'"),
    ({"hidden": torch.zeros(3, 5).double(), "head": torch.zeros(7, 5).double(), "impl": "triton"}, "torch.float64"),
])
def test_errors_name_the_argument_and_its_value(changes: dict[str, Any], message: str) -> None:
    arguments = {"hidden": torch.zeros(3, 5), "head": torch.zeros(7, 5),
                 "token_ids": torch.zeros(3, dtype=torch.int64)} | changes
    tensors = [arguments.pop(name) for name in ("hidden", "head", "token_ids")]
    with pytest.raises(ValueError, match=message):
        linear_logprobs(*tensors, **arguments)


# -- properties ------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None, derandomize=True)
@given(count=st.integers(1, 20), width=st.integers(1, 20), vocabulary=st.integers(1, 90), seed=st.integers(0, 99),
       dtype=st.sampled_from([SINGLE, BF16]), name=st.sampled_from(sorted(OPTIONS)), scale=st.floats(0.01, 1.5))
def test_any_shape_in_torch(count: int, width: int, vocabulary: int, seed: int, dtype: torch.dtype, name: str,
                            scale: float) -> None:
    data = rows(count, width, vocabulary, seed=seed, dtype=dtype, scale=scale, **OPTIONS[name])
    assert check(data, "torch", steps=3) == []


@settings(max_examples=6, deadline=None, derandomize=True)
@given(count=st.integers(1, 9), width=st.integers(1, 20), vocabulary=st.integers(1, 70), seed=st.integers(0, 99),
       name=st.sampled_from(sorted(OPTIONS)))
def test_any_shape_in_triton(count: int, width: int, vocabulary: int, seed: int, name: str) -> None:
    assert check(rows(count, width, vocabulary, seed=seed, dtype=BF16, **OPTIONS[name]), "triton", steps=3) == []


# -- proof that the checker bites ------------------------------------------------------------------------------------

MUTANTS: dict[str, tuple[ModuleType, str, str]] = {
    "no running maximum": (linear_torch, "torch.maximum(self.maximum, logits.amax(1))",
                           "torch.zeros_like(self.maximum)"),
    "sums without rescaling": (linear_torch, "self.others * decay + exp", "self.others + exp"),
    "no 1/temperature in backward": (linear_torch, "dlogits /= head.temperature", "pass"),
    "own token not kept out": (linear_torch, "logits[own] = -torch.inf", "pass"),
    "next tile's token": (linear_torch, "return rows, token_ids[rows] - start",
                          "return rows, token_ids[rows] - start - 1"),
    "kernel: no running maximum": (kernels, "higher = tl.maximum(peak, tl.max(m, 0))", "higher = peak * 0.0"),
    "kernel: columns beyond V count": (kernels, "| (v >= vocabulary)[None, :]", ""),
    "kernel: entropy of the others alone": (
        kernels, "weighted += tl.where(own > 0.0, own * (mine - peak), 0.0)", "pass"),
    "kernel: no softcap slope": (kernels, "gradient *= 1.0 - bend * bend * logits * logits", "pass"),
    "engine: no 1/temperature": (linear_triton, "torch.where(scale == 0, 0, scale / self.head.temperature)", "scale"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_checker_rejects(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, right, wrong = MUTANTS[name]
    install(module, mutant(module, right, wrong, tmp_path), monkeypatch)
    impl = "torch" if module is linear_torch else "triton"
    assert [found for scale in (20.0, 0.3)
            for found in check(rows(8, temperature=0.6, softcap=60.0, entropy=True, scale=scale), impl)] != []


def test_checker_needs_every_output() -> None:
    data = rows()
    got, own, truth = data.run("torch"), data.define(), data.define(torch.float64)
    for name, broken in product(truth, (None, torch.zeros(3), torch.nan)):
        changed = {key: value for key, value in got.items() if key != name or broken is not None}
        if isinstance(broken, torch.Tensor):
            changed[name] = broken
        elif broken is not None:
            changed[name] = got[name] * broken
        if "logprobs" in changed:
            assert len(complaints(changed, own, truth)) == 1
