"""The rules judge: reads the reasoning's own conclusion (see conclusions.py) and compares it with the answer.

It needs no model. It is blind to conclusions without a marker word, and says so: no verdict.
"""

from __future__ import annotations

from veripo_fast.reward.spans import parse_group
from veripo_fast.types import RolloutGroup
from veripo_fast.verifier.conclusions import supported_answer
from veripo_fast.verifier.judges import NO_JUDGEMENT, Judgement, Progress, compare, given_answers


class RulesJudge:
    """Consistent iff the answer equals the last conclusion; no verdict when the reasoning draws none."""

    def judge(self, groups: list[RolloutGroup], progress: Progress) -> list[list[Judgement]]:
        return [self._group(group, progress) for group in groups]

    def _group(self, group: RolloutGroup, progress: Progress) -> list[Judgement]:
        given = () if group.prompt.problem_type == "choice" else given_answers(group)
        judgements = [
            NO_JUDGEMENT if parsed.think is None
            else compare(supported_answer(parsed.think, group.prompt, given), parsed.answer, group.prompt)
            for parsed in parse_group(group)]
        progress(len(judgements))
        return judgements
