"""Chooses the rollout groups that the report shows, and gathers what belongs to each: frames, verdicts, pairs.

A report is for reading: a few groups of the first, middle and last steps of every stage, groups with reward variance
and pairs first, until BUDGET_BYTES is reached. Ranks are interleaved over steps: a full budget cuts every step alike.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import pyarrow.compute as pc

from veripo_fast.errors import DataError
from veripo_fast.report_data import Row, RunData, finite, plural, read_columns
from veripo_fast.report_frames import FrameStrips, TokenText, spread
from veripo_fast.rollout.store import read_groups
from veripo_fast.types import Completion, PreferencePair, RolloutGroup

STEPS_PER_STAGE = 5
GROUPS_PER_STEP = 4
BUDGET_BYTES = 6_500_000
"""Of samples and thumbnails; the rest of the page stays well under a megabyte."""
MAX_TEXT = 12_000
"""Characters of a completion that are shown."""


@dataclass
class Pick:
    """One chosen group."""

    rank: int
    """0 for the most telling group of its step."""
    stage: str
    stage_number: int
    step: int
    number: int
    """Index of the group in its step."""
    group: RolloutGroup


def collect(run: RunData) -> Row:
    """Everything the sample viewer shows, ready for JSON: `groups`, `media` (by key) and `left_out`."""
    picks = [pick for number, stage in enumerate(_rollout_stages(run)) for pick in _choose(run, stage, number)]
    if not picks:
        return {"groups": [], "media": {}, "left_out": 0}
    verifier = {stage: _Verifier(run, stage, [p for p in picks if p.stage == stage])
                for stage in {p.stage for p in picks}}
    strips = FrameStrips(run)
    strips.load([media for pick in sorted(picks, key=_priority) for media in pick.group.prompt.media])
    kept, media, size = [], {}, 0
    for pick in sorted(picks, key=_priority):
        record = _record(pick, verifier[pick.stage], strips)
        fresh = {key: strips.shown[key] for key in record["media"] if key not in media}
        cost = len(json.dumps(record)) + sum(len(json.dumps(strip)) for strip in fresh.values())
        if size + cost <= BUDGET_BYTES:
            kept.append((pick, record))
            media.update(fresh)
            size += cost
    kept.sort(key=lambda item: (item[0].stage_number, item[0].step, item[0].number))
    return {"groups": [record for _, record in kept], "media": media, "left_out": len(picks) - len(kept)}


def _priority(pick: Pick) -> tuple[int, int, int]:
    return pick.rank, pick.stage_number, pick.step


def _rollout_stages(run: RunData) -> list[str]:
    """Stages with rollouts on disk, in the order of the run."""
    folder = run.dir.root / "rollouts"
    found = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    known = [stage.name for stage in run.stages]
    return sorted(found, key=lambda name: known.index(name) if name in known else len(known))


def _choose(run: RunData, stage: str, stage_number: int) -> list[Pick]:
    """The groups of some steps of a stage, the most telling first in rank."""
    paired = {row["prompt_id"] for dpo in _verified_by(run, stage)
              for row in read_columns(run, f"verifier/{dpo}/pairs.parquet", ["prompt_id"])}
    picks = []
    for path in spread(run.dir.rollout_files(stage), STEPS_PER_STAGE):
        groups = _groups(run, path)
        order = sorted(range(len(groups)), key=lambda i: _telling(groups[i], paired), reverse=True)
        picks += [Pick(rank, stage, stage_number, _step_of(path), number, groups[number])
                  for rank, number in enumerate(order[:GROUPS_PER_STEP])]
    return picks


def _telling(group: RolloutGroup, paired: set[str]) -> tuple[bool, bool, float]:
    rewards = [completion.reward for completion in group.completions]
    mean = sum(rewards) / len(rewards)
    variance = sum((reward - mean) ** 2 for reward in rewards)
    return variance > 0, group.prompt.prompt_id in paired, variance


def _groups(run: RunData, path: Path) -> list[RolloutGroup]:
    try:
        return read_groups(path)
    except (DataError, OSError, ValueError) as error:
        run.notes.append(f"{path.relative_to(run.dir.root)} could not be read: {str(error).splitlines()[0]}.")
        return []


def _step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step_"))


def _verified_by(run: RunData, stage: str) -> list[str]:
    """The dpo stages that verified the rollouts of this stage."""
    return [dpo.name for dpo in run.stages if dpo.kind == "dpo" and dpo.rollouts_from == stage]


def _record(pick: Pick, verifier: _Verifier, strips: FrameStrips) -> Row:
    prompt, completions = pick.group.prompt, pick.group.completions
    return {"stage": pick.stage, "step": pick.step, "number": pick.number, "prompt_id": prompt.prompt_id,
            "problem_type": prompt.problem_type, "question": _cut(prompt.text), "gold": prompt.gold,
            "options": list(prompt.options), "data_source": prompt.data_source,
            "media": [strips.key(media) for media in prompt.media],
            "completions": [_completion(c, verifier.verdict(prompt.prompt_id, i, c))
                            for i, c in enumerate(completions)],
            "pairs": verifier.pairs_of(pick.group)}


def _completion(completion: Completion, verdict: Row | None) -> Row:
    scores = {name: round(finite(getattr(completion, name)) or 0.0, 4)
              for name in ("accuracy", "format", "reward", "advantage")}
    return {"text": _cut(completion.text), "tokens": len(completion.token_ids), "finish": completion.finish_reason,
            "version": completion.policy_version, "verdict": verdict, **scores}


def _cut(text: str) -> str:
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}\n… {plural(len(text) - MAX_TEXT, 'character')} more"


class _Verifier:
    """Verdicts and pairs of the chosen groups of one stage."""

    def __init__(self, run: RunData, stage: str, picks: Iterable[Pick]) -> None:
        ids = sorted({pick.group.prompt.prompt_id for pick in picks})
        chosen = pc.field("prompt_id").isin(ids)
        self.verdicts: dict[tuple[str, int], list[Row]] = {}
        self.pairs: dict[str, list[Row]] = {}
        self.tokens = TokenText(run)
        for dpo in _verified_by(run, stage):
            for row in read_columns(run, f"verifier/{dpo}/verdicts.parquet", list(_VERDICT_FIELDS), chosen):
                self.verdicts.setdefault((row["prompt_id"], row["index"]), []).append(row)
            for row in read_columns(run, f"verifier/{dpo}/pairs.parquet", list(_PAIR_FIELDS), chosen):
                self.pairs.setdefault(row["prompt_id"], []).append(row)

    def verdict(self, prompt_id: str, index: int, completion: Completion) -> Row | None:
        """The verdict of a completion. A prompt may occur in several steps: the one whose facts agree."""
        for row in self.verdicts.get((prompt_id, index), ()):
            if row["accuracy"] == completion.accuracy and row["finished"] == (completion.finish_reason == "stop"):
                return {"flags": list(row["flags"] or ()), "consistent": row["consistent"],
                        "supported": row["supported_answer"], "repetition": finite(row["repetition"]) or 0.0,
                        "think_tokens": row["length_tokens"], "judge_score": finite(row["judge_score"])}
        return None

    def pairs_of(self, group: RolloutGroup) -> list[Row]:
        """The pairs whose completions are those of this group."""
        return [{"family": row["family"], "reason": row["reason"],
                 "chosen": self._side(row, "chosen"), "rejected": self._side(row, "rejected")}
                for row in self.pairs.get(group.prompt.prompt_id, ()) if _from_group(row, group)]

    def _side(self, row: Row, side: str) -> Row:
        ids, mask = row[f"{side}_ids"], row[f"{side}_loss_mask"]
        runs = None if all(mask) else self.tokens.runs(ids, mask)
        return {"index": row[f"{side}_index"], "text": _cut(row[f"{side}_text"]), "tokens": len(ids),
                "loss_tokens": sum(1 for bit in mask if bit), "runs": runs}


_VERDICT_FIELDS = ("prompt_id", "index", "accuracy", "finished", "length_tokens", "repetition", "consistent",
                   "supported_answer", "judge_score", "flags")
_PAIR_FIELDS = tuple(field.name for field in fields(PreferencePair))


def _from_group(row: Row, group: RolloutGroup) -> bool:
    """Whether the pair was built from this very group: its completions have the same tokens."""
    for side in ("chosen", "rejected"):
        index = row[f"{side}_index"]
        if index >= 0:
            return index < len(group.completions) and _begins_alike(
                group.completions[index].token_ids, row[f"{side}_ids"])
    return True


def _begins_alike(left: Sequence[int], right: Sequence[int]) -> bool:
    count = min(len(left), len(right))
    return count > 0 and list(left[:count]) == list(right[:count])
