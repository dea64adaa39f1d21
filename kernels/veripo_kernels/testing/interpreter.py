"""Repair of the interpreter of Triton 3.6 to 3.9, which keeps bfloat16 as 16-bit integers and computes with those.

Also repaired: libdevice functions (return None), `range` over a kernel argument with numpy >= 2.4 (raises), and float
arguments (stay Python floats, so that `.to()` fails and they never round to float32). tests/conftest.py installs it.
Not repaired: bfloat16 atomics, inline assembly, autotuning over several configurations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.language.extra import libdevice
from triton.language.extra.cuda import libdevice as cuda_libdevice
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder as Builder
from triton.runtime.interpreter import TensorHandle

Array = np.ndarray[Any, Any]

LIBDEVICE: dict[str, Callable[[Array], Array]] = {
    "exp": np.exp, "exp2": np.exp2, "expm1": np.expm1, "log": np.log, "log2": np.log2, "log1p": np.log1p,
    "sqrt": np.sqrt, "rsqrt": lambda values: 1 / np.sqrt(values), "tanh": np.tanh,
}


def decode(bits: Array) -> Array:
    """float32 values of bfloat16 given as uint16."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def encode(values: Array) -> Array:
    """uint16 bits of the nearest bfloat16, ties to even; NaN stays NaN."""
    single = np.atleast_1d(np.asarray(values, dtype=np.float32))
    bits = single.view(np.uint32)
    bits = bits + np.uint32(0x7FFF) + (bits >> 16 & 1)
    return np.where(np.isnan(single), 0x7FC0, bits >> 16).astype(np.uint16).reshape(np.shape(values) or (1,))


def install() -> None:
    """Patches the interpreter of this process, once."""
    if hasattr(Builder, "veripo_repaired"):
        return
    Builder.veripo_repaired = True
    Builder.binary_op = _in_float32(Builder.binary_op)
    if hasattr(Builder, "create_fneg"):  # before 3.9 a negation is a subtraction from 0
        Builder.create_fneg = _negation(Builder.create_fneg)
    Builder.create_fma = _fma(Builder.create_fma)
    Builder.create_dot = _dot(Builder.create_dot)
    Builder.cast_impl = _cast(Builder.cast_impl)
    Builder.get_bf16 = lambda self, value: TensorHandle(encode(np.array([value])), tl.bfloat16)
    interpreter._implicit_cvt = _float_arguments(interpreter._implicit_cvt)
    interpreter._patch_lang_tensor = _index(interpreter._patch_lang_tensor)
    for name, function in LIBDEVICE.items():
        for module in (libdevice, cuda_libdevice):
            setattr(module, name, _elementwise(function))


def _is_bf16(handle: Any) -> bool:
    return isinstance(handle, TensorHandle) and handle.dtype.scalar == tl.bfloat16


def _widen(handle: Any) -> Any:
    return TensorHandle(decode(handle.data), tl.float32) if _is_bf16(handle) else handle


def _in_float32(original: Callable[..., Any]) -> Callable[..., Any]:
    """Arithmetic and comparison of bfloat16 in float32, rounded once; Triton widens before all other functions."""

    def binary_op(self: Any, left: Any, right: Any, function: Callable[..., Array]) -> Any:
        if not _is_bf16(left) and not _is_bf16(right):
            return original(self, left, right, function)
        result = function(_widen(left).data, _widen(right).data)
        return TensorHandle(result, tl.int1) if result.dtype == bool else TensorHandle(encode(result), tl.bfloat16)

    return binary_op


def _negation(original: Callable[..., Any]) -> Callable[..., Any]:
    def create_fneg(self: Any, value: Any) -> Any:
        return TensorHandle(value.data ^ np.uint16(0x8000), tl.bfloat16) if _is_bf16(value) else original(self, value)

    return create_fneg


def _fma(original: Callable[..., Any]) -> Callable[..., Any]:
    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        if not _is_bf16(z):
            return original(self, x, y, z)
        exact = decode(x.data).astype(np.float64) * decode(y.data) + decode(z.data)
        return TensorHandle(encode(exact), tl.bfloat16)

    return create_fma


def _dot(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, a, b, accumulator, *options: original(self, _widen(a), _widen(b), accumulator, *options)


def _cast(original: Callable[..., Any]) -> Callable[..., Any]:
    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        if target.scalar == tl.bfloat16:
            return TensorHandle(encode(source.data), tl.bfloat16)
        wide = _widen(source)
        return wide if target.scalar == wide.dtype.scalar else original(self, wide, target)

    return cast_impl


def _float_arguments(original: Callable[..., Any]) -> Callable[..., Any]:
    def convert(argument: Any) -> Any:
        if isinstance(argument, float):
            return tl.tensor(TensorHandle(np.array([argument], dtype=np.float32), tl.float32), tl.float32)
        return original(argument)

    return convert


def _index(original: Callable[..., Any]) -> Callable[..., Any]:
    def patch(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    return patch


def _elementwise(function: Callable[[Array], Array]) -> Callable[..., Any]:
    def call(x: Any, **_context: Any) -> Any:
        values = x.handle.data
        if values.dtype not in (np.float32, np.float64):
            raise TypeError(f"libdevice takes float32 and float64, got {x.dtype}")
        return tl.tensor(TensorHandle(function(values).astype(values.dtype), x.dtype.scalar), x.type)

    return call
