"""The parity gate without an engine of its own: what it measures, what it shows, and that NaN never passes."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from tests.support import policies
from tests.support.engine_runs import SAMPLED, prompts_of
from veripo_fast.errors import TrainingError
from veripo_fast.model.policy import Policy
from veripo_fast.rollout import parity as parity_module
from veripo_fast.rollout.parity import FAULTS, MEAN_TOLERANCES, TOLERANCES, ParityGate, logprob_gaps
from veripo_fast.rollout.torch_engine import TorchEngine
from veripo_fast.types import LoadedPrompt, RolloutGroup


def sampled(policy: Policy) -> tuple[list[LoadedPrompt], list[RolloutGroup]]:
    prompts = prompts_of(policy)
    return prompts, TorchEngine(policy).generate(prompts, SAMPLED)


def gate_of(policy: Policy, tolerance: float = 0.0) -> ParityGate:
    return ParityGate(policy, TorchEngine(policy), tolerance)


@pytest.mark.parametrize("family", policies.ALL_FAMILIES)
def test_the_torch_engine_passes(family: str) -> None:
    policy = policies.policy(family)
    parity = gate_of(policy).check(*sampled(policy), SAMPLED)
    assert parity.first is None and parity.largest < 5e-5


def test_the_first_token_that_differs_is_shown() -> None:
    policy = policies.policy("qwen3_vl")
    prompts, groups = sampled(policy)
    row = groups[2].completions[1]
    row.rollout_logprobs[3] += 0.01
    row.rollout_logprobs[5] -= 0.5
    token = policy.encoder.tokenizer.decode(row.token_ids[3:4])
    with pytest.raises(TrainingError) as stop:
        gate_of(policy).check(prompts, groups, SAMPLED)
    words = str(stop.value)
    assert "differ from the trainer's by 0.5 nats, " in words and "prompt 'p2', completion token 3" in words
    assert f"[{token!r}]" in words and "sampled once more is right, so the fault comes and goes" in words
    assert gate_of(policy, 0.6).check(prompts, groups, SAMPLED).largest == pytest.approx(0.5, abs=1e-4)


def test_prompts_of_every_kind_are_checked() -> None:
    """However many others there are, and others of a kind with another seed."""
    policy = policies.policy("qwen3_vl")
    sizes = [*[[("video", 3, 2, 2)]] * 9, [("image", 2, 2, 3)], []]
    prompts = prompts_of(policy, sizes)
    for kind in (9, 10):
        groups = TorchEngine(policy).generate(prompts, SAMPLED)
        for row in groups[kind].completions:
            row.rollout_logprobs[0] += 3
        with pytest.raises(TrainingError, match=f"prompt 'p{kind}'"):
            gate_of(policy).check(prompts, groups, SAMPLED)
    drawn = {index for seed in range(20) for index in parity_module._some(prompts, seed)}
    assert drawn == set(range(11)) and len(parity_module._some(prompts, 0)) == parity_module.PROMPTS


def test_a_small_fault_of_every_token_shows_in_the_mean() -> None:
    """In bfloat16 one token may be off by 1, but not all by 0.2: another temperature, older weights."""
    policy = policies.policy("qwen3_vl")
    prompts = prompts_of(policy)
    gate = gate_of(policy)
    gate.tolerance, gate.mean_tolerance = TOLERANCES[torch.bfloat16], MEAN_TOLERANCES[torch.bfloat16]
    groups = TorchEngine(policy).generate(prompts, SAMPLED)
    groups[0].completions[0].rollout_logprobs[0] += 0.9
    assert gate.check(prompts, groups, SAMPLED).first is None
    groups = TorchEngine(policy).generate(prompts, replace(SAMPLED, temperature=1.3))
    with pytest.raises(TrainingError, match="in the mean"):
        gate.check(prompts, groups, SAMPLED)


def test_a_low_temperature_enlarges_rounding() -> None:
    policy = policies.policy("qwen3_vl")
    prompts = prompts_of(policy)
    cold = replace(SAMPLED, temperature=0.05)
    groups = TorchEngine(policy).generate(prompts, cold)
    groups[0].completions[0].rollout_logprobs[0] += 5e-4
    assert gate_of(policy).check(prompts, groups, cold).first is None
    groups[0].completions[0].rollout_logprobs[0] += 1e-2
    with pytest.raises(TrainingError, match=r"at temperature 0\.05"):
        gate_of(policy).check(prompts, groups, cold)


def test_nothing_to_check() -> None:
    assert gate_of(policies.policy("qwen3_vl")).check([], [], SAMPLED).tokens == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_infinitely_far(value: float) -> None:
    assert logprob_gaps([value, 0.0], [0.0, 0.25]) == [math.inf, 0.25]
    assert logprob_gaps([0.0], [value]) == [math.inf]
    policy = policies.policy("qwen3_vl")
    prompts, groups = sampled(policy)
    groups[0].completions[0].rollout_logprobs[0] = value
    with pytest.raises(TrainingError, match="by inf nats"):
        gate_of(policy, 1e9).check(prompts, groups, SAMPLED)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named(fault: str) -> None:
    """An engine that reads its prompts with the fault."""
    policy = policies.policy("qwen2_5_vl")
    sizes = [[("video", 6, 2, 2)], [("video", 8, 3, 2)], []]
    prompts = prompts_of(policy, sizes)
    wrong = [FAULTS[fault](policy, prompt) or prompt for prompt in prompts]
    groups = TorchEngine(policy).generate(wrong, SAMPLED)
    groups = [replace(group, prompt=prompt.prompt) for group, prompt in zip(groups, prompts, strict=True)]
    with pytest.raises(TrainingError) as stop:
        gate_of(policy).check(prompts, groups, SAMPLED)
    assert f"The fault is known: {fault}." in str(stop.value)


def test_readings_change_what_they_should() -> None:
    """No fault is a no-op here, and none changes a prompt without video."""
    policy = policies.policy("qwen2_5_vl")
    video, text = prompts_of(policy, [[("video", 8, 2, 2)], []])
    for reading in FAULTS.values():
        read = reading(policy, video)
        assert read is not None and reading(policy, text) is None
        moved = not torch.equal(read.encoded.positions, video.encoded.positions)
        assert moved or not torch.equal(read.features.embeddings, video.features.embeddings)
