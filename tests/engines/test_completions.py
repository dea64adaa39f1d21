"""What vLLM writes, against the trainer's forward and the torch engine: every family, every kind of prompt."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from tests.engines.conftest import LIMITS, own_policy, policy_of
from tests.support import policies
from tests.support.engine_runs import (
    GREEDY,
    MEDIA,
    SAMPLED,
    TRUNCATED,
    completions,
    prompts_of,
    tokens,
)
from veripo_fast.config.families import FAMILIES
from veripo_fast.config.inputs import ModelConfig
from veripo_fast.model.policy import load_policy
from veripo_fast.rollout.limits import EngineLimits, block_tokens
from veripo_fast.rollout.parity import largest_gap
from veripo_fast.rollout.plans import contrast_by_patch
from veripo_fast.rollout.protocol import Sampling
from veripo_fast.rollout.torch_engine import TorchEngine
from veripo_fast.rollout.vllm_engine import VllmEngine
from veripo_fast.types import LoadedPrompt, RolloutGroup

FLOAT32 = 5e-5
KINDS = [(family, tied) for family in policies.FAMILIES for tied in (True, False)]
KINDS += [("qwen3_vl_moe", False), ("qwen3_5", True), ("qwen3_5_moe", False)]


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: f"{kind[0]}-{'tied' if kind[1] else 'untied'}")
def engine(request: pytest.FixtureRequest, engine_of: Callable[..., VllmEngine]) -> VllmEngine:
    family, tied = request.param
    return engine_of(own_policy(family, tied=tied))


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED, TRUNCATED], ids=["greedy", "sampled", "truncated"])
def test_log_probs_are_the_trainers(engine: VllmEngine, sampling: Sampling) -> None:
    """Of the distribution before bans, top-k and top-p, at the temperature, for every kind of prompt."""
    prompts = prompts_of(engine.policy)
    groups = engine.generate(prompts, sampling)
    assert largest_gap(engine.policy, prompts, groups, sampling.temperature) < FLOAT32
    for group in groups:
        assert len(group.completions) == sampling.group_size
        for row in group.completions:
            assert len(row.rollout_logprobs) == len(row.token_ids) <= sampling.max_new_tokens
            assert set(row.token_ids).isdisjoint(engine.policy.encoder.banned_ids)
            assert row.policy_version == engine.policy.version
            ended = row.token_ids[-1] in engine.policy.encoder.end_ids
            assert row.finish_reason == ("stop" if ended else "length")
            assert ended or len(row.token_ids) == sampling.max_new_tokens


def test_frames_in_another_order_are_read_as_such(engine: VllmEngine) -> None:
    """A contrast is the trainer's own under its features, beside the prompt it comes from, and written otherwise."""
    prompts = prompts_of(engine.policy, [[("video", 8, 2, 2)], [("video", 6, 2, 2), ("image", 2, 3, 3)]])
    contrasts = [contrast_by_patch(item, "reverse", 0) for item in prompts]
    shown = [*prompts, *(item for item in contrasts if item is not None)]
    groups = engine.generate(shown, SAMPLED)
    assert len(shown) == 4 and largest_gap(engine.policy, shown, groups, SAMPLED.temperature) < FLOAT32
    assert largest_gap(engine.policy, prompts, groups[2:], SAMPLED.temperature) > 10 * FLOAT32
    expected = TorchEngine(engine.policy).generate(shown, GREEDY)
    assert tokens(engine.generate(shown, GREEDY)) == tokens(expected)


def test_greedy_completions_are_the_torch_engines(engine: VllmEngine) -> None:
    prompts = prompts_of(engine.policy)
    expected = TorchEngine(engine.policy).generate(prompts, GREEDY)
    assert tokens(engine.generate(prompts, GREEDY)) == tokens(expected)


def test_equal_calls_give_equal_bits(engine: VllmEngine) -> None:
    """Whatever was asked for in between, also when the engine was asleep."""
    prompts = prompts_of(engine.policy)
    first = completions(engine.generate(prompts, SAMPLED))
    engine.generate(prompts[::-1], replace(TRUNCATED, seed=8))
    engine.sleep()
    assert completions(engine.generate(prompts, SAMPLED)) == first
    assert completions(engine.generate(prompts, replace(SAMPLED, seed=4))) != first


