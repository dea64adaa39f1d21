"""What low-rank adapters add to a model, from the names and shapes of its weights: as model/lora.py chooses them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from veripo_fast.config.lora import LoraConfig
from veripo_fast.schedule.shapes import ModelShape, Shape, numbers

_LAYER = re.compile(r"(?:.*\.)?layers\.\d+\.(?:\w+\.)*(\w+)\.weight")
_ROUTER = ".mlp.gate.weight"
"""Of experts: no linear layer, so it gets no adapters."""
_MERGER = re.compile(r"visual\.(?:merger|deepstack_merger_list\.\d+)\..+\.weight")


@dataclass(frozen=True)
class AdapterShapes:
    """Matrices of adapters, and the weights that they belong to."""

    language: tuple[Shape, ...]
    """A [rank, in] and B [out, rank] of each adapted layer of the language model, and of the head."""
    merger: tuple[Shape, ...]
    adapted: tuple[Shape, ...]
    """[out, in] of each adapted weight of the language model."""
    head: bool
    """Whether the head is one of them."""
    unread: tuple[Shape, ...]
    """Of `language`: those of the last layer but for keys and values."""

    @property
    def all(self) -> tuple[Shape, ...]:
        return self.language + self.merger


def adapter_shapes(shape: ModelShape, config: LoraConfig) -> AdapterShapes | None:
    """The adapters of a configuration; None without any."""
    if not config.rank:
        return None
    adapted: list[Shape] = []
    mergers: list[Shape] = []
    unread: list[Shape] = []
    for name, weight in shape.named:
        if len(weight) != 2:
            continue
        if name.startswith("visual."):
            if "merger" in config.targets and _MERGER.fullmatch(name):
                mergers.append(weight)
            continue
        match = _LAYER.fullmatch(name)
        if match and not name.endswith(_ROUTER) and ("language" in config.targets or match[1] in config.targets):
            adapted.append(weight)
            if f"layers.{shape.layers - 1}." in name and match[1] not in ("k_proj", "v_proj"):
                unread.append(weight)
    head = "head" in config.targets
    if head:
        adapted.append((shape.vocabulary, shape.hidden))
    return AdapterShapes(_pairs(adapted, config.rank), _pairs(mergers, config.rank), tuple(adapted), head,
                         _pairs(unread, config.rank))


def _pairs(weights: list[Shape], rank: int) -> tuple[Shape, ...]:
    pairs: list[Shape] = []
    for out, columns in weights:
        pairs += [(rank, columns), (out, rank)]
    return tuple(pairs)


def saved_by_adapters(adapters: AdapterShapes | None, config: LoraConfig, tokens: int, itemsize: int, on_gpu: bool
                      ) -> int:
    """Bytes that the adapters of the language model's layers save for a backward pass: what A gives, and with dropout
    its inputs once more with what was dropped, on a CPU as factors. The head's are multiplied into its weight."""
    if adapters is None:
        return 0
    layers = adapters.adapted[:-1] if adapters.head else adapters.adapted
    factor = 1 if on_gpu else itemsize
    dropped = sum(columns for _, columns in layers) * (itemsize + factor) if config.dropout else 0
    return tokens * (len(layers) * config.rank * itemsize + dropped)


def loss_with(adapters: AdapterShapes | None, loss: dict[str, int], shape: ModelShape, itemsize: int) -> dict[str, int]:
    """`loss_bytes` of a policy with adapters: a head without any has no gradient, one with some has a merged weight."""
    if adapters is None:
        return loss
    head = loss["head gradient"] + shape.head_numbers * itemsize if adapters.head else 0
    return {**loss, "head gradient": head}


def merged_bytes(adapters: AdapterShapes | None, itemsize: int) -> int:
    """Of the merged copies of adapted weights that an engine gets."""
    return 0 if adapters is None else numbers(adapters.adapted) * itemsize
