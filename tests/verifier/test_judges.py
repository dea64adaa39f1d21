"""The rules judge, the likelihood judge, and what every judge shares."""

import math
import time

import pytest

from tests.support.verifier_groups import completion, group, prompt, written
from veripo_fast.config.objectives import VerifierConfig
from veripo_fast.types import RolloutGroup
from veripo_fast.verifier.conclusions import reflectiveness, supported_answer
from veripo_fast.verifier.judge_likelihood import LikelihoodJudge
from veripo_fast.verifier.judge_rules import RulesJudge
from veripo_fast.verifier.judges import Judgement, distinct_groups, judge_distinct, no_progress
from veripo_fast.verifier.verify import make_judge

CELLS = ("top left", "left", "bottom right", "right")


def judged(judge, *groups):
    return judge.judge(list(groups), no_progress)


# Conclusions

@pytest.mark.parametrize(("think", "letter"), [
    ("0s: red circle left top. 2s: red circle right top. so it moves right.", "B"),
    ("0s left. 1s middle. so left.", "A"), ("Therefore, the answer is (A).", "A"), ("Answer: C", "C"),
    ("so it moves right, not left.", "B"), ("so not left but right", "B"), ("Thus up", "C"),
    ("I think B is correct.", "B"), ("option A is wrong. so B", "B"), ("so the answer is not A, it is B", "B"),
    ("the answer is A because B and C are wrong", "A"), ("The correct answer is\nD", "D"), ("so A moves left", "A"),
    ("so left. Wait, it moves back, so right.", "B"), ("The answer is right.", "B"), (r"**So** $\text{B}$", "B"),
    ("Hence the correct option is D. I am done.", "D"), ("so I would choose C", "C"),
    ("so it goes up. so we look at the next frame.", "C"),
])
def test_conclusion_is_read(think, letter):
    assert supported_answer(think, prompt()) == letter


@pytest.mark.parametrize("think", [
    "", "0s left. 1s right.", "so far it moves right", "If so, left.", "so it is either left or right",
    "so it moves from left to right", "so it isn't moving left", "so we see", "so that the ball goes up",
    "so left. Thus left or right",
])
def test_no_single_conclusion(think):
    assert supported_answer(think, prompt()) is None


@pytest.mark.parametrize("think", [
    "so B. Wait, that is not right.", "so left. Actually, it turns around later.", "So it is up.\nHmm, wait. Dark",
    "so B, wait no", "the answer is B. Let me check the last second again.", "so B. Let me recount.",
    "so B. On second thought it may be up.", "so right. But wait: the camera moves.", "so B. That's wrong.",
    "so B. No, hold on, it goes back.", "so B. That cannot be.", "so A. Wait, so B. Actually, that was mistaken.",
])
def test_a_conclusion_taken_into_doubt_is_none(think):
    assert supported_answer(think, prompt()) is None


@pytest.mark.parametrize("think", [
    "so B. They wait for the bus.", "so it is, actually, right.", "so it is B, actually.", "so right. Actually",
    "Wait, let me check again. so B.", "so B. The others are wrong.", "so B. That is correct.",
    "so left. Wait, no. Let me look again. so right.", "so right. People wait, and the light turns green.",
])
def test_a_conclusion_that_nothing_takes_back_stays(think):
    assert supported_answer(think, prompt()) == "B"


@pytest.mark.parametrize(("think", "options", "letter"), [
    ("so top left.", CELLS, "A"), ("so bottom right", CELLS, "C"), ("so right", CELLS, "D"),
    ("so the ball is moving right", ("It moves to the left", "It moves to the right"), "B"),
    ("so person B wins", ("person B", "person A"), "A"), ("so person A wins", ("person B", "person A"), "B"),
    ("so three shapes", ("2", "3", "4"), "B"), ("so 3 at 2s", ("2", "3", "4"), "B"), ("so C", ("2", "3", "4"), "C"),
    ("so it is -5", ("-5", "5"), "A"), ("so it is 5", ("-5", "5"), "B"),
    ("so a red circle", ("the red circle", "the red square"), "A"),
])
def test_conclusion_stated_as_option_text(think, options, letter):
    assert supported_answer(think, prompt(options=options)) == letter


