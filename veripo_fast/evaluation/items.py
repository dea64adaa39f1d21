"""One line for every prompt of an evaluation: what others count again, and what two evaluations are compared by."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from veripo_fast.evaluation.controls import accuracy_of, as_well
from veripo_fast.evaluation.judging import Judged
from veripo_fast.reward.answers import normalise_text
from veripo_fast.reward.score import scores_of
from veripo_fast.reward.spans import parse_completion
from veripo_fast.types import RolloutGroup
from veripo_fast.verifier.judge_rules import RulesJudge
from veripo_fast.verifier.judges import no_progress


def items_of(groups: Sequence[RolloutGroup], judged: Judged | None = None,
             controls: Mapping[str, Sequence[RolloutGroup]] | None = None) -> list[dict[str, Any]]:
    """Of every prompt its id and question, what it is about, the gold answer, and by completion: answer, accuracy,
    format, whether answer and reasoning agree (null: no verdict), tokens, and whether it ended by itself. Under
    `controls` stand answers and accuracy of each control, and whether the prompt is answered as well so.

    Args:
        judged: verdicts; None: those of the rules. controls: groups of each control.
    """
    judged = judged or RulesJudge().judge(list(groups), no_progress)
    others = {name: {group.prompt: group for group in those} for name, those in (controls or {}).items()}
    items: list[dict[str, Any]] = []
    for group, verdicts in zip(groups, judged, strict=True):
        prompt = group.prompt
        items.append({
            "prompt_id": prompt.prompt_id, "question": prompt.text, "data_source": prompt.data_source,
            "problem_type": prompt.problem_type,
            "media": [medium.path for medium in prompt.media], "gold": prompt.gold, "answers": answers_of(group),
            "accuracy": scores_of(group, "accuracy"), "format": scores_of(group, "format"),
            "consistent": [verdict.consistent for verdict in verdicts],
            "tokens": [len(completion.token_ids) for completion in group.completions],
            "finished": [completion.finish_reason == "stop" for completion in group.completions]})
        if others:
            items[-1]["controls"] = {name: _control(known[prompt], accuracy_of(group))
                                     for name, known in others.items() if prompt in known}
    return items


def _control(group: RolloutGroup, whole: float) -> dict[str, Any]:
    return {"answers": answers_of(group), "accuracy": scores_of(group, "accuracy"),
            "as_well": as_well(accuracy_of(group), whole)}


def answers_of(group: RolloutGroup) -> list[str | None]:
    """What each completion answers; None without an answer span."""
    return [parse_completion(completion.text, group.think_opened, group.prompt.form).answer
            for completion in group.completions]


def majority_accuracy(group: RolloutGroup) -> float:
    """Accuracy of the answer that most completions give (self-consistency; Wang et al. 2022, arXiv 2203.11171).

    Answers count as one when they differ in case, spaces and punctuation alone. Of answers that are given equally
    often the one that came first counts. Without any answer it is 0.
    """
    answers = [None if answer is None else normalise_text(answer) for answer in answers_of(group)]
    counts = Counter(answer for answer in answers if answer is not None)
    if not counts:
        return 0.0
    return scores_of(group, "accuracy")[answers.index(max(counts, key=lambda answer: counts[answer]))]
