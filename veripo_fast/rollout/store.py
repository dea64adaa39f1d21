"""Rollouts on disk: one Parquet file per GRPO step, one row per completion, written atomically.

Columns: stage, step, policy_version, prompt_id, problem_type, gold, group (index in the step), index (in the group),
prompt (JSON of the whole Prompt), think_opened, token_ids, text, rollout_logprobs, finish_reason, accuracy, format,
reward, advantage, columns (JSON of the number of each term of the reward). Files without think_opened or columns were
written before these existed; there they mean false and none. With `rollout.router_replay` there are two more, experts
and prompt_experts (in the first row of each group): int16 as in `types.py`, which an update alone reads.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from veripo_fast.errors import DataError
from veripo_fast.run.atomic import atomic_open
from veripo_fast.types import Completion, Form, Image, Message, Prompt, RolloutGroup, Sampling, Video

_SCORES = ("accuracy", "format", "reward", "advantage")
_TOLD = ("reference_logprobs", "answer_tokens", "frame_likeness")
"""What rewards were told, which a stored group that has its rewards needs no more."""
_EXPERTS = ("experts", "prompt_experts")


def prompt_to_json(prompt: Prompt) -> str:
    """The whole prompt as JSON; media are objects with a `video` or `image` key."""

    def part(value: str | Video | Image) -> Any:
        if isinstance(value, str):
            return value
        sampling = {} if value.sampling is None else {"sampling": asdict(value.sampling)}
        if isinstance(value, Image):
            return {"image": value.path, **sampling}
        frames = {} if not value.frames else {"frames": list(value.frames)}
        fps = {} if value.frame_fps is None else {"frame_fps": value.frame_fps}
        return {"video": value.path, "start_seconds": value.start_seconds, "end_seconds": value.end_seconds,
                **sampling, **frames, **fps}

    record = asdict(prompt)
    record["messages"] = [{"role": m.role, "parts": [part(p) for p in m.parts]} for m in prompt.messages]
    return json.dumps(record, ensure_ascii=False)


def prompt_from_json(text: str) -> Prompt:
    """Inverse of `prompt_to_json`."""

    def part(value: Any) -> str | Video | Image:
        if isinstance(value, str):
            return value
        sampling = Sampling(**value["sampling"]) if "sampling" in value else None
        if "image" in value:
            return Image(value["image"], sampling)
        return Video(value["video"], value["start_seconds"], value["end_seconds"], sampling,
                     tuple(value.get("frames", ())), value.get("frame_fps"))

    record = json.loads(text)
    record["messages"] = tuple(
        Message(m["role"], tuple(part(p) for p in m["parts"])) for m in record["messages"])
    record["options"] = tuple(record["options"])
    if form := record.get("form"):
        record["form"] = Form(tuple(form["tags"]), form["pattern"])
    return Prompt(**record)


def write_table(table: pa.Table, path: Path) -> None:
    """Write Parquet so that `path` either holds the whole table or does not exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_open(path) as file:
        pq.write_table(table, file, compression="zstd")


def write_groups(path: Path, groups: Iterable[RolloutGroup], stage: str, step: int, *, experts: bool = False) -> None:
    """Store the groups of one step, and where they have them the `experts` that the engine chose."""
    rows = []
    for number, group in enumerate(groups):
        prompt = prompt_to_json(group.prompt)
        for index, completion in enumerate(group.completions):
            fields = {name: value for name, value in asdict(completion).items() if name not in (*_TOLD, *_EXPERTS)}
            if experts and group.prompt_experts is not None:
                fields |= {"experts": completion.experts, "prompt_experts": None if index else group.prompt_experts}
            rows.append({"stage": stage, "step": step, "prompt_id": group.prompt.prompt_id,
                         "problem_type": group.prompt.problem_type, "gold": group.prompt.gold,
                         "group": number, "index": index, "prompt": prompt,
                         "think_opened": group.think_opened, **fields,
                         "columns": json.dumps(completion.columns)})
    write_table(pa.Table.from_pylist(rows), path)


def read_groups(path: Path, *, experts: bool = False) -> list[RolloutGroup]:
    """Read one step back, groups and completions in the order they were written.

    Args:
        experts: whether to read those that the engine chose, too, which are many bytes.
    """
    try:
        names = pq.read_schema(path).names
        rows = pq.read_table(path, columns=[name for name in names if experts or name not in _EXPERTS]).to_pylist()
        groups: dict[int, RolloutGroup] = {}
        for row in rows:
            group = groups.setdefault(row["group"], RolloutGroup(
                prompt_from_json(row["prompt"]), [], row.get("think_opened", False),
                prompt_experts=row.get("prompt_experts")))
            group.completions.append(Completion(
                token_ids=row["token_ids"], text=row["text"], rollout_logprobs=row["rollout_logprobs"],
                finish_reason=row["finish_reason"], policy_version=row["policy_version"],
                columns=json.loads(row.get("columns") or "{}"), experts=row.get("experts"),
                **{name: row[name] for name in _SCORES}))
    except (pa.ArrowInvalid, KeyError, ValueError, TypeError) as error:
        raise DataError(f"{path} is not a rollout file of veripo: {error}") from error
    return list(groups.values())
