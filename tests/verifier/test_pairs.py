import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.verifier_groups import encode, group, prompt, written
from veripo_fast.config.objectives import VerifierConfig
from veripo_fast.verifier.checks import check_group
from veripo_fast.verifier.judge_rules import RulesJudge
from veripo_fast.verifier.judges import judge_distinct, no_progress
from veripo_fast.verifier.pairs import build_pairs

ALL = ("accuracy", "consistency", "reflection", "repetition")
RIGHT = written("0s left. so right.", "B")
WRONG = written("0s left. so left.", "A")
LUCKY = written("0s right. so left.", "B")
SLIP = written("0s here. so right.", "C")
LOOP = written("on and on we go " * 6 + "so right.", "B")
LOOSE = {"max_length_ratio": 100.0, "min_length_ratio": 0.0, "length_match": 100.0}


def pairs_of(*groups, families=ALL, seed=0, **options):
    config = VerifierConfig(families=families, **{**LOOSE, **options})
    rows = judge_distinct(RulesJudge(), list(groups), no_progress)
    verdicts = [check_group(group_, row, config, len) for group_, row in zip(groups, rows, strict=True)]
    return build_pairs(list(groups), verdicts, config, encode, 0, seed)


def decode(ids):
    return "".join(map(chr, ids))


def learned(ids, mask):
    return decode([token for token, bit in zip(ids, mask, strict=True) if bit])


# Families

def test_accuracy_pair_uses_the_sampled_tokens_verbatim():
    group_ = group(RIGHT, WRONG)
    group_.completions[0].token_ids = [7, 8, 9]
    group_.completions[1].token_ids = [7, 5]
    (pair,), account = pairs_of(group_, families=("accuracy",))
    assert (pair.chosen_ids, pair.rejected_ids) == ((7, 8, 9), (7, 5))
    assert (pair.chosen_loss_mask, pair.rejected_loss_mask) == ((1, 1, 1), (1, 1))
    assert (pair.chosen_text, pair.rejected_text) == (RIGHT, WRONG)
    assert (pair.chosen_index, pair.rejected_index, pair.prompt_id, pair.family) == (0, 1, "p0", "accuracy")
    assert account.kept == {"accuracy": 1} and pair.reason.count(".") == 1


def test_consistency_pair_of_two_right_rollouts():
    (pair,), _ = pairs_of(group(LUCKY, RIGHT, SLIP), families=("consistency",))
    assert (pair.chosen_index, pair.rejected_index) == (1, 0)
    assert set(pair.chosen_loss_mask) == {1} and set(pair.rejected_loss_mask) == {1}


def test_consistency_pair_of_one_rollout_differs_in_the_answer_only():
    (pair,), _ = pairs_of(group(SLIP, WRONG), families=("consistency",))
    assert (pair.chosen_text, pair.rejected_text) == (SLIP.replace(">C<", ">B<"), SLIP)
    assert learned(pair.chosen_ids, pair.chosen_loss_mask) == "B</answer>\0"
    assert learned(pair.rejected_ids, pair.rejected_loss_mask) == "C</answer>\0"
    assert (pair.chosen_index, pair.rejected_index) == (-1, 0)


def test_one_rollout_pair_where_one_answer_begins_the_other():
    to = prompt("number", "1")
    (pair,), _ = pairs_of(group(written("so 1.", "10"), to=to), families=("consistency",))
    assert learned(pair.chosen_ids, pair.chosen_loss_mask) == "</answer>\0"
    assert learned(pair.rejected_ids, pair.rejected_loss_mask) == "0</answer>\0"


def test_one_rollout_needs_a_reasoning_that_supports_the_gold():
    pairs, account = pairs_of(group(written("so left.", "C")), families=("consistency",))
    assert pairs == [] and list(account.groups_without) == [
        "consistency: no right, consistent partner, and no reasoning that supports the gold answer"]


def test_reflection_pair_masks_the_wrong_prefix():
    (pair,), _ = pairs_of(group(WRONG, RIGHT), families=("reflection",))
    prefix = "<think>0s left. so left."
    assert pair.chosen_text.startswith(prefix)
    assert pair.chosen_text.endswith(". 0s left. so right.</think><answer>B</answer>")
    assert decode(pair.chosen_ids) == pair.chosen_text + "\0"
    assert learned(pair.chosen_ids, pair.chosen_loss_mask) == pair.chosen_text[len(prefix):] + "\0"
    assert pair.chosen_ids[-1] == 0 and pair.chosen_text.count("<think>") == pair.chosen_text.count("</think>") == 1
    assert (pair.rejected_text, pair.chosen_index, pair.rejected_index) == (WRONG, -1, 0)
    assert set(pair.rejected_loss_mask) == {1}


@pytest.mark.parametrize(("wrong", "kept"), [
    ("0s left. so left. It is clear.", "0s left. so left."),
    ("so left. I see it go left. so left! And that is all, I am sure.  ", "so left. I see it go left. so left!"),
    ("  so left\nThe rest is sky.", "  so left"),
    ("so $A$. It is clear.", "so $A$. It is clear.")])  # places do not count in text with LaTeX
