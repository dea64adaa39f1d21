"""The whole hand-over of weights to a rollout engine in the same process: plan, views where they are possible, copies
where not, and a self-test against the engine's own way of loading."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from veripo_fast.errors import TrainingError
from veripo_fast.text import duration, memory, number
from veripo_fast.weights.alias import Aliasing, alias, sorted_out
from veripo_fast.weights.layouts import Geometry, stored
from veripo_fast.weights.parts import Part
from veripo_fast.weights.plan import by_source, plan
from veripo_fast.weights.transfer import Transfer

Named = Iterable[tuple[str, torch.Tensor]]
Reload = Callable[[Iterator[tuple[str, torch.Tensor]]], None]
"""Takes the policy's parameters by Hugging Face name, as the engine's own loader does."""

_MOST_PLAIN_BYTES = 256 << 20
"""A plain copy is timed on at most that much, and scaled to the bytes of a sync."""


@dataclass(frozen=True)
class SyncReport:
    """What one hand-over moved. Printed, it is one line."""

    version: int
    """Number of optimizer steps behind the weights."""
    bytes: int
    seconds: float
    ratio_to_plain_copy: float | None
    """Seconds over those of a plain copy of the same bytes, as it was timed at the start; None where nothing moved."""

    def __str__(self) -> str:
        if self.ratio_to_plain_copy is None:
            return "0 bytes moved: the engine's weights are the policy's"
        time_taken = f"{number(self.seconds * 1e3)} ms" if self.seconds < 1 else duration(self.seconds)
        return (f"{memory(self.bytes)} in {time_taken}, {self.ratio_to_plain_copy:.1f}x a plain copy of the same bytes "
                "(measured at start)")


class WeightSync:
    """Keeps an engine's weights equal to the policy's."""

    def __init__(self, policy: Named, engine: Named, geometry: Geometry, *, mode: Literal["alias", "copy"] = "alias",
                 tower: bool = True, tp: int = 1, rank: int = 0) -> None:
        """
        Args:
            policy, engine: `named_parameters()` of the Hugging Face model, and of the engine's on this rank.
            mode: alias makes the policy's parameters views of the engine's wherever layout, dtype and device allow it;
                copy leaves both as they are.
            tower: whether the engine has the vision tower.

        Raises:
            ConfigError: the plan does not fill the engine; see `plan`.
        """
        self.sources, self.targets, self.mode, self.geometry = dict(policy), dict(engine), mode, geometry
        self.copies = plan({name: tuple(tensor.shape) for name, tensor in self.sources.items()},
                           {name: tuple(tensor.shape) for name, tensor in self.targets.items()},
                           geometry, tp=tp, rank=rank, tower=tower)
        self.transfer = Transfer(self.copies, self.sources, self.targets)
        self.version: int | None = None
        self._plain_seconds_per_byte = 0.0

    def start(self, version: int) -> tuple[Aliasing, SyncReport]:
        """The first hand-over: makes the views, times a plain copy, moves the rest."""
        if self.mode == "alias":
            aliasing = alias(self.copies, self.sources, self.targets)
        else:
            aliasing = sorted_out(self.copies, self.sources)
        if due := self.transfer.due_bytes(everything=True):
            self._plain_seconds_per_byte = plain_copy_seconds_per_byte(due, self.targets[self.copies[0].target.name])
        return aliasing, self.sync(version, everything=True)

    def sync(self, version: int, *, everything: bool = False) -> SyncReport:
        """Hand over the weights of a policy version. The engine's caches are the caller's to reset.

        Args:
            everything: also what did not change, for an engine whose weights were freed.

        Raises:
            TrainingError: the engine does not hold what was sent; names the bucket.
        """
        started = time.perf_counter()
        moved = self.transfer.send(everything=everything)
        seconds = time.perf_counter() - started
        self.version = version
        plain = moved * self._plain_seconds_per_byte
        return SyncReport(version, moved, seconds, seconds / plain if plain else None)

    @torch.no_grad()
    def self_test(self, reload: Reload) -> None:
        """Write random weights by the plan, then through the engine's own loader, and compare every element's bits.

        The engine's weights are as before when it ends, however it ends. Host memory: two copies of them.

        Raises:
            TrainingError: the two differ, or the loader has moved a parameter to other memory; names the parameter.
        """
        places = {name: tensor.data_ptr() for name, tensor in self.targets.items()}
        before = _on_host(self.targets)
        try:
            for name, own in by_source(self.copies).items():
                Transfer(own, {name: self._random(name)}, self.targets).send()
            planned = _on_host(self.targets)
            reload((name, stored(name, self._random(name), self.geometry.family)) for name in by_source(self.copies))
            self._compare(planned, places)
        finally:
            for name, values in before.items():
                self.targets[name].copy_(values)

    def _random(self, name: str) -> torch.Tensor:
        """Values in the shape and dtype of a parameter, the same whenever they are asked for."""
        like = self.sources[name]
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        return (torch.randn(like.shape, generator=generator) * 0.02).to(like.device, like.dtype)

    def _compare(self, planned: dict[str, torch.Tensor], places: dict[str, int]) -> None:
        for copy in self.copies:
            part = copy.target
            if self.targets[part.name].data_ptr() != places[part.name]:
                raise TrainingError(f"the engine's reload has moved {part.name} to other memory, where no sync reaches")
            one, other = _elements(planned[part.name], part), _elements(self.targets[part.name].detach(), part).cpu()
            if not torch.equal(one.view(torch.uint8), other.view(torch.uint8)):
                raise TrainingError(f"{part.name}: the plan writes other weights than the engine's reload, for "
                                    f"{copy.source.name}")


def plain_copy_seconds_per_byte(count: int, like: torch.Tensor) -> float:
    """Seconds that a contiguous copy of `count` bytes (at most 256 MB) takes per byte, on the device of a tensor."""
    size = max(1, min(count, _MOST_PLAIN_BYTES) // like.element_size())
    one = torch.zeros(size, dtype=like.dtype, device=like.device)
    other = torch.zeros_like(one)
    seconds = []
    for _ in range(3):
        _wait(like.device)
        started = time.perf_counter()
        other.copy_(one)
        _wait(like.device)
        seconds.append(time.perf_counter() - started)
    return min(seconds) / (size * like.element_size())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _on_host(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def _elements(tensor: torch.Tensor, part: Part) -> torch.Tensor:
    """[n] of a part of a contiguous tensor; parts of the engine are whole rows."""
    return tensor.view(-1)[part.offset:part.offset + part.numel]
