"""How the policy's weights reach an engine: one rank's own, or those that many ranks share."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal

import torch

from veripo_fast.distributed.backend import whole_shape
from veripo_fast.errors import ConfigError
from veripo_fast.model.lora import Adapters, is_adapter, plain_name
from veripo_fast.model.policy import Policy
from veripo_fast.rollout.vllm_library import tensor_parallel_rank
from veripo_fast.weights.alias import Aliasing
from veripo_fast.weights.layouts import Geometry
from veripo_fast.weights.sharded import ShardedSync
from veripo_fast.weights.sync import Named, Reload, SyncReport, WeightSync


def sync_of(policy: Policy, model: torch.nn.Module, mode: Literal["alias", "copy"], *, tower: bool,
            tensor_parallel: int) -> WeightSync | ShardedSync | MergedSync:
    """What keeps an engine's `model` equal to the policy. Collective where the policy lies over many ranks.

    Args:
        tower: whether the engine has the vision tower.

    Raises:
        ConfigError: the policy's parameters do not fill the engine's; adapters over many ranks.
    """
    geometry = Geometry.of(policy.model.config)
    named = dict(policy.model.named_parameters())
    if policy.adapters is not None:
        if policy.backend.distributed:
            raise ConfigError("model.lora cannot be merged into an engine from weights that lie over many ranks; take "
                              "rollout.engine torch, or one process")
        return MergedSync(policy.adapters, named, model.named_parameters(), geometry, mode=mode, tower=tower,
                          tp=tensor_parallel, rank=tensor_parallel_rank(tensor_parallel))
    if policy.backend.distributed:
        return ShardedSync({name: whole_shape(parameter) for name, parameter in named.items()}, policy.backend.held,
                           model.named_parameters(), geometry, tower=tower, tp=tensor_parallel,
                           trained=[name for name, parameter in named.items() if parameter.requires_grad],
                           ranks_per_node=int(os.environ.get("LOCAL_WORLD_SIZE", 0)) or None)
    return WeightSync(named.items(), model.named_parameters(), geometry, mode=mode, tower=tower, tp=tensor_parallel,
                      rank=tensor_parallel_rank(tensor_parallel))


class MergedSync:
    """A `WeightSync` whose engine gets W + alpha / rank * B A where the policy has adapters.

    The merged weights are tensors of their own. Where an engine's can be shared they are the engine's, so that merging
    writes into it, and the policy's base is held once more, in its layers.

    Args:
        named: the policy's parameters. options: of `WeightSync`.
    """

    def __init__(self, adapters: Adapters, named: Mapping[str, torch.nn.Parameter], engine: Named, geometry: Geometry,
                 **options: Any) -> None:
        self.adapters = adapters
        self.merged = {f"{name}.weight": torch.nn.Parameter(torch.empty_like(layer.base_layer.weight))
                       for name, layer in adapters.layers.items()}  # they train: each sync sends them again
        sources: dict[str, torch.nn.Parameter] = {}
        for name, parameter in named.items():
            if not is_adapter(name):
                sources[plain_name(name)] = self.merged.get(plain_name(name), parameter)
        self.inner = WeightSync(sources.items(), engine, geometry, **options)

    def start(self, version: int) -> tuple[Aliasing, SyncReport]:
        """See `WeightSync`."""
        self.adapters.merge_into(self.merged)
        return self.inner.start(version)

    def sync(self, version: int, *, everything: bool = False) -> SyncReport:
        """See `WeightSync`."""
        self.adapters.merge_into(self.merged)
        return self.inner.sync(version, everything=everything)

    def self_test(self, reload: Reload) -> None:
        """See `WeightSync`."""
        self.inner.self_test(reload)
