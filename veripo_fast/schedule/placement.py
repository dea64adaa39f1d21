"""Where weights, gradients and AdamW's state of a policy lie: whole, in rows of FSDP2, or in the partitions of ZeRO.

What distributed/backend.py, fsdp.py, rows.py and zero.py allocate, from shapes alone.

Letters: N numbers of a part of the model, b bytes of a number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from veripo_fast.config.schema import Config, DistributedConfig
from veripo_fast.schedule.adapters import AdapterShapes
from veripo_fast.schedule.shapes import ModelShape, Shape, numbers

Owners = Mapping[str, int]
"""Owner -> bytes."""
BUCKET = 500_000_000
"""DeepSpeed's default of reduce_bucket_size, in numbers."""
LIVE = 1_000_000_000
"""DeepSpeed's default of stage3_max_live_parameters."""


@dataclass(frozen=True)
class Placement:
    """How a policy is spread over ranks.

    Args of `of` are the configuration and how many ranks there are.
    """

    backend: str
    """none, fsdp, zero1, zero2 or zero3."""
    ranks: int = 1
    offload: bool = False

    @classmethod
    def of(cls, config: DistributedConfig, ranks: int) -> Placement:
        """What `distributed.choice.distribute` does."""
        if ranks == 1:
            return cls("none")
        if config.backend != "deepspeed":
            return cls("fsdp", ranks)
        return cls(f"zero{config.zero_stage}", ranks, config.offload == "cpu")

    @property
    def sharded(self) -> bool:
        """Whether weights are."""
        return self.backend in ("fsdp", "zero3")


@dataclass(frozen=True)
class Held:
    """Bytes of one rank."""

    resident: Owners
    """From the load on: weights, and float32 masters of bfloat16 weights; AdamW's state from the first step on."""
    gradients: int
    """Once every parameter has one."""
    gathered: int
    """Weights and gradients that are whole while a layer runs."""
    whole: int
    """More weights while every one is whole, as the torch engine needs them."""
    stepping: int
    """Besides, while AdamW steps."""
    host: Owners
    """What lies in host memory because it is offloaded."""


def rows_share(shapes: tuple[Shape, ...], ranks: int) -> int:
    """Numbers that the first rank holds where each tensor is cut by rows."""
    return sum(-(-shape[0] // ranks) * math.prod(shape[1:]) for shape in shapes)


def held_by(shape: ModelShape, placement: Placement, itemsize: int, tower_trained: bool, on_gpu: bool,
            adapters: AdapterShapes | None = None) -> Held:
    """What a rank holds of a policy that trains, whole or by adapters."""
    if adapters is not None:
        return _held_with(adapters, shape, placement, itemsize, on_gpu)
    ranks, backend = placement.ranks, placement.backend
    language, vision = shape.language_numbers, shape.vision_numbers
    own = rows_share(shape.language, ranks) if backend in ("none", "fsdp") else -(-language // ranks)
    tower_own = rows_share(shape.vision, ranks) if tower_trained else 0
    stepped = own + tower_own
    weights = (own if placement.sharded else language) * itemsize
    masters, moments = 4 * stepped if itemsize < 4 else 0, 8 * stepped
    gradients = own * itemsize
    largest = max(math.prod(part) for part in shape.language)
    stepping = 4 * (stepped if on_gpu else 2 * largest)
    if backend == "none":
        stepping += 4 * stepped if itemsize < 4 else 0
    elif backend == "fsdp":
        stepping += 4 * stepped
    else:
        masters = 4 * (own + (tower_own if itemsize < 4 else 0))
        gradients = language * itemsize if backend == "zero1" else 4 * own
        stepping += 4 * own
    resident = {"weights": weights, "tower": vision * itemsize, "masters": masters, "AdamW's moments": moments}
    host: dict[str, int] = {}
    if placement.offload:
        host = {"offloaded AdamW": 4 * own + 8 * own + 4 * own}
        resident |= {"masters": masters - 4 * own, "AdamW's moments": moments - 8 * own}
        gradients, stepping = language * itemsize if backend == "zero1" else 0, 4 * tower_own
    tower_gradients = vision * itemsize if tower_trained else 0
    return Held(resident, gradients + tower_gradients, _gathered(shape, placement, itemsize, on_gpu),
                (language - own) * itemsize if placement.sharded else 0, stepping, host)


def _held_with(adapters: AdapterShapes, shape: ModelShape, placement: Placement, itemsize: int, on_gpu: bool) -> Held:
    """Of adapters: weights without gradient or state. In one process, or by FSDP2, which shards both by rows."""
    ranks, trained = placement.ranks, numbers(adapters.all)
    whole = shape.language_numbers + trained
    weights = rows_share(shape.language, ranks) + rows_share(adapters.all, ranks) if placement.sharded else whole
    own = rows_share(adapters.all, ranks)
    masters = 4 * own if itemsize < 4 else 0
    stepping = 4 * own * (1 if placement.backend == "none" and itemsize == 4 else 2)
    resident = {"weights": weights * itemsize, "tower": shape.vision_numbers * itemsize, "masters": masters,
                "AdamW's moments": 8 * own}
    gathered = 0
    if placement.sharded:
        gathered = (shape.outside_numbers + 4 * shape.layer_numbers) * itemsize
    return Held(resident, own * itemsize, gathered, (whole - weights) * itemsize, stepping, {})


def _gathered(shape: ModelShape, placement: Placement, itemsize: int, on_gpu: bool) -> int:
    """Whole weights and gradients around the layer that runs, with the buffers that they are sent in."""
    language, layer = shape.language_numbers, shape.layer_numbers
    bucket = BUCKET if on_gpu else min(BUCKET, language)  # memory that nobody touches costs a CPU nothing
    if placement.backend == "none":
        return 0
    if placement.backend == "fsdp":
        root = shape.outside_numbers
        # the root and its gradient stay whole from the forward to the backward pass; of layers there are two, each with
        # the buffer that it came in, and one gradient in float32 on its way out
        return root * 2 * itemsize + layer * (2 * 2 * itemsize + itemsize + 4)
    if placement.backend == "zero3":
        return min(LIVE, language) * itemsize + 4 * bucket
    return 4 * bucket if placement.backend == "zero2" else 0


def frozen_bytes(shape: ModelShape, ranks: int, itemsize: int, tower: bool) -> int:
    """Of a policy that only gives log-probs; `tower`: with its own."""
    language = rows_share(shape.language, ranks) if ranks > 1 else shape.language_numbers
    return (language + (shape.vision_numbers if tower else 0)) * itemsize


def reference_owners(shape: ModelShape, config: Config, ranks: int, itemsize: int, adapters: AdapterShapes | None
                     ) -> Owners:
    """The reference of a GRPO stage, and the float32 mean behind one that follows the policy."""
    if not config.needs_reference:
        return {}
    if adapters is not None:  # the same model: those of the start, and those of now while they are away
        return {"reference policy": 2 * numbers(adapters.all) * itemsize}
    moves = config.grpo.reference == "ema" and itemsize < 4
    return {"reference policy": frozen_bytes(shape, ranks, itemsize, tower=True),
            "mean of the policy": frozen_bytes(shape, ranks, 4, tower=not config.model.freeze_vision) if moves else 0}
