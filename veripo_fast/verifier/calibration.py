"""How good a judge is: its verdicts against a labelled set, and whether a run may use it.

A set is a JSONL file; an item is a line with

    kind          what is wrong with it, or nothing: a row of the table
    question, options (texts without letters; none of open questions), problem_type
    think, answer
    consistent    true, false, or null where the reasoning supports no answer
    supported     what it supports: a letter, or an answer (not needed, for people)

The shipped set (planted.py) has planted defects. "No verdict" is an outcome of its own and never counts as consistent.
Items of one question form a group, because judges compare the answers of a group.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from veripo_fast.config.objectives import VerifierConfig
from veripo_fast.data.wording import question_text
from veripo_fast.errors import DataError, JudgeError
from veripo_fast.reward.graders import DECLARED_TYPES, type_name
from veripo_fast.reward.spans import parse_completion
from veripo_fast.types import Completion, Message, Prompt, RolloutGroup
from veripo_fast.verifier.judges import Judgement
from veripo_fast.verifier.proportions import Share

SHIPPED = "planted"
"""The name of the shipped set."""
_SHIPPED_FILE = Path(__file__).with_name("planted.jsonl")
_NAMES = {True: "consistent", False: "inconsistent", None: "no verdict"}


@dataclass(frozen=True)
class Item:
    """One labelled completion."""

    kind: str
    prompt: Prompt
    think: str
    answer: str
    consistent: bool | None

    @property
    def text(self) -> str:
        """The completion as a policy writes it."""
        return f"<think>{self.think}</think><answer>{self.answer}</answer>"


def read_set(name: str, limit: int | None = None) -> list[Item]:
    """The items of a file, or of the shipped set by its name; `limit` takes so many, spread over the kinds.

    Raises:
        DataError: there is no such file, or a line is no item; the first that is not is named.
    """
    path = _SHIPPED_FILE if name == SHIPPED else Path(name)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the calibration set {path} cannot be read: {error}") from error
    items = [_item(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    labels = {item.consistent for item in items}
    if not {True, False} <= labels:
        raise DataError(f"the calibration set {path} needs consistent and inconsistent items; it has "
                        f"{', '.join(sorted(_NAMES[label] for label in labels)) or 'no item'}")
    return _spread(items, limit) if limit else items


def _item(line: str, where: str) -> Item:
    try:
        record: dict[str, Any] = json.loads(line)
        kind, think, answer, question = (_string(record, key) for key in ("kind", "think", "answer", "question"))
        declared, label, options = record.get("problem_type") or "", record["consistent"], record.get("options") or []
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DataError(f"{where} is no item of a calibration set: {type(error).__name__} {error}") from error
    if label not in (True, False, None) or not isinstance(label, bool | None):
        raise DataError(f"{where}: consistent must be true, false or null, got {label!r}")
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        raise DataError(f"{where}: options must be a list of texts, got {options!r}")
    if type_name(str(declared)) not in DECLARED_TYPES:
        raise DataError(f"{where}: problem_type {declared!r} is not known")
    problem_type = DECLARED_TYPES[type_name(str(declared))]
    text = question_text(question, options, problem_type)
    # a judge never sees a gold answer, so there is none
    prompt = Prompt(question, (Message("user", (text,)),), problem_type, "", tuple(options))
    item = Item(kind, prompt, think, answer, label)
    if not parse_completion(item.text).format_ok:
        raise DataError(f"{where}: think and answer must be texts without tags of their own")
    return item


def _string(record: dict[str, Any], key: str) -> str:
    value = record[key]
    if not isinstance(value, str) or not value.strip():
        raise TypeError(f"{key} must be a text, got {value!r}")
    return value


def _spread(items: list[Item], limit: int) -> list[Item]:
    """`limit` items: one of each kind and label in turn, and within these evenly over the file."""
    by_kind: dict[tuple[str, bool | None], list[Item]] = defaultdict(list)
    for item in items:
        by_kind[item.kind, item.consistent].append(item)
    each = -(-limit // len(by_kind))
    spread = {key: [rows[number * len(rows) // min(each, len(rows))] for number in range(min(each, len(rows)))]
              for key, rows in by_kind.items()}
    rounds: list[Item] = []
    for number in range(each):
        rounds += [rows[number] for rows in spread.values() if number < len(rows)]
    return rounds[:limit]


def groups_of(items: Sequence[Item]) -> tuple[list[RolloutGroup], list[tuple[int, int]]]:
    """A group per question, and for each item its (group, completion)."""
    numbers: dict[Prompt, int] = {}
    groups: list[RolloutGroup] = []
    where = []
    for item in items:
        number = numbers.setdefault(item.prompt, len(groups))
        if number == len(groups):
            prompt = replace(item.prompt, prompt_id=f"calibration-{number}")
            groups.append(RolloutGroup(prompt, []))
        where.append((number, len(groups[number].completions)))
        groups[number].completions.append(Completion([], item.text, [], "stop", 0))
    return groups, where


@dataclass(frozen=True)
class Calibration:
    """What a judge says of a set."""

    items: tuple[Item, ...]
    judgements: tuple[Judgement, ...]

    @property
    def pairs(self) -> list[tuple[bool | None, bool | None]]:
        """(verdict, truth) of each item."""
        return [(judgement.consistent, item.consistent)
                for judgement, item in zip(self.judgements, self.items, strict=True)]

    @property
    def precision(self) -> Share:
        """Of the items called inconsistent, those that are."""
        return Share.of(truth is False for verdict, truth in self.pairs if verdict is False)

    @property
    def recall(self) -> Share:
        """Of the inconsistent items, those called so."""
        return Share.of(verdict is False for verdict, truth in self.pairs if truth is False)

    @property
    def consistent_precision(self) -> Share:
        """Of the items called consistent, those that are: the chosen sides of pairs."""
        return Share.of(truth is True for verdict, truth in self.pairs if verdict is True)

    @property
    def coverage(self) -> Share:
        """Of the items whose reasoning supports an answer, those with a verdict."""
        return Share.of(verdict is not None for verdict, truth in self.pairs if truth is not None)

    @property
    def invented(self) -> Share:
        """Of the items whose reasoning supports no answer, those with a verdict all the same."""
        return Share.of(verdict is not None for verdict, truth in self.pairs if truth is None)

    @property
    def agreement(self) -> Share:
        """Of all items, those whose verdict, or lack of one, is the truth."""
        return Share.of(verdict is truth for verdict, truth in self.pairs)

    def shares(self) -> dict[str, Share]:
        """The six shares by name."""
        return {"precision of inconsistent": self.precision, "recall of inconsistent": self.recall,
                "precision of consistent": self.consistent_precision, "coverage": self.coverage,
                "verdicts where none is due": self.invented, "agreement": self.agreement}

    def by_kind(self) -> dict[str, Calibration]:
        """The part of each kind, in the order of the set."""
        parts: dict[str, list[int]] = defaultdict(list)
        for number, item in enumerate(self.items):
            parts[item.kind].append(number)
        return {kind: Calibration(tuple(self.items[number] for number in numbers),
                                  tuple(self.judgements[number] for number in numbers))
                for kind, numbers in parts.items()}

    def verdicts(self) -> Counter[str]:
        """How many items are called consistent, inconsistent, or get no verdict."""
        counts = Counter(dict.fromkeys(_NAMES.values(), 0))
        counts.update(_NAMES[verdict] for verdict, _ in self.pairs)
        return counts

    def no_verdict(self) -> Counter[str]:
        """Items without a verdict, by the reason that the judge gives."""
        return Counter(judgement.why for judgement in self.judgements if judgement.consistent is None)

    def faults(self, config: VerifierConfig) -> list[str]:
        """Why the judge may not be used; empty when it may."""
        given = {verdict for verdict, _ in self.pairs if verdict is not None}
        if not given:
            return [f"it gives no verdict on any of {len(self.items)} items"]
        faults = []
        if len(given) == 1:
            faults.append(f"all its verdicts are the same: {_NAMES[given.pop()]}")
        for name, share, floor in (("precision", self.precision, config.min_precision),
                                   ("recall", self.recall, config.min_recall),
                                   ("coverage", self.coverage, config.min_coverage)):
            if share.value is None or share.value < floor:
                faults.append(f"its {name} is {share} and verifier.min_{name} is {floor:g}")
        return faults


def check_judge(name: str, calibration: Calibration, config: VerifierConfig) -> None:
    """Raises JudgeError when the judge is under a floor of the configuration, or always says the same."""
    faults = calibration.faults(config)
    if faults:
        raise JudgeError(f"the judge `{name}` is refused on {len(calibration.items)} labelled items: "
                         f"{'; '.join(faults)}; veripo judge-eval shows the kinds that it gets wrong")
