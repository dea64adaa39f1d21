"""A chat template that opens `<think>` itself: what the policy writes after it is read as if it had written the tag."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from tests.support import policies
from veripo_fast.config.inputs import ModelConfig
from veripo_fast.config.objectives import RewardConfig, VerifierConfig
from veripo_fast.config.schema import Config
from veripo_fast.demo.pretrain import clip_media, worded
from veripo_fast.demo.questions import Question, questions
from veripo_fast.demo.world import random_clip
from veripo_fast.evaluation.evaluate import scores
from veripo_fast.model.encoding import PromptEncoder
from veripo_fast.model.policy import Policy, load_policy
from veripo_fast.model.scorer import answer_scorer
from veripo_fast.reward.groups import reward_groups
from veripo_fast.reward.score import Score, score
from veripo_fast.reward.spans import answer_prefix, parse_completion
from veripo_fast.rollout.protocol import Sampling
from veripo_fast.rollout.store import read_groups, write_groups
from veripo_fast.rollout.torch_engine import TorchEngine
from veripo_fast.types import Completion, LoadedPrompt, Prompt, RolloutGroup, Video
from veripo_fast.verifier.candidates import GroupView
from veripo_fast.verifier.judge_likelihood import LikelihoodJudge
from veripo_fast.verifier.judge_rules import RulesJudge
from veripo_fast.verifier.judges import distinct_groups
from veripo_fast.verifier.verify import verify

DEMO = Path(__file__).parents[2] / "veripo_fast" / "demo" / "tiny_policy"
TAGGED = Completion([1], "<think>so left.</think><answer>A</answer>", [], "stop", 0)
BARE = replace(TAGGED, text=TAGGED.text.removeprefix("<think>"))


@pytest.mark.parametrize("family", policies.ALL_FAMILIES)
@pytest.mark.parametrize(("opening", "opens"), [
    ("", False), ("<think>", True), ("<think>\n", True), ("<think>\n\n</think>\n\n", False)])
def test_the_encoder_knows_what_its_template_ends_with(family: str, opening: str, opens: bool, tmp_path: Path) -> None:
    folder = policies.thinking_checkpoint(tmp_path / "model", policies.checkpoint(family), opening)
    assert PromptEncoder(folder).opens_think is opens


def test_a_tag_counts_once_whoever_wrote_it() -> None:
    assert parse_completion(BARE.text, think_opened=True) == parse_completion(TAGGED.text)
    assert not parse_completion(BARE.text).format_ok
    assert not parse_completion(TAGGED.text, think_opened=True).format_ok  # two opening tags
    assert not parse_completion("</think><answer>A</answer>", think_opened=True).format_ok  # nothing was thought
    assert answer_prefix(BARE.text) == "so left.</think><answer>"
    prompt = policies.prompt_of("?", problem_type="choice", gold="A", options=("left", "right"))
    assert score(BARE.text, prompt, RewardConfig(), think_opened=True) == Score(1.0, 1.0)
    assert score(BARE.text, prompt, RewardConfig()) == Score(1.0, 0.0)


def test_the_store_keeps_it_and_older_files_lack_it(tmp_path: Path) -> None:
    prompt = policies.prompt_of("?")
    groups = [RolloutGroup(prompt, [BARE, BARE], True), RolloutGroup(prompt, [TAGGED])]
    write_groups(tmp_path / "a.parquet", groups, "grpo", 1)
    assert read_groups(tmp_path / "a.parquet") == groups
    pq.write_table(pq.read_table(tmp_path / "a.parquet").drop_columns(["think_opened"]), tmp_path / "old.parquet")
    assert [group.think_opened for group in read_groups(tmp_path / "old.parquet")] == [False, False]


def test_the_same_text_after_another_template_is_judged_apart() -> None:
    groups = [RolloutGroup(policies.prompt_of("?"), [BARE], opened) for opened in (True, False, True)]
    reduced, where = distinct_groups(groups)
    assert [group.think_opened for group in reduced] == [True, False]
    assert where == [[(0, 0)], [(1, 0)], [(0, 0)]]


@pytest.fixture(scope="module")
def thinking(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    """The demo's policy, which learned to write `<think>` first, behind a template that does so for it."""
    folder = policies.thinking_checkpoint(tmp_path_factory.mktemp("thinking") / "model", DEMO, "<think>")
    return load_policy(ModelConfig(path=str(folder), device="cpu"))


