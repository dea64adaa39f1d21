"""AdamW with a schedule per stage, over whatever ranks hold the weights, and a guard against NaN.

A step whose loss or gradient is not finite is skipped and counted; too many in a row stop the run, because the weights
behind them are still those of the last good step.
"""

from __future__ import annotations

import logging
import math
from functools import partial
from pathlib import Path
from typing import Any

import torch

from veripo_fast.config.schema import OptimizerConfig
from veripo_fast.distributed.backend import Backend
from veripo_fast.distributed.offload import HostCopies
from veripo_fast.distributed.state_files import read_state
from veripo_fast.distributed.world import ONE, World
from veripo_fast.errors import TrainingError
from veripo_fast.model.policy import Policy
from veripo_fast.run.memory import return_freed_memory
from veripo_fast.schedule.timeline import span

log = logging.getLogger(__name__)


def step_policy(policy: Policy, optimizer: Optimizer) -> dict[str, float]:
    """Step over what was given to `backward`, and count the step: the one writer of a running policy's version.

    Returns:
        metrics of the step; `skipped_updates` alone when the guard skipped it.
    """
    rate = optimizer.learning_rate()
    if policy.device.type == "cpu":  # beside what the backward pass has freed AdamW needs twice the largest weight
        return_freed_memory()
    norm = optimizer.step()
    if norm is None:
        return {"skipped_updates": 1.0}
    policy.version += 1
    parts = {f"grad_norm_{part}": value for part, value in optimizer.backend.part_norms.items()}
    return {"grad_norm": norm, **parts, "learning_rate": rate, "skipped_updates": 0.0}


class Optimizer:
    """Schedule, clipping and guard of one stage, around the backend that steps.

    `total_steps` is the number of optimizer steps that the schedule spans.
    """

    def __init__(self, backend: Backend, config: OptimizerConfig, peak: float, total_steps: int,
                 world: World = ONE) -> None:
        self.backend = backend
        self.config = config
        self.peak = peak
        self.total_steps = total_steps
        self.world = world
        self.steps = self.bad_steps = 0
        self.loss = 0.0
        """Sum of the losses given to `backward` since the last step, on this rank."""
        self.beside: dict[str, torch.Tensor] = {}
        """What else the checkpoints of the stage hold, by names with a slash; `load` leaves it alone."""
        self._away = HostCopies()
        backend.begin(config, peak)

    def learning_rate(self) -> float:
        """Of the next step: linear warm-up, then constant or cosine to a tenth of the peak."""
        if self.steps < self.config.warmup_steps:
            return self.peak * (self.steps + 1) / self.config.warmup_steps
        if self.config.schedule == "constant":
            return self.peak
        span = max(self.total_steps - self.config.warmup_steps, 1)
        done = min((self.steps - self.config.warmup_steps) / span, 1.0)
        return self.peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done)))

    def backward(self, loss: torch.Tensor | None) -> float:
        """Add the gradients of one micro-batch; returns its loss."""
        assert loss is not None, "the loss inputs gave log-probs alone"
        self.backend.backward(loss)
        value = loss.item()
        self.loss += value
        return value

    def step(self) -> float | None:
        """Clip the gradients and step; returns the gradient norm before clipping, None when the step was skipped.

        Raises:
            TrainingError: `max_bad_steps` steps in a row were skipped.
        """
        self.onload()
        [loss] = self.world.total([self.loss])
        self.loss = 0.0
        norm = self.backend.step(loss, self.learning_rate(), self.config.max_grad_norm)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._skip(loss, norm)
            return None
        self.steps += 1
        self.bad_steps = 0
        return norm

    def offload(self) -> int:
        """Move AdamW's state of this rank to host memory until the next step; returns the bytes."""
        return 0 if self._away else self._away.take(self.backend.movable())

    def onload(self) -> None:
        """Bring it back, if it is away."""
        if self._away:
            with span("onload"):
                self._away.bring_back()

    def state(self) -> dict[str, Any]:
        """What `load` needs, of this rank. Collective."""
        self.onload()
        return self.backend.optimizer_state() | {"steps": torch.tensor(self.steps)} | self.beside

    def load(self, folder: Path) -> None:
        """Continue from a `state` that was written to a folder; the weights themselves come with the model. Collective.

        Raises:
            CheckpointError: the folder holds another state.
        """
        state = self.backend.optimizer_state()
        steps = torch.tensor(0)
        read_state(folder, state | {"steps": steps}, self.world)
        self.backend.restored(state)
        self.steps = int(steps)

    def _skip(self, loss: float, norm: float) -> None:
        self.bad_steps += 1
        if self.world.main:
            log.warning("optimizer step skipped: loss %s, gradient norm %s (%d in a row)", loss, norm, self.bad_steps)
        if self.bad_steps >= self.config.max_bad_steps:
            self.world.agreed(partial(self._give_up, loss, norm))

    def _give_up(self, loss: float, norm: float) -> None:
        raise TrainingError(f"{self.bad_steps} optimizer steps in a row had a loss or gradient that is not finite "
                            f"(last loss {loss}, gradient norm {norm}); the last checkpoint is untouched. "
                            "Lower the learning rate or look at the newest rollouts")
