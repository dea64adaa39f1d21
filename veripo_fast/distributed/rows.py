"""AdamW shared out by rows: a rank steps its rows of each parameter, and keeps their moments and float32 masters.

A DTensor is those rows. A parameter that is whole on every rank, as in a vision tower that trains, has its gradients
summed over the ranks before the step, and gets the rows of all ranks after it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from veripo_fast.config.schema import OptimizerConfig
from veripo_fast.distributed.backend import Named, adamw, known_moments, moments, step_adamw
from veripo_fast.distributed.parts import norms_of, squares_of

_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
"""Its name since torch 2.13, and the one before."""


def rows_of(count: int, rank: int, size: int) -> tuple[int, int]:
    """Which of `count` rows a rank holds: as `torch.chunk` cuts them, so late ranks may hold fewer or none."""
    share = -(-count // size)
    return min(rank * share, count), min((rank + 1) * share, count)


def all_ranks(device: torch.device) -> DeviceMesh:
    """A mesh of every rank, in one dimension."""
    return init_device_mesh(device.type, (dist.get_world_size(),))


def by_rows(own: torch.Tensor, mesh: DeviceMesh, shape: Sequence[int]) -> DTensor:
    """A tensor of `shape` of which this rank holds the rows `own`."""
    return DTensor.from_local(own, mesh, [Shard(0)], run_check=False, shape=torch.Size(shape),
                              stride=torch.empty(tuple(shape), device="meta").stride())


@dataclass
class _Owned:
    """A trained parameter, and the rows of it that this rank steps."""

    name: str
    parameter: torch.nn.Parameter
    rows: tuple[int, int]
    master: torch.nn.Parameter
    """float32 [rows, ...]: the weights themselves where they are float32 and sharded."""

    @property
    def sharded(self) -> bool:
        return isinstance(self.parameter, DTensor)

    def own(self, tensor: torch.Tensor) -> torch.Tensor:
        """The rank's rows of the parameter or of its gradient."""
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()[slice(*self.rows)]


class RowOptimizer:
    """AdamW over the rows of parameters; any number of them, also none."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh = mesh
        self.rank, self.size = mesh.get_local_rank(), mesh.size()
        self.owned: list[_Owned] = []
        self.adamw: torch.optim.AdamW | None = None

    def begin(self, parameters: Named, config: OptimizerConfig, peak: float) -> None:
        """Start anew over `parameters`."""
        self.owned = [self._owned(name, parameter) for name, parameter in parameters]
        names = [owned.name for owned in self.owned]
        self.adamw = adamw([owned.master for owned in self.owned], config, peak, names) if self.owned else None

    def end(self) -> None:
        """Forget the state and the masters."""
        self.discard()
        self.owned, self.adamw = [], None

    def movable(self) -> list[torch.Tensor]:
        """See `Backend.movable`."""
        if self.adamw is None:
            return []
        apart = [owned.master for owned in self.owned if owned.parameter.dtype != torch.float32]
        return [*known_moments(self.adamw), *apart]

    def reduce(self) -> None:
        """Average the gradients of whole parameters over the ranks; one that no rank has stays None."""
        replicated = [owned.parameter for owned in self.owned if not owned.sharded]
        if not replicated:
            return
        there = torch.tensor([float(parameter.grad is not None) for parameter in replicated],
                             device=replicated[0].device)
        dist.all_reduce(there, group=self.mesh.get_group())
        for parameter, ranks in zip(replicated, there.tolist(), strict=True):
            if ranks:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                dist.all_reduce(parameter.grad.div_(self.size), group=self.mesh.get_group())

    def norm(self) -> float:
        """Euclidean norm of the gradients over the rows of all ranks."""
        squares = torch.zeros((), dtype=torch.float64, device=self.mesh.device_type)
        for owned in self.owned:
            if owned.parameter.grad is not None:
                squares += owned.own(owned.parameter.grad).double().square().sum()
        dist.all_reduce(squares, group=self.mesh.get_group())
        return math.sqrt(squares.item()) if squares.isfinite() else float(squares)

    def part_norms(self) -> dict[str, float]:
        """See `Backend.part_norms`: of the gradients as they are. Collective."""
        gradients = ((owned.name, None if owned.parameter.grad is None else owned.own(owned.parameter.grad))
                     for owned in self.owned)
        squares = squares_of(gradients, self.mesh.device_type)
        dist.all_reduce(squares, group=self.mesh.get_group())
        return norms_of(squares, [owned.name for owned in self.owned])

    def step(self, rate: float, scale: float) -> None:
        """Step with gradients times `scale`, and write the weights."""
        if self.adamw is None:
            return
        for owned in self.owned:
            if owned.parameter.grad is not None:
                owned.master.grad = owned.own(owned.parameter.grad).float().mul(scale)
        step_adamw(self.adamw, rate)
        self._publish()

    def discard(self) -> None:
        """Forget the gradients."""
        for owned in self.owned:
            owned.parameter.grad = owned.master.grad = None

    def state(self) -> dict[str, Any]:
        """See `Backend.optimizer_state`: AdamW's own tensors."""
        if self.adamw is None:
            return {}
        state: dict[str, Any] = moments(self.adamw, [o.name for o in self.owned], [o.master for o in self.owned])
        state |= {f"master/{owned.name}": owned.master.detach() for owned in self.owned
                  if owned.parameter.dtype != torch.float32}
        shapes = {owned.name: owned.parameter.shape for owned in self.owned}
        for key, value in state.items():
            kind, name = key.split("/", 1)
            if kind != "step":
                state[key] = by_rows(value, self.mesh, shapes[name])
        return state

    def _owned(self, name: str, parameter: torch.nn.Parameter) -> _Owned:
        rows = rows_of(parameter.shape[0], self.rank, self.size)
        owned = _Owned(name, parameter, rows, parameter)
        value = owned.own(parameter.detach())
        # float32 rows are stepped where they lie
        owned.master = torch.nn.Parameter(value if value.dtype == torch.float32 else value.float())
        return owned

    @torch.no_grad()
    def _publish(self) -> None:
        """Round the masters into the weights; whole parameters get the rows of all ranks."""
        for owned in self.owned:
            own = owned.own(owned.parameter)
            if own.data_ptr() != owned.master.data_ptr():
                own.copy_(owned.master)
            if not owned.sharded:
                self._gather_rows(owned.parameter, own)

    def _gather_rows(self, parameter: torch.Tensor, own: torch.Tensor) -> None:
        share = rows_of(parameter.shape[0], 0, self.size)[1]
        sent = own.new_zeros((share, *parameter.shape[1:]))
        sent[:len(own)] = own
        everything = own.new_empty((share * self.size, *parameter.shape[1:]))
        _all_gather(everything, sent, group=self.mesh.get_group())
        parameter.copy_(everything[:parameter.shape[0]])
