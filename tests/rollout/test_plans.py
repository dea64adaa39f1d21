"""Frames in another order: exact from the tower's output, through both ways into an engine; pairing by hand."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from tests.support import policies
from veripo_fast.rollout.engine_input import media_of
from veripo_fast.rollout.plans import contrast_by_patch, frame_order, pair_all, patch_orders
from veripo_fast.rollout.protocol import Sampling
from veripo_fast.rollout.torch_engine import TorchEngine
from veripo_fast.types import Completion, RolloutGroup

MIXED = [("image", 2, 2, 3), ("video", 6, 2, 2), ("image", 2, 3, 3), ("video", 8, 2, 3)]


def test_a_shuffle_is_another_order_and_follows_from_its_seed() -> None:
    orders = {seed: frame_order(3, "shuffle", seed) for seed in range(60)}
    others = [list(order) for order in itertools.permutations(range(3))][1:]
    assert {tuple(order) for order in orders.values() if order} == {tuple(order) for order in others}
    assert orders[7] == frame_order(3, "shuffle", 7)
    assert frame_order(4, "reverse", 0) == [3, 2, 1, 0]
    assert frame_order(1, "shuffle", 0) is None and frame_order(1, "reverse", 0) is None


@pytest.mark.parametrize("order", ["shuffle", "reverse"])
@pytest.mark.parametrize("family", policies.FAMILIES)
def test_reordered_output_is_that_of_reordered_pixels(family: str, order: str) -> None:
    """Bit for bit, deepstack levels too; images and positions stay."""
    policy = policies.policy(family)
    item = policies.loaded(policy, MIXED)
    other = contrast_by_patch(item, order, 5)  # type: ignore[arg-type]
    assert other is not None and other.features is not None and item.features is not None
    media, before = other.encoded.media, item.encoded.media
    assert media is not None and before is not None and media.key != before.key
    with torch.no_grad():
        fresh = policy.vision_features(media)
    assert torch.equal(fresh.embeddings, other.features.embeddings)
    assert len(fresh.deepstack) == len(other.features.deepstack)
    assert all(map(torch.equal, fresh.deepstack, other.features.deepstack))
    assert torch.equal(other.encoded.positions, item.encoded.positions)
    assert torch.equal(other.encoded.token_ids, item.encoded.token_ids)
    shown, given = (media_of(policy.encoder, one, "output") for one in (other, item))
    for one, original, drawn in zip(shown, given, patch_orders(before, order, 5), strict=True):  # type: ignore[arg-type]
        if drawn is None:
            assert original.kind == "image" and torch.equal(one.values, original.values)
            continue
        assert drawn != sorted(drawn)
        patches = original.values.view(len(drawn), -1, original.values.shape[-1])
        assert torch.equal(one.values, patches[drawn].flatten(0, 1)) and one.key != original.key


@pytest.mark.parametrize("sizes", [[], [("image", 2, 2, 2)], [("video", 2, 2, 2)]])
def test_without_several_patches_there_is_no_contrast(sizes: list[tuple[str, int, int, int]]) -> None:
    assert contrast_by_patch(policies.loaded(policies.policy("qwen3_vl"), sizes), "shuffle", 0) is None


def test_a_contrast_is_answered_otherwise() -> None:
    """The policy sees it: with the same noise the log-probs are others."""
    policy = policies.policy("qwen2_5_vl")
    item = policies.loaded(policy, [("video", 8, 2, 2)])
    other = contrast_by_patch(item, "reverse", 0)
    assert other is not None
    drawn = Sampling(2, 1.0, 4, 0)
    one, two = (TorchEngine(policy).generate([shown], drawn)[0].completions for shown in (item, other))
    assert one[0].rollout_logprobs[0] != two[0].rollout_logprobs[0]


def test_pairing_by_hand() -> None:
    """Two wordings with two completions each: the shared advantage everywhere, the own one under its own wording."""
    prompt = policies.prompt_of("?")
    prompts = [prompt, replace(prompt, prompt_id="p/wording-1")]
    numbers = ((0, 1), (10, 11))
    groups = [RolloutGroup(asked, [Completion([number], "", [0.0], "stop", 0) for number in own])
              for own, asked in zip(numbers, prompts, strict=True)]
    paired = pair_all(groups, 2, [[1.0, -1.0], [0.5, -0.5]], [[3.0, 2.0], [-2.0, -3.0]])
    assert [group.prompt for group in paired] == prompts
    assert [[row.token_ids for row in group.completions] for group in paired] == [[[0], [1], [10], [11]]] * 2
    assert [row.advantage for row in paired[0].completions] == [4.0, 1.0, -2.0, -3.0]
    assert [row.advantage for row in paired[1].completions] == [3.0, 2.0, -1.5, -3.5]
    assert groups[0].completions[0].advantage is None
