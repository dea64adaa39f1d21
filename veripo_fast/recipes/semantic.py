"""A bonus for a reasoning that says what the frames show."""

from __future__ import annotations

from veripo_fast.recipes.view import Column, PromptView


def semantic(asked: PromptView, *, scale: float = 2.0) -> Column:
    """Mean over the frames of min(1, scale * max(cosine, 0)), the cosine of the reasoning with the frame under
    `reward.vision_text`; 0 for a prompt without media.

    The semantic reward of VideoRFT (arXiv 2505.12434), as in its code; the paper takes the cosine with the mean of the
    frames' embeddings, which is at least as large where no cosine is negative. It counts for right answers alone:
    `on: accuracy > 0`.
    """
    column = []
    for completion in asked.completions:
        cosines = completion.frame_likeness or ()
        column.append(sum(min(1.0, scale * max(value, 0.0)) for value in cosines) / max(len(cosines), 1))
    return column