def test_the_completions_of_a_group_and_of_equal_prompts_differ(engine: VllmEngine) -> None:
    """vLLM counts seeds up inside a group; those of the next prompt must not be among them."""
    prompt = prompts_of(engine.policy)[0]
    groups = engine.generate([prompt, prompt], replace(SAMPLED, max_new_tokens=24))
    texts = [tuple(row.token_ids) for group in groups for row in group.completions]
    assert len(set(texts)) == len(texts)


def test_sampling_follows_the_log_probs(engine: VllmEngine) -> None:
    """Frequencies of the first token against its probabilities: noise of neighbouring seeds is independent."""
    prompt = prompts_of(engine.policy)[0]
    count = 2000
    (group,) = engine.generate([prompt], Sampling(count, 0.5, 1, 5))
    drawn = torch.tensor([row.token_ids[0] for row in group.completions])
    logprobs = torch.tensor([row.rollout_logprobs[0] for row in group.completions])
    chance = torch.zeros(512).index_put((drawn,), logprobs.exp())
    seen = torch.bincount(drawn, minlength=512) / count
    likely = chance > 0.005
    spread = (chance * (1 - chance) / count).sqrt()
    assert likely.sum() >= 5
    assert ((seen - chance).abs() <= 4.5 * spread)[likely].all()


def test_every_group_is_given_once_when_it_is_finished(engine: VllmEngine) -> None:
    done: list[tuple[int, RolloutGroup]] = []
    groups = engine.generate(prompts_of(engine.policy), SAMPLED, lambda number, group: done.append((number, group)))
    assert sorted(number for number, _ in done) == list(range(len(MEDIA)))
    assert all(groups[number] is group for number, group in done)
    assert engine.generate([], SAMPLED) == []


# -- what a long or shared video does --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*policies.FAMILIES, "qwen3_vl_moe"])
def test_prompts_longer_than_a_batch(family: str, engine_of: Callable[..., VllmEngine]) -> None:
    """Prefilled in several steps, with a seed; the first two prompts share a video (vllm-project/vllm#41485)."""
    policy = own_policy(family)
    engine = engine_of(policy, EngineLimits(1024, 64, 4, 1 << 30))
    long = [("video", 4, 3, 4), ("video", 6, 3, 3), ("video", 4, 4, 3)]
    prompts = prompts_of(policy, [long, [], [("video", 4, 2, 3)]])
    prompts.append(prompts[0])
    assert len(prompts[0].encoded.token_ids) > 64
    groups = engine.generate(prompts, SAMPLED)
    assert largest_gap(policy, prompts, groups, 1.0) < FLOAT32
    assert completions(engine.generate(prompts, SAMPLED)) == completions(groups)


@pytest.mark.parametrize("family", [name for name, entry in FAMILIES.items() if entry.delta_class])
def test_states_at_the_edges_of_blocks(family: str, engine_of: Callable[..., VllmEngine]) -> None:
    """A prompt of several blocks is read in steps that end with them. Its state there starts the other completions, and
    another prompt that begins alike. A slot that is used again holds nothing of its last sequence."""
    policy = own_policy(family)
    engine = engine_of(policy, EngineLimits(1024, 192, 4, 1 << 30))
    shared = [("video", 8, 6, 6), ("video", 8, 6, 6)]
    long = [*shared, ("video", 6, 6, 6)]
    prompts = [policies.loaded(policy, sizes, 3) for sizes in (long, shared, [("image", 2, 3, 3)], long)]
    assert len(prompts[0].encoded.token_ids) > 2 * block_tokens(policy) == 256
    for sampling in (SAMPLED, replace(TRUNCATED, max_new_tokens=40)):
        groups = engine.generate(prompts, sampling)
        assert largest_gap(policy, prompts, groups, sampling.temperature) < FLOAT32
        assert completions(engine.generate(prompts, sampling)) == completions(groups)


def test_seeds_stay_with_rows_that_change_places(engine_of: Callable[..., VllmEngine]) -> None:
    """Where more is asked for than is sampled together, completions come before prompts in a batch with recurrent
    layers. What is drawn for a completion depends on no numbers of the process."""
    policy = own_policy("qwen3_5", tied=False)
    engine = engine_of(policy)
    prompts = prompts_of(policy)
    for seed in range(10):
        sampling, found = replace(TRUNCATED, seed=seed), []
        for state in (1, 2):
            torch.manual_seed(state)
            found.append(completions(engine.generate(prompts, sampling)))
        assert found[0] == found[1], seed


