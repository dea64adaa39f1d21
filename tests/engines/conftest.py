"""Real vLLM engines, built once per file and family: a start takes ten seconds and more."""

from __future__ import annotations

import os

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import policies
from veripo_fast.config.inputs import ModelConfig
from veripo_fast.model.policy import Policy, in_own_memory, load_policy
from veripo_fast.rollout.limits import EngineLimits
from veripo_fast.rollout.vllm_engine import VllmEngine

LIMITS = EngineLimits(context_tokens=1024, batched_tokens=2048, sequences=16, kv_cache_bytes=1 << 30)


def own_policy(family: str, *, freeze_vision: bool = True, tied: bool = True) -> Policy:
    """A policy whose weights a test may change."""
    return policy_of(policies.checkpoint(family) if tied else policies.untied_checkpoint(family), freeze_vision)


def policy_of(folder: Path, freeze_vision: bool = True) -> Policy:
    """The policy of a checkpoint with its weights in memory of its own."""
    return in_own_memory(load_policy(ModelConfig(path=str(folder), device="cpu", freeze_vision=freeze_vision)))


@pytest.fixture(scope="module")
def engine_of() -> Iterator[Callable[..., VllmEngine]]:
    """Makes engines, one at a time: the next one ends the one before."""
    made: list[VllmEngine] = []

    def make(policy: Policy, limits: EngineLimits = LIMITS, **options: Any) -> VllmEngine:
        close()
        made.append(VllmEngine(policy, limits, **options))
        return made[-1]

    def close() -> None:
        while made:
            made.pop().close()
        gc.collect()

    yield make
    close()


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
