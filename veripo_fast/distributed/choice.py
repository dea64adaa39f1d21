"""Which backend holds a policy: `distributed.backend` of the configuration."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from veripo_fast.config.schema import Config, DistributedConfig
from veripo_fast.distributed.world import World
from veripo_fast.errors import ConfigError


def check_backend(config: Config, world: World) -> None:
    """Whether the configuration and the number of ranks go together.

    Raises:
        ConfigError: they do not.
    """
    together = config.rollout.tensor_parallel
    if world.size % together:
        raise ConfigError(f"rollout.tensor_parallel is {together}, and {world.size} ranks cannot be shared out into "
                          "engines of as many; start a multiple of it")
    if world.size == 1 and config.distributed.backend in ("fsdp", "deepspeed"):
        raise ConfigError(f"distributed.backend is {config.distributed.backend}, and there is one process; start "
                          "several with torchrun, or take auto")
    if world.size > 1 and config.distributed.backend == "none":
        raise ConfigError(f"distributed.backend is none, which is one process, and {world.size} ranks were started; "
                          "start it without torchrun, or take fsdp or deepspeed")
    if world.size > 1 and config.model.lora.rank and config.rollout.engine == "vllm":
        raise ConfigError(f"model.lora.rank is {config.model.lora.rank}, and adapters of {world.size} ranks cannot be "
                          "merged into vllm; take rollout.engine torch, or one process")


def gpu_name(device: str) -> str:
    """Of the GPU that this rank takes; empty on a CPU."""
    import torch

    return torch.cuda.get_device_name() if device != "cpu" and torch.cuda.is_available() else ""


def distribute(policy: Any, config: DistributedConfig, world: World) -> None:
    """Lay the weights of a `model.policy.Policy` over the ranks, by way of its `backend`; of one process none.

    Raises:
        ConfigError: DeepSpeed cannot be used.
    """
    if world.size == 1:
        return
    if config.backend == "deepspeed":
        policy.backend = world.agreed(partial(_zero, policy, config))
        return
    from veripo_fast.distributed.fsdp import FsdpBackend

    policy.backend = FsdpBackend(policy.step, policy.all_parameters, lambda step: step(*policy.idle_inputs()))


def _zero(policy: Any, config: DistributedConfig) -> Any:
    from veripo_fast.distributed.zero import ZeroBackend
    from veripo_fast.distributed.zero_config import ZeroOptions, read_json

    given = read_json(Path(config.deepspeed_config)) if config.deepspeed_config else {}
    return ZeroBackend(policy.step, policy.all_parameters, ZeroOptions(config.zero_stage, config.offload, given))


def distribute_frozen(policy: Any, world: World) -> None:
    """The same for a policy that only gives log-probs."""
    if world.size > 1:
        from veripo_fast.distributed.fsdp import shard_frozen

        shard_frozen(policy.step)