@pytest.mark.parametrize(("think", "number"), [
    ("0s red. 1s blue. so 3.", "3"), ("so 2 + 1 = 3", "3"), ("so there are three circles", "3"), ("so one", "1"),
    ("so there are 3 at 2s", "3"), ("the answer is 3 because 2 + 1", "3"), ("thus about 2.5 m", "2.5 m"),
    ("so 3 in all", "3"),
    ("so the answer is 1,000.", "1000"), ("so 50%", "50%"), ("hence -5", "-5"), ("so 40. so the end.", "40"),
    ("so the red one is left", None), ("so two or three", None), ("so 3 of the 5", None), ("3 balls", None),
])
def test_numeric_conclusion(think, number):
    assert supported_answer(think, prompt("number", "9")) == number


def test_open_conclusions_are_looked_up_among_the_answers_given():
    to = prompt("text", "x")
    assert supported_answer("so it is a red ball", to, ("red ball", "blue ball")) == "red ball"
    assert supported_answer("so it is green", to, ("red ball", "blue ball")) is None
    assert supported_answer("the answer is green", to, ("red ball", "blue ball")) == "green"
    roots = (r"$2\sqrt{3}$", r"$\sqrt{2}$")
    assert supported_answer(r"so x = 2\sqrt{3}.", prompt("math", "x"), roots) == roots[0]


@pytest.mark.parametrize("think", ["so " + "B " * 10_000, "so it " * 3_000, "so " + "not " * 8_000 + "left"])
def test_no_reasoning_takes_long(think):
    started = time.process_time()
    supported_answer(think, prompt())
    assert time.process_time() - started < 3  # comparing all mentions with each other took 33 s for the letters


def test_reflectiveness():
    corrected = reflectiveness("so left. Wait, let me check again. so right.", prompt())
    assert corrected.self_corrected and corrected.markers == 2 and corrected.reflective
    assert not reflectiveness("so right. Wait, let me check again. so right.", prompt()).reflective
    assert not reflectiveness("so left. so right.", prompt()).reflective
    assert not reflectiveness("right.", prompt()).reflective


# Rules

def test_rules_judge_compares_with_the_given_answer():
    rows = judged(RulesJudge(), group(
        written("so right", "B"), written("so right", "right"), written("so right", "A"), written("right", "B"),
        written("so right", "A or B"), "so right", "<think>so right</think>", written("so left. Wait. so up", "(C)")))
    assert [(j.consistent, j.supported_answer) for j in rows[0]] == [
        (True, "B"), (True, "B"), (False, "B"), (None, None), (None, "B"), (None, None), (None, "B"), (True, "C")]


@pytest.mark.parametrize(("problem_type", "answer", "consistent"), [
    ("number", "3.0", True), ("number", "three", True), ("number", "3.1", False), ("estimate", "3.1", True),
    ("estimate", "3.5", False), ("number", "3 m", True), ("math", "3", True), ("math", r"\frac{6}{2}", True),
    ("math", "4", False),
    ("text", "3", True),
])
def test_rules_judge_on_values(problem_type, answer, consistent):
    group_ = group(written("so 3", answer), to=prompt(problem_type, "9"))
    if problem_type in ("math", "text"):  # the candidates of open questions are the answers of the group
        group_.completions.append(completion(written("", "3"), group_.prompt))
    assert judged(RulesJudge(), group_)[0][0].consistent is consistent


@pytest.mark.parametrize(("think", "answer", "consistent"), [
    ("so it is 200 cm.", "2 m", True), ("so it is 200 cm.", "2 cm", False), ("so 4 minutes", "240 seconds", True),
    ("so 4 minutes", "4", True), ("so 4", "4 minutes", True), ("so 4 m", "4 kg", False),
    ("so 2 m or 3 m", "2 m", None),
])
def test_rules_judge_compares_measures(think, answer, consistent):
    assert judged(RulesJudge(), group(written(think, answer), to=prompt("number", "9")))[0][0].consistent is consistent


