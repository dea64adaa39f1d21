"""Bytes that the linear ops move on a GPU beside their matrix products, and how often the host waits: counted here, on
any machine, from what they launch. `grpo_loss` and `dpo_loss` too, of whose kernels only the launches are counted.

The op runs as it would on a GPU, at its full shape, on CPU tensors. Every aten op and every launch of a kernel of
`jit/` is recorded. Products and kernels are not executed, nor are aten ops on more than 64 MiB: their results stay
unwritten, which no control flow reads. `combine`'s results are set: a log-prob of -1 everywhere.

What counts. A product (`logit_tile`, `add_product`) reads its operands, and its result is written once: that is its
own. All else is beside it: reading a result that is added to and writing it again, tables of tiles, conversions, fills,
copies, scaling. An aten op reads each input once (a gather: as much as it gives) and writes each output once; views are
free. A kernel's bytes are its formula below, each address once.

Not counted: what a cache saves or a second reader costs; rows of `settle` whose guess was off (`kept` read and written
once more); `change_unit` where it changes something, once a later run's gradient is 32 times the first's (the head's
gradient read and written once more).

Where the host waits: ops whose result it needs (a number, a list, a shape that depends on values).

Letters: R rows of a run, V vocabulary, D hidden.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from veripo_kernels import dpo, grpo, linear, linear_loss, linear_triton
from veripo_kernels.jit import dpo as jit_dpo
from veripo_kernels.jit import grpo as jit_grpo
from veripo_kernels.jit import linear as jit
from veripo_kernels.jit import linear_sums as jit_sums

_EXECUTED_BYTES = 1 << 26
_FREE = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "detach", "scalar_tensor"}
"""Ops that launch nothing; a number that `where` takes travels as an argument."""
_PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm"}
_OVERWRITES = {"zero_", "fill_", "copy_", "fill", "zeros_like", "full_like", "ones_like", "new_zeros", "new_full",
               "new_ones"}
"""Ops that do not read their first argument's values."""
_GATHERS = {"index", "gather", "index_select", "take"}
_SCATTERS = {"index_put_", "_index_put_impl_", "index_copy_", "scatter_"}
_WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique_dim", "_unique2",
          "unique_consecutive", "bincount"}
_OPS = {definition._qualname: definition for definition in (
    linear._forward, linear._backward, linear_loss._policy, linear_loss._dpo, grpo._forward, grpo.scale_slopes,
    dpo._forward)}


@dataclass
class Traffic:
    """What was recorded."""

    read: Counter[str] = field(default_factory=Counter)
    """Bytes beside the products by launch."""
    written: Counter[str] = field(default_factory=Counter)
    launches: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)
    """How often the host waited, by op."""
    rows: list[int] = field(default_factory=list)
    """Rows of each launch of `logit_tile`."""
    modes: list[tuple[str, bool]] = field(default_factory=list)
    """Mode of each launch of `logit_tile`, and whether it takes the entropy along."""

    @property
    def beside(self) -> int:
        """Bytes moved beside the products."""
        return self.read.total() + self.written.total()

    def add(self, name: str, read: float, written: float) -> None:
        self.launches[name] += 1
        self.read[name] += int(read)
        self.written[name] += int(written)

    def largest(self, count: int = 8) -> dict[str, int]:
        """Bytes of the launches that move most, by name."""
        both = self.read + self.written
        return dict(both.most_common(count))


