"""Two methods of vLLM's model, replaced: the trainer's temperature and the trainer's positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from veripo_fast.rollout.engine_input import PositionTable


class EngineFailure(RuntimeError):
    """The engine stopped working in the middle of a batch."""


class Hooks:
    """What is put into a model, and how often it was called."""

    def __init__(self) -> None:
        self.temperature = 1.0
        self.positions = PositionTable()
        self.calls = {"compute_logits": 0, "get_mrope_input_positions": 0}

    def install(self, model: Any) -> None:
        """Replace `compute_logits` and `get_mrope_input_positions` of a model."""
        plain = model.compute_logits

        def compute_logits(*arguments: Any, **named: Any) -> torch.Tensor | None:
            self.calls["compute_logits"] += 1
            return self._divided(plain(*arguments, **named))

        model.compute_logits = compute_logits
        model.get_mrope_input_positions = self._positions_of

    def _divided(self, logits: torch.Tensor | None) -> torch.Tensor | None:
        """Logits float32 over the temperature; None where another tensor-parallel rank has them."""
        if logits is None or self.temperature == 1:
            return None if logits is None else logits.float()
        return logits.float().div_(self.temperature)

    def _positions_of(self, input_tokens: Sequence[int], mm_features: Sequence[Any]) -> tuple[torch.Tensor, int]:
        self.calls["get_mrope_input_positions"] += 1
        media = sorted(mm_features, key=lambda feature: feature.mm_position.offset)
        found = self.positions.find(list(input_tokens), [feature.identifier for feature in media])
        if found is None:
            raise EngineFailure(f"it asks for positions of {len(input_tokens)} tokens that it was not given")
        return found
