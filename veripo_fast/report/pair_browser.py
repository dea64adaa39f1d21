"""Pairs to read: of every stage and family some, with question, frames, both sides, and the verdicts of the two."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.compute as pc

from veripo_fast.report.frames import FrameStrips, spread
from veripo_fast.report.run_data import Row, RunData, read_columns
from veripo_fast.report.verifier import PAIR_FIELDS, VERDICT_FIELDS, TokenText, blocks_of, cut, pair_side, shown_verdict
from veripo_fast.rollout.store import prompt_from_json
from veripo_fast.types import Prompt

PER_FAMILY = 12
"""Pairs of a stage and family."""
BUDGET_BYTES = 1_500_000
"""Of pairs and of the frames that no sample shows."""


def browse(run: RunData, media: Row) -> Row:
    """`shown`: pairs ready for JSON, and `total`; frames that are new are added to `media`, by key."""
    tokens, strips = TokenText(run), FrameStrips.of_run(run)
    shown: list[Row] = []
    total = size = 0
    for stage, step, source, path in _files(run):
        rows = [row | {"step": step} for row in read_columns(run, path, PAIR_FIELDS)]
        total += len(rows)
        chosen = _chosen(rows, [pair for pair in shown if pair["stage"] == stage])
        where = pc.field("prompt_id").isin(sorted({row["prompt_id"] for row in chosen}))
        prompts = _prompts(run, source, where, {row["prompt_id"] for row in chosen}) if chosen else {}
        verdicts = _verdicts(run, stage, where) if chosen and step is None else {}
        strips.load([medium for prompt in prompts.values() for medium in prompt.media])
        for row in chosen:
            record = _record(stage, row, prompts.get(row["prompt_id"]), verdicts, tokens, strips)
            fresh = {key: strips.shown[key] for key in record["media"] if key not in media}
            cost = len(json.dumps(record)) + sum(len(json.dumps(strip)) for strip in fresh.values())
            if size + cost <= BUDGET_BYTES:
                shown.append(record)
                media.update(fresh)
                size += cost
    return {"shown": shown, "total": total}


def _files(run: RunData) -> list[tuple[str, int | None, str, str]]:
    """Stage, step, the stage whose rollouts are paired, and the file, of every file of pairs."""
    files: list[tuple[str, int | None, str, str]] = []
    for stage in run.stages:
        folder = run.dir.verifier(stage.name)
        if (folder / "pairs.parquet").is_file():
            files.append((stage.name, None, stage.rollouts_from, str((folder / "pairs.parquet").relative_to(
                run.dir.root))))
        for path in spread(sorted((folder / "pairs").glob("step_*.parquet")), PER_FAMILY):
            files.append((stage.name, _step_of(path), stage.name, str(path.relative_to(run.dir.root))))
    return files


def _step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step_"))


def _chosen(rows: list[Row], before: list[Row]) -> list[Row]:
    """Some rows of each family, spread over the file; `before` are those of the stage that are shown already. Of a
    stage with a file for each step, each gives one of a family."""
    found: list[Row] = []
    for family in dict.fromkeys(row["family"] for row in rows):
        own = [row for row in rows if row["family"] == family]
        room = PER_FAMILY - sum(pair["family"] == family for pair in before)
        if room > 0:
            found += own[:1] if room == 1 or own[0]["step"] is not None else spread(own, room)
    return found


def _prompts(run: RunData, stage: str, where: pc.Expression, wanted: set[str]) -> dict[str, Prompt]:
    """The prompts of a stage's rollouts by id, until all are found."""
    found: dict[str, Prompt] = {}
    for path in run.dir.rollout_files(stage):
        if wanted <= found.keys():
            break
        for row in read_columns(run, str(path.relative_to(run.dir.root)), ["prompt_id", "prompt"], where):
            if row["prompt_id"] not in found:
                found[row["prompt_id"]] = prompt_from_json(row["prompt"])
    return found


def _verdicts(run: RunData, stage: str, where: pc.Expression) -> dict[tuple[str, int], Row]:
    """By prompt and completion, of prompts with one group: in several a completion's number names several."""
    rows = read_columns(run, f"verifier/{stage}/verdicts.parquet", VERDICT_FIELDS, where)
    return {(name, row["index"]): shown_verdict(row) for name, blocks in blocks_of(rows).items()
            for row in blocks[0] if len(blocks) == 1}


def _record(stage: str, row: Row, prompt: Prompt | None, verdicts: dict[tuple[str, int], Row], tokens: TokenText,
            strips: FrameStrips) -> Row:
    sides = {side: pair_side(row, side, tokens) | {"verdict": verdicts.get((row["prompt_id"], row[f"{side}_index"]))}
             for side in ("chosen", "rejected")}
    return {"stage": stage, "step": row["step"], "family": row["family"], "reason": row["reason"],
            "prompt_id": row["prompt_id"], "question": None if prompt is None else cut(prompt.text),
            "gold": "" if prompt is None else prompt.gold, "options": [] if prompt is None else list(prompt.options),
            "problem_type": "" if prompt is None else prompt.problem_type,
            "media": [] if prompt is None else [strips.key(medium) for medium in prompt.media], **sides}
