"""Two evaluations of the same questions, item by item: what changed, and whether chance explains it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from veripo_fast.errors import UserError
from veripo_fast.evaluation.intervals import Interval, paired_difference
from veripo_fast.run.jsonlines import read_objects
from veripo_fast.text import plural

Item = Mapping[str, Any]
SHOWN = 3
"""Names of prompts in a sentence."""


class Pair(NamedTuple):
    """One prompt in both evaluations."""

    before: Item
    after: Item

    @property
    def moved(self) -> float:
        """How much more of its completions' accuracy the second one has."""
        return accuracy_of(self.after) - accuracy_of(self.before)


@dataclass(frozen=True)
class Comparison:
    """A mode of two evaluations."""

    mode: str
    pairs: list[Pair]
    """Prompts of both, in the order of the first."""
    alone: tuple[int, int]
    """Prompts that only the first, only the second one has."""
    accuracy: Interval
    """After - before, over prompts."""
    inconsistency: Interval
    """The same of the share of completions whose answer contradicts their reasoning."""
    gained: int
    """Prompts whose first completion is right after and was not before."""
    lost: int
    p_value: float
    """McNemar's exact test of `gained` against `lost`."""
    judges: tuple[str, str] = ("", "")
    """Who said what is inconsistent in each; empty of evaluations that do not say."""

    @property
    def flipped(self) -> list[Pair]:
        """Prompts whose accuracy is another one; the largest changes first, losses before gains."""
        moved = [pair for pair in self.pairs if pair.moved]
        return sorted(moved, key=lambda pair: (-abs(pair.moved), pair.moved))


def compare(before: Path, after: Path, resamples: int = 2000, seed: int = 0, other_wording: bool = False
            ) -> list[Comparison]:
    """Every mode that two folders of `veripo eval` have.

    Args:
        other_wording: questions of one id may be worded, or instructed, otherwise.

    Raises:
        UserError: a folder holds no finished evaluation, they share no mode or no prompt, or prompts of one id ask for
            another answer or in other words.
    """
    found = [items_in(Path(folder)) for folder in (before, after)]
    shared = [mode for mode in found[0] if mode in found[1]]
    if not shared:
        raise UserError(f"{before} has {', '.join(found[0])} and {after} has {', '.join(found[1])}: no mode is in both")
    for mode in shared:
        _check_same(found[0][mode], found[1][mode], (before, after), other_wording)
    judges = [_judges(Path(folder)) for folder in (before, after)]
    return [replace(_compared(mode, found[0][mode], found[1][mode], resamples, seed),
                    judges=(judges[0][mode], judges[1][mode])) for mode in shared]


def mcnemar(gained: int, lost: int) -> float:
    """Two-sided exact p-value that a change and its opposite are equally likely (McNemar, Psychometrika 12, 1947; the
    binomial test of the discordant pairs)."""
    total = gained + lost
    if not total:
        return 1.0
    tail = sum(math.comb(total, count) for count in range(min(gained, lost) + 1))
    return min(1.0, 2 * (tail / 2 ** total if total < 1000 else math.exp(math.log(tail) - total * math.log(2))))


def _judges(folder: Path) -> dict[str, str]:
    """Mode -> the judge that reported on it."""
    return {str(record["mode"]): str(record.get("judge") or "") for record in _objects(folder / "evals.jsonl")}


