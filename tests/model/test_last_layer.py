"""The last layer that leaves out what nobody reads, against its sibling that computes all of it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from tests.support import policies
from veripo_fast.config.inputs import ModelConfig
from veripo_fast.distributed.flops import trims_last_layer
from veripo_fast.model.packing import PackedBatch, pack
from veripo_fast.model.policy import Policy, load_policy
from veripo_fast.model.shared_prefix import PromptCache, attend_packed, read_tokens
from veripo_fast.rollout.protocol import Sampling
from veripo_fast.rollout.torch_engine import TorchEngine
from veripo_fast.types import VisionFeatures

CPU = torch.device("cpu")


@cache
def ends_in_attention(family: str) -> Policy:
    """A policy whose last layer attends, as that of real hybrids does; of the tiny ones only the second."""
    if not family.startswith("qwen3_5"):
        return policies.policy(family)
    folder = Path(mkdtemp(prefix=f"veripo-short-{family}-"))
    shutil.copytree(policies.checkpoint(family), folder, dirs_exist_ok=True)
    config = AutoConfig.from_pretrained(folder)
    config.text_config.num_hidden_layers, config.text_config.layer_types = 2, config.text_config.layer_types[:2]
    torch.manual_seed(1)
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    return load_policy(ModelConfig(path=str(folder), device="cpu", freeze_vision=False))


@contextmanager
def whole(policy: Policy) -> Iterator[None]:
    """With all of the last layer: its own forward."""
    assert policy.step._trimmed
    policy.step._trimmed = False
    try:
        yield
    finally:
        policy.step._trimmed = True


def two_groups(policy: Policy) -> tuple[PackedBatch, list[VisionFeatures | None]]:
    """A video with uneven completions, one of them of a single token, and a text with one."""
    video = policies.encoded(policy.encoder, [("video", 4, 3, 2)])
    text = policies.encoded(policy.encoder, [])
    assert video.media is not None
    return (pack([(video, policies.random_completions([7, 1, 12])), (text, policies.random_completions([5]))]),
            [policy.vision_features(video.media), None])


def logprobs_and_gradients(policy: Policy) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    batch, features = two_groups(policy)
    weights = torch.randn(len(batch.targets), generator=torch.Generator().manual_seed(3))
    policy.model.zero_grad()
    logprobs = policy.completion_logprobs(batch, features, temperature=0.7)
    (logprobs * weights).sum().backward()
    grads = {name: p.grad.clone() for name, p in policy.model.named_parameters() if p.grad is not None}
    policy.model.zero_grad()
    return logprobs.detach(), grads


def assert_same(ours: tuple[torch.Tensor, dict[str, torch.Tensor]],
                theirs: tuple[torch.Tensor, dict[str, torch.Tensor]], allowed: float = 1e-5) -> None:
    assert (ours[0] - theirs[0]).abs().max() < 1e-5
    assert ours[1].keys() == theirs[1].keys()
    total = torch.cat([grad.flatten() for grad in theirs[1].values()]).norm()
    for name, grad in theirs[1].items():
        assert (ours[1][name] - grad).norm() <= allowed * total, name


@pytest.mark.parametrize("family", policies.ALL_FAMILIES)
def test_logprobs_and_every_gradient_are_those_of_the_whole_layer(family: str) -> None:
    policy = ends_in_attention(family)
    ours = logprobs_and_gradients(policy)
    with whole(policy):
        theirs = logprobs_and_gradients(policy)
    hybrid = family.startswith("qwen3_5")  # its recurrence turns a last digit below into 1e-5 (test_shared_prefix.py)
    assert_same(ours, theirs, 1e-4 if hybrid else 1e-5)


@pytest.mark.parametrize("family", policies.FAMILIES)
def test_with_gradient_checkpointing(family: str) -> None:
    folder = str(policies.checkpoint(family))
    policy = load_policy(ModelConfig(path=folder, device="cpu", gradient_checkpointing=True, freeze_vision=True))
    ours = logprobs_and_gradients(policy)
    with whole(policy):
        theirs = logprobs_and_gradients(policy)
    assert_same(ours, theirs)


@pytest.mark.parametrize("family", policies.ALL_FAMILIES)
def test_only_what_is_read_passes_the_last_layer(family: str) -> None:
    policy = ends_in_attention(family)
    batch, features = two_groups(policy)
    read, seen = read_tokens(batch.groups, CPU), {}
    layer = policy.step.language_model.layers[-1]
    handles = [module.register_forward_hook(
                   lambda module, inputs, output, name=name: seen.__setitem__(name, inputs[0].shape[1]))
               for name, module in (("mlp", layer.mlp), ("k_proj", layer.self_attn.k_proj),
                                    ("q_proj", layer.self_attn.q_proj), ("o_proj", layer.self_attn.o_proj))]
    with torch.no_grad():
        hidden = policy.hidden(batch, features)
    for handle in handles:
        handle.remove()
    assert len(read) == 1 + 6 + 0 + 11 + 1 + 4 < len(batch.token_ids)
    assert seen == {"mlp": len(read), "q_proj": len(read), "o_proj": len(read), "k_proj": len(batch.token_ids)}
    assert len(hidden) == len(read)


def test_tails_ask_as_in_the_whole_row() -> None:
    batch, _ = two_groups(policies.policy("qwen3_vl"))
    draw = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, len(batch.token_ids), 16, generator=draw) for heads in (4, 2, 2))
    read = read_tokens(batch.groups, CPU)
    some = attend_packed(query, key, value, batch.groups, None, tails=True)
    every = attend_packed(query, key, value, batch.groups, None)
    assert (some - every)[:, :, read].abs().max() < 1e-6
    left = torch.ones(len(batch.token_ids), dtype=torch.bool)
    left[read] = False
    assert left.any() and not some[:, :, left].any()


@torch.no_grad()
def test_a_prefill_keeps_the_keys_of_every_prompt_token() -> None:
    policy = policies.policy("qwen3_vl")
    items = [policies.loaded(policy, sizes) for sizes in ([("video", 4, 3, 2)], [])]
    lengths = [len(item.encoded.token_ids) for item in items]
    caches = PromptCache(lengths), PromptCache(lengths)
    batch = pack([(item.encoded, []) for item in items])
    ends = policy.hidden(batch, [item.features for item in items], caches[0])
    with whole(policy):
        others = policy.hidden(batch, [item.features for item in items], caches[1])
    assert ends.shape == others.shape == (2, ends.shape[1])
    assert (ends - others).abs().max() < 1e-5
    last = policy.num_layers - 1
    for ours, theirs in zip(caches[0].padded[last], caches[1].padded[last], strict=True):
        assert ours.shape[0] == 2 and ours[0].any(0).any(-1).all() and torch.allclose(ours, theirs, atol=1e-6)


@torch.no_grad()
def test_completions_are_those_of_the_whole_layer() -> None:
    policy = policies.policy("qwen3_vl")
    items = [policies.loaded(policy, sizes) for sizes in ([("video", 4, 3, 2)], [])]
    sampling = Sampling(3, 1.0, 12, 5)
    ours = TorchEngine(policy).generate(items, sampling)
    with whole(policy):
        theirs = TorchEngine(policy).generate(items, sampling)
    for one, other in zip(ours, theirs, strict=True):
        assert [row.token_ids for row in one.completions] == [row.token_ids for row in other.completions]


def test_balanced_experts_are_chosen_for_every_token() -> None:
    folder = str(policies.checkpoint("qwen3_vl_moe"))
    policy = load_policy(ModelConfig(path=folder, device="cpu", router_balance=0.01, freeze_vision=True))
    assert not policy.step._trimmed
    batch, features = two_groups(policy)
    seen = []
    handle = policy.step.language_model.layers[-1].mlp.register_forward_hook(
        lambda module, inputs, output: seen.append(inputs[0].shape[1]))
    with torch.no_grad():
        assert len(policy.hidden(batch, features)) == len(read_tokens(batch.groups, CPU))
    handle.remove()
    assert seen == [len(batch.token_ids)]


def test_layers_that_cannot_are_left_alone() -> None:
    config = policies.policy("qwen3_vl").model.config
    assert trims_last_layer(config)
    deep = SimpleNamespace(
        get_text_config=lambda: config.text_config,
        vision_config=SimpleNamespace(deepstack_visual_indexes=[0] * config.text_config.num_hidden_layers))
    assert not trims_last_layer(deep), "the tower's output is added behind the last layer"
    hybrid = policies.policy("qwen3_5").step
    assert not hasattr(hybrid.language_model.layers[-1], "self_attn")
    assert not hybrid._trimmed and "forward" not in hybrid.language_model.layers[-1].__dict__


def test_an_error_in_the_layer_leaves_no_trace() -> None:
    policy = load_policy(ModelConfig(path=str(policies.checkpoint("qwen3_vl")), device="cpu", freeze_vision=True))
    batch, features = two_groups(policy)
    with pytest.raises(Exception, match=r"packed|size|split"), torch.no_grad():
        policy.hidden(replace(batch, groups=(replace(batch.groups[0], prompt=3), batch.groups[1])), features)
    with torch.no_grad():
        assert policies.plain_logits(policy, batch.prompts[1], [30, 31]).shape[0] == 3
