"""A bonus for right completions whose answer a slowly moving copy of the policy finds likely too."""

from __future__ import annotations

import math

from veripo_fast.recipes.view import Column, CompletionView, PromptView


def likely_answer(asked: PromptView, *, share: float = 0.5, cap: float = 0.95, margin: float = 0.0,
                  floor: float = 0.1) -> Column:
    """share * accuracy, for a completion whose answer is as likely under the reference as those of its right peers.

    p = min(cap, exp(mean log-prob of the answer's tokens under the reference, given the reasoning)). Eligible are
    completions with accuracy above `floor` and at least the mean of the group; each with p >= mean p of the eligible -
    `margin` gets the bonus (the consistency bonus of GRPO-CARE, arXiv 2506.16141). A completion without an answer has
    none, and is not eligible. Needs `reward.reference_logprobs`.
    """
    likely = [_likelihood(completion, cap) for completion in asked.completions]
    accuracies = [completion.accuracy for completion in asked.completions]
    mean = sum(accuracies) / len(accuracies)
    eligible = [number for number, value in enumerate(accuracies)
                if value > floor and value >= mean and likely[number] is not None]
    if not eligible:
        return [0.0] * len(accuracies)
    bound = sum(likely[number] or 0.0 for number in eligible) / len(eligible) - margin
    return [share * value if number in eligible and (likely[number] or 0.0) >= bound else 0.0
            for number, value in enumerate(accuracies)]


def _likelihood(completion: CompletionView, cap: float) -> float | None:
    """The mean probability of the answer's tokens (geometric), at most `cap`; None without an answer."""
    if completion.answer_tokens is None or completion.reference_logprobs is None:
        return None
    begin, end = completion.answer_tokens
    return min(cap, math.exp(math.fsum(completion.reference_logprobs[begin:end]) / (end - begin)))
