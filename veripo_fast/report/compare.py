"""`veripo compare A B`: two evaluations in the terminal, and as one HTML file with the prompts that flipped."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veripo_fast.errors import ConfigError, UserError
from veripo_fast.evaluation.compare import Comparison, Pair, accuracy_of, compare, inconsistency_of
from veripo_fast.evaluation.intervals import Interval
from veripo_fast.report.frames import DEFAULT_FACTOR, FrameStrips, video_contract
from veripo_fast.report.page import page_environment
from veripo_fast.report.scores import Table
from veripo_fast.reward.score import scores_of
from veripo_fast.rollout.store import read_groups
from veripo_fast.run.atomic import atomic_write_bytes
from veripo_fast.run.inputs import read_inputs
from veripo_fast.text import plural
from veripo_fast.types import RolloutGroup

MOST_SHOWN = 60
"""Prompts that moved, on the page of a mode; the count is always whole."""
NAMED = 5
"""Of these in the terminal."""


@dataclass
class Shown:
    """A prompt that moved, as the page has it."""

    name: str
    moved: str
    question: str
    gold: str
    sides: list[tuple[str, list[tuple[str, str, str]]]]
    """Name of the evaluation -> its completions: text, score, verdict."""
    strips: list[Mapping[str, Any]]


def compare_command(before: Path, after: Path, out: Path, other_wording: bool = False) -> None:
    """Print the comparison and write the page.

    Raises:
        UserError: as `compare`; or the page cannot be written.
    """
    found = compare(before, after, other_wording=other_wording)
    for one in found:
        print("\n".join(lines_of(one)))
    target = out / "compare.html" if out.is_dir() else out
    page = page_of(found, before, after).encode(errors="replace")  # a text may hold half of a surrogate pair
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_bytes(target, page)
    except OSError as error:
        raise ConfigError(f"--out {target} cannot be written: {error.strerror or error}") from error
    print(f"page: {target}")


def lines_of(one: Comparison) -> list[str]:
    """What the terminal says of a mode."""
    lines = [f"{one.mode}: {plural(len(one.pairs), 'prompt')} in both{_alone(one)}"]
    for name, (first, second, change) in _changes(one).items():
        lines.append(f"  {name}: {first:.3f} -> {second:.3f}, {_signed(change)}")
    if one.judges[0] != one.judges[1]:
        judge, other = (name or "a judge that is not named" for name in one.judges)
        lines.append(f"  inconsistent is what {judge} says before and {other} after, so its change says little")
    lines.append(f"  right after and wrong before: {one.gained}; the reverse: {one.lost}; "
                 f"McNemar p = {one.p_value:.3g}")
    names = [f"{pair.before['prompt_id']} ({pair.moved:+.2g})" for pair in one.flipped[:NAMED]]
    if names:
        more = len(one.flipped) - len(names)
        lines.append(f"  moved most: {', '.join(names)}{f' and {more} more' if more else ''}")
    return lines


def page_of(found: Sequence[Comparison], before: Path, after: Path) -> str:
    """The HTML of a comparison."""
    strips = _strips(before)
    modes = []
    for one in found:
        pairs = one.flipped[:MOST_SHOWN]
        first = _groups(before / f"{one.mode}.parquet", [pair.before for pair in pairs])
        second = _groups(after / f"{one.mode}.parquet", [pair.after for pair in pairs])
        chosen = list(zip(pairs, first, second, strict=True))
        strips.load([medium for _, group, _ in chosen for medium in group.prompt.media])
        modes.append({"name": one.mode, "lines": lines_of(one), "table": _table(one), "moved": len(one.flipped),
                      "shown": [_shown(pair, first, second, strips) for pair, first, second in chosen]})
    return page_environment().get_template("compare.html").render(before=str(before), after=str(after), modes=modes)


def _groups(path: Path, items: Sequence[Mapping[str, Any]]) -> list[RolloutGroup]:
    """The completions of some prompts. Raises UserError where the file does not hold those that were scored."""
    if not path.is_file():
        raise UserError(f"{path} is missing: it holds the completions that the page shows; evaluate again")
    groups = {group.prompt.prompt_id: group for group in read_groups(path)}
    for item in items:
        name = item["prompt_id"]
        if name not in groups or scores_of(groups[name], "accuracy") != item["accuracy"]:
            raise UserError(f"{path} and {path.with_suffix('.jsonl').name} are of two evaluations: they differ in "
                            f"prompt {name}; evaluate again")
    return [groups[item["prompt_id"]] for item in items]


def _changes(one: Comparison) -> dict[str, tuple[float, float, Interval]]:
    return {"accuracy": (*_means(one, accuracy_of), one.accuracy),
            "inconsistent": (*_means(one, inconsistency_of), one.inconsistency)}


def _means(one: Comparison, value: Callable[[Mapping[str, Any]], float]) -> tuple[float, float]:
    return (sum(value(pair.before) for pair in one.pairs) / len(one.pairs),
            sum(value(pair.after) for pair in one.pairs) / len(one.pairs))


def _signed(change: Interval) -> str:
    return f"{change.mean:+.3f} [{change.low:+.3f}, {change.high:+.3f}]"


def _alone(one: Comparison) -> str:
    first, second = one.alone
    return f", {first} only in the first, {second} only in the second" if first or second else ""


def _table(one: Comparison) -> Table:
    """Accuracy by the kind of question."""
    rows = []
    for kind in sorted({str(pair.before["problem_type"]) for pair in one.pairs}):
        pairs = [pair for pair in one.pairs if pair.before["problem_type"] == kind]
        first, second = (sum(map(accuracy_of, side)) / len(pairs)
                         for side in ([pair.before for pair in pairs], [pair.after for pair in pairs]))
        rows.append([kind, str(len(pairs)), f"{first:.3f}", f"{second:.3f}", f"{second - first:+.3f}"])
    return Table("By problem type", ["", "prompts", "first", "second", "change"], rows)


def _shown(pair: Pair, first: RolloutGroup, second: RolloutGroup, strips: FrameStrips) -> Shown:
    prompt = first.prompt
    sides = [(name, [(completion.text, f"{score:g}", _verdict(consistent)) for completion, score, consistent in zip(
        group.completions, item["accuracy"], item["consistent"], strict=True)])
        for name, group, item in (("first", first, pair.before), ("second", second, pair.after))]
    return Shown(prompt.prompt_id, f"{pair.moved:+.2g}", prompt.text, prompt.gold, sides,
                 [strips.shown[strips.key(medium)] for medium in prompt.media])


def _verdict(consistent: bool | None) -> str:
    return "no verdict" if consistent is None else "consistent" if consistent else "contradicts its reasoning"


def _strips(folder: Path) -> FrameStrips:
    """Frames under the video contract that the evaluation noted."""
    noted = read_inputs(folder / "inputs.json").get("options")
    try:
        options = {name: json.loads(value) for name, value in (noted or {}).items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{folder / 'inputs.json'} is damaged: {error}; evaluate again") from error
    video = {name.removeprefix("video."): value for name, value in options.items() if name.startswith("video.")}
    return FrameStrips(video_contract({"video": video}), DEFAULT_FACTOR, Path(options.get("data.media_root") or "."))
