"""On a CPU, what layers have freed goes back to the system between them.

glibc keeps a freed block where others above it are in use, and a training pass leaves many between what it saves: half
as much again as the pass holds. On a GPU torch's allocator has its own way.
"""

from __future__ import annotations

from typing import Any

import torch

from veripo_fast.run.memory import Resident

IDLE_BYTES = 256 << 20
"""Freed memory that may stay resident beside the most that was in use. Less costs time: a page that went back is filled
with zeros when it is used again (bench/step: 128 MiB take 4 % of a training phase)."""

_resident = Resident(IDLE_BYTES)


def watch_layers(language_model: Any) -> None:
    """Look at what is resident between decoder layers, in passes with a gradient: before each one's forward pass and
    behind its backward pass. Behind the first layer's the gradient of the embedding comes."""
    embedding = language_model.get_input_embeddings()
    for layer in language_model.layers:
        if not any(isinstance(hook, _Look) for hook in layer._forward_pre_hooks.values()):  # of the same model
            layer.register_forward_pre_hook(_Look(embedding if layer is language_model.layers[0] else None))


class _Look:
    """Before a layer.

    Args:
        embedding: whose weight gets its gradient behind the layer's backward pass; None: the layer is not the first.
    """

    def __init__(self, embedding: torch.nn.Module | None) -> None:
        self.embedding = embedding

    def __call__(self, layer: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        hidden = inputs[0]
        if hidden.requires_grad and hidden.device.type == "cpu":
            _resident.look()
            hidden.register_hook(lambda _: _resident.look(self._coming()))

    def _coming(self) -> int:
        """Bytes of the embedding's gradient; whoever shards the model has put another weight in its place."""
        weight = None if self.embedding is None else self.embedding.weight
        return weight.nbytes if isinstance(weight, torch.Tensor) and weight.requires_grad else 0
