"""Engines that fail, hang or are interrupted, and what does not fit."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.engines.conftest import own_policy, policy_of
from tests.support import policies
from tests.support.children import run
from tests.support.engine_runs import SAMPLED, TRUNCATED, completions, prompts_of
from tests.support.paths import PYTHONPATH
from veripo_fast.errors import ConfigError, TrainingError
from veripo_fast.rollout import vllm_engine as module
from veripo_fast.rollout.parity import largest_gap
from veripo_fast.rollout.vllm_engine import VllmEngine
from veripo_fast.rollout.vllm_hooks import Hooks
from veripo_fast.types import LoadedPrompt


def fail_at(engine: VllmEngine, steps: int, error: BaseException) -> None:
    """Let the engine raise in the middle of the next batch."""
    plain, done = engine.engine.step, []

    def step() -> Any:
        done.append(1)
        if len(done) == steps:
            raise error
        return plain()

    engine.engine.step = step


def test_an_engine_that_fails_is_built_again(engine_of: Callable[..., VllmEngine],
                                             caplog: pytest.LogCaptureFixture) -> None:
    """And the batch is the one that a sound engine gives."""
    engine = engine_of(own_policy("qwen3_vl"))
    prompts = prompts_of(engine.policy)
    expected = completions(engine.generate(prompts, SAMPLED))
    fail_at(engine, 5, RuntimeError("the scheduler lost a block"))
    groups = engine.generate(prompts, SAMPLED)
    assert completions(groups) == expected and engine.rebuilds == 1
    assert "the scheduler lost a block" in caplog.text and "with the same seeds" in caplog.text
    assert largest_gap(engine.policy, prompts, groups, 1.0) < 5e-5
    places = {p.untyped_storage().data_ptr() for p in engine.model.parameters()}
    assert {p.untyped_storage().data_ptr() for _, p in engine.policy.parameters()} == places


def test_a_cuda_error_ends_the_run(engine_of: Callable[..., VllmEngine]) -> None:
    """It stays with the process, so nothing can be built again there."""
    engine = engine_of(own_policy("qwen3_vl"))
    fail_at(engine, 2, RuntimeError("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(TrainingError, match=r"illegal memory access .*cannot be mended in the process; --resume"):
        engine.generate(prompts_of(engine.policy), SAMPLED)


def test_a_cache_that_cannot_be_reset_and_requests_that_cannot_be_aborted(engine_of: Callable[..., VllmEngine]) -> None:
    """Whatever else fails with the engine, it is built again."""
    engine = engine_of(own_policy("qwen3_vl"))
    prompts = prompts_of(engine.policy)
    expected = completions(engine.generate(prompts, SAMPLED))

    def broken(*arguments: Any) -> None:
        raise RuntimeError("dead")

    engine.engine.reset_encoder_cache = engine.engine.abort_request = broken
    assert completions(engine.generate(prompts, SAMPLED)) == expected and engine.rebuilds == 1


def test_an_error_of_the_caller_is_the_callers(engine_of: Callable[..., VllmEngine]) -> None:
    engine = engine_of(own_policy("qwen3_vl"))
    prompts = prompts_of(engine.policy)

    def on_group(number: int, group: object) -> None:
        raise ValueError("callback broke")

    with pytest.raises(ValueError, match="callback broke"):
        engine.generate(prompts, SAMPLED, on_group)
    assert engine.rebuilds == 0 and not engine.engine.has_unfinished_requests()
    assert len(engine.generate(prompts, SAMPLED)) == len(prompts)


def test_a_model_folder_that_is_gone(tmp_path: Path, engine_of: Callable[..., VllmEngine]) -> None:
    """The engine reads config.json when it is built again; the first failure is in the message too."""
    shutil.copytree(policies.checkpoint("qwen3_vl"), tmp_path / "model")
    engine = engine_of(policy_of(tmp_path / "model"))
    shutil.rmtree(tmp_path / "model")
    fail_at(engine, 2, RuntimeError("first"))
    with pytest.raises(TrainingError, match=r"failed \(RuntimeError: first\) and cannot be built again"):
        engine.generate(prompts_of(engine.policy), SAMPLED)


def test_an_engine_that_fails_twice_ends_the_run(engine_of: Callable[..., VllmEngine],
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(own_policy("qwen3_vl"))
    fail_at(engine, 2, RuntimeError("first"))
    plain = VllmEngine._start

    def start(self: VllmEngine) -> None:
        plain(self)
        fail_at(self, 2, RuntimeError("second"))

    monkeypatch.setattr(VllmEngine, "_start", start)
    with pytest.raises(TrainingError, match=r"failed again after it was built anew .*second"):
        engine.generate(prompts_of(engine.policy), SAMPLED)


def test_an_engine_that_computes_nothing(engine_of: Callable[..., VllmEngine], caplog: pytest.LogCaptureFixture,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(own_policy("qwen3_vl"))
    monkeypatch.setattr(module, "_IDLE_STEPS", 20)
    engine.engine.step = list
    prompts = prompts_of(engine.policy)
    assert largest_gap(engine.policy, prompts, engine.generate(prompts, SAMPLED), 1.0) < 5e-5
    assert engine.rebuilds == 1 and "computed nothing in 20 steps while requests were waiting" in caplog.text


HANGS = """
import sys, time
from tests.engines.conftest import LIMITS, own_policy
from tests.support.engine_runs import SAMPLED, prompts_of
from veripo_fast.rollout.vllm_engine import VllmEngine

