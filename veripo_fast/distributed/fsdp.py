"""FSDP2: every rank holds rows of each weight, gradient and moment, and gathers a layer while it runs.

The decoder layers and what is around them are sharded. A vision tower that trains stays whole on every rank, because a
rank runs it for its own videos whenever it likes; only its optimizer is shared out by rows. A frozen tower stays whole.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from veripo_fast.config.schema import OptimizerConfig
from veripo_fast.distributed.backend import Held, Named
from veripo_fast.distributed.rows import RowOptimizer, all_ranks, rows_of


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
        mesh = all_ranks(next(step.parameters()).device)
        self.modules = shard(step, mesh)
        self._step = step
        self._all = named
        with torch.no_grad():
            warm_up(step)  # sets up the modules from the root: a layer that ran first would be a root of its own
        self.rows = RowOptimizer(mesh)
        self.rank, self.size = self.rows.rank, self.rows.size
        self.part_norms: dict[str, float] = {}
        self._wants_norms = False

    def begin(self, config: OptimizerConfig, peak: float) -> None:
        """See `Backend`."""
        trained = [(name, parameter) for name, parameter in self._named() if parameter.requires_grad]
        self.rows.begin(trained, config, peak)
        self._wants_norms = config.part_norms

    def end(self) -> None:
        """See `Backend`."""
        self.rows.end()

    def movable(self) -> list[torch.Tensor]:
        """See `Backend`."""
        return self.rows.movable()

    def forward(self, *inputs: Any) -> Any:
        """See `Backend`."""
        return self._step(*inputs)

    def backward(self, loss: torch.Tensor) -> None:
        """See `Backend`. FSDP2 takes the mean over ranks, of sharded weights alone."""
        (loss * self.size).backward()

    def step(self, loss: float, rate: float, max_norm: float) -> float:
        """See `Backend`."""
        self.rows.reduce()
        norm = self.rows.norm()
        if self._wants_norms:
            self.part_norms = self.rows.part_norms()
        if math.isfinite(loss) and math.isfinite(norm):
            self.rows.step(rate, min(1.0, max_norm / (norm + 1e-6)))
        self.discard()
        return norm

    def discard(self) -> None:
        """See `Backend`."""
        self.rows.discard()

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
        return self.rows.state()

    def restored(self, state: dict[str, Any]) -> None:
        """See `Backend`: the tensors are AdamW's own."""

    def _named(self) -> Named:
        """The parameters as they are sharded: after a forward the root's are still whole."""
        self._step.reshard()
        return self._all()


def shard(step: Any, mesh: DeviceMesh) -> list[FSDPModule]:
    """Shard the layers and the rest of a `PolicyStep`; returns the modules that gather, the root last.

    Gradients of the ranks are added up in float32, and micro-batches in the dtype of the weights, as in one process.
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
    modules = shard(step, all_ranks(next(step.parameters()).device))
    modules[-1].set_reshard_after_forward(True, recurse=False)  # a root waits for a backward pass otherwise
    return modules
