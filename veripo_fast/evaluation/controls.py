"""Controls of an evaluation (`eval.controls`): the same questions without their media, or with frames in another order.

A policy that answers as well without the video answers from the question alone; one that answers as well with shuffled
frames does not need their order. The order is changed in the tower's output at hand, so no control decodes or encodes
anything (rollout/plans.py).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from veripo_fast.evaluation.intervals import paired_difference
from veripo_fast.model.encoding import PromptEncoder
from veripo_fast.reward.score import scores_of
from veripo_fast.rollout.plans import contrast_by_patch
from veripo_fast.run.seeds import derive_seed
from veripo_fast.types import LoadedPrompt, Prompt, RolloutGroup

TITLES = {"blind": "without the media", "shuffled": "with shuffled frames"}
_ADDS = {"blind": "the media add", "shuffled": "their order adds"}


def controlled(encoder: PromptEncoder, loaded: Mapping[int, LoadedPrompt], control: str, seed: int
               ) -> dict[int, LoadedPrompt]:
    """The prompts of a batch as a control shows them, by number. Without media there is none, and for `shuffled` there
    has to be a video of two temporal patches or more.

    Args:
        seed: of the evaluation; with the prompt it gives the order of its frames.
    """
    found: dict[int, LoadedPrompt] = {}
    for number, item in loaded.items():
        if control == "blind":
            other = _blind(encoder, item)
        else:
            other = contrast_by_patch(item, "shuffle", derive_seed(seed, "shuffled", item.prompt.prompt_id))
        if other is not None:
            found[number] = other
    return found


def _blind(encoder: PromptEncoder, item: LoadedPrompt) -> LoadedPrompt | None:
    """The text of a prompt alone."""
    if not item.prompt.media:
        return None
    texts = [replace(message, parts=tuple(part for part in message.parts if isinstance(part, str)))
             for message in item.prompt.messages]
    question = replace(item.prompt, messages=tuple(message for message in texts if message.parts))
    return LoadedPrompt(item.prompt, encoder.encode(question, None), None) if question.messages else None


def control_scores(groups: Sequence[RolloutGroup], others: Sequence[RolloutGroup], resamples: int, seed: int
                   ) -> dict[str, Any]:
    """A control beside the evaluation, over the prompts that have it.

    `accuracy` is that of the control and `accuracy_whole` that of the same prompts as they are; `gain`, with a paired
    95 % interval in which prompts about the same media are one draw, is what the media add. `as_well_rate` is the share
    of prompts that are answered right sometimes, and as often as with the media. `format_rate` is the control's share
    of well-formed completions: a policy that was never asked without media may write none. `chance` is the accuracy of
    guesses: 1 / options of a choice, 1 / 2 of yes or no, 0 of others.
    """
    whole = {group.prompt: group for group in groups}
    own = [group for group in others if group.prompt in whole]
    control = [accuracy_of(group) for group in own]
    accuracy = [accuracy_of(whole[group.prompt]) for group in own]
    about: list[Hashable] = [tuple(medium.path for medium in group.prompt.media) for group in own]
    gain = paired_difference(control, accuracy, resamples, seed, about)
    return {"prompts": len(own), "accuracy": _mean(control), "accuracy_whole": _mean(accuracy),
            "gain": gain.mean, "gain_low": gain.low, "gain_high": gain.high,
            "as_well_rate": _mean([float(as_well(one, other)) for one, other in zip(control, accuracy, strict=True)]),
            "format_rate": _mean([_mean(scores_of(group, "format")) for group in own]),
            "chance": _mean([_chance(group.prompt) for group in own])}


def as_well(control: float, whole: float) -> bool:
    """Whether a prompt of these accuracies is answered as well under a control."""
    return 0 < control >= whole


def accuracy_of(group: RolloutGroup) -> float:
    """Mean over the completions."""
    return _mean(scores_of(group, "accuracy"))


def control_lines(controls: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What the terminal says of them."""
    return [f"{'':>17} {TITLES[name]}: accuracy {one['accuracy']:.3f} of {one['prompts']} prompts, format "
            f"{one['format_rate']:.3f}, {_ADDS[name]} "
            f"{one['gain']:+.3f} [{one['gain_low']:+.3f}, {one['gain_high']:+.3f}]; {one['as_well_rate']:.0%} are "
            f"answered as well, guesses are right in {one['chance']:.0%}" for name, one in controls.items()]


def _chance(prompt: Prompt) -> float:
    if prompt.problem_type == "choice" and prompt.options:
        return 1 / len(prompt.options)
    return 0.5 if prompt.problem_type == "boolean" else 0.0


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
