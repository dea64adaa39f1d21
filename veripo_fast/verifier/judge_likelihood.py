"""The likelihood judge: does a frozen model, having read the reasoning, prefer the answer that was given?

No judge model and no text rules: the policy (or its reference) scores the candidates after its own think span. The idea
of measuring consistency by likelihood is GRPO-CARE's (arXiv 2506.16141); the margin over candidates is ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

from veripo_fast.reward.score import answers_equal
from veripo_fast.reward.spans import Parsed, answer_closing, answer_prefix, parse_group
from veripo_fast.types import Prompt, RolloutGroup
from veripo_fast.verifier.judges import NO_JUDGEMENT, Judgement, Progress, given_answers

AnswerLogprobs: TypeAlias = Callable[[Prompt, list[str], list[str]], list[float]]
"""(prompt, prefixes, continuations), equally long -> mean log-probability of each continuation's tokens, in nats."""


class LikelihoodJudge:
    """Consistent when the given answer beats every other candidate by `margin`, inconsistent when another beats it so.

    Candidates: the letters of all options, or the distinct answers of the group. In between, and with fewer than two
    candidates, there is no verdict. The score is the given answer's log-probability minus the best other one's, in nats
    per token. Open answers are scored with their closing tag, or "1" would always be at least as likely as "10".
    """

    def __init__(self, answer_logprobs: AnswerLogprobs, margin: float = 0.0) -> None:
        self._answer_logprobs = answer_logprobs
        self._margin = margin

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
        form = group.prompt.form
        closing = "" if group.prompt.problem_type == "choice" else answer_closing(form)
        prefixes = [answer_prefix(group.completions[index].text, form) or "" for index in judged]
        logprobs = self._answer_logprobs(
            group.prompt, [prefix for prefix in prefixes for _ in candidates],
            [candidate + closing for _ in prefixes for candidate in candidates])
        judgements = [NO_JUDGEMENT] * len(parsed)
        for row, index in enumerate(judged):
            scores = logprobs[row * len(candidates):(row + 1) * len(candidates)]
            judgements[index] = self._judgement(parsed[index], group.prompt, dict(zip(candidates, scores, strict=True)))
        return judgements

    def _judgement(self, parsed: Parsed, prompt: Prompt, logprobs: dict[str, float]) -> Judgement:
        best = max(logprobs, key=lambda candidate: logprobs[candidate])
        answer = parsed.answer or ""
        given = next((candidate for candidate in logprobs if answers_equal(candidate, answer, prompt)), None)
        if any(math.isnan(value) for value in logprobs.values()):
            return NO_JUDGEMENT
        if given is None:
            return Judgement(None, best, None, "unreadable answer")
        margin = logprobs[given] - max(value for candidate, value in logprobs.items() if candidate != given)
        decided = abs(margin) >= self._margin and margin != 0
        if not decided:
            return Judgement(None, None, margin, "small margin")
        return Judgement(margin > 0, best, margin)