def items_in(folder: Path) -> dict[str, dict[str, Item]]:
    """Mode -> prompt id -> its line, of a folder of `veripo eval`. Raises UserError, see `compare`."""
    if (folder / "parts").is_dir():  # whatever else is there may be of an evaluation before
        raise UserError(f"{folder} holds no finished evaluation: it was stopped; the same `veripo eval` goes on")
    if not (folder / "evals.jsonl").is_file():
        raise UserError(f"{folder} holds no finished evaluation: evals.jsonl is missing")
    modes: dict[str, dict[str, Item]] = {}
    for record in _objects(folder / "evals.jsonl"):
        if not isinstance(record.get("mode"), str):
            raise UserError(f"{folder / 'evals.jsonl'} is damaged: a line names no mode")
        file = folder / f"{record['mode']}.jsonl"
        if not file.is_file():
            raise UserError(f"{file} is missing: evaluate again, earlier versions wrote no line for each prompt")
        items = _objects(file)
        for number, item in enumerate(items, 1):
            if not _is_item(item):
                raise UserError(f"{file} is damaged: prompt {number} is no line of an evaluation")
            if "question" not in item:
                raise UserError(f"{file} holds no questions: evaluate again, earlier versions wrote none")
        modes[record["mode"]] = {str(item["prompt_id"]): item for item in items}
    if not modes:
        raise UserError(f"{folder} holds no finished evaluation: evals.jsonl is empty")
    return modes


def _is_item(item: Item) -> bool:
    """Whether an object has what is compared."""
    scores, verdicts = item.get("accuracy"), item.get("consistent")
    return (all(isinstance(item.get(key), str) for key in ("prompt_id", "gold", "problem_type"))
            and isinstance(scores, list) and isinstance(verdicts, list) and 0 < len(scores) == len(verdicts)
            and all(isinstance(score, int | float) and 0 <= score <= 1 for score in scores))


def _objects(path: Path) -> list[dict[str, Any]]:
    objects, bad = read_objects(path)
    if bad:
        raise UserError(f"{path} is damaged: {plural(len(bad), 'line')} cannot be read")
    return objects


def _check_same(before: Mapping[str, Item], after: Mapping[str, Item], folders: Sequence[Path], other_wording: bool
                ) -> None:
    """UserError unless the prompts of both ask for the same."""
    pairs = [Pair(item, after[name]) for name, item in before.items() if name in after]
    if not pairs:
        raise UserError(f"{folders[0]} and {folders[1]} have no prompt in common")
    other = [str(pair.before["prompt_id"]) for pair in pairs
             if any(pair.before[key] != pair.after[key] for key in ("gold", "problem_type"))]
    if other:
        raise UserError(f"{plural(len(other), 'prompt')} of both ask for another answer in each, "
                        f"{_named(other)}: these are other data")
    reworded = [str(pair.before["prompt_id"]) for pair in pairs
                if pair.before["question"] != pair.after["question"]]
    if reworded and not other_wording:
        raise UserError(f"{plural(len(reworded), 'prompt')} of both ask in other words in each, {_named(reworded)}: "
                        "these are other data, or another instruction; --other-wording compares them all the same")


def _named(prompts: Sequence[str]) -> str:
    return f"{', '.join(prompts[:SHOWN])}{', ...' if len(prompts) > SHOWN else ''}"


def _compared(mode: str, before: Mapping[str, Item], after: Mapping[str, Item], resamples: int, seed: int
              ) -> Comparison:
    pairs = [Pair(item, after[name]) for name, item in before.items() if name in after]
    about = [tuple(pair.before["media"]) or pair.before["prompt_id"] for pair in pairs]
    accuracy = paired_difference([accuracy_of(pair.before) for pair in pairs],
                                 [accuracy_of(pair.after) for pair in pairs], resamples, seed, about)
    inconsistency = paired_difference([inconsistency_of(pair.before) for pair in pairs],
                                      [inconsistency_of(pair.after) for pair in pairs], resamples, seed, about)
    right = [(pair.before["accuracy"][0] == 1, pair.after["accuracy"][0] == 1) for pair in pairs]
    gained, lost = right.count((False, True)), right.count((True, False))
    return Comparison(mode, pairs, (len(before) - len(pairs), len(after) - len(pairs)), accuracy, inconsistency,
                      gained, lost, mcnemar(gained, lost))


def accuracy_of(item: Item) -> float:
    """Mean over the completions of a prompt."""
    return sum(item["accuracy"]) / len(item["accuracy"])


def inconsistency_of(item: Item) -> float:
    """Share of the completions whose answer contradicts their reasoning; no verdict is no contradiction."""
    return sum(verdict is False for verdict in item["consistent"]) / len(item["consistent"])
