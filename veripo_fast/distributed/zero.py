"""DeepSpeed's ZeRO 1, 2 and 3 behind the same seam as FSDP2: the one file that imports deepspeed, and only when used.

DeepSpeed reduces and shards; veripo clips, guards and names. Two of its rules are turned around here. It averages
gradients over the ranks, and our losses are weighted to the update of all of them, so a loss is multiplied by their
number. It steps on every norm in some stages, and here its norm method is ours, so that a loss or norm that is not
finite takes DeepSpeed's own way to skip a step. A vision tower stays outside: whole on every rank, stepped by rows.

What it does to the process: PYTORCH_NVML_BASED_CUDA_CHECK and (on a CPU) DS_ACCELERATOR are set where they are not; its
logger says errors alone; torch's warning about the names of its collectives is filtered; its shared-memory collectives,
which are compiled for two minutes on a CPU, stay off.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from veripo_fast.config.schema import OptimizerConfig
from veripo_fast.distributed.backend import Held, KeepsState, Named, moments
from veripo_fast.distributed.hooks import without_deepspeeds
from veripo_fast.distributed.rows import RowOptimizer, all_ranks, by_rows, rows_of
from veripo_fast.distributed.zero_config import ZeroOptions, deepspeed_config
from veripo_fast.errors import ConfigError

_RANGE = "deepspeed>=0.19.8,<0.20"
_HOOKED = {
    1: ("scaled_global_norm", "single_partition_of_fp32_groups", "_lazy_init_hp_params_optimizer_state"),
    3: ("_get_norm_groups", "fp32_partitioned_groups_flat", "parameter_offload"),
}
"""What is used of DeepSpeed's optimizer beside its public methods; stage 2 is as stage 1."""
_MOMENTS = ("exp_avg", "exp_avg_sq")


