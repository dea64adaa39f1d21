"""The likelihood judge: which answer does a frozen model give, having read the reasoning?

No judge model and no text rules: the policy (or its reference) scores the candidates after its own think span. The idea
of measuring consistency by likelihood is GRPO-CARE's (arXiv 2506.16141); the margin over candidates is ours. Candidates
are scored as the policy writes answers (answer_forms.py): a policy that answers by an option's text gives its letter
a chance of nearly 0, and the order of such numbers means nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

from veripo_fast.reward.score import answers_equal
from veripo_fast.reward.spans import Parsed, answer_closing, answer_prefix, parse_group
from veripo_fast.types import Prompt, RolloutGroup
from veripo_fast.verifier.answer_forms import answer_forms, written_as
from veripo_fast.verifier.judges import NO_JUDGEMENT, Judgement, Progress, given_answers

AnswerLogprobs: TypeAlias = Callable[[Prompt, list[str], list[str]], list[float]]
"""(prompt, prefixes, continuations), equally long -> log-probability of each continuation as a whole, in nats."""


class LikelihoodJudge:
    """Consistent when the given answer beats every other candidate by `margin`, inconsistent when another beats it so.

    Candidates: all options, or the distinct answers of the group. A candidate's probability is that of the whole answer
    span with its closing tag, summed over the forms in which the group answers. The score is the given answer's
    log-probability minus the best other one's, in nats. There is no verdict with fewer than two candidates, in between
    the margins, and where the candidates together have less than `floor`: the model would say something else.
    """

    def __init__(self, answer_logprobs: AnswerLogprobs, margin: float = 0.0, floor: float = 0.0) -> None:
        self._answer_logprobs = answer_logprobs
        self._margin = margin
        self._floor = floor

    def judge(self, groups: list[RolloutGroup], progress: Progress) -> list[list[Judgement]]:
        judged = []
        for group in groups:
            judged.append(self._group(group))
            progress(len(group.completions))
        return judged

    def _group(self, group: RolloutGroup) -> list[Judgement]:
        candidates = given_answers(group)
        parsed = parse_group(group)
        judged = [index for index, item in enumerate(parsed) if item.format_ok]
        if len(candidates) < 2 or not judged:
            return [NO_JUDGEMENT] * len(parsed)
        forms = answer_forms(group.prompt, [parsed[index].answer or "" for index in judged])
        closing = answer_closing(group.prompt.form)
        spelt = [written_as(form, candidate, group.prompt) + closing for candidate in candidates for form in forms]
        prefixes = [answer_prefix(group.completions[index].text, group.prompt.form) or "" for index in judged]
        logprobs = self._answer_logprobs(group.prompt, [prefix for prefix in prefixes for _ in spelt],
                                         spelt * len(prefixes))
        judgements = [NO_JUDGEMENT] * len(parsed)
        for row, index in enumerate(judged):
            scores = logprobs[row * len(spelt):(row + 1) * len(spelt)]
            summed = [_log_sum(scores[start:start + len(forms)]) for start in range(0, len(spelt), len(forms))]
            judgements[index] = self._judgement(parsed[index], group.prompt, dict(zip(candidates, summed, strict=True)))
        return judgements

    def _judgement(self, parsed: Parsed, prompt: Prompt, logprobs: dict[str, float]) -> Judgement:
        best = max(logprobs, key=lambda candidate: logprobs[candidate])
        answer = parsed.answer or ""
        given = next((candidate for candidate in logprobs if answers_equal(candidate, answer, prompt)), None)
        if any(math.isnan(value) for value in logprobs.values()):
            return NO_JUDGEMENT
        if math.exp(min(_log_sum(list(logprobs.values())), 0.0)) < self._floor:
            return Judgement(None, None, None, "small probability")
        if given is None:
            return Judgement(None, best, None, "unreadable answer")
        margin = logprobs[given] - max(value for candidate, value in logprobs.items() if candidate != given)
        decided = abs(margin) >= self._margin and margin != 0
        if not decided:
            return Judgement(None, None, margin, "small margin")
        return Judgement(margin > 0, best, margin)


def _log_sum(logprobs: list[float]) -> float:
    """log of the sum of exp; of one value that value itself, and NaN where one is NaN."""
    largest = max(logprobs)
    if any(map(math.isnan, logprobs)):
        return math.nan
    if len(logprobs) == 1 or largest == -math.inf:
        return largest
    return largest + math.log(math.fsum(math.exp(value - largest) for value in logprobs))
