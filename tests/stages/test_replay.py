"""Router replay in an update and on disk: who runs the experts of the engine, who does not, and what is counted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.model.test_replay import own_choice, random_experts
from tests.stages.test_update import Counted, config_of, groups_of, optimizer_of
from tests.support import policies
from veripo_fast.config.inputs import ModelConfig
from veripo_fast.distributed.world import ONE
from veripo_fast.model.packing import pack
from veripo_fast.model.policy import Policy, load_policy
from veripo_fast.model.replay import UNKNOWN, stored
from veripo_fast.rollout.protocol import Sampling
from veripo_fast.rollout.store import read_groups, write_groups
from veripo_fast.stages.grpo import GrpoUpdate
from veripo_fast.stages.rollouts import stored_groups
from veripo_fast.types import LoadedPrompt, RolloutGroup

FAMILIES = ("qwen3_vl_moe", "qwen3_5_moe")


@pytest.fixture(params=FAMILIES)
def policy(request: pytest.FixtureRequest) -> Policy:
    return load_policy(ModelConfig(str(policies.checkpoint(request.param)), device="cpu", freeze_vision=True))


def given(group: RolloutGroup, prompt: int, experts: torch.Tensor) -> None:
    """Let a group have `experts` int16 [T, L, k] of its packed row, with a prompt of so many tokens."""
    lengths = [len(row.token_ids) - 1 for row in group.completions]
    first, *parts = experts.split([prompt, *lengths])
    group.prompt_experts = stored(first.numpy())
    for row, part in zip(group.completions, parts, strict=True):
        row.experts = stored(part.numpy())


def rollout(policy: Policy, how: str) -> tuple[list[LoadedPrompt], list[RolloutGroup]]:
    """Rewarded groups with the policy's own choice of experts, with drawn ones, or with none."""
    prompts, groups = groups_of(policy)
    for seed, (item, group) in enumerate(zip(prompts, groups, strict=True)):
        batch = pack([(item.encoded, [row.token_ids for row in group.completions])])
        if how == "own":
            given(group, len(item.encoded.token_ids), own_choice(policy, batch, [item.features]))
        if how == "drawn":
            given(group, len(item.encoded.token_ids), random_experts(policy, len(batch.token_ids), seed))
    return prompts, groups


def updated(policy: Policy, how: str, **options: object) -> tuple[list[torch.Tensor], dict[str, float]]:
    config = config_of(**options)
    optimizer = optimizer_of(policy, config)
    metrics = GrpoUpdate(policy, optimizer, config, None).run(*rollout(policy, how))
    policy.version = 0
    return optimizer.recorded, metrics


def test_an_update_with_the_own_choice_has_the_bits_of_one_without(policy: Policy) -> None:
    plain, metrics = updated(policy, "none", max_tokens=1)
    assert "router_mismatch" not in metrics and "router_unknown" not in metrics
    replayed, counted = updated(policy, "own", max_tokens=1)
    assert torch.equal(plain[0], replayed[0])
    assert counted.pop("router_mismatch") == counted.pop("router_unknown") == 0
    assert counted == metrics


def test_every_update_of_a_rollout_replays_and_the_first_is_measured(
        policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the pass for old log-probs; and micro-batches count together."""
    whole, one = updated(policy, "drawn")
    parted, many = updated(policy, "drawn", max_tokens=1)
    assert one["router_mismatch"] == pytest.approx(many["router_mismatch"], abs=1e-3) and one["router_mismatch"] > 0.5
    assert one["parity_max"] > 0.1, "the engine's log-probs are those of other experts"
    assert (whole[0] - parted[0]).norm() < 1e-4 * whole[0].norm()
    forwards = Counted(policy.step, "forward", monkeypatch)
    recorded, _ = updated(policy, "drawn", max_tokens=1, updates_per_rollout=2, importance="token_truncate")
    assert len(recorded) == 2
    trained = [batch for batch in forwards.calls if batch.experts is not None]
    assert len(trained) == 3 + 2, "three live groups, and old log-probs of those of the second update"


def test_the_reference_chooses_for_itself(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = load_policy(ModelConfig(str(policy.encoder.path), device="cpu", freeze_vision=True))
    forwards = Counted(reference.step, "forward", monkeypatch)
    config = config_of(kl_coef=0.1)
    prompts, groups = rollout(policy, "drawn")
    GrpoUpdate(policy, optimizer_of(policy, config), config, reference).run(prompts, groups)
    assert len(forwards) == 1 and forwards.calls[0].experts is None


def test_tokens_without_experts_are_counted(policy: Policy) -> None:
    prompts, groups = rollout(policy, "own")
    routers = policy.routers
    assert routers is not None
    tokens = len(prompts[0].encoded.token_ids)
    groups[0].prompt_experts = stored(torch.full((tokens, len(routers.layers), routers.top_k), UNKNOWN).numpy())
    config = config_of(max_tokens=1)
    metrics = GrpoUpdate(policy, optimizer_of(policy, config), config, None).run(prompts, groups)
    assert 0 < metrics["router_unknown"] < 1 and metrics["router_mismatch"] == 0


# -- on disk ----------------------------------------------------------------------------------------------------------

def test_stored_experts_come_back_where_they_are_asked_for(tmp_path: Path) -> None:
    policy = policies.policy("qwen3_vl_moe")
    _, groups = rollout(policy, "drawn")
    write_groups(tmp_path / "a.parquet", groups, "grpo-1", 0, experts=True)
    assert read_groups(tmp_path / "a.parquet", experts=True) == groups
    without = [replace(group, prompt_experts=None, completions=[replace(row, experts=None)
                                                                for row in group.completions]) for group in groups]
    assert read_groups(tmp_path / "a.parquet") == without
    write_groups(tmp_path / "b.parquet", groups, "eval", 0)
    assert read_groups(tmp_path / "b.parquet", experts=True) == without


@pytest.mark.parametrize("kept", [True, False])
def test_a_step_that_replays_takes_no_groups_without_experts(kept: bool, tmp_path: Path) -> None:
    policy = policies.policy("qwen3_vl_moe")
    prompts, groups = rollout(policy, "drawn")
    write_groups(tmp_path / "a.parquet", groups, "grpo-1", 0, experts=kept)
    drawn = Sampling(4, 1.0, 16, 0)
    loaded = dict(enumerate(prompts))
    again = stored_groups(tmp_path / "a.parquet", loaded, drawn, 0, ONE, replayed=True)
    assert again == (groups if kept else None)
    plain = stored_groups(tmp_path / "a.parquet", loaded, drawn, 0, ONE)
    assert plain is not None and all(group.prompt_experts is None for group in plain)
