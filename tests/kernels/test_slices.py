"""Copies of slices against plain torch: dtypes, strides, ragged and empty shapes, threads; what the door refuses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from veripo_kernels import copy_slices, cpp, slices_torch
from veripo_kernels.dispatch import Impl

from tests.kernels.test_csrc import COMPILER, library  # noqa: F401  library: a fixture that loads the op

IMPLS = [pytest.param("cpp", marks=COMPILER), "torch"]
PAIRS = [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.float32, torch.float16),
         (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16)]
"""From which dtype to which the compiled op copies."""
SHAPES = [(1, 1), (1, 7), (3, 1), (5, 33), (1, 2048), (1, 2049), (2, 16385), (300, 17), (0, 4), (4, 0), (1, 140_001)]
"""One element, vectors, blocks and tiles and one more element, many short rows, nothing."""


def matrix(rows: int, columns: int, dtype: torch.dtype, *, gap: int = 0, seed: int = 0) -> torch.Tensor:
    """Random columns of a larger matrix whose other `gap` columns are as random."""
    values = torch.randn(rows, columns + gap, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return values[:, gap // 2:gap // 2 + columns]


def checksum(tensors: list[torch.Tensor]) -> int:
    """The definition in Python's integers."""
    words = [word for tensor in tensors for word in tensor.contiguous().view(torch.int16).view(-1).tolist()]
    return sum(word % 65536 for word in words)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("gap", [0, 5])
@pytest.mark.parametrize(("dtype", "to"), PAIRS)
def test_equals_the_definition(dtype: torch.dtype, to: torch.dtype, gap: int, impl: Impl) -> None:
    sources = [matrix(*shape, dtype, gap=gap, seed=number) for number, shape in enumerate(SHAPES)]
    wholes = [torch.full((rows, columns + 2 * gap), 7.0, dtype=to) for rows, columns in SHAPES]
    targets = [whole[:, gap:gap + columns] for whole, (_, columns) in zip(wholes, SHAPES, strict=True)]
    sums = copy_slices(sources, targets, impl=impl)
    for source, target, whole in zip(sources, targets, wholes, strict=True):
        assert torch.equal(target, source.to(to))
        assert (whole[:, :gap] == 7).all() and (whole[:, gap + source.shape[1]:] == 7).all()
    assert sums.dtype == torch.int64 and sums.tolist() == [checksum(targets)] * 2


@pytest.mark.parametrize("to", [torch.bfloat16, torch.float16])
def test_every_float_is_rounded_as_torch_does(to: torch.dtype) -> None:
    """Halves between two numbers, subnormal and infinite ones among all bits of the upper half. NaN may be another."""
    upper = torch.arange(-2**15, 2**15, dtype=torch.int32) << 16
    bits = torch.stack([upper, upper | 1, upper | 0x8000, upper | 0x8001, upper | 0x7fff, upper | 0xffff])
    source, target = bits.view(torch.float32), torch.zeros(bits.shape, dtype=to)
    copy_slices([source], [target])
    expected, known = source.to(to), ~source.isnan()
    assert torch.equal(target.view(torch.int16)[known], expected.view(torch.int16)[known])
    assert target[~known].isnan().all()


@COMPILER
def test_bits_that_are_no_number_stay() -> None:
    bits = torch.randint(-2**31, 2**31, (3, 5000), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        source, target = bits.view(dtype), torch.zeros_like(bits).view(dtype)
        copy_slices([source], [target], impl="cpp")
        assert torch.equal(target.view(torch.int32), bits)


@COMPILER
@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 700), st.integers(0, 3), st.sampled_from(PAIRS)),
                min_size=1, max_size=8), st.integers(1, 4))
def test_no_result_depends_on_the_threads(slices: list, threads: int) -> None:
    sources = [matrix(rows, columns, pair[0], gap=gap, seed=gap) for rows, columns, gap, pair in slices]
    targets = [torch.zeros(source.shape, dtype=pair[1]) for source, (*_, pair) in zip(sources, slices, strict=True)]
    expected = [torch.zeros_like(target) for target in targets]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        sums = copy_slices(sources, targets, impl="cpp")
    finally:
        torch.set_num_threads(before)
    assert torch.equal(sums, slices_torch.copy_slices(sources, expected))
    assert all(map(torch.equal, targets, expected))


@COMPILER
def test_sums_do_not_overflow() -> None:
    """The largest words, in more elements than 32 bits could add up, and an odd number of them."""
    for count in (1, 300_001):
        source = torch.full((1, count), -1, dtype=torch.int16).view(torch.bfloat16)
        assert copy_slices([source], [torch.zeros_like(source)], impl="cpp").tolist() == [count * 0xffff] * 2


