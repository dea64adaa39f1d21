"""The one seam between an update and the ranks: where weights, gradients and AdamW's state lie, and who steps.

`LocalBackend` is one process, `fsdp.py` and `zero.py` shard. All of them give the same update, up to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, TypeAlias

import torch

from veripo_fast.config.schema import OptimizerConfig
from veripo_fast.distributed.parts import norms_of, rate_groups, squares_of

Named: TypeAlias = list[tuple[str, torch.nn.Parameter]]
Held: TypeAlias = Mapping[str, tuple[int, torch.Tensor]]
"""What a rank holds of each parameter: its first element in the flattened parameter, and the elements [n]."""


class Backend(Protocol):
    """A policy's weights with their gradients and optimizer state, on one rank or over many.

    Methods are collective, `forward` and `backward` too where weights are sharded.
    """

    distributed: bool
    """Whether there are several ranks."""
    sharded: bool
    """Whether a forward pass of one rank waits for the others."""

    @property
    def part_norms(self) -> Mapping[str, float]:
        """Of the last step: gradient norm of each part of the model, before clipping; empty unless asked for."""
        ...

    def begin(self, config: OptimizerConfig, peak: float) -> None:
        """Start AdamW anew, as each stage does."""
        ...

    def end(self) -> None:
        """Forget AdamW's state, as far as it can be forgotten: the stage is over. DeepSpeed's stays until `begin`."""
        ...

    def movable(self) -> list[torch.Tensor]:
        """What may lie in host memory between two steps: this rank's moments, if there are any, and masters that are
        not the weights. Each has its storage for itself. DeepSpeed has a way of its own, and gives nothing."""
        ...

    def forward(self, *inputs: Any) -> Any:
        """`PolicyStep.forward` with whole weights."""
        ...

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of one micro-batch; its loss is weighted to the update of all ranks."""
        ...

    def step(self, loss: float, rate: float, max_norm: float) -> float:
        """Clip, step and forget the gradients; returns their norm before clipping, the same on all ranks.

        Weights and optimizer stay as they are when `loss`, the sum over all ranks, or the norm is not finite.
        """
        ...

    def discard(self) -> None:
        """Forget the gradients."""
        ...

    def whole(self) -> AbstractContextManager[None]:
        """A block in which this rank holds every weight whole, and runs the model as it likes."""
        ...

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and whole value of each parameter, one after the other; on rank 0, elsewhere an empty tensor."""
        ...

    def held(self) -> Held:
        """What this rank holds, for the weights' way into an engine."""
        ...

    def optimizer_state(self) -> dict[str, Any]:
        """AdamW's state in tensors, sharded ones as DTensors by rows: KIND/NAME, where kind is step, exp_avg,
        exp_avg_sq, or master where there is a float32 copy of the weight. A checkpoint is filled into them in place,
        then given to `restored`.
        """
        ...

    def restored(self, state: dict[str, Any]) -> None:
        """Go on from a state that `optimizer_state` gave and a checkpoint filled."""
        ...


class KeepsState:
    """Of a backend whose AdamW can be neither forgotten nor moved, and whose gradients lie in flat partitions:
    DeepSpeed's."""

    @property
    def part_norms(self) -> Mapping[str, float]:
        """See `Backend`: they cannot be told apart."""
        return {}

    def end(self) -> None:
        """See `Backend`."""

    def movable(self) -> list[torch.Tensor]:
        """See `Backend`."""
        return []


