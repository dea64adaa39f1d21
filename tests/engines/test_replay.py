"""Router replay with a real vLLM: its experts come with completions, and the trainer that runs them agrees with it."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.engines.conftest import LIMITS, own_policy
from tests.support import policies, runs
from tests.support.engine_runs import GREEDY, SAMPLED, prompts_of
from tests.support.run_compare import assert_same, records, written
from veripo_fast.config.families import FAMILIES
from veripo_fast.config.inputs import ModelConfig
from veripo_fast.errors import TrainingError
from veripo_fast.model.policy import Policy, in_own_memory, load_policy
from veripo_fast.model.replay import UNKNOWN, pack_rollouts, stored
from veripo_fast.model.step import LogprobInputs
from veripo_fast.rollout.limits import EngineLimits
from veripo_fast.rollout.parity import ParityGate, largest_gap
from veripo_fast.rollout.protocol import Sampling
from veripo_fast.rollout.vllm_engine import VllmEngine
from veripo_fast.rollout.vllm_experts import ExpertRecorder, _Rows
from veripo_fast.run.folder import RunDir
from veripo_fast.types import LoadedPrompt, RolloutGroup

MIXED = [name for name, family in FAMILIES.items() if family.router_class]
FLOAT32 = 5e-5
LONG = replace(SAMPLED, max_new_tokens=40)


def without(group: RolloutGroup) -> RolloutGroup:
    """The trainer then chooses for itself."""
    return replace(group, prompt_experts=None, completions=[replace(row, experts=None) for row in group.completions])


def counted(policy: Policy, prompts: Sequence[LoadedPrompt], groups: Sequence[RolloutGroup]) -> dict[str, int]:
    batch = pack_rollouts([(item.encoded, group) for item, group in zip(prompts, groups, strict=True)], policy.routers)
    with torch.no_grad():
        metrics = policy.forward(batch, [item.features for item in prompts], LogprobInputs()).metrics
    return {name: int(value) for name, value in metrics.items()}


@pytest.fixture(scope="module", params=MIXED)
def engine(request: pytest.FixtureRequest, engine_of: Callable[..., VllmEngine]) -> VllmEngine:
    return engine_of(own_policy(request.param), router_replay=True)


@pytest.mark.parametrize("sampling", [GREEDY, LONG], ids=["greedy", "sampled"])
def test_the_engine_tells_the_experts_of_every_token(engine: VllmEngine, sampling: Sampling) -> None:
    """In float32 they are those that the trainer chooses, for prompts of every kind."""
    prompts = prompts_of(engine.policy)
    groups = engine.generate(prompts, sampling)
    assert largest_gap(engine.policy, prompts, groups, sampling.temperature) < FLOAT32
    counts = counted(engine.policy, prompts, groups)
    assert counts["router_choices"] > 1000 and counts["router_unknown"] == 0
    assert counts["router_differing"] <= 0.001 * counts["router_choices"]


def test_equal_calls_tell_equal_experts(engine: VllmEngine) -> None:
    prompts = prompts_of(engine.policy)
    first = engine.generate(prompts, SAMPLED)
    engine.generate(prompts[::-1], replace(SAMPLED, seed=8))
    assert engine.generate(prompts, SAMPLED) == first


def test_other_experts_would_be_seen(engine: VllmEngine) -> None:
    """The gate replays: experts of other tokens are no longer the engine's log-probs."""
    prompts = prompts_of(engine.policy)
    groups = engine.generate(prompts, SAMPLED)
    group = groups[0]
    assert group.prompt_experts is not None and group.completions[0].experts is not None
    size = len(group.prompt_experts) // len(prompts[0].encoded.token_ids)
    groups[0] = replace(group, prompt_experts=group.prompt_experts[size:] + group.prompt_experts[:size])
    gate = ParityGate(engine.policy, engine)
    assert gate.measure(list(zip(prompts, groups, strict=True)), SAMPLED).largest > 10 * FLOAT32


