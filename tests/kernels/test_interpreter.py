"""The repaired interpreter computes bfloat16 as torch does, bit by bit where torch defines the bits."""

from __future__ import annotations

import os

import pytest
import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="kernels are compiled here")


def rand(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def bits(values: torch.Tensor) -> list[int]:
    return values.view(torch.int16).tolist()


@triton.jit
def arithmetic(a_ptr, b_ptr, out_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    a, b = tl.load(a_ptr + at), tl.load(b_ptr + at)
    tl.store(out_ptr + at, a + b)
    tl.store(out_ptr + SIZE + at, a - b)
    tl.store(out_ptr + 2 * SIZE + at, a * b)
    tl.store(out_ptr + 3 * SIZE + at, a / b)
    tl.store(out_ptr + 4 * SIZE + at, tl.maximum(a, b))
    tl.store(out_ptr + 5 * SIZE + at, tl.where(a < b, -a, tl.abs(b)))
    tl.store(out_ptr + 6 * SIZE + at, a * 2.5 + 1)
    tl.store(out_ptr + 7 * SIZE + at, tl.full([SIZE], -1.7, tl.bfloat16) + a)
    tl.store(out_ptr + 8 * SIZE + at, ((a < b) & (b > 0.5)).to(tl.float32))


def test_bfloat16_arithmetic() -> None:
    a, b = rand(64).bfloat16(), rand(64, seed=1, scale=3.0).bfloat16()
    out = torch.empty(9, 64, dtype=torch.bfloat16)
    arithmetic[(1,)](a, b, out, SIZE=64)
    constant = torch.tensor(-1.7).bfloat16()
    expected = [a + b, a - b, a * b, (a.float() / b.float()).bfloat16(), torch.maximum(a, b),
                torch.where(a < b, -a, b.abs()), a * 2.5 + 1, constant + a,
                ((a < b) & (b > 0.5)).bfloat16()]
    for row, (got, want) in enumerate(zip(out, expected, strict=True)):
        assert bits(got) == bits(want), row


@triton.jit
def fused_multiply_add(a_ptr, b_ptr, out_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    a, b = tl.load(a_ptr + at), tl.load(b_ptr + at)
    tl.store(out_ptr + at, tl.fma(a, b, a))


def test_bfloat16_fma_rounds_once() -> None:
    a, b = rand(64).bfloat16(), rand(64, seed=1).bfloat16()
    out = torch.empty_like(a)
    fused_multiply_add[(1,)](a, b, out, SIZE=64)
    assert bits(out) == bits((a.double() * b.double() + a.double()).float().bfloat16())


@triton.jit
def convert(a_ptr, out_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out_ptr + at, tl.load(a_ptr + at).to(out_ptr.dtype.element_ty))


SPECIAL = [0.0, -0.0, 1.00390625, 1.01171875, -1.00390625, 3.4e38, -3.4e38, 1e-40, -1e-45, float("inf"), float("-inf")]


@pytest.mark.parametrize("source", [torch.float32, torch.float64, torch.float16, torch.int32])
def test_rounding_to_bfloat16_is_to_the_nearest_even(source: torch.dtype) -> None:
    values = torch.cat([torch.tensor(SPECIAL), rand(53, scale=100.0)])
    values = values.clamp(-1e6, 1e6).to(source) if source == torch.int32 else values.to(source)
    out = torch.empty(64, dtype=torch.bfloat16)
    convert[(1,)](values, out, SIZE=64)
    assert bits(out) == bits(values.bfloat16())


def test_rounding_keeps_nan() -> None:
    out = torch.empty(4, dtype=torch.bfloat16)
    convert[(1,)](torch.tensor([0x7F800001, 0x7FFFFFFF, -1, 0], dtype=torch.int32).view(torch.float32), out, SIZE=4)
    assert out.isnan().tolist() == [True, True, True, False]


@pytest.mark.parametrize("target", [torch.float32, torch.float64, torch.float16, torch.int32, torch.bfloat16])
def test_conversion_from_bfloat16(target: torch.dtype) -> None:
    values = rand(64, scale=100.0).bfloat16()
    out = torch.empty(64, dtype=target)
    convert[(1,)](values, out, SIZE=64)
    assert torch.equal(out, values.to(target))


@triton.jit
def round_as_asked(a_ptr, out_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    a = tl.load(a_ptr + at)
    tl.store(out_ptr + at, a.to(tl.bfloat16, fp_downcast_rounding="rtz"))
    tl.store(out_ptr + SIZE + at, a.to(tl.bfloat16, fp_downcast_rounding="rtne"))


def test_a_rounding_can_be_asked_for() -> None:
    values = torch.cat([torch.tensor([1.00390625, 1.01171875]), rand(62)])  # the first two are ties
    out = torch.empty(2, 64, dtype=torch.bfloat16)
    round_as_asked[(1,)](values, out, SIZE=64)
    assert bits(out[0]) == bits((values.view(torch.int32) & -65536).view(torch.float32).bfloat16())
    assert bits(out[1]) == bits(values.bfloat16())


@triton.jit
def product(a_ptr, b_ptr, out_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    square = at[:, None] * SIZE + at[None, :]
    tl.store(out_ptr + square, tl.dot(tl.load(a_ptr + square), tl.trans(tl.load(b_ptr + square))))


def test_bfloat16_matrix_product_adds_up_in_float32() -> None:
    a, b = rand(32, 32).bfloat16(), rand(32, 32, seed=1).bfloat16()
    out = torch.empty(32, 32)
    product[(1,)](a, b, out, SIZE=32)
    torch.testing.assert_close(out, a.float() @ b.float().T, rtol=1e-6, atol=1e-5)


@triton.jit
def reduce(a_ptr, out_ptr, SIZE: tl.constexpr):
    a = tl.load(a_ptr + tl.arange(0, SIZE))
    tl.store(out_ptr, tl.max(a, 0))
    tl.store(out_ptr + 1, tl.min(a, 0))
    tl.store(out_ptr + 2, tl.sum(a.to(tl.float32), 0))


def test_bfloat16_reductions() -> None:
    a = rand(64).bfloat16()
    out = torch.empty(3)
    reduce[(1,)](a, out, SIZE=64)
    assert out[0] == a.max() and out[1] == a.min()
    torch.testing.assert_close(out[2], a.float().sum())


@triton.jit
def library(a_ptr, out_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    a = tl.load(a_ptr + at)
    tl.store(out_ptr + at, libdevice.expm1(a))
    tl.store(out_ptr + SIZE + at, libdevice.log1p(a))
    tl.store(out_ptr + 2 * SIZE + at, libdevice.rsqrt(a))
    tl.store(out_ptr + 3 * SIZE + at, libdevice.tanh(a))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_libdevice(dtype: torch.dtype) -> None:
    a = rand(16, scale=1e-3).abs().to(dtype)
    out = torch.empty(4, 16, dtype=dtype)
    library[(1,)](a, out, SIZE=16)
    torch.testing.assert_close(out, torch.stack([a.expm1(), a.log1p(), a.rsqrt(), a.tanh()]))


def test_libdevice_refuses_bfloat16_as_the_compiler_does() -> None:
    a = rand(16).bfloat16()
    with pytest.raises(triton.runtime.errors.InterpreterError, match="float32"):
        library[(1,)](a, torch.empty(4, 16, dtype=torch.bfloat16), SIZE=16)


@triton.jit
def loop(out_ptr, length, step, factor):
    total = 0.0
    for start in range(0, length, step):
        total += start * factor.to(tl.float32)
    tl.store(out_ptr, total)
    tl.store(out_ptr + 1, factor + 1e-9)


def test_lengths_and_float_arguments_are_numbers_of_the_kernel() -> None:
    out = torch.empty(2, dtype=torch.float64)
    loop[(1,)](out, 10, 3, 0.1)
    single = torch.tensor(0.1)
    assert out[0].item() == pytest.approx(18 * 0.1)
    assert out[1].item() == (single + 1e-9).item() != 0.1 + 1e-9  # float32, as when compiled
