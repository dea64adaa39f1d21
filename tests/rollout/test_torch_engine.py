"""The torch engine against its slow sibling: one full Hugging Face forward per sampled token, prompt by prompt.
And rollouts on disk: what was written is what is read."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.support import policies
from veripo_fast.config.families import FAMILIES
from veripo_fast.errors import DataError
from veripo_fast.model import shared_prefix
from veripo_fast.model.packing import PackedBatch, pack
from veripo_fast.model.policy import Policy
from veripo_fast.rollout import torch_engine
from veripo_fast.rollout.protocol import Sampling
from veripo_fast.rollout.store import read_groups, write_groups
from veripo_fast.rollout.torch_engine import TorchEngine, sample
from veripo_fast.types import Completion, Image, LoadedPrompt, Message, Prompt, RolloutGroup, Video

MEDIA = [[("video", 4, 3, 2)], [], [("image", 2, 2, 3)], [("video", 6, 2, 2), ("image", 2, 3, 3)], [("video", 3, 2, 2)]]
GREEDY = Sampling(group_size=2, temperature=0.0, max_new_tokens=8, seed=0)
SAMPLED = replace(GREEDY, group_size=3, temperature=0.7)


@cache
def prompts(family: str) -> tuple[LoadedPrompt, ...]:
    """Video, text-only and image prompts of different lengths."""
    return tuple(policies.loaded(policies.policy(family), sizes, seed) for seed, sizes in enumerate(MEDIA))


def generate(family: str, sampling: Sampling, which: slice = slice(None)) -> list[RolloutGroup]:
    return TorchEngine(policies.policy(family)).generate(prompts(family)[which], sampling)


def tokens(groups: list[RolloutGroup]) -> list[list[list[int]]]:
    return [[completion.token_ids for completion in group.completions] for group in groups]


@torch.no_grad()
def sibling_greedy(policy: Policy, item: LoadedPrompt, max_new_tokens: int) -> list[int]:
    """Token by token, nothing shared and nothing kept between tokens."""
    ids: list[int] = []
    while len(ids) < max_new_tokens and (not ids or ids[-1] != policy.encoder.eos_id):
        logits = policies.plain_logits(policy, item.encoded, ids)[-1]
        logits[policy.encoder.banned_ids] = float("-inf")
        ids.append(int(logits.argmax()))
    return ids


@torch.no_grad()
def sibling_logprobs(policy: Policy, item: LoadedPrompt, ids: list[int], temperature: float) -> torch.Tensor:
    logits = policies.plain_logits(policy, item.encoded, ids)[:-1]
    return torch.log_softmax(logits / temperature, -1).gather(-1, torch.tensor(ids)[:, None])[:, 0]


def assert_like_the_sibling(family: str, groups: list[RolloutGroup], temperature: float) -> None:
    for item, group in zip(prompts(family), groups, strict=True):
        for completion in group.completions:
            expected = sibling_logprobs(policies.policy(family), item, completion.token_ids, temperature)
            assert (torch.tensor(completion.rollout_logprobs) - expected).abs().max() < 1e-4


# -- tokens and log-probabilities ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", policies.ALL_FAMILIES)
def test_greedy_tokens_are_the_siblings(family: str) -> None:
    policy = policies.policy(family)
    groups = generate(family, GREEDY)
    expected = [sibling_greedy(policy, item, GREEDY.max_new_tokens) for item in prompts(family)]
    assert len({tuple(ids) for ids in expected}) == len(expected)
    assert tokens(groups) == [[ids, ids] for ids in expected]
    assert_like_the_sibling(family, groups, temperature=1.0)


@pytest.mark.parametrize("family", policies.ALL_FAMILIES)
def test_rollout_logprobs_are_those_of_the_trainer_and_of_hugging_face(family: str) -> None:
    policy = policies.policy(family)
    groups = generate(family, SAMPLED)
    assert_like_the_sibling(family, groups, SAMPLED.temperature)
    batch = pack([(item.encoded, [c.token_ids for c in group.completions])
                  for item, group in zip(prompts(family), groups, strict=True)])
    with torch.no_grad():
        trained = policy.completion_logprobs(batch, [item.features for item in prompts(family)],
                                             temperature=SAMPLED.temperature)
    rolled = torch.tensor([value for group in groups for c in group.completions for value in c.rollout_logprobs])
    assert (trained - rolled).abs().max() < 1e-4
    assert len({tuple(ids) for group in tokens(groups) for ids in group}) == len(prompts(family)) * SAMPLED.group_size


def test_completions_carry_prompt_text_and_version(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = policies.policy("qwen3_vl")
    monkeypatch.setattr(policy, "version", 17)
    groups = generate("qwen3_vl", SAMPLED)
    assert [group.prompt for group in groups] == [item.prompt for item in prompts("qwen3_vl")]
    for completion in (c for group in groups for c in group.completions):
        assert completion.text == policy.encoder.decode_completion(completion.token_ids)
        assert completion.policy_version == 17


def test_seeds() -> None:
    first = generate("qwen3_vl", SAMPLED)
    assert generate("qwen3_vl", SAMPLED) == first
    assert tokens(generate("qwen3_vl", replace(SAMPLED, seed=1))) != tokens(first)


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-4}])
def test_the_narrowest_truncation_is_greedy_at_any_temperature(narrow: dict) -> None:
    greedy = generate("qwen2_5_vl", GREEDY)
    narrowed = generate("qwen2_5_vl", replace(GREEDY, temperature=1.3, **narrow))
    assert tokens(narrowed) == tokens(greedy)
    assert_like_the_sibling("qwen2_5_vl", narrowed, temperature=1.3)


def test_one_token() -> None:
    whole, one = generate("qwen3_vl", GREEDY), generate("qwen3_vl", replace(GREEDY, max_new_tokens=1))
    assert tokens(one) == [[ids[:1] for ids in group] for group in tokens(whole)]
    assert {c.finish_reason for group in one for c in group.completions} == {"length"}
    assert TorchEngine(policies.policy("qwen3_vl")).generate([], GREEDY) == []


# -- the end of a completion -----------------------------------------------------------------------------------------


@pytest.fixture
def eager_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head that wants to end the turn wherever a hidden feature says so: about every tenth token."""
    for family in policies.ALL_FAMILIES:
        policy = policies.policy(family)
        plain, eos = policy.head, policy.encoder.eos_id

        def head(hidden: torch.Tensor, plain=plain, eos=eos) -> torch.Tensor:
            logits = plain(hidden)
            return logits.index_add(-1, torch.tensor([eos]), 30.0 * (hidden[..., :1] > 1.05))

        monkeypatch.setattr(policy, "head", head)


