"""FSDP2: every rank holds rows of each weight, gradient and moment, and gathers a layer while it runs.

The decoder layers and what is around them are sharded. A vision tower that trains stays whole on every rank, because a
rank runs it for its own videos whenever it likes; only its optimizer is shared out by rows. A frozen tower stays whole.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from veripo_fast.config.schema import OptimizerConfig
from veripo_fast.distributed.backend import Held, Named, adamw, moments, step_adamw

_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
"""Its name since torch 2.13, and the one before."""


def rows_of(count: int, rank: int, size: int) -> tuple[int, int]:
    """Which of `count` rows a rank holds: as `torch.chunk` cuts them, so late ranks may hold fewer or none."""
    share = -(-count // size)
    return min(rank * share, count), min((rank + 1) * share, count)


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


class FsdpBackend:
    """See `Backend`. Shards the modules of `step` in place."""

    distributed = sharded = True

    def __init__(self, step: Any, named: Callable[[], Named], warm_up: Callable[[Any], object]) -> None:
        """
        Args:
            step: `model.step.PolicyStep`.
            named: the policy's parameters, frozen ones too; asked for anew, because sharding replaces them.
            warm_up: runs something through `step`, without a gradient.
        """
        self.mesh = _mesh(next(step.parameters()).device)
        self.modules = shard(step, self.mesh)
        self._step = step
        self._all = named
        with torch.no_grad():
            warm_up(step)  # sets up the modules from the root: a layer that ran first would be a root of its own
        self.rank, self.size = self.mesh.get_local_rank(), self.mesh.size()
        self.owned: list[_Owned] = []
        self.adamw: torch.optim.AdamW

    def begin(self, config: OptimizerConfig, peak: float) -> None:
        """See `Backend`."""
        self.owned = [self._owned(name, parameter) for name, parameter in self._named() if parameter.requires_grad]
        self.adamw = adamw([owned.master for owned in self.owned], config, peak)

    def forward(self, *inputs: Any) -> Any:
        """See `Backend`."""
        return self._step(*inputs)

    def backward(self, loss: torch.Tensor, *, last: bool = True) -> None:
        """See `Backend`. FSDP2 takes the mean over ranks, of sharded weights alone."""
        (loss * self.size).backward()

    def step(self, loss: float, rate: float, max_norm: float) -> float:
        """See `Backend`."""
        self._reduce_replicated()
        gradients = {owned.name: owned.own(owned.parameter.grad).float() for owned in self.owned
                     if owned.parameter.grad is not None}
        norm = global_norm(list(gradients.values()), self.mesh)
        if math.isfinite(loss) and math.isfinite(norm):
            scale = min(1.0, max_norm / (norm + 1e-6))
            for owned in self.owned:
                if owned.name in gradients:
                    owned.master.grad = gradients[owned.name].mul(scale)
            step_adamw(self.adamw, rate)
            self._publish()
        self.discard()
        return norm

    def discard(self) -> None:
        """See `Backend`."""
        for owned in self.owned:
            owned.parameter.grad = owned.master.grad = None

    @contextmanager
    def whole(self) -> Iterator[None]:
        """See `Backend`: every layer is gathered at once."""
        for module in self.modules:
            module.unshard()
            module.set_reshard_after_forward(False, recurse=False)
        try:
            yield
        finally:
            for module in self.modules:
                module.set_reshard_after_forward(module is not self._step, recurse=False)
                module.reshard()

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """See `Backend`."""
        for name, parameter in self._named():
            value = parameter.detach()
            if isinstance(value, DTensor):
                value = value.full_tensor()
            yield name, value if self.rank == 0 else value.new_empty(0)
            del value

    def held(self) -> Held:
        """See `Backend`."""
        held: dict[str, tuple[int, torch.Tensor]] = {}
        for name, parameter in self._named():
            value = parameter.detach()
            first = 0
            if isinstance(value, DTensor):
                first = rows_of(value.shape[0], self.rank, self.size)[0] * math.prod(value.shape[1:])
                value = value.to_local()
            held[name] = first, value.reshape(-1)
        return held

    def optimizer_state(self) -> dict[str, Any]:
        """See `Backend`."""
        state: dict[str, Any] = moments(self.adamw, [o.name for o in self.owned], [o.master for o in self.owned])
        state |= {f"master/{owned.name}": owned.master.detach() for owned in self.owned
                  if owned.parameter.dtype != torch.float32}
        shapes = {owned.name: owned.parameter for owned in self.owned}
        for key, value in state.items():
            kind, name = key.split("/", 1)
            if kind != "step":
                like = shapes[name]
                state[key] = DTensor.from_local(value, self.mesh, [Shard(0)], run_check=False, shape=like.shape,
                                                stride=torch.empty(like.shape, device="meta").stride())
        return state

    def restored(self, state: dict[str, Any]) -> None:
        """See `Backend`: the tensors are AdamW's own."""

    def _named(self) -> Named:
        """The parameters as they are sharded: after a forward the root's are still whole."""
        self._step.reshard()
        return self._all()

    # -- rows ---------------------------------------------------------------------------------------------------------

    def _owned(self, name: str, parameter: torch.nn.Parameter) -> _Owned:
        rows = rows_of(parameter.shape[0], self.rank, self.size)
        owned = _Owned(name, parameter, rows, parameter)
        value = owned.own(parameter.detach())
        # float32 rows are stepped where they lie
        owned.master = torch.nn.Parameter(value if value.dtype == torch.float32 else value.float())
        return owned

    def _reduce_replicated(self) -> None:
        """Sum the gradients of whole parameters over the ranks; one that no rank has stays None."""
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


def shard(step: Any, mesh: DeviceMesh) -> list[FSDPModule]:
    """Shard the layers and the rest of a `PolicyStep`; returns the modules that gather, the root last.

    Gradients are added up in float32.
    """
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")  # nobody writes into it
    precision = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in step.language_model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=precision)
    fully_shard(step, mesh=mesh, mp_policy=precision)
    modules: list[FSDPModule] = [*step.language_model.layers, step]
    for module, before in zip(modules, [step, *modules[:-1]], strict=True):
        # FSDP2 guesses the order from the forwards since the last backward. A rank that sampled more has had others,
        # would gather another layer than the rest in its backward, and all would hang.
        module.set_modules_to_backward_prefetch([before])
    return modules


def shard_frozen(step: Any) -> list[FSDPModule]:
    """Shard a policy that only gives log-probs, such as a reference."""
    return shard(step, _mesh(next(step.parameters()).device))


def global_norm(gradients: list[torch.Tensor], mesh: DeviceMesh) -> float:
    """Euclidean norm over the rows of all ranks."""
    squares = torch.zeros((), dtype=torch.float64, device=mesh.device_type)
    for gradient in gradients:
        squares += gradient.double().square().sum()
    dist.all_reduce(squares, group=mesh.get_group())
    return math.sqrt(squares.item()) if squares.isfinite() else float(squares)


def _mesh(device: torch.device) -> DeviceMesh:
    return init_device_mesh(device.type, (dist.get_world_size(),))
