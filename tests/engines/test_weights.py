"""Weights that move: shared or copied, twenty updates, sleep in between, caches and memory that stay flat."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.engines.conftest import own_policy
from tests.support import policies
from tests.support.engine_runs import MEDIA, SAMPLED, TRUNCATED, Updates, completions, prompts_of
from tests.support.memory import held_bytes
from veripo_fast.config.inputs import ModelConfig
from veripo_fast.config.lora import LoraConfig
from veripo_fast.errors import TrainingError
from veripo_fast.model.policy import in_own_memory, load_policy, save_policy
from veripo_fast.rollout.parity import largest_gap
from veripo_fast.rollout.vllm_engine import VllmEngine
from veripo_fast.weights.layouts import stored

FLOAT32 = 5e-5

GROWTH = 3 << 20
"""Less than one copy of the smallest policy's weights, in bytes."""


WAYS = [(family, weights, vision) for family in policies.FAMILIES for weights in ("alias", "copy")
        for vision in ("output", "pixels")]
WAYS += [(family, *way) for family in policies.NEW_FAMILIES for way in (("alias", "pixels"), ("copy", "output"))]


@pytest.mark.parametrize(("family", "weights", "vision"), WAYS)
def test_twenty_updates(family: str, weights: str, vision: str, engine_of: Callable[..., VllmEngine]) -> None:
    """The engine samples from the weights of this step: with the tower trained where it gets pixels."""
    policy = own_policy(family, freeze_vision=vision == "output", tied=family in ("qwen3_vl", "qwen3_5"))
    engine = engine_of(policy, weights=weights, vision=vision)
    updates, sizes = Updates(policy), []
    before = [p.detach().clone() for _, p in policy.parameters()]
    for number in range(20):
        prompts = prompts_of(policy)
        report = engine.sync()
        groups = engine.generate(prompts, TRUNCATED)
        assert largest_gap(policy, prompts, groups, TRUNCATED.temperature) < FLOAT32
        if number:
            assert (report["sync_bytes"] == 0) == (weights == "alias")
        assert engine.sync() == {}
        engine.sleep()
        updates.step(prompts, groups)
        sizes.append(held_bytes())
    moved = max(float((p.detach() - old).abs().max()) for (_, p), old in zip(policy.parameters(), before, strict=True))
    assert moved > 1e-3
    assert sizes[-1] - sizes[4] < GROWTH


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3_5_moe"])
def test_shared_weights_are_one_memory(family: str, engine_of: Callable[..., VllmEngine]) -> None:
    """Those of experts and recurrent layers too."""
    policy = own_policy(family)
    engine = engine_of(policy, weights="alias")
    places = {p.untyped_storage().data_ptr() for p in engine.model.parameters()}
    trained = [p for _, p in policy.parameters()]
    assert {p.untyped_storage().data_ptr() for p in trained} == places


def test_a_checkpoint_of_shared_weights_is_the_same(tmp_path: Path, engine_of: Callable[..., VllmEngine]) -> None:
    """Views of fused tensors are written like parameters of their own."""
    alone, shared = own_policy("qwen2_5_vl", tied=False), own_policy("qwen2_5_vl", tied=False)
    engine_of(shared, weights="alias")
    save_policy(alone, tmp_path / "alone")
    save_policy(shared, tmp_path / "shared")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("alone", "shared"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_fifty_steps_with_new_videos(engine_of: Callable[..., VllmEngine]) -> None:
    """Nothing of a video stays behind: not in the encoder cache, not in memory (EasyR1#11002)."""
    policy = own_policy("qwen3_vl")
    engine = engine_of(policy)
    runner, sizes, kept = engine.engine.model_executor.driver_worker.worker.model_runner, [], []
    for number in range(50):
        engine.generate(prompts_of(policy, seed=1000 * number), SAMPLED)
        policy.version += 1
        sizes.append(held_bytes())
        kept.append(len(runner.encoder_cache))
    assert max(kept[5:]) <= kept[5] + 1 <= len(MEDIA) * 2
    assert sizes[-1] - sizes[5] < GROWTH


@pytest.mark.parametrize("family", ["qwen2_5_vl", *policies.NEW_FAMILIES])
def test_two_syncs_in_a_row_change_nothing(family: str, engine_of: Callable[..., VllmEngine]) -> None:
    """And neither does the engine's own way of loading the same weights, which may turn those of experts."""
    policy = own_policy(family, tied=False)
    engine = engine_of(policy, weights="copy")
    prompts = prompts_of(policy)
    first = completions(engine.generate(prompts, SAMPLED))
    for _ in range(2):
        policy.version += 1
        engine.sync()
    assert completions(engine.generate(prompts, SAMPLED)) == first
    engine._reload((name, stored(name, p.detach(), family)) for name, p in policy.model.named_parameters()
                   if ".visual." not in name)
    assert completions(engine.generate(prompts, SAMPLED)) == first


def test_weights_that_are_not_finite(engine_of: Callable[..., VllmEngine]) -> None:
    policy = own_policy("qwen3_vl")
    engine = engine_of(policy)
    prompts = prompts_of(policy)
    with torch.no_grad():
        policy.model.model.language_model.norm.weight.fill_(float("nan"))
    policy.version += 1
    with pytest.raises(TrainingError, match="after 1 optimizer steps gives logits that are not finite"):
        engine.generate(prompts, SAMPLED)


@pytest.mark.parametrize(("family", "weights"), [
    *((family, weights) for family in policies.FAMILIES for weights in ("alias", "copy")),
    ("qwen3_5_moe", "alias"), ("qwen3_5", "copy")])
def test_merged_adapters(family: str, weights: str, engine_of: Callable[..., VllmEngine]) -> None:
    """The engine samples from base and adapters of this step: those of the head and of a merger too."""
    lora = LoraConfig(rank=4, targets=("language", "merger", "head"))
    policy = in_own_memory(load_policy(ModelConfig(path=str(policies.untied_checkpoint(family)), device="cpu",
                                                   freeze_vision=False, lora=lora)))
    engine = engine_of(policy, weights=weights, vision="pixels")
    updates, base = Updates(policy, 1e-2), policy.model.lm_head.base_layer.weight.detach().clone()
    for number in range(6):
        prompts = prompts_of(policy)
        report = engine.sync()
        groups = engine.generate(prompts, TRUNCATED)
        assert largest_gap(policy, prompts, groups, TRUNCATED.temperature) < FLOAT32 / TRUNCATED.temperature
        if number:
            assert (report["sync_bytes"] == 0) == (weights == "alias")
        engine.sleep()
        updates.step(prompts, groups)
    with policy.adapters.off():
        assert largest_gap(policy, prompts, groups, TRUNCATED.temperature) > 100 * FLOAT32
    assert torch.equal(policy.model.lm_head.base_layer.weight, base)