def test_a_spliced_side_takes_the_wrong_reasoning_up_to_its_conclusion(wrong, kept):
    (pair,), account = pairs_of(group(written(wrong, "A"), RIGHT), families=("reflection",))
    masked = decode([token for token, bit in zip(pair.chosen_ids, pair.chosen_loss_mask, strict=True) if not bit])
    assert masked == f"<think>{kept}"
    assert learned(pair.chosen_ids, pair.chosen_loss_mask).endswith(" 0s left. so right.</think><answer>B</answer>\0")
    assert account.to_json()["spliced"] == {"reflection": 1} and account.kept == {"reflection": 1}


def test_reflection_prefers_a_rollout_that_corrected_itself():
    natural = written("so left. Wait, let me check again. so right.", "B")
    pairs, _ = pairs_of(group(WRONG, RIGHT, natural), families=("reflection",), max_pairs_per_prompt=1)
    assert [(p.chosen_text, p.chosen_index, p.rejected_index) for p in pairs] == [(natural, 2, 0)]


def test_reflection_needs_a_wrong_reasoning_not_only_a_wrong_answer():
    assert pairs_of(group(SLIP, RIGHT), families=("reflection",))[0] == []


def test_repetition_pair_is_concise_over_repetitive_and_both_right():
    (pair,), _ = pairs_of(group(LOOP, RIGHT, LOOP.replace(">B<", ">A<")), families=("repetition",), length_match=1.0)
    assert (pair.chosen_index, pair.rejected_index) == (1, 0)


# Who may be chosen

@pytest.mark.parametrize("bad", [
    "<think>so right</think> B", RIGHT + " <answer>B</answer>", "<think>so right.</think><answer>B", "",
    "<answer>B</answer>",
])
def test_malformed_or_unfinished_is_never_chosen_but_may_be_rejected(bad):
    pairs, _ = pairs_of(group(bad, WRONG))
    assert pairs == []
    pairs, _ = pairs_of(group(bad, RIGHT))
    assert {p.chosen_index for p in pairs} <= {1, -1} and {p.rejected_index for p in pairs} <= {0}
    assert bool(pairs) == (bad not in ("", "<answer>B</answer>"))


@pytest.mark.parametrize("doubtful", [LUCKY, LOOP, written("0s right.", "B"), WRONG, SLIP])
def test_inconsistent_repetitive_unjudged_or_wrong_is_never_chosen_for_accuracy(doubtful):
    assert pairs_of(group(doubtful, written("so up", "C")), families=("accuracy",))[0] == []


def test_odd_length_is_never_chosen():
    long = written("right up here we see " + " ".join(f"w{n}" for n in range(100)) + " so right.", "B")
    texts = (long, WRONG, written("so up.", "C"), written("so down.", "D"))
    assert pairs_of(group(*texts), families=("accuracy",), max_length_ratio=2.0)[0] == []
    assert pairs_of(group(*texts), families=("accuracy",))[0]


def test_graded_answers_need_a_gap():
    to = prompt("estimate", "100")
    near, far = written("so 120.", "120"), written("so 125.", "125")
    pairs, account = pairs_of(group(near, far, to=to), families=("accuracy",))
    assert pairs == [] and account.dropped == {"accuracy: accuracies too close": 1}
    assert len(pairs_of(group(near, written("so 900.", "900"), to=to), families=("accuracy",))[0]) == 1


# Limits

def test_length_match_bounds_the_ratio_but_not_for_repetition_or_reflection():
    long = written("0s left. 1s " + "x" * len(WRONG) * 2 + " so left.", "A")
    pairs, account = pairs_of(group(RIGHT, long), families=("accuracy",), length_match=2.0)
    assert pairs == [] and account.dropped == {"accuracy: lengths too different": 1}
    assert len(pairs_of(group(RIGHT, long), families=("reflection",), length_match=1.0)[0]) == 1
    edge = group(RIGHT, WRONG)
    edge.completions[0].token_ids, edge.completions[1].token_ids = [1] * 4, [2] * 8
    assert len(pairs_of(edge, families=("accuracy",), length_match=2.0)[0]) == 1
    edge.completions[1].token_ids = [2] * 9
    assert pairs_of(edge, families=("accuracy",), length_match=2.0)[0] == []


def many(right=4, wrong=4):
    return [written(f"{n}s left. so right.", "B") for n in range(right)] + [
        written(f"{n}s left. so up.", "C") for n in range(wrong)]