policy = own_policy("qwen3_vl")
engine = VllmEngine(policy, LIMITS, stall_seconds=3.0)
prompts = prompts_of(policy)
engine.generate(prompts, SAMPLED)
time.sleep(4)  # nothing is asked of it: no hang
print("sound", flush=True)
engine.engine.step = lambda: time.sleep(600)
engine.generate(prompts, SAMPLED)
"""


def test_an_engine_that_hangs_ends_the_process() -> None:
    done = run(sys.executable, "-c", HANGS, env={**os.environ, "PYTHONPATH": PYTHONPATH})
    assert done.returncode == 75 and "sound" in done.stdout
    assert "finished nothing for 3 seconds (rollout.stall_seconds)" in done.stderr
    assert "in _steps" in done.stderr, "where it hangs is shown"


def test_ctrl_c_leaves_no_requests(engine_of: Callable[..., VllmEngine]) -> None:
    engine = engine_of(own_policy("qwen3_vl"))
    prompts = prompts_of(engine.policy)
    expected = completions(engine.generate(prompts, TRUNCATED))
    plain = engine.engine.step
    fail_at(engine, 4, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        engine.generate(prompts, TRUNCATED)
    engine.engine.step = plain
    assert not engine.engine.has_unfinished_requests()
    assert completions(engine.generate(prompts, TRUNCATED)) == expected and engine.rebuilds == 0


def test_a_refused_reset_is_an_error(engine_of: Callable[..., VllmEngine]) -> None:
    engine = engine_of(own_policy("qwen3_vl"))
    engine.engine.reset_prefix_cache = lambda: False
    with pytest.raises(TrainingError, match="refused to reset its prefix cache"):
        engine.generate(prompts_of(engine.policy), SAMPLED)


def test_memory_that_cannot_be_taken_back(engine_of: Callable[..., VllmEngine],
                                          caplog: pytest.LogCaptureFixture) -> None:
    """Once: tried again, and the batch is sampled. Twice: one sentence."""
    engine = engine_of(own_policy("qwen3_vl"), weights="copy")
    prompts = prompts_of(engine.policy)
    expected = completions(engine.generate(prompts, SAMPLED))
    plain, failures = engine.engine.wake_up, [1]

    def wake_up(kinds: list[str]) -> Any:
        if failures:
            failures.pop()
            raise RuntimeError("CUDA Error: out of memory at cumem_allocator.cpp:62")
        return plain(kinds)

    engine.engine.wake_up = wake_up
    engine.sleep()
    assert completions(engine.generate(prompts, SAMPLED)) == expected and "tried once more" in caplog.text
    engine.sleep()
    failures[:] = [1, 1]
    with pytest.raises(TrainingError, match=r"cannot take back the memory of its weights, .* free; lower rollout.kv"):
        engine.generate(prompts, SAMPLED)


def test_a_prompt_read_otherwise(engine_of: Callable[..., VllmEngine], monkeypatch: pytest.MonkeyPatch) -> None:
    """Pads that are expanded once more: the first token that differs is shown (vllm#46817)."""
    engine = engine_of(own_policy("qwen3_vl"))
    plain = module.group_of

    def group_of(item: LoadedPrompt, output: Any, *rest: Any, **named: Any) -> Any:
        output.prompt_token_ids = output.prompt_token_ids[:5] + output.prompt_token_ids[4:]
        return plain(item, output, *rest, **named)

    monkeypatch.setattr(module, "group_of", group_of)
    with pytest.raises(TrainingError, match=r"read a prompt of \d+ tokens where \d+ were given; the first that"):
        engine.generate(prompts_of(engine.policy), SAMPLED)


def test_a_prompt_that_is_too_long(engine_of: Callable[..., VllmEngine]) -> None:
    engine = engine_of(own_policy("qwen3_vl"))
    with pytest.raises(TrainingError, match=r"of 1000 does not fit .* of 1024: .* Lower data.max_prompt_tokens"):
        engine.generate(prompts_of(engine.policy), replace(SAMPLED, max_new_tokens=1000))


@pytest.mark.parametrize("name", ["compute_logits", "get_mrope_input_positions"])
def test_a_version_that_does_not_call_what_is_replaced(name: str, engine_of: Callable[..., VllmEngine],
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    """Another runner: found at the start, by a request of one token."""
    plain = Hooks.install

    def install(self: Hooks, model: Any) -> None:
        original = getattr(model, name)
        plain(self, model)
        setattr(model, name, original)

    monkeypatch.setattr(Hooks, "install", install)
    with pytest.raises(ConfigError, match=f"with its CPUModelRunner does not call {name} of its model"):
        engine_of(own_policy("qwen3_vl"))


def test_a_reload_that_disagrees_with_the_plan(engine_of: Callable[..., VllmEngine],
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    """The self-test at the start: vLLM's own loader puts another weight there."""
    plain = VllmEngine._reload

    def reload(self: VllmEngine, weights: Any) -> None:
        plain(self, ((name, w.flip(0) if name.endswith("layers.1.self_attn.k_proj.weight") else w)
                     for name, w in weights))

    monkeypatch.setattr(VllmEngine, "_reload", reload)
    with pytest.raises(TrainingError, match=r"layers\.1\.self_attn\.qkv_proj\.weight: the plan writes other weights"):
        engine_of(own_policy("qwen3_vl"))


def test_the_process_is_left_as_it_was(engine_of: Callable[..., VllmEngine]) -> None:
    """What an engine changes of the process is put back: threads and the generators are the trainer's."""
    import random

    import numpy as np
    import torch

    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    policy = own_policy("qwen3_vl")
    engine = engine_of(policy)
    engine.generate(prompts_of(policy), SAMPLED)
    engine.close()
    assert torch.equal(torch.get_rng_state(), states[0]) and (np.random.get_state()[1] == states[1]).all()
    assert random.getstate() == states[2]
    torch.set_num_threads(2)
    assert torch.get_num_threads() == 2
