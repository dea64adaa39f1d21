"""The checks of the Rollout-Aware Verifier on one group: format, finish, length, repetition, consistency, accuracy.

VerIPO names the four checks (its Fig. 2) and publishes no definition; these are ours. Length is relative to the median
of the prompt's own group, so that no absolute length is ever bought. Reflection is measured in conclusions.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

from veripo_fast.config.objectives import VerifierConfig
from veripo_fast.reward.answers import words
from veripo_fast.reward.score import scores_of
from veripo_fast.reward.spans import parse_group
from veripo_fast.types import RolloutGroup, Verdict
from veripo_fast.verifier.judges import Judgement

ACCURATE = 0.7
"""From this accuracy on a completion counts as right. Choices, numbers and maths score 0 or 1; an estimate reaches 0.7
within 20 % of the gold, a text when most of its words agree."""
FLAGS = ("format", "unfinished", "length", "repetition", "inconsistent", "wrong")


def repetition(text: str, ngram: int) -> float:
    """Share of the words that lie inside an n-gram which occurred before, 0 to 1.

    The first occurrence never counts, so k copies of a passage give (k - 1) / k; a text of up to `ngram` words gives 0.
    """
    said = words(text)
    seen: set[tuple[str, ...]] = set()
    repeated = covered_to = 0
    for start in range(len(said) - ngram + 1):
        gram = tuple(said[start:start + ngram])
        if gram in seen:
            repeated += start + ngram - max(start, covered_to)
            covered_to = start + ngram
        seen.add(gram)
    return repeated / len(said) if said else 0.0


def length_tokens(think: str | None, count_tokens: Callable[[str], int]) -> int:
    """Tokens inside the think span; 0 when there is none."""
    return 0 if think is None else count_tokens(think)


def check_group(group: RolloutGroup, judgements: Sequence[Judgement], config: VerifierConfig,
                count_tokens: Callable[[str], int]) -> list[Verdict]:
    """One verdict per completion of the group, in order.

    The length check compares a think span with the median of the group's think spans and passes by a completion
    without one (that is a matter of format). `accuracy` is taken from the completions as they were scored.
    """
    parsed = parse_group(group)
    lengths = [length_tokens(item.think, count_tokens) for item in parsed]
    typical = median([length for length in lengths if length] or [0])
    verdicts = []
    accuracies = scores_of(group, "accuracy")
    for index, (completion, item, judgement) in enumerate(zip(group.completions, parsed, judgements, strict=True)):
        verdict = Verdict(
            prompt_id=group.prompt.prompt_id, index=index, accuracy=accuracies[index], format_ok=item.format_ok,
            finished=completion.finish_reason == "stop", length_tokens=lengths[index],
            repetition=repetition(item.think or "", config.repetition_ngram), consistent=judgement.consistent,
            supported_answer=judgement.supported_answer, judge_score=judgement.score)
        verdict.flags = _flags(verdict, typical, config)
        verdicts.append(verdict)
    return verdicts


def _flags(verdict: Verdict, typical: float, config: VerifierConfig) -> tuple[str, ...]:
    length = verdict.length_tokens
    failed = {
        "format": not verdict.format_ok,
        "unfinished": not verdict.finished,
        "length": length > 0 and not config.min_length_ratio <= length / typical <= config.max_length_ratio,
        "repetition": verdict.repetition > config.max_repetition,
        "inconsistent": verdict.consistent is False,
        "wrong": verdict.accuracy < ACCURATE,
    }
    return tuple(name for name in FLAGS if failed[name])


def is_well_formed(verdict: Verdict) -> bool:
    """Format ok and finished."""
    return verdict.format_ok and verdict.finished


def is_clean(verdict: Verdict) -> bool:
    """No check failed: right, well formed, neither repetitive nor of odd length, and not found inconsistent.

    One without a verdict is clean; `GroupView.right` are those that were found consistent.
    """
    return not verdict.flags