def test_rules_judge_never_sees_the_gold():
    texts = [written("so right", "B"), written("so left", "B"), written("so 2", "D")]
    by_gold = [judged(RulesJudge(), group(*texts, to=prompt(gold=gold))) for gold in "ABCD"]
    assert all(rows == by_gold[0] for rows in by_gold)


# Likelihood

class Scorer:
    """Log-probabilities from a table of the answer and the last word of the think span."""

    def __init__(self, table):
        self.table, self.calls = table, []

    def __call__(self, to, prefixes, continuations):
        assert len(prefixes) == len(continuations)
        self.calls.append(list(zip(prefixes, continuations, strict=True)))
        assert all(continuation.endswith("</answer>") for continuation in continuations)
        return [self.table[prefix.split("</think>")[0].split()[-1], continuation.removesuffix("</answer>")]
                for prefix, continuation in self.calls[-1]]


def letters_after(word, *logprobs):
    return {(word, letter): value for letter, value in zip("ABCD", logprobs, strict=True)}


def test_likelihood_judge_on_choices():
    scorer = Scorer(letters_after("right", -3, -0.5, -4, -4) | letters_after("left", -0.2, -2.2, -9, -9))
    rows = judged(LikelihoodJudge(scorer), group(
        written("so right", "B"), written("so right", "chair"), written("so left", "b"), "no tags"))
    assert rows[0] == [Judgement(True, "B", 2.5), Judgement(None, "B", None), Judgement(False, "A", -2.0),
                       Judgement(None, None, None)]
    assert len(scorer.calls) == 1 and len(scorer.calls[0]) == 3 * 4
    assert all(prefix.endswith("<answer>") for prefix, _ in scorer.calls[0])


@pytest.mark.parametrize(("margin", "consistent"), [(0.0, True), (2.5, True), (2.6, None)])
def test_likelihood_margin(margin, consistent):
    scorer = Scorer(letters_after("right", -3, -0.5, -4, -4))
    assert judged(LikelihoodJudge(scorer, margin), group(written("so right", "B")))[0][0].consistent is consistent
    assert judged(LikelihoodJudge(scorer, margin), group(written("so right", "A")))[0][0].consistent is (
        False if consistent else None)


TEXTS = dict(zip("ABCD", ("left", "right", "up", "down"), strict=True))


@pytest.mark.parametrize(("form", "answer"), [
    ("{letter}", "B"), ("{text}", "right"), ("{letter}. {text}", "B. right"), ("({letter})", "(b)"),
    ("{text}.", "Right."), ("$\\text{{{letter}}}$", r"$\text{B}$"), ("The answer is {letter}.", "The answer is B."),
])
def test_candidates_are_scored_in_the_form_of_the_answer(form, answer):
    scorer = Scorer({("right", form.format(letter=letter, text=text)): -0.1 if letter == "B" else -5.0
                     for letter, text in TEXTS.items()})
    [row] = judged(LikelihoodJudge(scorer, floor=0.5), group(written("so right", answer)))
    assert row == [Judgement(True, "B", pytest.approx(4.9))] and len(scorer.calls[0]) == 4


def test_probabilities_of_the_forms_of_a_group_are_added():
    """By letter A is likelier than B, by text B; a judge that read the letters alone would take A."""
    table = dict(zip([*TEXTS, *TEXTS.values()], (0.2, 0.1, 0.0, 0.0, 0.05, 0.6, 0.05, 0.0), strict=True))
    scorer = Scorer({("right", answer): math.log(value) if value else -math.inf for answer, value in table.items()})
    [row] = judged(LikelihoodJudge(scorer, floor=0.9), group(written("so right", "B"), written("so right", "left")))
    assert [(j.consistent, j.supported_answer) for j in row] == [(True, "B"), (False, "B")]
    assert row[0].score == pytest.approx(math.log(0.7 / 0.25))


