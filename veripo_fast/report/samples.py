"""Chooses the rollout groups that the report shows, and gathers what belongs to each: frames, verdicts, pairs.

A report is for reading: a few groups of the first, middle and last steps of every stage, groups with reward variance
and pairs first, until BUDGET_BYTES is reached. Ranks are interleaved over steps: a full budget cuts every step alike.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from veripo_fast.errors import DataError
from veripo_fast.report.frames import FrameStrips, spread
from veripo_fast.report.run_data import Row, RunData, finite, read_columns
from veripo_fast.report.verifier import GroupVerdicts, cut, verified_by
from veripo_fast.reward.score import scores_of
from veripo_fast.rollout.store import read_groups
from veripo_fast.types import Completion, RolloutGroup

STEPS_PER_STAGE = 5
GROUPS_PER_STEP = 4
BUDGET_BYTES = 6_500_000
"""Of samples and thumbnails; the rest of the page stays well under a megabyte."""


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
    verifier = {stage: GroupVerdicts(run, stage, {p.group.prompt.prompt_id for p in picks if p.stage == stage})
                for stage in {p.stage for p in picks}}
    strips = FrameStrips.of_run(run)
    strips.load([media for pick in sorted(picks, key=_priority) for media in pick.group.prompt.media])
    run_steps = {(stage.name, row.get("step")): row["global_step"] for stage in run.stages for row in stage.rows}
    kept, media, size = [], {}, 0
    for pick in sorted(picks, key=_priority):
        record = _record(pick, verifier[pick.stage], strips, run_steps.get((pick.stage, pick.step), pick.step))
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
    paired = {row["prompt_id"] for dpo in verified_by(run, stage)
              for row in read_columns(run, f"verifier/{dpo}/pairs.parquet", ["prompt_id"])}
    picks = []
    for path in spread(run.dir.rollout_files(stage), STEPS_PER_STAGE):
        groups = _groups(run, path)
        order = sorted(range(len(groups)), key=lambda i: _telling(groups[i], paired), reverse=True)
        picks += [Pick(rank, stage, stage_number, _step_of(path), number, groups[number])
                  for rank, number in enumerate(order[:GROUPS_PER_STEP])]
    return picks


def _telling(group: RolloutGroup, paired: set[str]) -> tuple[bool, bool, float]:
    rewards = scores_of(group, "reward")
    mean = sum(rewards) / len(rewards)
    variance = sum((reward - mean) ** 2 for reward in rewards)
    return variance > 0, group.prompt.prompt_id in paired, variance


def _groups(run: RunData, path: Path) -> list[RolloutGroup]:
    try:
        return read_groups(path)
    except (DataError, OSError, ValueError):
        run.notes.append(f"{path.relative_to(run.dir.root)} could not be read: it is damaged or no rollout file.")
        return []


def _step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step_"))


def _record(pick: Pick, verifier: GroupVerdicts, strips: FrameStrips, run_step: int) -> Row:
    prompt, completions = pick.group.prompt, pick.group.completions
    return {"stage": pick.stage, "step": pick.step, "run_step": run_step, "number": pick.number,
            "prompt_id": prompt.prompt_id, "problem_type": prompt.problem_type, "question": cut(prompt.text),
            "gold": prompt.gold, "options": list(prompt.options), "data_source": prompt.data_source,
            "media": [strips.key(media) for media in prompt.media],
            "completions": [_completion(c, verdict) for c, verdict in zip(
                completions, verifier.verdicts_of(pick.group, pick.step, pick.number), strict=True)],
            "pairs": verifier.pairs_of(pick.group)}


def _completion(completion: Completion, verdict: Row | None) -> Row:
    scores = {name: round(finite(getattr(completion, name)) or 0.0, 4)
              for name in ("accuracy", "format", "reward", "advantage")}
    return {"text": cut(completion.text), "tokens": len(completion.token_ids), "finish": completion.finish_reason,
            "version": completion.policy_version, "verdict": verdict, **scores}
