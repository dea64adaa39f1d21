"""Experts that an engine chose, run again by the trainer: where they go, what they weigh, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.model.test_last_layer import ends_in_attention
from tests.support import policies
from veripo_fast.config.families import FAMILIES
from veripo_fast.config.inputs import ModelConfig
from veripo_fast.model.packing import PackedBatch, pack
from veripo_fast.model.plain import plain_logprobs
from veripo_fast.model.policy import Policy, load_policy
from veripo_fast.model.replay import UNKNOWN, Replay, pack_rollouts, routers_of, stored
from veripo_fast.model.shared_prefix import read_tokens
from veripo_fast.model.step import LogprobInputs, StepOutput
from veripo_fast.types import Completion, EncodedPrompt, RolloutGroup, VisionFeatures

MIXED = [name for name, family in FAMILIES.items() if family.router_class]
LENGTHS = [[7, 1, 12], [5], [3, 3]]
CPU = torch.device("cpu")


def policy_of(family: str, **options: object) -> Policy:
    return load_policy(ModelConfig(str(policies.checkpoint(family)), device="cpu", freeze_vision=True, **options))


def rows_of(policy: Policy) -> tuple[list[tuple[EncodedPrompt, list[list[int]]]], list[VisionFeatures | None]]:
    """Groups of uneven completions, one of them of a single token; a video, a text, and an image."""
    sizes = ([("video", 4, 3, 2)], [], [("image", 2, 2, 3)])
    items = [policies.loaded(policy, size, seed) for seed, size in enumerate(sizes)]
    return ([(item.encoded, policies.random_completions(lengths, seed))
             for seed, (item, lengths) in enumerate(zip(items, LENGTHS, strict=True))],
            [item.features for item in items])


@contextmanager
def watched(policy: Policy) -> Iterator[list[list[torch.Tensor]]]:
    """What each router chooses, int64 [n, k] of each of its runs."""
    routers = routers_of(policy.model, policy.encoder.family).values()
    seen: list[list[torch.Tensor]] = [[] for _ in routers]
    handles = [router.register_forward_hook(lambda module, inputs, output, own=own: own.append(output[2]))
               for router, own in zip(routers, seen, strict=True)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def own_choice(policy: Policy, batch: PackedBatch, features: Sequence[VisionFeatures | None]) -> torch.Tensor:
    """int16 [T, L, k] of a pass without a replay; of a trimmed last layer unknown where nothing is read."""
    with watched(policy) as seen:
        policy.completion_logprobs(batch, features)
    columns = []
    for (chosen,) in seen:
        if len(chosen) < len(batch.token_ids):
            read = read_tokens(batch.groups, CPU)
            chosen = torch.full((len(batch.token_ids), chosen.shape[1]), UNKNOWN).index_copy(0, read, chosen)
        columns.append(chosen)
    return torch.stack(columns, 1).short()


def random_experts(policy: Policy, tokens: int, seed: int = 0) -> torch.Tensor:
    """int16 [tokens, L, k], another set for every token and layer."""
    routers = policy.routers
    assert routers is not None
    draw = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens, len(routers.layers), routers.experts, generator=draw)
    return scores.topk(routers.top_k, -1).indices.short()


def passed(policy: Policy, batch: PackedBatch, features: Sequence[VisionFeatures | None]
           ) -> tuple[StepOutput, dict[str, torch.Tensor]]:
    """A pass, and the gradients of a weighted sum of its log-probs."""
    weights = torch.randn(len(batch.targets), generator=torch.Generator().manual_seed(3))
    policy.model.zero_grad()
    output = policy.forward(batch, features, LogprobInputs(0.7))
    (output.logprobs * weights).sum().backward()
    grads = {name: p.grad.clone() for name, p in policy.model.named_parameters() if p.grad is not None}
    policy.model.zero_grad()
    return output, grads


def assert_equal_bits(one: tuple[StepOutput, dict[str, torch.Tensor]],
                      other: tuple[StepOutput, dict[str, torch.Tensor]]) -> None:
    assert torch.equal(one[0].logprobs, other[0].logprobs)
    assert one[1].keys() == other[1].keys()
    for name, grad in one[1].items():
        assert torch.equal(grad, other[1][name]), name


# -- what is run ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("balance", [0.0, 0.01], ids=["trimmed", "whole"])
@pytest.mark.parametrize("family", MIXED)
def test_the_own_choice_gives_the_bits_of_no_replay(family: str, balance: float) -> None:
    policy = policy_of(family, router_balance=balance)
    rows, features = rows_of(policy)
    batch = pack(rows)
    again = replace(batch, experts=own_choice(policy, batch, features))
    plain, replayed = passed(policy, batch, features), passed(policy, again, features)
    assert_equal_bits(plain, replayed)
    counts = replayed[0].metrics
    read = len(read_tokens(batch.groups, CPU)) if policy.step._trimmed else len(batch.token_ids)
    assert policy.routers is not None
    assert int(counts["router_choices"]) == (len(policy.routers.layers) - 1) * len(batch.token_ids) + read
    assert int(counts["router_differing"]) == int(counts["router_unknown"]) == 0
    assert "router_choices" not in plain[0].metrics


@pytest.mark.parametrize("family", MIXED)
def test_only_replayed_experts_and_their_routers_rows_get_gradients(family: str) -> None:
    policy = policy_of(family)
    rows, features = rows_of(policy)
    batch = pack(rows)
    assert policy.routers is not None
    chosen = torch.tensor([1, 3] if policy.routers.top_k == 2 else list(range(policy.routers.top_k)))
    experts = chosen.short().expand(len(batch.token_ids), len(policy.routers.layers), -1)
    plain, replayed = passed(policy, batch, features), passed(policy, replace(batch, experts=experts), features)
    assert (plain[0].logprobs - replayed[0].logprobs).abs().max() > 0.1
    assert int(replayed[0].metrics["router_differing"]) > 0.5 * int(replayed[0].metrics["router_choices"])
    left = [number for number in range(policy.routers.experts) if number not in chosen.tolist()]
    for number in policy.routers.layers:
        prefix = f"model.language_model.layers.{number}.mlp."
        for name in ("gate.weight", "experts.gate_up_proj", "experts.down_proj"):
            grad = replayed[1][prefix + name].flatten(1)
            assert grad[chosen].any(1).all(), (number, name)
            of_others = 1e-6 * grad.norm() if name == "gate.weight" else 0.0  # they cancel, but for rounding
            assert grad[left].norm() <= of_others, (number, name)


@pytest.mark.parametrize("family", MIXED)
def test_weights_are_a_softmax_over_the_own_logits(family: str) -> None:
    policy = policy_of(family)
    router = routers_of(policy.model, policy.encoder.family)[0]
    hidden = torch.randn(6, router.hidden_dim, generator=torch.Generator().manual_seed(0))
    experts = random_experts(policy, 6)[:, 0].long()
    router.replayed = Replay(experts[:, None]), experts
    logits, weights, chosen = router(hidden)
    expected = torch.softmax((hidden.double() @ router.weight.double().t()).gather(-1, experts), -1)
    assert torch.equal(chosen, experts)
    torch.testing.assert_close(weights.double(), expected, rtol=1e-5, atol=1e-6)
    assert len(logits[0]) == router.num_experts


@pytest.mark.parametrize("short", [False, True], ids=["whole", "ends-in-attention"])
@pytest.mark.parametrize("family", MIXED)
def test_packed_positions_are_those_of_repeated_prompts(family: str, short: bool) -> None:
    """Each token runs its own experts: against Hugging Face's forward on each prompt and completion alone, whose
    routers are handed the same."""
    policy = ends_in_attention(family) if short else policy_of(family)
    rows, _ = rows_of(policy)
    features = [None if prompt.media is None else policy.vision_features(prompt.media) for prompt, _ in rows]
    groups, alone = [], []
    for number, (prompt, completions) in enumerate(rows):
        of_prompt = random_experts(policy, len(prompt.token_ids), number)
        parts = [random_experts(policy, len(ids) - 1, 100 * number + place) for place, ids in enumerate(completions)]
        groups.append(group_of(completions, of_prompt, parts))
        alone += [(prompt, ids, torch.cat([of_prompt, part])) for ids, part in zip(completions, parts, strict=True)]
    batch = pack_rollouts([(prompt, group) for (prompt, _), group in zip(rows, groups, strict=True)], policy.routers)
    with torch.no_grad():
        packed = policy.completion_logprobs(batch, features).split(batch.cu_seqlens.diff().tolist())
        for ours, (prompt, ids, experts) in zip(packed, alone, strict=True):
            with handed(policy, experts):
                theirs = plain_logprobs(policy, prompt, ids)
            assert (ours - theirs).abs().max() < 1e-4


def group_of(completions: Sequence[list[int]], prompt: torch.Tensor, parts: Sequence[torch.Tensor]) -> RolloutGroup:
    return RolloutGroup(policies.prompt_of("?"), [
        Completion(ids, "", [0.0] * len(ids), "stop", 0, experts=stored(part.numpy()))
        for ids, part in zip(completions, parts, strict=True)], prompt_experts=stored(prompt.numpy()))


@contextmanager
def handed(policy: Policy, experts: torch.Tensor) -> Iterator[None]:
    """Routers of a plain forward take these; the token behind the last one, which predicts nothing, its own."""
    ended = torch.cat([experts, torch.full_like(experts[:1], UNKNOWN)]).long()
    handles = []
    for column, router in enumerate(routers_of(policy.model, policy.encoder.family).values()):
        def hand(module: torch.nn.Module, inputs: tuple[torch.Tensor], column: int = column) -> None:
            module.replayed = Replay(ended), ended[:, column]

        handles.append(router.register_forward_pre_hook(hand))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("family", MIXED)
def test_gradient_checkpointing_replays_again_in_the_backward(family: str) -> None:
    """Also where another pass, with another replay or with none, was run between forward and backward."""
    found = []
    for checkpointing in (False, True):
        policy = policy_of(family, gradient_checkpointing=checkpointing)
        rows, features = rows_of(policy)
        batch = pack(rows)
        batch = replace(batch, experts=random_experts(policy, len(batch.token_ids)))
        output = policy.forward(batch, features, LogprobInputs())
        counts = {name: int(value) for name, value in output.metrics.items()}
        with torch.no_grad():
            policy.completion_logprobs(replace(batch, experts=batch.experts.flip(0)), features)
            policy.completion_logprobs(replace(batch, experts=None), features)
        output.logprobs.mean().backward()
        assert {name: int(value) for name, value in output.metrics.items()} == counts, "counted once"
        found.append(torch.cat([p.grad.flatten() for _, p in policy.parameters() if p.grad is not None]))
    assert torch.equal(*found)


@pytest.mark.parametrize("family", MIXED)
def test_where_nothing_is_known_the_router_chooses(family: str) -> None:
    """A group from before the option, beside one that has experts; and single tokens."""
    policy = policy_of(family)
    rows, features = rows_of(policy)
    batch = pack(rows)
    own = own_choice(policy, batch, features)
    groups = [RolloutGroup(policies.prompt_of("?"), [Completion(ids, "", [], "stop", 0) for ids in completions])
              for _, completions in rows]
    assert pack_rollouts([(prompt, group) for (prompt, _), group in zip(rows, groups, strict=True)],
                         policy.routers).experts is None
    span = batch.groups[1]
    groups[1] = group_of(rows[1][1], own[span.start:span.completion_start], [own[span.completion_start:span.end]])
    mixed = pack_rollouts([(prompt, group) for (prompt, _), group in zip(rows, groups, strict=True)], policy.routers)
    assert mixed.experts is not None and torch.equal(mixed.experts[span.start:span.end], own[span.start:span.end])
    plain, replayed = passed(policy, batch, features), passed(policy, mixed, features)
    assert_equal_bits(plain, replayed)
    assert int(replayed[0].metrics["router_unknown"]) > int(replayed[0].metrics["router_choices"]) > 0
    assert int(replayed[0].metrics["router_differing"]) == 0


def test_a_dense_family_packs_as_before() -> None:
    policy = policies.policy("qwen3_vl")
    assert policy.routers is None
    prompt = policies.encoded(policy.encoder, [])
    group = group_of([[30, 31]], torch.zeros(len(prompt.token_ids), 2, 2).short(), [torch.zeros(1, 2, 2).short()])
    assert pack_rollouts([(prompt, group)], None).experts is None


# -- what is refused --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("tokens", "expert", "words"), [
    (3, 0, r"holds \d+ experts where 2 tokens take"), (1, 0, r"holds \d+ experts where 2 tokens take"),
    (2, 4096, "holds expert 4096 of a model with")])
def test_experts_that_do_not_fit(tokens: int, expert: int, words: str) -> None:
    policy = policies.policy("qwen3_5_moe")
    routers = policy.routers
    assert routers is not None
    prompt = policies.encoded(policy.encoder, [])
    layers = len(routers.layers), routers.top_k
    experts = np.full((tokens, *layers), expert)
    group = RolloutGroup(policies.prompt_of("?"), [Completion([5, 6, 7], "", [], "stop", 0, experts=stored(experts))],
                         prompt_experts=stored(np.zeros((len(prompt.token_ids), *layers))))
    with pytest.raises(ValueError, match=words):
        pack_rollouts([(prompt, group)], routers)