@pytest.mark.parametrize("family", policies.ALL_FAMILIES)
def test_prompts_leave_the_batch_without_touching_the_others(family: str, eager_to_stop: None) -> None:
    policy = policies.policy(family)
    together = generate(family, GREEDY)
    lengths = [len(group[0]) for group in tokens(together)]
    assert len(set(lengths)) > (1 if family == "qwen3_vl_moe" else 2), lengths  # its head seldom wants to end
    assert tokens(together) == [[sibling_greedy(policy, item, GREEDY.max_new_tokens)] * 2 for item in prompts(family)]
    for number, group in enumerate(together):
        alone = generate(family, GREEDY, slice(number, number + 1))[0]
        assert tokens([alone]) == tokens([group])
        assert alone.completions[0].finish_reason == group.completions[0].finish_reason


@pytest.mark.parametrize("family", policies.ALL_FAMILIES)
def test_a_completion_stops_at_its_first_end_of_turn(family: str, eager_to_stop: None) -> None:
    eos = policies.policy(family).encoder.eos_id
    groups = generate(family, SAMPLED)
    completions = [c for group in groups for c in group.completions]
    assert {c.finish_reason for c in completions} == {"stop", "length"}
    for completion in completions:
        ended = completion.token_ids[-1] == eos
        assert eos not in completion.token_ids[:-1]
        assert completion.finish_reason == ("stop" if ended else "length")
        assert ended or len(completion.token_ids) == SAMPLED.max_new_tokens
        assert len(completion.rollout_logprobs) == len(completion.token_ids)
        assert "<|im_end|>" not in completion.text
    uneven = [group for group in groups if len({len(c.token_ids) for c in group.completions}) > 1]
    assert uneven, "no group in which one completion outlives another"
    assert_like_the_sibling(family, groups, SAMPLED.temperature)