@torch.no_grad()
def asked(policy: Policy, seed: int) -> tuple[Question, LoadedPrompt]:
    clip = random_clip(seed)
    question = random.Random(seed).choice(questions(clip, seed))
    prompt = Prompt(f"p{seed}", policies.prompt_of(Video(""), worded(question)).messages, question.problem_type,
                    question.gold, tuple(question.options))
    media = clip_media(policy.encoder, clip)
    return question, LoadedPrompt(prompt, policy.encoder.encode(prompt, media), policy.vision_features(media))


def test_from_the_rollout_to_pairs(thinking: Policy, tmp_path: Path) -> None:
    """What the policy writes itself is well formed, and right and wrong completions of it become pairs."""
    encoder, config = thinking.encoder, Config()
    loaded = [asked(thinking, seed)[1] for seed in range(8)]
    groups = TorchEngine(thinking).generate(loaded, Sampling(8, 1.0, 80, 0))
    texts = [completion.text for group in groups for completion in group.completions]
    assert all(group.think_opened for group in groups) and sum("<think>" in text for text in texts) < len(texts) / 8
    reward_groups(groups, config)
    assert scores(groups, config)["format_rate"] > 0.75
    write_groups(tmp_path / "step.parquet", groups, "grpo", 1)
    judges = (RulesJudge(), LikelihoodJudge(answer_scorer(thinking, lambda prompt: next(
        item for item in loaded if item.prompt == prompt))))
    for judge in judges:
        result = verify(read_groups(tmp_path / "step.parquet"), VerifierConfig(max_pairs_per_prompt=16), judge,
                        lambda text: len(encoder.encode_completion(text)), encoder.encode_completion, encoder.eos_id, 0)
        assert any(verdict.consistent is not None for row in result.verdicts for verdict in row)
        assert result.pairs and all(verdict.length_tokens for row in result.verdicts for verdict in row
                                    if verdict.format_ok)


def test_assembled_sides_go_on_after_the_tag_of_the_prompt(thinking: Policy) -> None:
    """Corrected reasoning, swapped answers and the likelihood judge's prefixes hold no tag, and no lost reasoning."""
    encoder = thinking.encoder
    prompt = policies.prompt_of("?", problem_type="choice", gold="B", options=("left", "right"))
    texts = ["It goes right. So the answer is B.</think><answer>B</answer>",
             "It goes left. So the answer is A.</think><answer>A</answer>",
             "It is right there. So the answer is B.</think><answer>A</answer>"]
    group = RolloutGroup(prompt, [Completion([*encoder.encode_completion(text), encoder.eos_id], text, [], "stop", 0)
                                  for text in texts], True)
    reward_groups([group], Config())
    config = VerifierConfig(families=("consistency", "reflection"), max_pairs_per_prompt=16)
    pairs = verify([group], config, RulesJudge(), lambda text: len(encoder.encode_completion(text)),
                   encoder.encode_completion, encoder.eos_id, 0).pairs
    assembled = [pair for pair in pairs if pair.chosen_index == -1]
    assert {pair.family for pair in assembled} == {"consistency", "reflection"}
    for pair in assembled:
        for text, ids in ((pair.chosen_text, pair.chosen_ids), (pair.rejected_text, pair.rejected_ids)):
            assert "<think>" not in text and "None" not in text and encoder.decode_completion(list(ids)) == text
            assert parse_completion(text, think_opened=True).format_ok
    seen: list[str] = []

    def logprobs(prompt: Prompt, prefixes: list[str], continuations: list[str]) -> list[float]:
        seen.extend(prefixes)
        return [-float(len(seen))] * len(prefixes)

    LikelihoodJudge(logprobs).judge([group], lambda count: None)
    assert set(seen) == {text[:text.index("<answer>") + len("<answer>")] for text in texts}


def test_the_roles_of_a_group_see_the_tag_too(thinking: Policy) -> None:
    """A completion that corrected itself is found as reflective: its think span is read, not taken as empty."""
    prompt = policies.prompt_of("?", problem_type="choice", gold="B", options=("left", "right"))
    texts = ["So the answer is A. Wait, let me check. So the answer is B.</think><answer>B</answer>",
             "It goes left. So the answer is A.</think><answer>A</answer>"]
    group = RolloutGroup(prompt, [Completion([number], text, [], "stop", 0) for number, text in enumerate(texts)], True)
    reward_groups([group], Config())
    result = verify([group], VerifierConfig(families=("reflection",), max_pairs_per_prompt=16), RulesJudge(), len,
                    lambda text: [ord(character) for character in text], 0, 0)
    assert len(GroupView(group, result.verdicts[0], VerifierConfig()).right) == 1
    assert [pair.chosen_index for pair in result.pairs] == [0, -1]
