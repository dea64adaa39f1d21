"""A case of the step bench: both sides in processes of their own, compared first, then timed in paired rounds."""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from bench.measure import Ratio, digits
from bench.step.cases import PEER, PEER_VERSION, WITH, WITHOUT, Case, switches_of
from bench.video.worker import Answer, Worker

Row = dict[str, Any]
FOLDER = Path(__file__).resolve().parent
OURS = "ours"

PARTS = {"step": ("vision", "rollout", "reward", "reference", "training"), "rollout": ("vision", "rollout", "reward"),
         "training": ("training",)}
"""What is compared -> phases. The peer's tower runs inside its rollout and training, so ours counts as rollout."""
LOGPROBS_ALLOWED, GRADIENTS_ALLOWED = 5e-5, 1e-4
"""Largest difference of a log-prob, and relative one of all gradients, in float32. Other weights give 1e-2 and more."""


class MismatchError(Exception):
    """The sides do not compute the same, so there is nothing to time."""


def peer_missing() -> str | None:
    """Why the peer is not measured; None when it is."""
    try:
        version = metadata.version(PEER)
    except metadata.PackageNotFoundError:
        return f"{PEER} is not installed (pip install {PEER}=={PEER_VERSION}.0)"
    if version != PEER_VERSION and not version.startswith(f"{PEER_VERSION}."):
        return f"{PEER} {version} is installed, and this bench steps {PEER} {PEER_VERSION}"
    return None


class Session:
    """The processes of one case: a context manager.

    Args:
        folder: empty; both sides read the checkpoint and the inputs in it.
        cores: processor numbers; each side runs on all of them, one at a time.
    """

    def __init__(self, case: Case, folder: Path, cores: set[int], with_peer: bool) -> None:
        self.case, self.folder = case, folder
        self.sides = {OURS: Worker(str(FOLDER / "ours.py"), cores)}
        if with_peer:
            self.sides[PEER] = Worker(str(FOLDER / "peer.py"), cores)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        for side in self.sides.values():
            side.close()

    def agreed(self) -> Row:
        """Start both sides and compare them; entries of every line.

        Raises:
            MismatchError: they do not read or compute the same.
        """
        started = {name: side.call("start", folder=str(self.folder), case=self.case.fields())
                   for name, side in self.sides.items()}
        lengths = [len(ids) for ids in started[OURS]["ids"]]
        common = {"parameters": started[OURS]["parameters"], "prompt_tokens": max(lengths)}
        if PEER not in self.sides:
            return common
        check_ids(started[OURS]["ids"], started[PEER]["ids"])
        losses = {name: side.call("check")["loss"] for name, side in self.sides.items()}
        found = differences(torch.load(self.folder / "ours.pt"), torch.load(self.folder / "peer.pt"))
        return common | found | {"loss_difference": digits(abs(losses[OURS] - losses[PEER]))}

    def measured(self, rounds: int, switches: Sequence[str]) -> dict[str, list[Answer]]:
        """Answers of every way of the step, round by round, after a step of each side that is not counted."""
        for name in self.sides:
            self._step(name)
        ways = [*self.sides, *switches]
        answers: dict[str, list[Answer]] = {name: [] for name in ways}
        for number in range(rounds):
            turn = number % len(ways)
            for name in ways[turn:] + ways[:turn]:
                answers[name].append(self._step(name))
        return answers

    def _step(self, name: str) -> Answer:
        """A step of a side, or ours by the name of a switch."""
        side = self.sides.get(name, self.sides[OURS])
        options = {} if name == PEER else {"switch": "" if name == OURS else name}
        answer = side.call("step", **options)
        wanted = self.case.rows * self.case.completion
        if answer["tokens"] != wanted:
            raise MismatchError(f"{name} trained {answer['tokens']} completion tokens in a step, not {wanted}")
        return answer