@pytest.mark.parametrize(("floor", "consistent"), [(0.0, True), (0.029, True), (0.031, None), (1.0, None)])
def test_likelihood_floor_is_of_all_candidates_together(floor, consistent):
    """The model would say something else: which of four unlikely letters is the least unlikely means nothing."""
    scorer = Scorer(letters_after("right", *map(math.log, (0.005, 0.015, 0.005, 0.005))))
    [judgement] = judged(LikelihoodJudge(scorer, floor=floor), group(written("so right", "B")))[0]
    assert judgement.consistent is consistent and judgement.why == ("" if consistent else "small probability")


def test_the_floor_comes_from_the_configuration():
    judge = make_judge(VerifierConfig(judge="likelihood", likelihood_floor=0.5),
                       scorer=lambda: Scorer(letters_after("right", -3, -0.5, -4, -4)))
    assert judged(judge, group(written("so right", "B")))[0][0].consistent is True
    judge = make_judge(VerifierConfig(judge="likelihood", likelihood_floor=0.5),
                       scorer=lambda: Scorer(letters_after("right", -3, -1.5, -4, -4)))
    assert judged(judge, group(written("so right", "B")))[0][0].why == "small probability"


def test_likelihood_tie_or_nan_is_no_verdict():
    scorer = Scorer(letters_after("right", -1, -1, -4, -4) | letters_after("left", -1, float("nan"), -4, -4))
    rows = judged(LikelihoodJudge(scorer), group(written("so right", "B"), written("so left", "A")))
    assert [j.consistent for j in rows[0]] == [None, None]


def test_likelihood_judge_on_values_compares_the_answers_of_the_group():
    scorer = Scorer({("1", "1"): -0.1, ("1", "10"): -2, ("10", "1"): -0.3, ("10", "10"): -0.4})
    rows = judged(LikelihoodJudge(scorer), group(
        written("so 1", "1"), written("so 10", "10"), written("so 1", "1.0"), to=prompt("number", "1")))
    assert [j.consistent for j in rows[0]] == [True, False, True]
    assert rows[0][1].supported_answer == "1" and rows[0][1].score == pytest.approx(-0.1)


def test_likelihood_judge_stops_between_two_forward_passes():
    """A group is one forward pass; what is asked to stop sees no second one."""
    passes = []

    def scorer(asked, prefixes, continuations):
        passes.append(asked)
        return [0.0] * len(prefixes)

    def stop(completions):
        raise KeyboardInterrupt

    groups = [group(written("so right", "B"), to=prompt(prompt_id=f"p{number}")) for number in range(3)]
    with pytest.raises(KeyboardInterrupt):
        LikelihoodJudge(scorer).judge(groups, stop)
    assert len(passes) == 1


def test_likelihood_with_one_candidate_has_no_verdict():
    same = group(written("so 1", "1"), written("so 1", "1"), to=prompt("number", "1"))
    rows = judged(LikelihoodJudge(Scorer({})), same)
    assert [j.consistent for j in rows[0]] == [None, None]


# Shared

class Counting:
    """Says that everything is consistent, and remembers what it was shown."""

    def __init__(self):
        self.seen = []

    def judge(self, groups, progress):
        self.seen += [(g.prompt.prompt_id, c.text) for g in groups for c in g.completions]
        progress(len(self.seen))
        return [[Judgement(True, c.text, None) for c in g.completions] for g in groups]


def test_every_distinct_completion_is_judged_once():
    again = prompt(prompt_id="p1")
    groups = [group("a", "b", "a"), group("b", "c"), group("a", to=again), RolloutGroup(prompt(), [])]
    judge, counted = Counting(), []
    rows = judge_distinct(judge, groups, counted.append)
    assert judge.seen == [("p0", "a"), ("p0", "b"), ("p0", "c"), ("p1", "a")]
    assert [[j.supported_answer for j in row] for row in rows] == [["a", "b", "a"], ["b", "c"], ["a"], []]
    assert sum(counted) == 6


def test_equal_ids_of_different_prompts_are_kept_apart():
    reduced, _ = distinct_groups([group("a"), group("a", to=prompt(gold="C"))])
    assert len(reduced) == 2

