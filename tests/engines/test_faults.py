"""Faults planted in a real engine: the parity gate stops the run, shows the token, and names the kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from tests.engines.conftest import own_policy
from tests.support.engine_runs import SAMPLED, Updates, prompts_of
from veripo_fast.errors import TrainingError
from veripo_fast.rollout import parity as module
from veripo_fast.rollout.engine_input import PositionTable
from veripo_fast.rollout.parity import ParityGate
from veripo_fast.rollout.vllm_engine import VllmEngine
from veripo_fast.types import EncodedPrompt, LoadedPrompt

VIDEOS = [[("video", 6, 2, 2)], [("video", 8, 3, 2)], [], [("image", 2, 2, 3)]]


def gate_of(engine: VllmEngine) -> ParityGate:
    return ParityGate(engine.policy, engine)


def assert_names(engine: VllmEngine, fault: str, seed: int = 0) -> None:
    """That the gate stops and names this fault."""
    prompts = prompts_of(engine.policy, VIDEOS, seed)
    groups = engine.generate(prompts, SAMPLED)
    with pytest.raises(TrainingError, match=r"differ from the trainer's by .* nats.*completion token \d+.*") as stop:
        gate_of(engine).check(prompts, groups, SAMPLED)
    assert f"The fault is known: {fault}" in str(stop.value)


def test_a_right_engine_passes(engine_of: Callable[..., VllmEngine]) -> None:
    engine = engine_of(own_policy("qwen2_5_vl"))
    prompts = prompts_of(engine.policy, VIDEOS)
    parity = gate_of(engine).check(prompts, engine.generate(prompts, SAMPLED), SAMPLED)
    assert 0 < parity.largest < 5e-5 and parity.first is None and parity.tokens > 50


@pytest.mark.parametrize(("reading", "fault"), [
    (module._transformers_positions, "the engine places the text after a video as transformers does"),
    (module._at_24_fps, "the engine times videos as if they had 24 frames a second"),
])
def test_positions(reading: Callable[..., LoadedPrompt | None], fault: str, engine_of: Callable[..., VllmEngine],
                   monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(own_policy("qwen2_5_vl"))
    plain = PositionTable.add
    known = {item.encoded.token_ids.numpy().tobytes(): item for item in prompts_of(engine.policy, VIDEOS)}

    def add(table: PositionTable, prompt: EncodedPrompt, keys: list[str]) -> None:
        wrong = reading(engine.policy, known[prompt.token_ids.numpy().tobytes()])
        plain(table, prompt if wrong is None else wrong.encoded, keys)

    monkeypatch.setattr(PositionTable, "add", add)
    assert_names(engine, fault)


def test_pixels_that_are_normalised_twice(engine_of: Callable[..., VllmEngine]) -> None:
    engine = engine_of(own_policy("qwen2_5_vl", freeze_vision=False), vision="pixels")
    plain = engine.model.visual.forward
    spec = engine.policy.encoder.vision
    mean, std = (torch.tensor(values)[None, :, None] for values in (spec.mean, spec.std))

    def twice(pixels: torch.Tensor, *arguments: object, **named: object) -> torch.Tensor:
        again = (pixels.view(len(pixels), 3, -1) - mean) / std
        return plain(again.view_as(pixels), *arguments, **named)

    engine.model.visual.forward = twice
    assert_names(engine, "the engine normalises pixel values a second time")


def test_weights_of_the_step_before(engine_of: Callable[..., VllmEngine], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(own_policy("qwen3_vl"), weights="copy")
    prompts = prompts_of(engine.policy, VIDEOS)
    groups = engine.generate(prompts, SAMPLED)
    Updates(engine.policy).step(prompts, groups)
    monkeypatch.setattr(engine, "sync", dict)
    assert_names(engine, "the engine's weights are older than the trainer's")


def test_a_stale_prefix_cache(engine_of: Callable[..., VllmEngine], monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks hold 128 tokens on a CPU, so the prompts must be longer."""
    engine = engine_of(own_policy("qwen3_vl"))
    long = [[("video", 8, 6, 6)], [("video", 10, 6, 6)]]
    prompts = prompts_of(engine.policy, long)
    assert min(len(prompt.encoded.token_ids) for prompt in prompts) > 128
    groups = engine.generate(prompts, SAMPLED)
    Updates(engine.policy).step(prompts, groups)
    monkeypatch.setattr(engine, "reset_caches", lambda: None)
    groups = engine.generate(prompts, SAMPLED)
    with pytest.raises(TrainingError, match="the engine's prefix cache holds keys and values of earlier weights"):
        gate_of(engine).check(prompts, groups, SAMPLED)


def test_a_stale_encoder_cache(engine_of: Callable[..., VllmEngine], monkeypatch: pytest.MonkeyPatch) -> None:
    """The tower is trained, and a video of the step before is seen again (huggingface/trl#7198)."""
    engine = engine_of(own_policy("qwen3_vl", freeze_vision=False))
    prompts = prompts_of(engine.policy, VIDEOS)
    groups = engine.generate(prompts, SAMPLED)
    with torch.no_grad():
        for parameter in engine.policy.model.model.visual.merger.parameters():
            parameter.mul_(1.5)
    engine.policy.version += 1
    plain = engine.reset_caches
    monkeypatch.setattr(engine, "reset_caches", engine._reset_prefix_cache)
    prompts = prompts_of(engine.policy, VIDEOS)
    groups = engine.generate(prompts, SAMPLED)
    monkeypatch.setattr(engine, "reset_caches", plain)
    with pytest.raises(TrainingError, match="the engine's encoder cache holds tower outputs of earlier weights"):
        gate_of(engine).check(prompts, groups, SAMPLED)


def test_log_probs_that_are_no_numbers(engine_of: Callable[..., VllmEngine]) -> None:
    engine = engine_of(own_policy("qwen3_vl"))
    prompts = prompts_of(engine.policy, VIDEOS)
    groups = engine.generate(prompts, SAMPLED)
    row = groups[0].completions[0]
    groups[0].completions[0] = replace(row, rollout_logprobs=[float("nan")] * len(row.token_ids))
    with pytest.raises(TrainingError, match="by inf nats"):
        gate_of(engine).check(prompts, groups, SAMPLED)
