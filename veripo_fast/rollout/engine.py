"""Which engine samples: `rollout.engine` of the configuration."""

from __future__ import annotations

from veripo_fast.config.families import names_with
from veripo_fast.config.schema import Config
from veripo_fast.errors import ConfigError
from veripo_fast.model.policy import Policy
from veripo_fast.rollout.protocol import RolloutEngine
from veripo_fast.rollout.torch_engine import TorchEngine


def make_engine(config: Config, policy: Policy) -> RolloutEngine:
    """The engine that the configuration names, sampling from the weights of `policy`.

    Raises:
        ConfigError: vLLM is asked for and cannot be used, also with the policy's family, or does not fit into the
            memory.
    """
    if config.rollout.engine == "torch":
        return TorchEngine(policy)
    family, rollout = policy.encoder.family, config.rollout
    if rollout.router_replay and policy.routers is None:
        raise ConfigError(f"rollout.router_replay replays the choice of experts, and {family.name} has none; "
                          f"{names_with('router_class')} have; set it to false")
    if not family.engine_rules:
        raise ConfigError(f"rollout.engine is vllm, to which the weights of {family.name} cannot be handed over yet; "
                          f"those of {names_with('engine_rules')} can; set rollout.engine to torch")
    from veripo_fast.rollout.limits import limits_of
    from veripo_fast.rollout.vllm_engine import VllmEngine
    from veripo_fast.rollout.vllm_library import check_version

    check_version(family)
    return VllmEngine(policy, limits_of(config, policy), vision=rollout.vision, weights=rollout.weights,
                      stall_seconds=rollout.stall_seconds, tensor_parallel=rollout.tensor_parallel,
                      router_replay=rollout.router_replay)