def test_an_end_of_turn_as_the_last_token_allowed_is_a_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = policies.policy("qwen3_vl")
    third = tokens(generate("qwen3_vl", GREEDY))[0][0][2]
    monkeypatch.setattr(policy.encoder, "end_ids", (third,))
    first = generate("qwen3_vl", replace(GREEDY, max_new_tokens=3), slice(1))[0].completions[0]
    assert (len(first.token_ids), first.token_ids[-1], first.finish_reason) == (3, third, "stop")


@pytest.mark.parametrize("max_new_tokens", [1, 8])
def test_every_group_is_given_once_when_it_ends(eager_to_stop: None, max_new_tokens: int) -> None:
    seen: list[tuple[int, RolloutGroup]] = []
    groups = TorchEngine(policies.policy("qwen3_vl")).generate(
        prompts("qwen3_vl"), replace(GREEDY, max_new_tokens=max_new_tokens),
        lambda number, group: seen.append((number, group)))
    assert sorted(number for number, _ in seen) == list(range(len(groups))), "also those cut off at max_new_tokens"
    assert all(groups[number] is group for number, group in seen)
    lengths = [len(group.completions[0].token_ids) for _, group in seen]
    assert lengths == sorted(lengths), "the shortest first"


# -- drawing one token -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED, replace(SAMPLED, top_k=1), replace(SAMPLED, top_p=0.5)])
def test_banned_tokens_are_never_written(sampling: Sampling, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = policies.policy("qwen3_vl")
    plain, banned = policy.head, torch.tensor(policy.encoder.banned_ids)
    assert {policy.encoder.pad_ids["image"], policy.encoder.pad_ids["video"]} < set(banned.tolist())
    monkeypatch.setattr(policy, "head", lambda hidden: plain(hidden).index_fill(-1, banned, 40.0))
    groups = generate("qwen3_vl", sampling)
    assert not {value for group in tokens(groups) for ids in group for value in ids} & set(banned.tolist())
    assert_like_the_sibling("qwen3_vl", groups, sampling.temperature or 1.0)  # the bans do not enter the log-probs


def noise(rows: int, seed: int) -> torch.Tensor:
    return torch.rand(rows, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


PROBABILITIES = torch.tensor([0.02, 0.4, 0.08, 0.24, 0.2, 0.06])
BANNED = (3,)


@pytest.mark.parametrize(("options", "kept"), [
    ({}, [0, 1, 2, 4, 5]), ({"top_k": 2}, [1, 4]), ({"top_k": 100}, [0, 1, 2, 4, 5]), ({"top_p": 0.53}, [1, 4]),
    ({"top_p": 0.51}, [1]), ({"top_p": 0.8}, [1, 2, 4]), ({"top_k": 2, "top_p": 0.5}, [1]),
    ({"temperature": 0.5}, [0, 1, 2, 4, 5]), ({"temperature": 2.0, "top_k": 3}, [1, 2, 4])])
def test_sampled_frequencies(options: dict, kept: list[int]) -> None:
    sampling, draws = replace(SAMPLED, **({"temperature": 1.0} | options)), 20_000
    logits = (PROBABILITIES.log() + 3.0).expand(draws, -1)
    drawn, logprobs = sample(logits, sampling, BANNED, noise(draws, 5))
    whole = torch.softmax(PROBABILITIES.log().double() / sampling.temperature, -1)
    expected = torch.zeros(6, dtype=torch.float64).index_add(0, torch.tensor(kept), whole[kept])
    expected *= draws / expected.sum()
    counts = torch.bincount(drawn, minlength=6)
    assert (counts[expected == 0] == 0).all()
    chi_square = ((counts - expected).square() / expected)[kept].sum()
    assert chi_square < 18.5, counts  # 4 degrees of freedom: once in a thousand seeds
    assert (logprobs - whole.log()[drawn]).abs().max() < 1e-5


def test_rows_are_drawn_independently() -> None:
    logits = torch.zeros(2000, 4)
    drawn, _ = sample(logits, replace(SAMPLED, temperature=1.0), (), noise(2000, 0))
    pairs = torch.bincount(drawn[::2] * 4 + drawn[1::2], minlength=16)
    assert ((pairs - 62.5).square() / 62.5).sum() < 37.7  # 15 degrees of freedom, once in a thousand


def test_the_ends_of_the_noise_draw_tokens_that_have_weight() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]] * 3)
    ends = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert sample(logits, replace(SAMPLED, temperature=1.0), (), ends)[0].tolist() == [1, 3, 3]


