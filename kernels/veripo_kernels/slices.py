"""Many slices of parameters copied in one call, with checksums of what was sent and what arrived: the hand-over of
weights.

Slices are matrices whose rows may lie apart (a part of the columns of a larger one). A checksum is the sum of the words
of 16 bits that elements consist of, modulo 2^64: no order of threads or blocks changes it. `slices_torch.py` defines
the op in plain torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from veripo_kernels import cpp, slices_torch
from veripo_kernels.derivatives import refuse_transforms, refuse_wrapped
from veripo_kernels.dispatch import Impl, choose

_STAY = (torch.float32, torch.bfloat16, torch.float16)
_COMPILED = {*((dtype, dtype) for dtype in _STAY), *((torch.float32, dtype) for dtype in _STAY)}
"""From which dtype to which the compiled op copies."""

_Span = tuple[int, int, torch.Tensor, str]
"""First byte, the one after the last, the tensor, and what it is called."""


def copy_slices(sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor], *, impl: Impl = "auto"
                ) -> torch.Tensor:
    """Copy each source into the target of its place, rounded to the target's dtype (to nearest even).

    Args:
        sources: [rows, columns] each, of a floating dtype of 16 bits or more, on one device, with columns next to each
            other.
        targets: the same shapes on that device; share no memory with each other or a source.

    Returns:
        int64 [2] on that device: the checksum of what was read and rounded, and that of what the targets hold.

    Raises:
        ValueError: another number of tensors, a shape, dtype, device or stride that does not fit, or shared memory;
            names the tensor. RuntimeError: `impl` cannot be used here. NotImplementedError: tensors of torch.func's
            transforms, or with a tangent.
    """
    refuse_wrapped("copy_slices", *sources, *targets)
    refuse_transforms("copy_slices", *sources, *targets)
    _check(sources, targets)
    if not targets:
        return torch.zeros(2, dtype=torch.int64)
    pairs = {(source.dtype, target.dtype) for source, target in zip(sources, targets, strict=True)}
    sources, targets = [source.detach() for source in sources], [target.detach() for target in targets]
    if _implementation(impl, targets[0].device, pairs) == "cpp":
        return cpp.copy_slices(sources, targets)
    return slices_torch.copy_slices(sources, targets)


def _implementation(impl: Impl, device: torch.device, pairs: set[tuple[torch.dtype, torch.dtype]]) -> Impl:
    """What computes the op; `auto` takes plain torch for dtypes that the compiled op does not have."""
    others = sorted(str(pair) for pair in pairs - _COMPILED)
    if impl == "cpp" and others:
        raise ValueError(f"copy_slices: impl='cpp' has no {others[0]}; impl='torch' does")
    return choose("copy_slices", "torch" if others else impl, device)


# -- the door ---------------------------------------------------------------------------------------------------------

def _check(sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> None:
    if len(sources) != len(targets):
        raise ValueError(f"sources and targets must be equally many, got {len(sources)} and {len(targets)}")
    for number, (source, target) in enumerate(zip(sources, targets, strict=True)):
        _check_matrix(f"sources[{number}]", source, sources[0].device)
        _check_matrix(f"targets[{number}]", target, sources[0].device)
        if len(target) > 1 and target.stride(0) < target.shape[1]:
            raise ValueError(f"targets[{number}] must have rows that do not overlap, got strides {target.stride()}")
        if source.shape != target.shape:
            raise ValueError(f"targets[{number}] must have shape {list(source.shape)} like sources[{number}], "
                             f"got {list(target.shape)}")
    _refuse_shared_memory(sources, targets)


def _check_matrix(name: str, tensor: torch.Tensor, device: torch.device) -> None:
    if not tensor.is_floating_point() or tensor.element_size() < 2:
        raise ValueError(f"{name} must be of a floating dtype of 16 bits or more, got {tensor.dtype}")
    if tensor.ndim != 2:
        raise ValueError(f"{name} must have shape [rows, columns], got {list(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device}, got {tensor.device}")
    if tensor.shape[1] > 1 and tensor.stride(1) != 1:
        raise ValueError(f"{name} must have its columns next to each other, got a stride of {tensor.stride(1)}")


def _refuse_shared_memory(sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> None:
    """Compare in order of address: a target with all that begin before it ends."""
    spans = [*_spans("sources", sources), *_spans("targets", targets)]
    spans.sort(key=lambda span: span[0])
    open_spans: list[_Span] = []
    for span in spans:
        open_spans = [other for other in open_spans if other[1] > span[0]]
        for other in open_spans:
            if (span[3] + other[3]).count("sources") < 2 and _share_memory(other, span):
                raise ValueError(f"{other[3]} and {span[3]} share memory")
        open_spans.append(span)


def _spans(name: str, tensors: Sequence[torch.Tensor]) -> Iterator[_Span]:
    for number, tensor in enumerate(tensors):
        if tensor.numel():
            first, (rows, columns) = tensor.data_ptr(), tensor.shape
            elements = (rows - 1) * tensor.stride(0) + columns
            yield first, first + elements * tensor.element_size(), tensor, f"{name}[{number}]"


def _share_memory(one: _Span, other: _Span) -> bool:
    """Whether two tensors whose spans overlap share a byte; those with different distances of rows count as sharing.

    Rows at equal distances are columns of one larger matrix: they share nothing when their columns do not.
    """
    pitch = one[2].stride(0) * one[2].element_size()
    if pitch != other[2].stride(0) * other[2].element_size() or pitch <= 0:
        return True
    shift = (other[0] - one[0]) % pitch
    own, theirs = (span[2].shape[1] * span[2].element_size() for span in (one, other))
    return shift < own or shift + theirs > pitch
