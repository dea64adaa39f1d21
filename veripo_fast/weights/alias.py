"""One copy of the weights: the policy's parameters become views of the engine's, so that a sync moves nothing.

Query, key, value, gate and up are rows of the engine's fused matrices, the padded vocabulary is a prefix of rows, and
all else has equal shapes: on one rank, with equal dtype and device, every parameter can be a view.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from veripo_fast.weights.parts import SliceCopy
from veripo_fast.weights.plan import by_source


@dataclass(frozen=True)
class Aliasing:
    """What became of each parameter of the policy, by name."""

    aliased: tuple[str, ...]
    """Views of the engine's tensors."""
    copied: tuple[str, ...]
    """To be moved by every sync, because layout, dtype or device differ."""
    skipped: tuple[str, ...]
    """Not in the engine: a tower that it runs without, a head that is the embedding."""


def alias(copies: Sequence[SliceCopy], sources: Mapping[str, torch.Tensor], targets: Mapping[str, torch.Tensor]
          ) -> Aliasing:
    """Make parameters of the policy views of the engine's, which take over their values.

    The engine's tensors must stay where they are from now on: sleep may free the KV cache only.

    Args:
        copies: from `plan`. sources, targets: what its names mean.
    """
    aliased = set()
    for name, own in by_source(copies).items():
        view = _view(own, sources[name], targets)
        if view is not None:
            view.copy_(sources[name].detach())
            sources[name].data = view
            aliased.add(name)
    return sorted_out(copies, sources, aliased)


def sorted_out(copies: Sequence[SliceCopy], sources: Iterable[str], aliased: Collection[str] = ()) -> Aliasing:
    """What becomes of each parameter, by name, when these are views."""
    used = by_source(copies)
    return Aliasing(aliased=tuple(name for name in used if name in aliased),
                    copied=tuple(name for name in used if name not in aliased),
                    skipped=tuple(name for name in sources if name not in used))


def _view(copies: Sequence[SliceCopy], source: torch.Tensor, targets: Mapping[str, torch.Tensor]
          ) -> torch.Tensor | None:
    """The elements of the engine that are the whole parameter, in its shape; None where they cannot be."""
    part, target = copies[0].target, targets[copies[0].target.name]
    whole = len(copies) == 1 and part.contiguous and part.numel == source.numel()
    alike = target.dtype == source.dtype and target.device == source.device
    if not (whole and alike and target.is_contiguous()) or target.is_inference():
        return None
    return target.detach().view(-1)[part.offset:part.offset + part.numel].view(source.shape)
