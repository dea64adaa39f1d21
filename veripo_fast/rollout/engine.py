"""Which engine samples: `rollout.engine` of the configuration."""

from __future__ import annotations

from veripo_fast.config.schema import Config
from veripo_fast.model.policy import Policy
from veripo_fast.rollout.protocol import RolloutEngine
from veripo_fast.rollout.torch_engine import TorchEngine


def make_engine(config: Config, policy: Policy) -> RolloutEngine:
    """The engine that the configuration names, sampling from the weights of `policy`."""
    engines = {"torch": TorchEngine}
    return engines[config.rollout.engine](policy)