def check_ids(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> None:
    """Prompt tokens one by one. Raises MismatchError."""
    for number, (own, other) in enumerate(zip(ours, theirs, strict=True)):
        wrong = [place for place, (a, b) in enumerate(zip(own, other, strict=False)) if a != b]
        if len(own) != len(other) or wrong:
            place = wrong[0] if wrong else min(len(own), len(other))
            raise MismatchError(f"prompt {number} has {len(own)} tokens here and {len(other)} in {PEER}; "
                                f"they differ from token {place} on")


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Row:
    """How far log-probs and gradients of the same weights are apart. Raises MismatchError."""
    if ours["gradients"].keys() != theirs["gradients"].keys():
        names = sorted(ours["gradients"].keys() ^ theirs["gradients"].keys())
        raise MismatchError(f"only one side has gradients of {', '.join(names[:3])}")
    apart = float((ours["logprobs"] - theirs["logprobs"]).abs().max())
    squares = total = 0.0
    for name, gradient in theirs["gradients"].items():
        squares += float((ours["gradients"][name] - gradient).double().pow(2).sum())
        total += float(gradient.double().pow(2).sum())
    relative = (squares / total) ** 0.5 if total else float("inf")
    if not (apart <= LOGPROBS_ALLOWED and relative <= GRADIENTS_ALLOWED):
        raise MismatchError(f"log-probs differ by up to {apart:.1e} (allowed {LOGPROBS_ALLOWED:.0e}), gradients by "
                            f"{relative:.1e} (allowed {GRADIENTS_ALLOWED:.0e})")
    return {"logprobs_difference": digits(apart), "gradient_relative_difference": digits(relative)}


# -- lines -----------------------------------------------------------------------------------------------------------


def rows_of(case: Case, answers: Mapping[str, list[Answer]]) -> Iterator[Row]:
    """The line of both sides (of ours alone where there is no peer), then one for each switch."""
    ours = answers[OURS]
    line: Row = {"row": PEER if PEER in answers else OURS, **side_fields("ours", ours)}
    if case.kind == "grpo":
        line["engine_logprobs_difference"] = max(answer["parity"] for answer in ours)
    if PEER in answers:
        line |= side_fields("peer", answers[PEER]) | ratios(case, answers[PEER], ours)
    yield line
    for name in switches_of(case):
        if name in answers:
            yield {"row": "with" if name in WITH else "without", "switch": name, "is": (WITHOUT | WITH)[name],
                   **side_fields("switched", answers[name]), **ratios(case, answers[name], ours)}


def side_fields(name: str, answers: Sequence[Answer]) -> Row:
    """What one way of the step took, phase by phase, and its peaks of memory."""
    row: Row = {}
    for kind in ("seconds", "cpu_seconds"):
        row[f"{name}_{kind}"] = {phase: [digits(answer[kind][phase]) for answer in answers]
                                 for phase in answers[0][kind]}
    peaks = {phase: statistics.median(answer["peak_bytes"][phase] for answer in answers)
             for phase in answers[0]["peak_bytes"]}
    return row | {f"{name}_peak_mib": {phase: round(peak / 2**20) for phase, peak in peaks.items()}}


def total(answer: Answer, kind: str, part: str) -> float:
    """Seconds of a part of a step."""
    return sum(value for phase, value in answer[kind].items() if phase in PARTS[part])


def ratios(case: Case, above: Sequence[Answer], below: Sequence[Answer]) -> Row:
    """Time of one way over that of another, round by round, wall and CPU; and of memory in training."""
    row: Row = {}
    for part in PARTS if case.kind == "grpo" else ("step", "training"):
        for kind, name in (("seconds", part), ("cpu_seconds", f"{part}_cpu")):
            row |= Ratio.of([total(a, kind, part) for a in above], [total(b, kind, part) for b in below]
                            ).fields(f"{name}_ratio")
    peaks = [statistics.median(answer["peak_bytes"]["training"] for answer in side) for side in (above, below)]
    return row | {"training_memory_ratio": digits(peaks[0] / peaks[1])}


def group_over_pair(group: Row, pair: Row) -> Row:
    """CPU time of a group of GRPO in that of a pair of DPO, whole steps, on each side; from their lines."""
    row: Row = {"row": "group_over_pair"}
    for side in ("ours", "peer"):
        costs = []
        for line in (group, pair):
            seconds = line[f"{side}_cpu_seconds"]
            costs.append(sum(statistics.median(values) for values in seconds.values()) / line["case"]["prompts"])
        row[side] = digits(costs[0] / costs[1])
    return row


def cores_of(threads: int | None) -> set[int]:
    """The first so many processors that this process may use; None: all. Raises ValueError."""
    usable = sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else list(range(os.cpu_count() or 1))
    if threads is not None and not 1 <= threads <= len(usable):
        raise ValueError(f"--threads must be 1 to {len(usable)}, got {threads}")
    return set(usable[:threads])
