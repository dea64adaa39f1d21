"""How the policy's weights reach an engine: one rank's own, or those that many ranks share."""

from __future__ import annotations

import os
from typing import Literal

import torch

from veripo_fast.distributed.backend import whole_shape
from veripo_fast.model.policy import Policy
from veripo_fast.rollout.vllm_library import tensor_parallel_rank
from veripo_fast.weights.layouts import Geometry
from veripo_fast.weights.sharded import ShardedSync
from veripo_fast.weights.sync import WeightSync


def sync_of(policy: Policy, model: torch.nn.Module, mode: Literal["alias", "copy"], *, tower: bool,
            tensor_parallel: int) -> WeightSync | ShardedSync:
    """What keeps an engine's `model` equal to the policy. Collective where the policy lies over many ranks.

    Args:
        tower: whether the engine has the vision tower.

    Raises:
        ConfigError: the policy's parameters do not fill the engine's.
    """
    geometry = Geometry.of(policy.model.config)
    named = dict(policy.model.named_parameters())
    if policy.backend.distributed:
        return ShardedSync({name: whole_shape(parameter) for name, parameter in named.items()}, policy.backend.held,
                           model.named_parameters(), geometry, tower=tower, tp=tensor_parallel,
                           trained=[name for name, parameter in named.items() if parameter.requires_grad],
                           ranks_per_node=int(os.environ.get("LOCAL_WORLD_SIZE", 0)) or None)
    return WeightSync(named.items(), model.named_parameters(), geometry, mode=mode, tower=tower, tp=tensor_parallel,
                      rank=tensor_parallel_rank(tensor_parallel))
