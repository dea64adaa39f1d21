"""What vLLM holds in the trainer's process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from veripo_fast.config.schema import RolloutConfig
from veripo_fast.schedule.activations import layer_working_bytes
from veripo_fast.schedule.adapters import AdapterShapes, merged_bytes
from veripo_fast.schedule.placement import Owners
from veripo_fast.schedule.shapes import ModelShape


@dataclass(frozen=True)
class EngineShape:
    """An engine of one rank; nothing where completions are written by the torch engine."""

    shape: ModelShape
    config: RolloutConfig
    itemsize: int
    gpu_bytes: int
    longest: int
    """Tokens of the longest prompt with its completion."""
    alone: bool
    """Whether no rank shares the trainer's weights with others, so that an engine may take them as they are."""
    adapters: AdapterShapes | None

    def weights(self, starting: bool) -> Owners:
        """vLLM makes its own weights while it starts, and keeps them unless they are the trainer's."""
        if self.config.engine != "vllm":
            return {}
        if self.config.weights == "alias" and self.alone and not starting:
            merged = merged_bytes(self.adapters, self.itemsize)
            return {"engine weights": merged} if merged else {}
        whole = (self.shape.language_numbers + self.shape.vision_numbers) * self.itemsize
        return {"engine weights": whole // self.config.tensor_parallel}

    def cache(self) -> Mapping[str, int]:
        """Keys and values, and what a batch of tokens takes besides."""
        asked = int(self.config.kv_cache_gb * 2 ** 30) or self.gpu_bytes // 4 or 2 ** 30  # as rollout/limits.py
        batched = max(8192, self.longest)
        working = layer_working_bytes(self.shape, [(1, batched)], self.itemsize)
        return {"key/value cache": asked, "engine activations": working
                + min(self.config.max_sequences, batched) * self.shape.vocabulary * 4 * 3}