class ZeroBackend(KeepsState):
    """See `Backend`. Re-points (ZeRO 1 and 2) or shards (3) the parameters of `step`, for good.

    Below ZeRO-3 a forward pass of one rank waits for nobody, so `sharded` is False there; every rank still has to call
    `backward` equally often.
    """

    distributed = True

    def __init__(self, step: Any, named: Callable[[], Named], options: ZeroOptions) -> None:
        """
        Args:
            step: `model.step.PolicyStep`.
            named: the policy's parameters, frozen ones and those outside of `step` too.

        Raises:
            ConfigError: DeepSpeed is missing or of another version, or does not take the user's configuration.
        """
        inside = list(step.parameters())
        self._inside = {id(parameter) for parameter in inside}
        self._named = named
        self._step = step
        self.sharded = options.stage == 3
        self._dtype, device, hidden_size = inside[0].dtype, inside[0].device, step.lm_head.weight.shape[1]
        self._deepspeed = _import(device)
        config = deepspeed_config(options, bfloat16=self._dtype == torch.bfloat16, hidden_size=hidden_size)
        trained = [parameter for parameter in inside if parameter.requires_grad]
        self.engine = _start(self._deepspeed, step, torch.optim.AdamW(trained, lr=0.0), config)
        if self.sharded:
            _forget_weights_between(step)
        self.zero = self.engine.optimizer
        """DeepSpeed's optimizer around torch's."""
        self.tower = RowOptimizer(all_ranks(device))
        self.rank, self.size = self.tower.rank, self.tower.size
        self._state_mesh = all_ranks(torch.device("cpu")) if options.offload == "cpu" else self.tower.mesh
        self._language_rate = 1.0
        self._pending = False
        self._loss = self._outside = self._norm = math.nan
        self._take_over_norm()

    def begin(self, config: OptimizerConfig, peak: float) -> None:
        """See `Backend`: in place, because a second engine would hook into the parameters twice."""
        for group in self.zero.optimizer.param_groups:
            group.update(lr=peak, betas=config.betas, weight_decay=config.weight_decay)
        self._language_rate = config.language_rate
        self.zero.refresh_fp32_params()
        for tensor in self._moments().values():
            tensor.zero_()
        self.tower.begin([(name, parameter) for name, parameter in self._named()
                          if parameter.requires_grad and id(parameter) not in self._inside], config, peak)

    def forward(self, *inputs: Any) -> Any:
        """See `Backend`."""
        return self.engine(*inputs)

    def backward(self, loss: torch.Tensor) -> None:
        """See `Backend`; the gradients of a tower become those of the loss times the number of ranks."""
        self._pending = True
        self.engine.backward(loss * self.size)

    def step(self, loss: float, rate: float, max_norm: float) -> float:
        """See `Backend`."""
        self._pending = False
        self.tower.reduce()
        self._loss, self._outside, self._norm = loss, self.tower.norm(), math.nan
        self.zero.set_lr(rate * self._language_rate)
        self.zero.clip_grad = max_norm
        self.engine.step()
        if self.engine.was_step_applied():
            self.tower.step(rate, min(1.0, max_norm / (self._norm + 1e-6)))
        self.tower.discard()
        return self._norm

    def discard(self) -> None:
        """See `Backend`: a step that the guard skips."""
        if self._pending:
            self.step(math.nan, 0.0, 1.0)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """See `Backend`. DeepSpeed's hooks would free a layer's weights behind its first pass, so they are off."""
        if not self.sharded:
            yield
            return
        with self._deepspeed.zero.GatheredParameters(list(self._step.parameters())), without_deepspeeds(self._step):
            yield

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """See `Backend`."""
        for name, parameter in self._named():
            with self._deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                value = parameter.detach()
                if self.rank:
                    value = value.new_empty(0)
                elif hasattr(parameter, "ds_id"):
                    value = value.clone()
            yield name, value
            del value

    def held(self) -> Held:
        """See `Backend`."""
        held: dict[str, tuple[int, torch.Tensor]] = {}
        parameter: Any
        for name, parameter in self._named():
            if hasattr(parameter, "ds_id"):
                own = parameter.ds_tensor.detach().view(-1)
                first = min(self.rank * own.numel(), parameter.ds_numel)
                held[name] = first, own[:parameter.ds_numel - first]
            else:
                held[name] = 0, parameter.detach().view(-1)
        return held

    # -- the state of AdamW -------------------------------------------------------------------------------------------

    def optimizer_state(self) -> dict[str, Any]:
        """See `Backend`: a copy, gathered parameter by parameter, of which a rank keeps its rows."""
        utils = self._deepspeed.utils
        steps = self._moments()["step/0"].item()
        state: dict[str, Any] = {}
        for name, parameter in self._trained():
            state[f"step/{name}"] = torch.tensor(steps)
            for kind in _MOMENTS:
                state[f"{kind}/{name}"] = self._rows(utils.safe_get_full_optimizer_state(parameter, kind))
            if self._dtype != torch.float32:
                state[f"master/{name}"] = self._rows(utils.safe_get_full_fp32_param(parameter))
        return state | self.tower.state()

    def restored(self, state: dict[str, Any]) -> None:
        """See `Backend`: written back parameter by parameter; masters of float32 weights are taken from the weights."""
        utils = self._deepspeed.utils
        own = self._moments()
        self.zero.refresh_fp32_params()
        names = [name for name, _ in self._trained()]
        steps = max(float(state[f"step/{name}"]) for name in names)
        for key, tensor in own.items():
            if key.startswith("step/"):
                tensor.fill_(steps)
        for name, parameter in self._trained():
            for kind in _MOMENTS:
                value = self._sent(parameter, state[f"{kind}/{name}"])
                if self.sharded:
                    utils.safe_set_local_optimizer_state(parameter, value, kind)
                else:
                    utils.safe_set_full_optimizer_state(parameter, value, kind)
            if self._dtype != torch.float32:
                value = self._sent(parameter, state[f"master/{name}"])
                if self.sharded:
                    utils.safe_set_local_fp32_param(parameter, value)
                else:
                    utils.safe_set_full_fp32_param(parameter, value)

    def _trained(self) -> Named:
        return [(name, parameter) for name, parameter in self._named()
                if parameter.requires_grad and id(parameter) in self._inside]

    def _moments(self) -> dict[str, torch.Tensor]:
        """Torch's AdamW state of each flat partition, made where no step has made it, and known to DeepSpeed."""
        flat = self.zero.fp32_partitioned_groups_flat if self.sharded else self.zero.single_partition_of_fp32_groups
        found = moments(self.zero.optimizer, [str(number) for number in range(len(flat))], flat)
        if not self.sharded:
            self.zero._lazy_init_hp_params_optimizer_state()
        return found

    def _rows(self, whole: torch.Tensor) -> DTensor:
        own = whole[slice(*rows_of(whole.shape[0], self.rank, self.size))].clone()
        return by_rows(own.to(self._state_mesh.device_type), self._state_mesh, whole.shape)

    def _sent(self, parameter: Any, value: Any) -> torch.Tensor:
        """What DeepSpeed's setters take: everything, or at ZeRO-3 the rank's part.

        Its setter of everything cuts a ZeRO-3 parameter behind its end where the ranks do not divide it.
        """
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        if not self.sharded:
            return whole
        share = parameter.ds_tensor.numel()
        padded = torch.nn.functional.pad(whole.view(-1), (0, share * self.size - whole.numel()))
        return padded.narrow(0, share * self.rank, share)

    # -- the norm -----------------------------------------------------------------------------------------------------

    def _take_over_norm(self) -> None:
        """Answer for DeepSpeed's norm, by which it clips and skips."""
        missing = [name for name in _HOOKED[3 if self.sharded else 1] if not hasattr(self.zero, name)]
        if missing:
            raise ConfigError(f"deepspeed {self._deepspeed.__version__} has no {missing[0]}, which veripo needs; "
                              f"install {_RANGE}")
        if self.sharded:
            inner = self.zero._get_norm_groups
            self.zero._get_norm_groups = lambda: [self._norm_of_all(inner())]
        else:
            whole = self.zero.scaled_global_norm
            self.zero.scaled_global_norm = lambda *_, **__: self._norm_of_all([whole()])

    def _norm_of_all(self, groups: list[torch.Tensor]) -> torch.Tensor:
        """The norm over DeepSpeed's parameters and those outside; -1, its word for a step to skip, where it or the loss
        is not finite."""
        inside = [float(norm) for norm in groups]
        good = all(math.isfinite(norm) and norm >= 0 for norm in inside)
        self._norm = math.hypot(*inside, self._outside) if good else math.nan
        steps = math.isfinite(self._norm) and math.isfinite(self._loss)
        return torch.tensor(self._norm if steps else -1.0, dtype=torch.float32, device=groups[0].device)


