"""The columns of a reward: computed for one prompt at a time, then gated, normalised, weighted and added up."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
from veripo_kernels import group_advantages

from veripo_fast.config.checks import OWN
from veripo_fast.config.objectives import RewardConfig
from veripo_fast.config.terms import RewardTerm, gate_of
from veripo_fast.errors import TrainingError
from veripo_fast.recipes.own import as_column, described, named
from veripo_fast.recipes.tables import REWARDS
from veripo_fast.recipes.view import CONTRAST, MAIN, Completions, CompletionView, PromptView
from veripo_fast.reward.spans import Parsed, parse_group
from veripo_fast.types import LoadedPrompt, RolloutGroup

log = logging.getLogger(__name__)


def view_of(group: RolloutGroup, parsed: Sequence[Parsed], loaded: LoadedPrompt | None) -> PromptView:
    """A group that has accuracy and format, as has its contrast, as rewards see it."""
    groups = {MAIN: _completions(group, parsed)}
    if group.contrast is not None:
        groups[CONTRAST] = _completions(group.contrast, parse_group(group.contrast))
    return PromptView(group.prompt, groups, loaded)


def _completions(group: RolloutGroup, parsed: Sequence[Parsed]) -> Completions:
    completions = []
    for row, item in zip(group.completions, parsed, strict=True):
        assert row.accuracy is not None and row.format is not None
        completions.append(CompletionView(row.text, item.spans, row.token_ids, row.rollout_logprobs,
                                          row.finish_reason == "stop", row.accuracy, row.format, row.reference_logprobs,
                                          row.answer_tokens, row.frame_likeness))
    return Completions(completions)


def columns_of(view: PromptView, config: RewardConfig) -> dict[str, list[float] | None]:
    """The column of each term by its name; None where its function failed and `on_error` is count.

    Raises:
        TrainingError: a function failed, or what it returned is no column; names function, prompt and completion.
    """
    return {term.name: _column(term, view, config.on_error == "count") for term in config.terms}


def _column(term: RewardTerm, view: PromptView, count_errors: bool) -> list[float] | None:
    function = named(term.use, REWARDS)
    view.completions.last_read = None
    try:
        values = function(view, **term.options)
    except Exception as error:  # of whatever a reward does with its options
        sentence = f"reward {term.use} failed on {_place(view)}: {described(error)}"
        if OWN.fullmatch(term.use) is None:
            raise TrainingError(f"{sentence}; correct its options {term.options}") from error
        if count_errors:
            _say_once(term.use, sentence)
            return None
        raise TrainingError(f"{sentence}; mend it and go on with --resume --allow-changes code, or set "
                            "reward.on_error to count") from error
    return as_column(values, len(view.completions), f"reward {term.use}, on prompt {view.prompt.prompt_id},")


def _place(view: PromptView) -> str:
    """The prompt, and the completion that was read last."""
    last = view.completions.last_read
    return f"prompt {view.prompt.prompt_id}, " + (
        "before it read a completion" if last is None else f"completion {last} of {len(view.completions)}")


@lru_cache
def _errors_said() -> set[str]:
    """Functions whose first failure was said."""
    return set()


def _say_once(name: str, sentence: str) -> None:
    if name not in _errors_said():
        _errors_said().add(name)
        log.warning("%s; such a column is 0, and the number of these is reward_errors in the metrics", sentence)


def total(columns: Mapping[str, Sequence[float] | None], terms: Sequence[RewardTerm], count: int) -> list[float]:
    """The reward of each of `count` completions: the sum of weight * column, gated and normalised as the terms say.

    Args:
        columns: those of the terms, and accuracy and format.
    """
    rewards = [0.0] * count
    for term in terms:
        column = columns[term.name]
        if column is None:
            continue
        if term.on:
            column = _gated(column, columns, term.on)
        if term.normalise:
            column = _normalised(column)
        rewards = [reward + term.weight * value for reward, value in zip(rewards, column, strict=True)]
    return rewards


def _gated(column: Sequence[float], columns: Mapping[str, Sequence[float] | None], on: str) -> list[float]:
    """0 where the gate is closed, as it is by a column that could not be computed."""
    gate = gate_of(on)
    watched = columns[gate.column]
    if watched is None:
        return [0.0] * len(column)
    return [value if gate.opens(other) else 0.0 for value, other in zip(column, watched, strict=True)]


def _normalised(column: Sequence[float]) -> list[float]:
    """(value - mean) / std of the group, exact zeros for equal values."""
    values = torch.tensor(column, dtype=torch.float64)
    normal: list[float] = group_advantages(values, torch.zeros(len(column), dtype=torch.int64), kind="std").tolist()
    return normal