def test_a_completion_depends_on_its_number_and_not_on_its_batch() -> None:
    """A rank that samples a share of the prompts writes what one process writes for them."""
    policy = policies.policy("qwen3_vl")
    prompts = [policies.loaded(policy, sizes, seed) for seed, sizes in enumerate(MEDIA)]
    engine = TorchEngine(policy)
    whole = engine.generate(prompts, SAMPLED)
    halves = [engine.generate(prompts[rank::2], SAMPLED, numbers=range(rank, len(prompts), 2)) for rank in range(2)]
    assert tokens(halves[0]) == tokens(whole[0::2]) and tokens(halves[1]) == tokens(whole[1::2])
    assert tokens(engine.generate(prompts[:1], SAMPLED, numbers=[7])) != tokens(whole[:1])


@pytest.mark.parametrize("vocabulary", [5, 128, 129, 1000, 4096])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.3}, {"top_k": 40}, {"top_p": 0.7}])
def test_tokens_are_those_of_a_running_sum_over_the_vocabulary(vocabulary: int, options: dict) -> None:
    """Whole blocks without weight, and a last block that is not full, are among them."""
    rows, sampling = 500, replace(SAMPLED, **({"temperature": 1.0} | options))
    logits = 3 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(vocabulary))
    logits[:100, vocabulary // 3:vocabulary // 3 + 300] = -torch.inf
    numbers = noise(rows, 3)
    numbers[-2:] = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    drawn, _ = sample(logits, sampling, (1,), numbers)
    allowed = logits.double() / sampling.temperature
    allowed[:, 1] = -torch.inf
    allowed = torch.log_softmax(allowed, -1)
    if sampling.truncates:  # of the definition's own tokens, ties aside
        order = allowed.argsort(-1, descending=True)
        sums = allowed.exp().gather(-1, order).cumsum(-1)
        last = sampling.top_k - 1 if sampling.top_k else (sums < 0.7).sum(-1, keepdim=True)
        rank = torch.arange(vocabulary).expand(rows, -1)
        allowed = torch.full_like(allowed, -torch.inf).scatter(
            -1, order, torch.where(rank <= last, allowed.gather(-1, order), -torch.inf))
    sums = torch.softmax(allowed, -1).cumsum(-1)
    upper = sums.gather(-1, drawn[:, None])[:, 0]
    lower = upper - torch.softmax(allowed, -1).gather(-1, drawn[:, None])[:, 0]
    assert ((lower - 2e-6 <= numbers) & (numbers <= upper + 2e-6)).all()
    assert allowed.gather(-1, drawn[:, None]).isfinite().all()


# -- parts of a batch --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", policies.ALL_FAMILIES)
def test_parts_of_a_batch_give_what_the_whole_gives(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts are prefilled, completions attend and tokens are drawn for a part of the batch at a time."""
    whole = generate(family, SAMPLED)
    passes: list[int] = []
    plain = Policy.hidden

    def hidden(self: Policy, batch: PackedBatch, *rest: Any) -> torch.Tensor:
        passes.append(len(batch.groups))
        return plain(self, batch, *rest)

    monkeypatch.setattr(Policy, "hidden", hidden)
    monkeypatch.setattr(torch_engine, "PREFILL_TOKENS", 40)
    monkeypatch.setattr(shared_prefix, "MOST_SCORES", 1)
    monkeypatch.setattr(torch_engine, "MOST_LOGITS", 4 * policies.policy(family).vocabulary)
    parts = generate(family, SAMPLED)
    assert sum(passes) == len(MEDIA) and len(passes) > 2
    assert tokens(parts) == tokens(whole)
    atol = 5e-5 if FAMILIES[family].router_class else 1e-5  # tokens are multiplied with their neighbours in an expert
    for one, other in zip(parts, whole, strict=True):
        for a, b in zip(one.completions, other.completions, strict=True):
            assert torch.tensor(a.rollout_logprobs).allclose(torch.tensor(b.rollout_logprobs), rtol=0, atol=atol)


def test_logits_exist_for_a_part_of_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = policies.policy("qwen3_vl")
    most = 4 * policy.vocabulary
    sizes: list[int] = []
    plain = Policy.head

    def head(self: Policy, hidden: torch.Tensor) -> torch.Tensor:
        sizes.append(len(hidden) * self.vocabulary)
        return plain(self, hidden)

    monkeypatch.setattr(Policy, "head", head)
    monkeypatch.setattr(torch_engine, "MOST_LOGITS", most)
    generate("qwen3_vl", replace(SAMPLED, max_new_tokens=3))
    assert max(sizes) <= most
    monkeypatch.setattr(torch_engine, "MOST_LOGITS", 1)  # less than one row
    assert len(generate("qwen3_vl", replace(SAMPLED, max_new_tokens=2))) == len(MEDIA)


# -- on disk ---------------------------------------------------------------------------------------------------------


def stored_groups() -> list[RolloutGroup]:
    video, part, image = Video("/a b/ü.mp4"), Video("clip.mp4", 1.5, 2.25), Image("x.png")
    turns = Message("system", ("Look.",)), Message("user", (video, 'Which "way"?\n', part, image, "?"))
    asked = [Prompt("p#1", turns, "choice", "B", ("left", "right"), "synth"),
             Prompt("p#2", (Message("user", ("Wie viele? 三",)),), "number", "3")]
    return [RolloutGroup(prompt, [Completion([1, 2, 511], "<think>é</think>", [-0.1, -1e-9, -12.5], "stop", 3, 0.7, 1.0,
                                             1.2, -0.123456789012345),
                                  Completion([7], "", [-1 / 3], "length", 4)]) for prompt in asked]


def test_stored_groups_come_back_equal(tmp_path: Path) -> None:
    path = tmp_path / "new" / "000001.parquet"
    write_groups(path, stored_groups(), "grpo-1", 12)
    assert read_groups(path) == stored_groups()
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    rows = pq.read_table(path).to_pylist()
    assert {(row["stage"], row["step"]) for row in rows} == {("grpo-1", 12)}
    assert [(row["prompt_id"], row["group"], row["index"]) for row in rows] == [
        ("p#1", 0, 0), ("p#1", 0, 1), ("p#2", 1, 0), ("p#2", 1, 1)]


def test_real_rollouts_come_back_equal(tmp_path: Path) -> None:
    groups = generate("qwen3_vl", SAMPLED)
    write_groups(tmp_path / "a.parquet", groups, "grpo-1", 0)
    assert read_groups(tmp_path / "a.parquet") == groups


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.parquet"
    write_groups(path, stored_groups(), "grpo-1", 0)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_groups(path, stored_groups()[:1], "grpo-1", 0)
    assert read_groups(path) == stored_groups()


@pytest.mark.parametrize("content", ["other columns", "no parquet"])
def test_another_file_is_refused_by_name(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.parquet"
    if content == "no parquet":
        path.write_text("{}")
    else:
        pq.write_table(pa.table({"ref_logprobs": [[1.0, 2.0]]}), path)
    with pytest.raises(DataError, match=r"a\.parquet is not a rollout file of veripo"):
        read_groups(path)


@pytest.mark.parametrize("temperature", [0.01, 0.1])
def test_a_temperature_near_zero(temperature: float) -> None:
    """Banned tokens may have all of the probability that float32 can hold."""
    policy = policies.policy("qwen3_vl")
    logits = torch.randn(4, 512, generator=torch.Generator().manual_seed(0))
    logits[:, policy.encoder.banned_ids[0]] = 50.0
    sampling = replace(SAMPLED, temperature=temperature)
    tokens, logprobs = sample(logits, sampling, policy.encoder.banned_ids, noise(4, 1))
    assert logprobs.isfinite().all() and not set(tokens.tolist()) & set(policy.encoder.banned_ids)
