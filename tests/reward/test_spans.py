r"""Forms other than think and answer: other tags, optional ones, \boxed, a pattern; who opened the think span."""

from __future__ import annotations

import pytest

from tests.support import policies
from veripo_fast.config.objectives import RewardConfig, VerifierConfig
from veripo_fast.config.schema import Config
from veripo_fast.reward.groups import reward_groups
from veripo_fast.reward.score import Score, score
from veripo_fast.reward.spans import answer_closing, answer_end, answer_prefix, parse_completion
from veripo_fast.types import Completion, Form, RolloutGroup
from veripo_fast.verifier.judge_rules import RulesJudge
from veripo_fast.verifier.verify import verify

BOXED = Form(("think", "boxed"))
MAP = Form(("think", "map?", "answer"))
THREE = Form(("observation", "think", "answer"))
NESTED = Form(("think", "time?", "caption?", "answer"),
              r"\s*<think>(?:(?!</?think>).)*</think>\s*<answer>[^<]*</answer>\s*")


@pytest.mark.parametrize(("form", "text", "answer", "well_formed"), [
    (BOXED, r"<think>so</think>It is \boxed{5}.", "5", True),
    (BOXED, r"<think>so</think>\boxed{\frac{1}{2}}", r"\frac{1}{2}", True),
    (BOXED, r"<think>so</think>\boxed{\{1, 2\}}", r"\{1, 2\}", True),
    (BOXED, r"<think>\boxed{3}? so</think>\boxed{ 5 }", "5", True),  # what is thought is no answer
    (BOXED, r"<think>so</think>\boxed{5} or \boxed{6}", None, False),  # hedging does not pay
    (BOXED, r"<think>so</think>\boxed{\frac{1}{2}", None, False),
    (BOXED, r"<think>so</think>\boxed{ }", None, False),
    (BOXED, r"\boxed{5}", "5", False),
    (BOXED, "<think>so</think><answer>5</answer>", None, False),
    (Form(("boxed",)), r"so \boxed{5}", "5", True),
    (Form(("answer",)), "so <answer>5</answer>", "5", True),
    (MAP, "<think>so</think><answer>5</answer>", "5", True),
    (MAP, "<think>so</think>\n<map>{}</map>\n<answer>5</answer>", "5", True),
    (MAP, "<map>{}</map><think>so</think><answer>5</answer>", "5", False),  # another order
    (MAP, "<think>so</think><map>{}<answer>5</answer>", "5", False),  # half a tag
    (MAP, "<think>so</think><map></map><answer>5</answer>", "5", False),
    (MAP, "<think>so</think><map>{}</map> and <answer>5</answer>", "5", False),
    (THREE, "<observation>a</observation><think>so</think><answer>5</answer>", "5", True),
    (THREE, "<think>so</think><answer>5</answer>", "5", False),
    (NESTED, "<think>at <time>1-2</time> <caption>a dog</caption></think><answer>5</answer>", "5", True),
    (NESTED, "<think>so</think><answer>5</answer>", "5", True),
    (NESTED, "Well: <think>so</think><answer>5</answer>", "5", False),
    (NESTED, "<think>at <time>1-2</think><answer>5</answer>", "5", False),
])
def test_forms(form: Form, text: str, answer: str | None, well_formed: bool) -> None:
    parsed = parse_completion(text, form=form)
    assert (parsed.answer, parsed.format_ok) == (answer, well_formed)
    if answer is not None:
        prefix = answer_prefix(text, form)
        assert prefix is not None and text[len(prefix):].startswith(answer)
        assert text[:answer_end(text, form)].endswith(answer_closing(form))


@pytest.mark.parametrize(("form", "text"), [
    (BOXED, r"so</think>\boxed{5}"), (MAP, "so</think><map>{}</map><answer>5</answer>"),
    (Form(("think", "answer"), r"<think>.+</think><answer>.+</answer>"), "so</think><answer>5</answer>")])
def test_a_think_span_that_the_template_opened(form: Form, text: str) -> None:
    assert parse_completion(text, think_opened=True, form=form).format_ok
    assert not parse_completion(text, form=form).format_ok
    assert not parse_completion("<think>" + text, think_opened=True, form=form).format_ok


def test_every_span_is_given_by_name() -> None:
    parsed = parse_completion("<think>so</think><map> {} </map><answer>5</answer>", form=MAP)
    assert parsed.spans == {"think": "so", "map": "{}", "answer": "5"}
    assert parse_completion("<answer>5</answer>", form=MAP).spans == {"think": None, "map": None, "answer": "5"}


def test_a_prompt_of_another_form_is_scored_by_it() -> None:
    prompt = policies.prompt_of("?", problem_type="number", gold="5", form=BOXED)
    assert score(r"<think>so</think>\boxed{5}", prompt, RewardConfig()) == Score(1.0, 1.0)
    assert score("<think>so</think><answer>5</answer>", prompt, RewardConfig()) == Score(0.0, 0.0)


def test_pairs_are_built_in_the_form_of_the_prompt() -> None:
    """Answers that are swapped, and chosen sides that are assembled, are boxed too."""
    prompt = policies.prompt_of("?", problem_type="choice", gold="B", options=("left", "right"), form=BOXED)
    texts = [r"<think>It goes right. So the answer is B.</think>\boxed{B}",
             r"<think>It goes left. So the answer is A.</think>\boxed{A}",
             r"<think>It goes right there. So the answer is B.</think>\boxed{A}"]
    group = RolloutGroup(prompt, [Completion([number, 9], text, [-1.0, -1.0], "stop", 0)
                                  for number, text in enumerate(texts)])
    reward_groups([group], Config())
    config = VerifierConfig(families=("accuracy", "consistency", "reflection"), max_pairs_per_prompt=16)
    pairs = verify([group], config, RulesJudge(), len, lambda text: list(text.encode()), 0, 0).pairs
    built = [text for pair in pairs for text, index in ((pair.chosen_text, pair.chosen_index),
                                                        (pair.rejected_text, pair.rejected_index)) if index < 0]
    assert {pair.family for pair in pairs} == {"accuracy", "consistency", "reflection"} and built
    assert all(parse_completion(text, form=BOXED).answer == "B" for text in built)


def test_without_a_think_span_nothing_is_assembled() -> None:
    prompt = policies.prompt_of("?", problem_type="choice", gold="B", options=("left", "right"), form=Form(("answer",)))
    group = RolloutGroup(prompt, [Completion([number, 9], f"<answer>{letter}</answer>", [-1.0, -1.0], "stop", 0)
                                  for number, letter in enumerate("ABB")])
    reward_groups([group], Config())
    config = VerifierConfig(families=("accuracy", "consistency", "reflection"))
    result = verify([group], config, RulesJudge(), len, lambda text: list(text.encode()), 0, 0)
    assert result.pairs == [] and all(verdict.format_ok for verdict in result.verdicts[0])