@pytest.mark.parametrize("family", ["qwen3_vl_moe", "qwen3_5_moe"])
def test_experts_as_wide_as_high(family: str, tmp_path: Path, engine_of: Callable[..., VllmEngine],
                                 monkeypatch: pytest.MonkeyPatch) -> None:
    """2 I == D: nothing but values tells whether a matrix is turned. A config.json that does not say whether weights of
    chosen experts add up to 1 is read as transformers reads it."""
    monkeypatch.setattr("veripo_fast.model.policy.check_expert_widths", lambda *arguments: None)
    config = json.loads((policies.checkpoint(family) / "config.json").read_text())
    config["text_config"]["moe_intermediate_size"] = config["text_config"]["hidden_size"] // 2
    config["text_config"].pop("norm_topk_prob")
    shutil.copytree(policies.checkpoint(family), tmp_path / "square")
    (tmp_path / "square" / "model.safetensors").unlink()
    (tmp_path / "square" / "config.json").write_text(json.dumps(config))
    made = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(tmp_path / "square"))
    made.save_pretrained(tmp_path / "square")
    (tmp_path / "square" / "config.json").write_text(json.dumps(config))
    policy = policy_of(tmp_path / "square")
    experts = policy.model.model.language_model.layers[0].mlp.experts.gate_up_proj
    assert experts.shape[1] == experts.shape[2]
    engine = engine_of(policy)
    prompts = prompts_of(policy)
    groups = engine.generate(prompts, SAMPLED)
    assert largest_gap(policy, prompts, groups, SAMPLED.temperature) < FLOAT32
    with torch.no_grad():
        experts.copy_(experts.transpose(1, 2).clone())
    assert largest_gap(policy, prompts, groups, SAMPLED.temperature) > 10 * FLOAT32, "it does matter"


def test_equal_tokens_and_other_times(engine_of: Callable[..., VllmEngine]) -> None:
    """Two Qwen2.5-VL videos of equal size and other rates have equal tokens and other positions."""
    policy = own_policy("qwen2_5_vl")
    engine = engine_of(policy)
    slow = policies.loaded(policy, [("video", 6, 2, 3)], 5)
    media = slow.encoded.media
    assert media is not None
    later = replace(media, grid_seconds=((0.0, 4.0, 8.0),), key="slower")
    fast = LoadedPrompt(slow.prompt, policy.encoder.encode(slow.prompt, later), slow.features)
    assert torch.equal(slow.encoded.token_ids, fast.encoded.token_ids)
    assert not torch.equal(slow.encoded.positions, fast.encoded.positions)
    groups = engine.generate([slow, fast], GREEDY)
    assert largest_gap(policy, [slow, fast], groups, 0.0) < FLOAT32


def test_every_end_token_ends(tmp_path: Path, engine_of: Callable[..., VllmEngine]) -> None:
    """Those of generation_config.json, and no other: not the end token of config.json."""
    folder = tmp_path / "ends"
    shutil.copytree(policies.checkpoint("qwen3_vl"), folder)
    stored = json.loads((folder / "generation_config.json").read_text())
    encoder = policies.policy("qwen3_vl").encoder
    text = encoder.chat_text(policies.prompt_around([("video", 1, 1, 1), ("image", 1, 1, 1)]))
    extra = [number for number in range(100, 500) if encoder.tokenizer.decode([number]) not in text]
    assert len(extra) > 150
    (folder / "generation_config.json").write_text(json.dumps(stored | {"eos_token_id": extra}))
    policy = load_policy(ModelConfig(path=str(folder), device="cpu"))
    engine = engine_of(policy, LIMITS)
    groups = engine.generate(prompts_of(policy), replace(SAMPLED, group_size=8, max_new_tokens=40))
    rows = [row for group in groups for row in group.completions]
    assert {row.finish_reason for row in rows} == {"stop"}
    for row in rows:
        assert row.token_ids[-1] in policy.encoder.end_ids
        assert set(row.token_ids[:-1]).isdisjoint(policy.encoder.end_ids)
    assert {row.token_ids[-1] for row in rows} & set(extra)