@contextmanager
def counted() -> Iterator[Traffic]:
    """Records what the linear ops do with impl="triton" inside; TRITON_INTERPRET=1 lets them take CPU tensors."""
    traffic = Traffic()
    tolist = torch.Tensor.tolist

    def waiting(values: torch.Tensor) -> Any:
        traffic.waits["tolist"] += 1
        return tolist(values)

    def numbers(values: torch.Tensor) -> list[float]:
        with _disable_current_modes():
            return list(tolist(values))

    def product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, add: bool) -> None:
        storage, place = total.untyped_storage(), (total.storage_offset(), total.shape)
        begun = storage.__dict__.setdefault("begun", set())
        traffic.add("product", add * _bytes(total), _bytes(total) if place in begun else 0)
        begun.add(place)

    with ExitStack() as stack:
        for module in [module for name, module in sys.modules.items() if name.startswith("veripo_kernels.")]:
            for name in ("check_bounds", "_check_ids"):  # they look at values, but only on a CPU
                if hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, lambda *_: None))
            if hasattr(module, "numbers_of"):  # of tensors that are on the CPU wherever the op runs
                stack.enter_context(mock.patch.object(module, "numbers_of", numbers))
        for module, name in _LAUNCHED:
            stack.enter_context(mock.patch.object(module, name, _Recorder(name, getattr(module, name), traffic)))
        stack.enter_context(mock.patch.object(linear_triton, "add_product", product))
        stack.enter_context(mock.patch.object(torch.Tensor, "tolist", waiting))
        stack.enter_context(_Mode(traffic))
        yield traffic


def _bytes(tensor: torch.Tensor) -> int:
    """Of the addresses that a tensor's elements have: a dimension that is expanded counts once."""
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return math.prod(size for size, stride in pairs if stride) * tensor.itemsize if tensor.numel() else 0


