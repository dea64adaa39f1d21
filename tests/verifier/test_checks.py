import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.verifier_groups import completion, group, prompt, written
from veripo_fast.config.objectives import VerifierConfig
from veripo_fast.types import RolloutGroup
from veripo_fast.verifier.checks import check_group, length_tokens, repetition
from veripo_fast.verifier.judges import NO_JUDGEMENT, Judgement

CONFIG = VerifierConfig()


def count_words(text):
    return len(text.split())


def checked(group_, judgements=None, config=CONFIG):
    return check_group(group_, judgements or [NO_JUDGEMENT] * len(group_.completions), config, count_words)


# Repetition

@pytest.mark.parametrize(("text", "share"), [
    ("", 0), ("one", 0), ("one two three four", 0), ("no no no", 0), ("no no no no", 0),
    ("no no no no no", 4 / 5), ("no no no no no no", 5 / 6),
    ("b c d e b c d e", 1 / 2), ("b c d e " * 4, 3 / 4), ("b c d e x b c d e y", 4 / 10),
    ("b c d e f b c d e f", 1 / 2), ("B, c! d e. b c (d) E", 1 / 2), ("b c d x b c d y b c d", 0),
    ("one two three four five six seven eight", 0),
])
def test_repetition(text, share):
    assert repetition(text, 4) == pytest.approx(share)


def test_repetition_depends_on_the_length_of_the_ngrams():
    assert repetition("b c b c", 1) == repetition("b c b c", 2) == 1 / 2
    assert repetition("b c b c", 3) == 0
    assert repetition("北京北京", 2) == 1 / 2


@settings(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from("bcdef"), max_size=40), st.integers(1, 6))
def test_repetition_matches_marking_words_one_by_one(letters, ngram):
    marked, seen = set(), set()
    for start in range(len(letters) - ngram + 1):
        gram = tuple(letters[start:start + ngram])
        if gram in seen:
            marked.update(range(start, start + ngram))
        seen.add(gram)
    assert repetition(" ".join(letters), ngram) == pytest.approx(len(marked) / max(1, len(letters)))


# Length

def test_length_counts_the_think_span_only():
    assert length_tokens(None, count_words) == 0 and length_tokens("two words", count_words) == 2
    assert [v.length_tokens for v in checked(group(written("a b c", "B and more"), "a b", "<think>a b</think>"))] == [
        3, 0, 2]


def test_length_is_relative_to_the_median_of_the_group():
    lengths = (1, 2, 8, 8, 8, 32, 33)
    rows = checked(group(*(written(" ".join(f"w{n}" for n in range(length)), "B") for length in lengths), "no think"))
    assert ["length" in row.flags for row in rows] == [True, False, False, False, False, False, True, False]
    mostly_malformed = checked(group(written("a b c d", "B"), written("a", "B"), "", "x", "y", "z"))
    assert [row.flags for row in mostly_malformed[:2]] == [(), ()]
    alone = checked(group(written("w", "B")))
    assert "length" not in alone[0].flags
    strict = checked(group(written("x", "B"), written("a b", "B"), written("a b", "B")),
                     config=VerifierConfig(min_length_ratio=0.6))
    assert ["length" in row.flags for row in strict] == [True, False, False]


# Flags

def test_flags():
    loop = "it moves on and on " * 8
    rows = checked(
        group(written("so right", "B"), written("so right", "A"), written("so left", "B"), "<think>so right",
              "<answer>B</answer>", written(loop, "B"), to=prompt()),
        [Judgement(True, "B", None), Judgement(False, "B", -1.5), Judgement(False, "A", None), NO_JUDGEMENT,
         NO_JUDGEMENT, NO_JUDGEMENT],
        VerifierConfig(max_length_ratio=1000))
    assert [row.flags for row in rows] == [
        (), ("inconsistent", "wrong"), ("inconsistent",), ("format", "unfinished", "wrong"), ("format",),
        ("repetition",)]
    assert [row.index for row in rows] == list(range(6)) and {row.prompt_id for row in rows} == {"p0"}
    assert rows[1].consistent is False and rows[1].supported_answer == "B" and rows[1].judge_score == -1.5
    assert [row.format_ok for row in rows] == [True, True, True, False, False, True]
    assert [row.finished for row in rows] == [True, True, True, False, True, True]


def test_repetition_threshold_is_exclusive():
    text = written("b c d e b c d e", "B")
    assert "repetition" not in checked(group(text), config=VerifierConfig(max_repetition=0.5))[0].flags
    assert "repetition" in checked(group(text), config=VerifierConfig(max_repetition=0.49))[0].flags
    longer = VerifierConfig(repetition_ngram=5, max_repetition=0)
    assert "repetition" not in checked(group(text), config=longer)[0].flags


@pytest.mark.parametrize(("answer", "wrong"), [("10", False), ("12", False), ("12.1", True), ("20", True)])
def test_graded_accuracy_is_right_from_07_on(answer, wrong):
    to = prompt("estimate", "10")
    assert ("wrong" in checked(group(written("why", answer), to=to))[0].flags) is wrong


def test_empty_group():
    assert checked(RolloutGroup(prompt(), [])) == []


def test_a_judgement_is_needed_for_each_completion():
    with pytest.raises(ValueError):
        check_group(RolloutGroup(prompt(), [completion("x", prompt())]), [], CONFIG, count_words)