@pytest.mark.parametrize("limits", [EngineLimits(1024, 192, 4, 1 << 30), LIMITS], ids=["chunks", "whole"])
@pytest.mark.parametrize("family", MIXED)
def test_prefixes_from_the_cache(family: str, limits: EngineLimits, engine_of: Callable[..., VllmEngine],
                                 monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of several blocks in several steps, which begin alike: each token has the experts of whoever ran it."""
    cached: list[int] = []
    plain = _Rows.first_rows

    def first_rows(rows: _Rows, *arguments: Any) -> np.ndarray:
        cached.append(rows.first)
        return plain(rows, *arguments)

    monkeypatch.setattr(_Rows, "first_rows", first_rows)
    policy = own_policy(family)
    engine = engine_of(policy, limits, router_replay=True)
    shared = [("video", 8, 6, 6), ("video", 8, 6, 6)]
    long = [*shared, ("video", 6, 6, 6)]
    prompts = [policies.loaded(policy, sizes, 3) for sizes in (long, shared, [("image", 2, 3, 3)], long)]
    for sampling in (SAMPLED, replace(SAMPLED, seed=5)):
        groups = engine.generate(prompts, sampling)
        assert largest_gap(policy, prompts, groups, 1.0) < FLOAT32
        counts = counted(policy, prompts, groups)
        assert counts["router_unknown"] == 0
        assert counts["router_differing"] <= 0.001 * counts["router_choices"]
    assert sum(first > 0 for first in cached) >= 8, "of 32 requests many start behind what others ran"


@pytest.mark.parametrize("family", MIXED)
def test_bfloat16_agrees_where_experts_are_replayed(family: str, engine_of: Callable[..., VllmEngine]) -> None:
    """The same completions, with the engine's experts and with the trainer's own choice."""
    policy = in_own_memory(load_policy(ModelConfig(str(policies.checkpoint(family)), device="cpu", dtype="bfloat16")))
    engine = engine_of(policy, router_replay=True)
    prompts = prompts_of(policy)
    groups = engine.generate(prompts, LONG)
    gate = ParityGate(policy, engine)
    replayed = gate.measure(list(zip(prompts, groups, strict=True)), LONG)
    own = gate.measure(list(zip(prompts, map(without, groups), strict=True)), LONG)
    counts = counted(policy, prompts, groups)
    assert counts["router_differing"] > 0 == counts["router_unknown"]
    assert replayed.largest < 0.6 * own.largest and replayed.mean < 0.8 * own.mean, (replayed, own)


def test_an_engine_that_tells_nothing_is_refused(engine_of: Callable[..., VllmEngine]) -> None:
    engine = engine_of(own_policy("qwen3_5_moe"))
    engine.router_replay = True
    with pytest.raises(TrainingError, match=r"gave experts of the shape None where \(\d+, 4, 2\).*replay to false"):
        engine.generate(prompts_of(engine.policy)[:1], SAMPLED)


def test_a_layer_that_tells_nothing_is_refused_at_the_start(
        engine_of: Callable[..., VllmEngine], monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a version whose routers no longer call what they are given."""
    plain = ExpertRecorder.capture

    def capture(recorder: ExpertRecorder, layer_id: int, topk_ids: torch.Tensor) -> None:
        if layer_id != 2:
            plain(recorder, layer_id, topk_ids)

    monkeypatch.setattr(ExpertRecorder, "capture", capture)
    with pytest.raises(TrainingError, match="does not tell which experts layer 2 chose; set rollout"):
        engine_of(own_policy("qwen3_5_moe"), router_replay=True)


# -- the loop ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("family", MIXED)
def test_a_run_that_replays_is_killed_and_resumed(family: str, tmp_path: Path) -> None:
    """It ends with the bits of a run without a kill: the experts of the step whose update was lost are on disk."""
    forks = runs.forks()
    options = {"rollout__engine": "vllm", "rollout__router_replay": True, "data__max_prompt_tokens": 512,
               "model__path": str(runs.model(family)), "rollout__parity_every": 1, "eval__at": "ends",
               "eval__samples": 0, "model__gradient_checkpointing": True}
    (tmp_path / "whole").mkdir()
    whole = written(runs.config(tmp_path / "whole" / "run", **options), tmp_path / "whole")
    ended = forks.run("train", "--config", whole)
    assert ended.code == 0, ended.output
    config = written(runs.config(tmp_path / "run", **options), tmp_path)
    at = r"mkdir .*\.tmp-step_000002$"
    assert forks.run("train", "--config", config, at=at).code == -signal.SIGKILL
    ended = forks.run("train", "--config", config, "--resume")
    assert ended.code == 0 and "000001.parquet are used again" in ended.output, ended.output
    assert_same(tmp_path / "run", tmp_path / "whole" / "run")
    steps = [step for step in records(RunDir(tmp_path / "run").metrics) if step["kind"] == "grpo"]
    assert len(steps) == 4 and all(step["engine_parity_max"] < FLOAT32 for step in steps)
    measured = [step for step in steps if "router_mismatch" in step]
    assert measured and all(step["router_mismatch"] < 0.01 and step["router_unknown"] == 0 for step in measured)


def test_unknown_is_what_is_stored_for_it() -> None:
    assert stored(torch.tensor([UNKNOWN, 3]).numpy()) == b"\xff\xff\x03\x00"
