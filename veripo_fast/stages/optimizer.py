"""AdamW with a schedule per stage, float32 master weights, and a guard against NaN.

A step whose loss or gradient is not finite is skipped and counted; too many in a row stop the run, because the weights
behind them are still those of the last good step.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path

import torch

from veripo_fast.config.schema import OptimizerConfig
from veripo_fast.errors import TrainingError
from veripo_fast.model.policy import Policy

log = logging.getLogger(__name__)


def step_policy(policy: Policy, optimizer: Optimizer) -> dict[str, float]:
    """Step over what was given to `backward`, and count the step: the one writer of a running policy's version.

    Returns:
        metrics of the step; `skipped_updates` alone when the guard skipped it.
    """
    rate = optimizer.learning_rate()
    norm = optimizer.step()
    if norm is None:
        return {"skipped_updates": 1.0}
    policy.version += 1
    return {"grad_norm": norm, "learning_rate": rate, "skipped_updates": 0.0}


class Optimizer:
    """Backward passes, clipping, the step and its guard, for one stage.

    `total_steps` is the number of optimizer steps that the schedule spans.
    """

    def __init__(self, parameters: list[tuple[str, torch.nn.Parameter]], config: OptimizerConfig, peak: float,
                 total_steps: int) -> None:
        self.config = config
        self.peak = peak
        self.total_steps = total_steps
        self.steps = self.bad_steps = 0
        self.loss = 0.0
        """Sum of the losses given to `backward` since the last step."""
        self.parameters = [p for _, p in parameters]
        self.masters = [p if p.dtype == torch.float32 else torch.nn.Parameter(p.detach().float())
                        for p in self.parameters]
        self.adamw = torch.optim.AdamW(self.masters, lr=peak, betas=config.betas, weight_decay=config.weight_decay)

    def learning_rate(self) -> float:
        """Of the next step: linear warm-up, then constant or cosine to a tenth of the peak."""
        if self.steps < self.config.warmup_steps:
            return self.peak * (self.steps + 1) / self.config.warmup_steps
        if self.config.schedule == "constant":
            return self.peak
        span = max(self.total_steps - self.config.warmup_steps, 1)
        done = min((self.steps - self.config.warmup_steps) / span, 1.0)
        return self.peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done)))

    def backward(self, loss: torch.Tensor) -> float:
        """Add the gradients of one micro-batch; returns its loss."""
        loss.backward()
        value = loss.item()
        self.loss += value
        return value

    def step(self) -> float | None:
        """Clip the gradients and step; returns the gradient norm before clipping, None when the step was skipped.

        Raises:
            TrainingError: `max_bad_steps` steps in a row were skipped.
        """
        norm = float(torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None]))
        if not (math.isfinite(self.loss) and math.isfinite(norm)):
            self._skip(self.loss, norm)
            return None
        scale = min(1.0, self.config.max_grad_norm / (norm + 1e-6))
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if parameter.grad is not None:
                master.grad = parameter.grad.float().mul_(scale)
        self.adamw.param_groups[0]["lr"] = self.learning_rate()
        self.adamw.step()
        with torch.no_grad():
            for parameter, master in zip(self.parameters, self.masters, strict=True):
                if master is not parameter:
                    parameter.copy_(master)
        self.zero_grad()
        self.steps += 1
        self.bad_steps = 0
        return norm

    def zero_grad(self) -> None:
        """Forget gradients and losses."""
        self.loss = 0.0
        for parameter in (*self.parameters, *self.masters):
            parameter.grad = None

    def save(self, path: Path) -> None:
        """Write what `load` needs."""
        masters = [m.detach() for p, m in zip(self.parameters, self.masters, strict=True) if m is not p]
        torch.save({"adamw": self.adamw.state_dict(), "masters": masters, "steps": self.steps}, path)

    def load(self, path: Path) -> None:
        """Continue from `save`; the parameters themselves come with the model."""
        state = torch.load(path, map_location=self.parameters[0].device, weights_only=True)
        self.adamw.load_state_dict(state["adamw"])
        own = [m for p, m in zip(self.parameters, self.masters, strict=True) if m is not p]
        with torch.no_grad():
            for master, saved in zip(own, state["masters"], strict=True):
                master.copy_(saved)
        self.steps = state["steps"]

    def _skip(self, loss: float, norm: float) -> None:
        self.zero_grad()
        self.bad_steps += 1
        log.warning("optimizer step skipped: loss %s, gradient norm %s (%d in a row)", loss, norm, self.bad_steps)
        if self.bad_steps >= self.config.max_bad_steps:
            raise TrainingError(f"{self.bad_steps} optimizer steps in a row had a loss or gradient that is not finite "
                                f"(last loss {loss}, gradient norm {norm}); the last checkpoint is untouched. "
                                "Lower the learning rate or look at the newest rollouts")
