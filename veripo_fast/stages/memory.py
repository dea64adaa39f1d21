"""The memory ledger of a run: predicted before anything large is made, compared with what was measured behind it."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from veripo_fast.config.load import apply_overrides
from veripo_fast.config.schema import Config
from veripo_fast.distributed.world import World
from veripo_fast.errors import CheckpointError, ConfigError
from veripo_fast.model.checkpoint_files import resolve_device, resolve_path
from veripo_fast.run.folder import RunDir
from veripo_fast.run.memory import HighWater, free_bytes, free_host_bytes, status_bytes, total_bytes
from veripo_fast.schedule.admission import Room, as_tree, refusal, summary, worst_excess
from veripo_fast.schedule.judge import judge_shapes
from veripo_fast.schedule.ledger import predict
from veripo_fast.schedule.shapes import ModelShape, read_shape
from veripo_fast.stages.optimizer import Optimizer
from veripo_fast.text import memory

log = logging.getLogger(__name__)
Plan = dict[str, dict[str, dict[str, dict[str, int]]]]
"""Stage -> phase -> device or host -> owner -> bytes."""
EVALUATION = "evaluation"
"""The phase of an evaluation between stages; one inside of a stage is `eval`."""
GROWING = 20
"""Steps in a row that a phase has to grow before it is named."""
_NOISE = 1 << 18
"""Bytes that a step may grow by: pages that are touched late."""


def check_memory(config: Config, world: World) -> Plan:
    """What the phases of a run will hold, after it was compared with what this rank's device has free. Collective.

    Raises:
        ConfigError: a phase would not fit; PeerFailed on other ranks.
    """
    device = resolve_device(config.model.device)
    shape = _shape_of(config)
    judges = judge_shapes(config)
    stages = predict(shape, config, world.size, gpu_bytes=total_bytes(device), judges=judges) if shape else {}

    def check() -> None:
        room = room_of(device)
        excess = worst_excess(stages, room) if room is not None and config.train.check_memory else None
        if shape is not None and excess is not None:
            stage = next(stage for stage in config.stages if stage.name == excess.stage)
            raise ConfigError(refusal(excess, apply_overrides(config, stage.set), shape, world.size))

    world.agreed(check)
    if world.main and device.type == "cpu" and any(
            apply_overrides(config, stage.set).optimizer.offload for stage in config.stages):
        log.warning("optimizer.offload frees nothing on a CPU: AdamW's state is copied within host memory")
    if world.main:
        for line in summary(stages, world.size):
            log.info("%s", line)
    return as_tree(stages)


def _shape_of(config: Config) -> ModelShape | None:
    """The shape of the checkpoint; None where it is broken: loading will say that better, or `MemoryBooks.loaded`."""
    try:
        return read_shape(resolve_path(config.model.path))
    except CheckpointError:
        return None


def room_of(device: torch.device) -> Room | None:
    """What one rank may take here; None where the system does not say. Ranks of a machine share its host memory."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    try:
        host, held = free_host_bytes() // ranks, status_bytes("VmRSS")
    except OSError:
        return None
    if device.type == "cuda":
        return Room(str(device), free_bytes(device), host, held)
    return Room(str(device), host, None, held)


class MemoryBooks:
    """Keeps the plan in the run folder, names what grows, and notes for each stage what was predicted and measured."""

    def __init__(self, run: RunDir, high_water: HighWater, world: World) -> None:
        self.run, self.high_water, self.world = run, high_water, world
        self.growth = Growth()

    def loaded(self) -> None:
        """Say so if the policy could be loaded, but nothing was predicted of it."""
        if self.world.main and not read_plan(self.run.memory_plan):
            log.warning("memory was not predicted: the checkpoint's files do not give the shapes of its weights")

    def step_done(self, known_bytes: int) -> None:
        """Look at the peaks of a step, less what is known to grow."""
        for phase in self.growth.observe(self.high_water.latest, known_bytes):
            log.warning("memory: phase %s held more in each of the last %d steps, from %s to %s; what grows is neither "
                        "weights nor the vision cache", phase, GROWING, *map(memory, self.growth.span(phase)))

    def stage_done(self, stage: str, optimizer: Optimizer | None) -> None:
        """Write a line of memory.jsonl. Collective, as `Backend.held` is."""
        owners = exact_owners(optimizer) if optimizer is not None else {}
        if self.world.main:
            predicted = read_plan(self.run.memory_plan).get(stage, {})
            self.high_water.write(self.run.memory, stage, predicted=predicted, owner_bytes=owners,
                                  ranks=self.world.size)


    def evaluated(self, after: str) -> None:
        """Write a line of memory.jsonl about an evaluation behind a stage, or of the start, before any."""
        if self.world.main:
            plan = read_plan(self.run.memory_plan)
            phases = plan.get(after) or next(iter(plan.values()), {})
            predicted = {name: owners for name, owners in phases.items() if name == EVALUATION}
            self.high_water.write(self.run.memory, after, only=EVALUATION, predicted=predicted, ranks=self.world.size)


class Growth:
    """Phases whose peak rises step after step; each is named once."""

    def __init__(self, steps: int = GROWING, noise: int = _NOISE) -> None:
        self.steps, self.noise = steps, noise
        self._rises: dict[str, list[int]] = {}
        self._named: set[str] = set()

    def observe(self, peaks: Mapping[str, int], known_bytes: int = 0) -> list[str]:
        """Take in the peaks of a step; returns phases that have now risen often enough in a row."""
        found = []
        for phase, peak in peaks.items():
            value = peak - known_bytes
            rises = self._rises.setdefault(phase, [])
            if rises and value <= rises[-1] + self.noise:
                rises.clear()
            rises.append(value)
            if len(rises) > self.steps and phase not in self._named:
                self._named.add(phase)
                found.append(phase)
        return found

    def span(self, phase: str) -> tuple[int, int]:
        """Bytes at the beginning and at the end of the rise."""
        return self._rises[phase][0], self._rises[phase][-1]


def exact_owners(optimizer: Optimizer) -> dict[str, int]:
    """Bytes of the tensors that this rank holds: weights, and AdamW's state but for DeepSpeed's, in flat partitions."""
    backend = optimizer.backend
    owners = {"weights": sum(part.nbytes for _, part in backend.held().values())}
    if type(backend).__name__ == "ZeroBackend":
        return owners
    for name, value in backend.optimizer_state().items():
        kind = {"exp_avg": "AdamW's moments", "exp_avg_sq": "AdamW's moments", "master": "masters"}.get(
            name.partition("/")[0])
        if kind:
            local = value.to_local() if hasattr(value, "to_local") else value
            owners[kind] = owners.get(kind, 0) + local.nbytes
    return owners


def read_plan(path: Path) -> Plan:
    """What `check_memory` predicted for the run; empty where the file is gone."""
    try:
        plan: Any = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return plan if isinstance(plan, dict) else {}

