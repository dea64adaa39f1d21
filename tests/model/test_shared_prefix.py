"""The packed group against its sibling, the plain Hugging Face forward on repeated prompts: logprobs and gradients."""

from __future__ import annotations

import pytest
import torch

from tests.support import policies
from veripo_fast.config.families import FAMILIES
from veripo_fast.model.packing import micro_batches, pack
from veripo_fast.model.plain import plain_logprobs
from veripo_fast.model.policy import Policy
from veripo_fast.model.shared_prefix import GroupSpan, read_tokens
from veripo_fast.schedule import blocks
from veripo_fast.types import EncodedPrompt

CASES = {
    "text_only": [],
    "one_video": [("video", 4, 3, 2)],
    "image": [("image", 2, 2, 3)],
    "two_videos_and_image": [("video", 6, 2, 2), ("image", 2, 3, 3), ("video", 3, 2, 3)],
}


def gradients(policy: Policy) -> torch.Tensor:
    return torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten()
                      for p in policy.model.parameters()])


def gradients_in_float64(policy: Policy, prompt: EncodedPrompt, completions: list[list[int]], weights: torch.Tensor
                         ) -> torch.Tensor:
    """Of a packed group: transformers computes the recurrence in float32, whatever the weights are."""
    experts = policy.model.get_experts_implementation()[""]
    policy.model.double()
    policy.model.set_experts_implementation("eager")  # torch's grouped product takes no float64
    policy.model.zero_grad()
    features = None if prompt.media is None else policy.vision_features(prompt.media)
    logprobs = policy.completion_logprobs(pack([(prompt, completions)]), [features], temperature=0.7)
    (logprobs * weights).sum().backward()
    exact = gradients(policy)
    policy.model.float()
    policy.model.set_experts_implementation(experts)
    policy.model.zero_grad()
    return exact


@pytest.mark.parametrize("family", policies.ALL_FAMILIES)
@pytest.mark.parametrize("case", CASES)
def test_logprobs_and_gradients_match_the_repeated_prompt(family: str, case: str) -> None:
    policy = policies.policy(family)
    prompt = policies.encoded(policy.encoder, CASES[case])
    completions = policies.random_completions([7, 1, 12, 2])
    weights = torch.randn(sum(map(len, completions)), generator=torch.Generator().manual_seed(3))

    policy.model.zero_grad()
    batch = pack([(prompt, completions)])
    features = None if prompt.media is None else policy.vision_features(prompt.media)
    packed = policy.completion_logprobs(batch, [features], temperature=0.7)
    (packed * weights).sum().backward()
    packed_gradients = gradients(policy)

    policy.model.zero_grad()
    plain = torch.cat([plain_logprobs(policy, prompt, c, 0.7) for c in completions])
    (plain * weights).sum().backward()
    plain_gradients = gradients(policy)
    policy.model.zero_grad()

    assert (packed - plain).abs().max() < 1e-4
    allowed = 1e-5
    if FAMILIES[family].delta_class:  # the plain forward itself is off by about 1e-5 in float32
        exact = gradients_in_float64(policy, prompt, completions, weights)
        own, ours = (float((part.double() - exact).norm() / exact.norm())
                     for part in (plain_gradients, packed_gradients))
        assert own < 1e-4 and ours <= 2 * own + 1e-6
        allowed = max(allowed, 2 * own)
    assert (packed_gradients - plain_gradients).norm() <= allowed * plain_gradients.norm()


def test_groups_in_one_row_do_not_see_each_other() -> None:
    policy = policies.policy("qwen3_vl")
    rows = [(policies.encoded(policy.encoder, [("video", 4, 2, 2)], seed), policies.random_completions([5, 3], seed))
            for seed in range(3)]
    features = [policy.vision_features(prompt.media) for prompt, _ in rows]
    with torch.no_grad():
        together = policy.completion_logprobs(pack(rows), features)
        alone = torch.cat([policy.completion_logprobs(pack([row]), [f]) for row, f in zip(rows, features, strict=True)])
    assert (together - alone).abs().max() < 1e-5


def test_completions_are_attended_in_blocks_when_the_mask_would_be_large(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = policies.policy("qwen2_5_vl")
    prompt, completions = policies.encoded(policy.encoder, []), policies.random_completions([6, 9, 4, 8])
    with torch.no_grad():
        whole = policy.completion_logprobs(pack([(prompt, completions)]), [None])
        monkeypatch.setattr(blocks, "MAX_MASK_ELEMENTS", 1)
        batch = pack([(prompt, completions)])
        assert [tokens for tokens, _ in batch.groups[0].blocks] == [5, 8, 3, 7]
        assert (policy.completion_logprobs(batch, [None]) - whole).abs().max() < 1e-5


@pytest.mark.parametrize(("prompt", "completions", "expected"), [
    (882, (8,) * 8, [64]),  # a call costs more than the pairs that a mask hides
    (882, (32,) * 8, [96, 96, 64]), (882, (64,) * 8, [64] * 8), (882, (512,) * 8, [512] * 8),
    (100, (64,) * 4, [64] * 4), (3000, (64,) * 4, [128, 128]),
    (882, (500, 3, 3, 500, 0, 500), [506, 500, 500])])
def test_completions_share_a_block_where_that_costs_less(prompt: int, completions: tuple[int, ...],
                                                         expected: list[int]) -> None:
    made = GroupSpan(0, prompt, completions).blocks
    assert [tokens for tokens, _ in made] == expected
    assert all(mask.shape == (tokens, prompt + tokens) for tokens, mask in made)


def test_the_last_token_of_a_completion_is_not_run() -> None:
    policy = policies.policy("qwen3_vl")
    prompt = policies.encoded(policy.encoder, [])
    batch = pack([(prompt, [[30, 31, 32], [33]])])
    assert len(batch.token_ids) == len(prompt.token_ids) + 2
    read = read_tokens(batch.groups, torch.device("cpu"))[batch.logit_index].tolist()
    end = len(prompt.token_ids)
    assert read == [end - 1, end, end + 1, end - 1]
    assert batch.targets.tolist() == [30, 31, 32, 33]


def test_an_empty_completion_is_refused() -> None:
    prompt = policies.encoded(policies.policy("qwen3_vl").encoder, [])
    with pytest.raises(ValueError, match="without tokens"):
        pack([(prompt, [[1], []])])


@pytest.mark.parametrize(("lengths", "expected"), [
    ([4, 4, 4], [[0, 1], [2]]), ([9], [[0]]), ([], []), ([3, 9, 3, 3], [[0], [1], [2, 3]])])
def test_micro_batches_keep_order_and_limit(lengths: list[int], expected: list[list[int]]) -> None:
    assert micro_batches(lengths, 8) == expected
