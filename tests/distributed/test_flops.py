"""The cost model against the FLOPs that torch counts in a real step of a tiny policy."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.support import policies
from veripo_fast.distributed.flops import ModelCost, Passes, attention_pairs, group_flops, tower_flops
from veripo_fast.model.packing import pack
from veripo_fast.model.shared_prefix import GroupSpan
from veripo_fast.model.step import StepOutput


class NaiveHead:
    """The head by matmul, in place of a fused op whose FLOPs torch cannot count."""

    def compute(self, hidden, head, targets, cu_seqlens):
        logprobs = (hidden @ head.T).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
        return StepOutput(logprobs.sum(), {}, logprobs)


def counted(run, leave_out=()):
    """FLOPs by aten op; attention by matmul, so that it is counted, and over all pairs, hidden or not."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    counts = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    for op in leave_out:
        counts.pop(op, None)
    batched = counts.pop("aten.bmm", 0) + counts.pop("aten.baddbmm", 0)
    return sum(counts.values()), batched


SHORT = ("aten.convolution", "aten.convolution_backward")
"""The convolutions of recurrent layers over four tokens, which the cost leaves out as it does norms."""


def attention_flops(cost, pairs, unread):
    """Of (query, key) pairs in every layer that attends, but `unread` of them in the last."""
    assert cost.trimmed or not unread
    return 6 * 2 * cost.heads * cost.head_dim * (cost.attending * pairs - unread)


def unread_pairs(cost, prompt):
    """Of a prompt whose last token alone asks in the last layer."""
    return prompt * (prompt - 1) // 2 if cost.trimmed else 0


def rule_flops(cost, tokens):
    """Of the recurrent layers, what is no matrix of weights."""
    return 6 * tokens * cost.delta.layers * cost.delta.rule if cost.delta else 0


@pytest.fixture(autouse=True)
def experts_one_by_one():
    """torch cannot count its grouped products."""
    made = [policies.policy(family, freeze_vision=True).model for family in ("qwen3_vl_moe", "qwen3_5_moe")]
    for model in made:
        model.set_experts_implementation("eager")
    yield
    for model in made:
        model.set_experts_implementation("grouped_mm")


@pytest.mark.parametrize("family", policies.ALL_FAMILIES)
def test_flops_of_a_packed_step_are_those_that_torch_counts(family):
    policy, lengths = policies.policy(family, freeze_vision=True), [9, 1, 30, 17]
    loaded = policies.loaded(policy, [("video", 4, 3, 4)])
    batch = pack([(loaded.encoded, policies.random_completions(lengths))])
    linear, attention = counted(lambda: policy.step(batch, [loaded.features], NaiveHead()).loss.backward(), SHORT)
    policy.model.zero_grad()
    cost = ModelCost.of(policy.model.config, tower_trained=False)
    prompt, packed = len(loaded.encoded.token_ids), [length - 1 for length in lengths]
    ours = group_flops(cost, prompt, lengths, loaded.encoded.media.grid_thw.tolist())
    apart = attention_flops(cost, attention_pairs(prompt, packed), unread_pairs(cost, prompt))
    apart += rule_flops(cost, prompt + sum(packed))
    assert linear == ours - apart
    if cost.delta:
        return  # chunks compute more than the rule
    every = prompt ** 2 + sum(packed) * (prompt + sum(packed))
    unread = prompt ** 2 - prompt if cost.trimmed else 0
    assert attention == pytest.approx(attention_flops(cost, every, unread), rel=0.01)  # and the rotary embedding


def test_attention_pairs_are_those_of_the_mask():
    span = GroupSpan(0, 11, (5, 0, 1, 8))
    visible = sum(int(mask.sum()) for _, mask in span.blocks) + 11 * 12 // 2
    assert attention_pairs(11, span.completions) == visible


@pytest.mark.parametrize("family", policies.ALL_FAMILIES)
def test_flops_of_a_trained_tower_are_those_that_torch_counts(family):
    policy = policies.policy(family)
    media = policies.random_media(policy.encoder, [("video", 4, 4, 6), ("image", 1, 2, 4)])

    def run():
        features = policy.vision_features(media)
        sum(part.sum() for part in (features.embeddings, *features.deepstack)).backward()

    linear, attention = counted(run)
    policy.model.zero_grad()
    tower = ModelCost.of(policy.model.config, tower_trained=True).tower
    grids = media.grid_thw.tolist()
    assert linear + attention == pytest.approx(tower_flops(tower, grids), rel=0.02)
    text = ModelCost.of(policy.model.config, tower_trained=False)
    trained = ModelCost.of(policy.model.config, tower_trained=True)
    assert group_flops(trained, 9, [3], grids) - group_flops(text, 9, [3], grids) == tower_flops(tower, grids)


@pytest.mark.parametrize("family", policies.ALL_FAMILIES)
def test_flops_without_a_backward_are_those_that_torch_counts(family):
    """Of a reference pass, and of a frozen tower."""
    policy, lengths = policies.policy(family, freeze_vision=True), [9, 1, 30, 17]
    loaded = policies.loaded(policy, [("video", 4, 3, 4)])
    prompt, packed = len(loaded.encoded.token_ids), [length - 1 for length in lengths]
    batch = pack([(loaded.encoded, policies.random_completions(lengths))])
    cost = ModelCost.of(policy.model.config, tower_trained=False)
    with torch.no_grad():
        linear, _ = counted(lambda: policy.step(batch, [loaded.features], NaiveHead()), SHORT)
    apart = attention_flops(cost, attention_pairs(prompt, packed), unread_pairs(cost, prompt))
    apart += rule_flops(cost, prompt + sum(packed))
    assert linear == group_flops(cost, prompt, lengths, backward=False) - apart // 3
    media = policies.random_media(policy.encoder, [("video", 4, 4, 6), ("image", 1, 2, 4)])
    linear, attention = counted(lambda: policy.vision_features(media))
    assert linear + attention == pytest.approx(tower_flops(policy.cost, media.grid_thw.tolist(), backward=False),
                                               rel=0.02)


@pytest.mark.parametrize("trained", [True, False])
def test_passes_of_a_policy_are_counted(trained):
    policy, lengths = policies.policy("qwen3_vl", freeze_vision=not trained), [9, 1, 30]
    loaded = policies.loaded(policy, [("video", 4, 3, 4)])
    policy.passes = Passes()
    cost = ModelCost.of(policy.model.config, tower_trained=trained)
    grids = loaded.encoded.media.grid_thw.tolist()
    batch = pack([(loaded.encoded, policies.random_completions(lengths))])
    policy.completion_logprobs(batch, policy.features_of([loaded]))
    whole = group_flops(cost, len(loaded.encoded.token_ids), lengths, grids)
    assert policy.passes == Passes(whole, 0, len(batch.token_ids))
    with torch.no_grad():
        policy.completion_logprobs(batch, policy.features_of([loaded]))
    forward = group_flops(cost, len(loaded.encoded.token_ids), lengths, grids, backward=False)
    assert policy.passes == Passes(whole + forward, 0, len(batch.token_ids))
    before = policy.passes.copy()
    policy.idle()
    idle, _, _ = policy.idle_inputs()
    text = ModelCost.of(policy.model.config, tower_trained=False)
    spare = group_flops(text, idle.groups[0].prompt, [1])
    assert policy.passes.since(before) == Passes(spare, spare, 0)