def _import(device: torch.device) -> Any:
    """DeepSpeed, silent and without anything to compile."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
    except ModuleNotFoundError as error:
        raise ConfigError(f"distributed.backend is deepspeed, which is not installed ({error}); "
                          "pip install 'veripo-fast[deepspeed]'") from error
    deepspeed.utils.logger.setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+_tensor` is deprecated", FutureWarning)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _start(deepspeed: Any, step: Any, adamw: torch.optim.AdamW, config: dict[str, Any]) -> Any:
    """DeepSpeed's engine around a module, in the process group that is there."""
    try:
        deepspeed.DeepSpeedConfig(config)
    except (ValueError, deepspeed.DeepSpeedConfigError) as error:
        raise ConfigError(f"distributed.deepspeed_config: {' '.join(str(error).split())[:300]}") from error
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    return deepspeed.initialize(model=step, optimizer=adamw, config=config)[0]


def _forget_weights_between(step: torch.nn.Module) -> None:
    """Keep the linear layers of `step` from holding gathered weights from the forward pass to the backward pass.

    torch saves a view of a weight, which DeepSpeed cannot free. DeepSpeed's own answer puts a function of its own in
    place of torch.nn.functional.linear, for every model of the process; here it is in these layers alone.
    """
    from deepspeed.runtime.zero.linear import LinearFunctionForZeroStage3

    def forward(layer: torch.nn.Linear, inputs: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = LinearFunctionForZeroStage3.apply(inputs, layer.weight, layer.bias)
        return output

    for layer in step.modules():
        if type(layer) is torch.nn.Linear:
            layer.forward = partial(forward, layer)  # type: ignore[method-assign]