class _Mode(TorchDispatchMode):
    def __init__(self, traffic: Traffic) -> None:
        super().__init__()
        self.traffic = traffic

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "veripo":  # its own ops are what is counted
            with self:
                return _OPS[func._schema.name]._init_fn(*args, **kwargs)
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:  # `to`, `item`, `pad`: what they are made of is counted
                return func.decompose(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if _waits(name, args, kwargs):
            self.traffic.waits[name] += 1
        if func.is_view or name in _FREE:
            return func(*args, **kwargs)
        if name in _PRODUCTS:
            raise AssertionError(f"a product that is not add_product: {func}")
        out = _result(func, args, kwargs, tensors)
        read, written = _moved(func, name, args, tensors, out)
        self.traffic.add(name, read, written)
        return out


def _waits(name: str, args: Any, kwargs: Any) -> bool:
    if name in ("index", "index_put_", "_index_put_impl_"):
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return name in _WAITS or (name == "repeat_interleave" and kwargs.get("output_size") is None)


def _mutated(func: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
    found = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found.append(kwargs[argument.name] if argument.name in kwargs else args[place])
    return found


def _result(func: Any, args: Any, kwargs: Any, tensors: list[torch.Tensor]) -> Any:
    """What the op gives; on large tensors only its shapes."""
    if sum(map(_bytes, tensors)) <= _EXECUTED_BYTES:
        return func(*args, **kwargs)
    mutated = _mutated(func, args, kwargs)
    if mutated:
        return mutated[0]
    args, kwargs = tree_map_only(torch.Tensor, lambda value: value.to("meta"), (args, kwargs))
    shapes = func(*args, **kwargs | ({"device": "meta"} if "device" in kwargs else {}))
    return tree_map_only(torch.Tensor, lambda value: torch.empty_strided(
        value.shape, value.stride(), dtype=value.dtype), shapes)


def _moved(func: Any, name: str, args: Any, tensors: list[torch.Tensor], out: Any) -> tuple[int, int]:
    """Bytes read and written."""
    outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
    written = sum(map(_bytes, outputs))
    if name in _GATHERS:
        return written + sum(map(_bytes, tensors[1:])), written
    if name in _SCATTERS:
        values = tensors[-1]
        return sum(map(_bytes, tensors[1:])), _bytes(values) if values.dim() else written
    given = tensors[1:] if name in _OVERWRITES else tensors
    only_written = {id(tensor) for tensor in outputs} if func._schema.overload_name.endswith("out") else set()
    return sum(_bytes(tensor) for tensor in given if id(tensor) not in only_written), written


class _Recorder:
    """Stands for a kernel: a launch is counted, not run."""

    def __init__(self, name: str, kernel: Any, traffic: Traffic) -> None:
        self.name, self.traffic = name, traffic
        self.signature = inspect.signature(kernel.fn)

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            options = {key: value for key, value in options.items() if key not in ("num_warps", "num_stages")}
            given = self.signature.bind(*args, **options).arguments
            read, written = _KERNELS[self.name](given) if self.name in _KERNELS else (0, 0)
            self.traffic.add(self.name, read, written)
            if self.name == "logit_tile":
                self.traffic.rows.append(given["rows"])
                self.traffic.modes.append((given["MODE"], given["ENTROPY"]))
            if self.name == "combine":
                _set_statistics(given)

        return launch


def _set_statistics(given: dict[str, Any]) -> None:
    for name, value in (("logprobs", -1.0), ("entropy", 1.0), ("logsumexp", 1.0)):
        given[name].fill_(value)
    if given["KEEP"]:
        given["settled"].copy_(given["offset"])
        given["rest"].fill_(1.0)
        given["scale"].fill_(-0.1)


def _logit_tile(given: dict[str, Any]) -> tuple[float, float]:
    """The tables of the tiles, and the head in the other type; ids, and in GRADIENT what is known of the rows. The
    product's operands and `kept` are its own."""
    rows, tiles = given["rows"], -(-given["vocabulary"] // given["BV"])
    narrow = _bytes(given["narrow"]) if given["NARROW"] else 0
    if given["MODE"] == jit.GRADIENT:
        return rows * (8 + 4 * (6 if given["ENTROPY"] else 4)), narrow
    return rows * (8 + 4), rows * tiles * 4 * (3 if given["ENTROPY"] else 2) + narrow


def _own_logit(given: dict[str, Any]) -> tuple[float, float]:
    rows = given["token_ids"].numel()
    row_bytes = given["width"] * (given["hidden"].itemsize + given["weight"].itemsize)
    return rows * (row_bytes + 8), rows * 8


def _combine(given: dict[str, Any]) -> tuple[float, float]:
    read = given["tiles"] * (3 if given["ENTROPY"] else 2) + 1 + given["KEEP"]
    return 4 * given["rows"] * read, 4 * given["rows"] * (3 + 3 * given["KEEP"])


def _settle(given: dict[str, Any]) -> tuple[float, float]:
    """Without ENTROPY the own token alone; with it all that is kept."""
    rows, itemsize = given["rows"], given["kept"].itemsize
    if not given["ENTROPY"]:
        return rows * (8 + 3 * 4), rows * itemsize
    whole = rows * given["vocabulary"] * itemsize
    return whole + rows * (8 + 9 * 4 + 4 * given["tiles"]), whole


def _scale_rows(given: dict[str, Any]) -> tuple[float, float]:
    return _bytes(given["hidden"]) + _bytes(given["scale"]) + 4, _bytes(given["scaled"])


def _spread_rows(given: dict[str, Any]) -> tuple[float, float]:
    numbers = given["product"].numel()
    return 4 * numbers + _bytes(given["scale"]) + _bytes(given["rows"]), numbers * given["gradient"].itemsize


_KERNELS: dict[str, Callable[[dict[str, Any]], tuple[float, float]]] = {
    "logit_tile": _logit_tile, "own_logit": _own_logit, "combine": _combine, "settle": _settle,
    "choose_unit": lambda given: (8 * given["rows"] + 4, 12), "change_unit": lambda given: (4, 0),
    "scale_rows": _scale_rows, "spread_rows": _spread_rows}
_LAUNCHED = [*((jit if hasattr(jit, name) else jit_sums, name) for name in _KERNELS), (jit_dpo, "forward_kernel"),
             *((jit_grpo, name) for name in ("forward_kernel", "reduce_kernel", "backward_kernel"))]
