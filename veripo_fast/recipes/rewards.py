"""The rewards that are shipped. Each takes a prompt with all its groups, and options; it returns a column."""

from __future__ import annotations

from veripo_fast.recipes.view import Column, PromptView


def accuracy(asked: PromptView) -> Column:
    """Accuracy of the answer in [0, 1], by the type of the prompt (reward/score.py)."""
    return [completion.accuracy for completion in asked.completions]


def format(asked: PromptView) -> Column:
    """1 for a well-formed completion (reward/spans.py), else 0."""
    return [completion.format for completion in asked.completions]


def length_window(asked: PromptView, shortest: int = 320, longest: int = 512, accurate: float = 0.1,
                  at_least: int = 2) -> Column:
    """1 for a completion of `shortest` to `longest` tokens whose accuracy is above `accurate`, where at least
    `at_least` completions of the group have such an accuracy; else 0.

    The length bonus of Video-R1 (arXiv 2503.21776) with weight 0.2, as in its code: more than one completion must be
    right, and a length counts the end of turn.
    """
    right = [completion.accuracy > accurate for completion in asked.completions]
    if sum(right) < at_least:
        return [0.0] * len(right)
    return [float(is_right and shortest <= completion.num_tokens <= longest)
            for is_right, completion in zip(right, asked.completions, strict=True)]


def overlong(asked: PromptView, longest: int, buffer: int) -> Column:
    """DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13): 0 up to `longest - buffer` tokens, then falling
    linearly to -1 at `longest`, and -1 beyond."""
    return [-min(max((completion.num_tokens - (longest - buffer)) / buffer, 0.0), 1.0)
            for completion in asked.completions]


def shortness(asked: PromptView, accurate: float = 0.5) -> Column:
    """Kimi k1.5's length reward (arXiv 2501.12599, section 2.3.3): 0.5 - (L - shortest) / (longest - shortest) of the
    group for a right completion, and at most 0 for a wrong one; 0 where all have one length.

    Right is an accuracy above `accurate`; the paper's is 0 or 1.
    """
    lengths = [completion.num_tokens for completion in asked.completions]
    shortest, longest = min(lengths), max(lengths)
    if shortest == longest:
        return [0.0] * len(lengths)
    column = []
    for completion, length in zip(asked.completions, lengths, strict=True):
        value = 0.5 - (length - shortest) / (longest - shortest)
        column.append(value if completion.accuracy > accurate else min(0.0, value))
    return column