class LocalBackend:
    """One process: everything is whole."""

    distributed = sharded = False

    def __init__(self, step: torch.nn.Module, named: Callable[[], Named]) -> None:
        """
        Args:
            step: `model.step.PolicyStep`.
            named: the policy's parameters, frozen ones too.
        """
        self._step = step
        self._named = named
        self.part_norms: dict[str, float] = {}
        self._wants_norms = False
        self.names: list[str] = []
        self.parameters: list[torch.nn.Parameter] = []
        self.masters: list[torch.nn.Parameter] = []
        self.adamw: torch.optim.AdamW

    def begin(self, config: OptimizerConfig, peak: float) -> None:
        """See `Backend`."""
        trained = [(name, parameter) for name, parameter in self._named() if parameter.requires_grad]
        self.names, self.parameters = [name for name, _ in trained], [parameter for _, parameter in trained]
        self.masters = [p if p.dtype == torch.float32 else torch.nn.Parameter(p.detach().float())
                        for p in self.parameters]
        self.adamw = adamw(self.masters, config, peak, self.names)
        self._wants_norms = config.part_norms

    def end(self) -> None:
        """See `Backend`."""
        self.discard()
        self.names, self.parameters, self.masters = [], [], []
        self.adamw.state.clear()
        self.adamw.param_groups.clear()

    def movable(self) -> list[torch.Tensor]:
        """See `Backend`."""
        apart = [master for parameter, master in zip(self.parameters, self.masters, strict=True)
                 if master is not parameter]
        return [*known_moments(self.adamw), *apart]

    def forward(self, *inputs: Any) -> Any:
        """See `Backend`."""
        return self._step(*inputs)

    def backward(self, loss: torch.Tensor) -> None:
        """See `Backend`."""
        loss.backward()

    def step(self, loss: float, rate: float, max_norm: float) -> float:
        """See `Backend`."""
        norm = float(torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None]))
        if self._wants_norms:
            named = [(name, p.grad) for name, p in zip(self.names, self.parameters, strict=True)]
            self.part_norms = norms_of(squares_of(named, self.parameters[0].device), self.names)
        if math.isfinite(loss) and math.isfinite(norm):
            scale = min(1.0, max_norm / (norm + 1e-6))
            for parameter, master in zip(self.parameters, self.masters, strict=True):
                if parameter.grad is not None:
                    master.grad = parameter.grad.float().mul_(scale)
            step_adamw(self.adamw, rate)
            with torch.no_grad():
                for parameter, master in zip(self.parameters, self.masters, strict=True):
                    if master is not parameter:
                        parameter.copy_(master)
        self.discard()
        return norm

    def discard(self) -> None:
        """See `Backend`."""
        for parameter in (*self.parameters, *self.masters):
            parameter.grad = None

    def whole(self) -> AbstractContextManager[None]:
        """See `Backend`."""
        return nullcontext()

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """See `Backend`."""
        yield from self._named()

    def held(self) -> Held:
        """See `Backend`."""
        return {name: (0, parameter.detach().view(-1)) for name, parameter in self._named()}

    def optimizer_state(self) -> dict[str, torch.Tensor]:
        """See `Backend`."""
        state = moments(self.adamw, self.names, self.masters)
        for name, parameter, master in zip(self.names, self.parameters, self.masters, strict=True):
            if master is not parameter:
                state[f"master/{name}"] = master.detach()
        return state

    def restored(self, state: dict[str, torch.Tensor]) -> None:
        """See `Backend`: the tensors are AdamW's own."""


def whole_shape(parameter: torch.Tensor) -> tuple[int, ...]:
    """Of a parameter that may be sharded: a DTensor has it, and DeepSpeed leaves it in a field of its own."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def adamw(parameters: Sequence[torch.nn.Parameter], config: OptimizerConfig, peak: float, names: Sequence[str]
          ) -> torch.optim.AdamW:
    """AdamW as every backend runs it.

    Args:
        names: of the parameters, which say what learning rate each has.
    """
    return torch.optim.AdamW(rate_groups(parameters, names, config), lr=peak, betas=config.betas,
                             weight_decay=config.weight_decay)


def step_adamw(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """One step at a learning rate, times that of each group."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("scale", 1.0)
    optimizer.step()


def known_moments(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """AdamW's moments as far as a step has made them; not its step counts, which lie in host memory anyway."""
    return [state[kind] for state in optimizer.state.values() for kind in ("exp_avg", "exp_avg_sq") if kind in state]


def moments(optimizer: torch.optim.Optimizer, names: Sequence[str], masters: Sequence[torch.nn.Parameter]
            ) -> dict[str, torch.Tensor]:
    """AdamW's own step counts and moments by name, made where no step has made them."""
    found: dict[str, torch.Tensor] = {}
    for name, master in zip(names, masters, strict=True):
        state = optimizer.state[master]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(master), torch.zeros_like(master)
        found[f"step/{name}"] = state["step"]
        found[f"exp_avg/{name}"], found[f"exp_avg_sq/{name}"] = state["exp_avg"], state["exp_avg_sq"]
    return found