def test_cap_is_spread_over_families_and_completions():
    group_ = group(*many(), LUCKY, LOOP)
    pairs, account = pairs_of(group_, max_pairs_per_prompt=4)
    assert sorted(p.family for p in pairs) == sorted(ALL)
    assert account.dropped["accuracy: over max_pairs_per_prompt"] == 15
    pairs, _ = pairs_of(group_, families=("accuracy",), max_pairs_per_prompt=4)
    assert len({p.chosen_index for p in pairs}) == len({p.rejected_index for p in pairs}) == 4
    pairs, _ = pairs_of(group_, families=("consistency", "accuracy"), max_pairs_per_prompt=9)
    assert [sum(p.family == f for p in pairs) for f in ("consistency", "accuracy")] == [4, 5]


def test_cap_holds_over_all_groups_of_a_prompt_and_the_newest_builds_first():
    old, new = group(*many(), version=1), group(*(t.replace("0s", "9s") for t in many(1, 1)), version=5)
    pairs, _ = pairs_of(old, new, families=("accuracy",), max_pairs_per_prompt=1)
    assert [p.chosen_text for p in pairs] == [written("9s left. so right.", "B")]
    other = group(*many(), to=prompt(prompt_id="p1"))
    assert len(pairs_of(old, other, families=("accuracy",), max_pairs_per_prompt=1)[0]) == 2


def test_repeated_completions_and_pairs_count_once():
    pairs, account = pairs_of(group(RIGHT, WRONG, RIGHT, WRONG), group(RIGHT, WRONG), families=("accuracy",))
    assert len(pairs) == 1
    assert account.dropped == {"accuracy: duplicate": 1} and account.unused["repeated"] == 2


def test_deterministic_under_the_seed_and_independent_of_other_groups():
    first, other = group(*many()), group(*many(), to=prompt(prompt_id="p1"))
    one = pairs_of(first, other, max_pairs_per_prompt=3, seed=1)[0]
    assert one == pairs_of(first, other, max_pairs_per_prompt=3, seed=1)[0]
    assert [p for p in one if p.prompt_id == "p1"] == pairs_of(other, max_pairs_per_prompt=3, seed=1)[0]
    seeds = {tuple(p.chosen_index for p in pairs_of(first, max_pairs_per_prompt=3, seed=seed)[0]) for seed in range(9)}
    assert len(seeds) > 1


# The account

TEXTS = [RIGHT, WRONG, LUCKY, SLIP, LOOP, "<think>cut", "", written("0s right.", "B"), *many(2, 2)]


@settings(deadline=None, max_examples=40)
@given(st.lists(st.lists(st.sampled_from(TEXTS), max_size=8), max_size=3), st.integers(1, 5),
       st.sets(st.sampled_from(ALL), min_size=1))
def test_books_balance_and_pairs_are_sound(texts, limit, families):
    groups = [group(*row, to=prompt(prompt_id=f"p{n % 2}")) for n, row in enumerate(texts)]
    pairs, account = pairs_of(*groups, families=tuple(sorted(families)), max_pairs_per_prompt=limit)
    for family in families:
        dropped = sum(n for key, n in account.dropped.items() if key.startswith(f"{family}:"))
        assert account.candidates[family] == account.kept[family] + dropped
        assert account.kept[family] == sum(p.family == family for p in pairs)
        without = sum(n for key, n in account.groups_without.items() if key.startswith(f"{family}:"))
        assert without <= account.groups
    assert account.completions == account.used + account.unused.total() == sum(map(len, texts))
    assert account.verdicts.total() == account.completions
    assert json.loads(json.dumps(account.to_json()))["pairs"] == len(pairs)
    assert len({(p.prompt_id, p.chosen_ids, p.rejected_ids) for p in pairs}) == len(pairs)
    for pair in pairs:
        assert len(pair.chosen_ids) == len(pair.chosen_loss_mask) and any(pair.chosen_loss_mask)
        assert len(pair.rejected_ids) == len(pair.rejected_loss_mask) and any(pair.rejected_loss_mask)
        assert pair.chosen_ids[-1] == 0 and pair.chosen_text.endswith("</answer>")
    for prompt_id in ("p0", "p1"):
        assert sum(p.prompt_id == prompt_id for p in pairs) <= limit


def test_flag_rates():
    _, account = pairs_of(group(RIGHT, WRONG, LUCKY, "<think>cut"))
    assert account.to_json()["flag_rates"] == {"format": 0.25, "unfinished": 0.25, "length": 0, "repetition": 0,
                                               "inconsistent": 0.25, "wrong": 0.5}
    assert account.to_json()["verdicts"] == {"consistent": 2, "inconsistent": 1, "unknown": 1}
    assert pairs_of()[1].to_json()["flag_rates"]["wrong"] == 0


def test_verdicts_decide_not_the_texts():
    group_ = group(RIGHT, WRONG)
    config = VerifierConfig(families=("accuracy",), **LOOSE)
    row = check_group(group_, RulesJudge().judge([group_], no_progress)[0], config, len)
    assert len(build_pairs([group_], [row], config, encode, 0, 0)[0]) == 1
    flagged = [replace(row[0], flags=("length",)), row[1]]
    assert build_pairs([group_], [flagged], config, encode, 0, 0)[0] == []