def test_dtypes_that_are_not_compiled_go_through_torch() -> None:
    source, target = matrix(3, 4, torch.bfloat16), torch.zeros(3, 4)
    copy_slices([source], [target])
    assert torch.equal(target, source.float())
    with pytest.raises(ValueError, match=r"impl='cpp' has no \(torch.bfloat16, torch.float32\); impl='torch' does"):
        copy_slices([source], [target], impl="cpp")


@pytest.mark.parametrize("impl", IMPLS)
def test_parameters_are_written_without_a_gradient(impl: Impl) -> None:
    source, target = torch.nn.Parameter(matrix(3, 4, torch.float32)), torch.nn.Parameter(torch.zeros(3, 4))
    copy_slices([source], [target], impl=impl)
    assert torch.equal(source, target) and target.is_leaf and target.grad_fn is None


def test_nothing_to_copy() -> None:
    assert copy_slices([], []).tolist() == [0, 0]


@COMPILER
def test_shapes_are_known_without_data() -> None:
    assert cpp.missing() is None
    with torch._subclasses.FakeTensorMode():
        sums = cpp.copy_slices([torch.zeros(2, 3)], [torch.zeros(2, 3)])
    assert (list(sums.shape), sums.dtype) == ([2], torch.int64)


# -- what is refused --------------------------------------------------------------------------------------------------

WHOLE = torch.zeros(4, 10)


@pytest.mark.parametrize(("sources", "targets", "sentence"), [
    ([WHOLE], [], "sources and targets must be equally many, got 1 and 0"),
    ([WHOLE, WHOLE], [torch.zeros(4, 10), torch.zeros(4, 9)],
     "targets[1] must have shape [4, 10] like sources[1], got [4, 9]"),
    ([WHOLE[0]], [torch.zeros(10)], "sources[0] must have shape [rows, columns], got [10]"),
    ([WHOLE.t()], [torch.zeros(10, 4)], "sources[0] must have its columns next to each other, got a stride of 10"),
    ([WHOLE], [torch.zeros(10, 4).t()], "targets[0] must have its columns next to each other, got a stride of 4"),
    ([WHOLE.int()], [torch.zeros(4, 10)],
     "sources[0] must be of a floating dtype of 16 bits or more, got torch.int32"),
    ([WHOLE], [torch.zeros(4, 10, device="meta")], "targets[0] must be on cpu, got meta"),
    ([WHOLE], [torch.zeros(10).expand(4, 10)], "targets[0] must have rows that do not overlap, got strides (0, 1)"),
    ([WHOLE], [WHOLE], "sources[0] and targets[0] share memory"),
    ([WHOLE[:, :6]], [WHOLE[:, 4:]], "sources[0] and targets[0] share memory"),
    ([WHOLE[:, 4:]], [WHOLE[:, :6]], "targets[0] and sources[0] share memory"),
    ([torch.zeros(2, 10)] * 2, [WHOLE[:2], WHOLE[1:3]], "targets[0] and targets[1] share memory"),
    ([torch.zeros(1, 5), torch.zeros(2, 10)], [WHOLE.view(-1)[:5].view(1, 5), WHOLE[:2]],
     "targets[0] and targets[1] share memory"),
])
def test_what_is_refused(sources: list, targets: list, sentence: str) -> None:
    with pytest.raises(ValueError) as caught:
        copy_slices(sources, targets)
    assert str(caught.value) == sentence


@pytest.mark.parametrize(("sources", "targets"), [
    ([WHOLE[:, :5]], [WHOLE[:, 5:]]), ([WHOLE[:2]], [WHOLE[2:]]), ([WHOLE[:2]] * 2, [WHOLE[2:], torch.zeros(2, 10)]),
    ([torch.zeros(4, 3)] * 3, [WHOLE[:, :3], WHOLE[:, 3:6], WHOLE[:, 7:]])])
def test_slices_of_one_matrix_need_not_share_memory(sources: list, targets: list) -> None:
    copy_slices(sources, targets)


@COMPILER
@pytest.mark.parametrize(("sources", "targets", "words"), [
    ([WHOLE], [], "sources and targets must be equally many, and one at least; got 1 and 0"),
    ([WHOLE], [torch.zeros(4, 9)], r"targets\[0\] must have shape \[4, 10\], got \[4, 9\]"),
    ([WHOLE[0]], [torch.zeros(10)], r"sources\[0\] must have shape \[rows, columns\]"),
    ([WHOLE], [torch.zeros(10, 4).t()], r"targets\[0\] must have its columns next to each other"),
    ([WHOLE.double()], [WHOLE], r"sources\[0\] must be float32, bfloat16 or float16 .* got Double to Float"),
    ([WHOLE.bfloat16()], [WHOLE.half()], r"sources\[0\] must be .* got BFloat16 to Half")])
def test_what_the_compiled_op_refuses_itself(sources: list, targets: list, words: str) -> None:
    assert cpp.missing() is None
    with pytest.raises(RuntimeError, match=words):
        cpp.copy_slices(sources, targets)
