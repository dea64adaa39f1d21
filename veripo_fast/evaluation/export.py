"""`veripo export-lmms-eval`: an evaluation in the files that lmms-eval writes with `--log_samples`.

The form is that of EvolvingLMMs-Lab/lmms-eval at commit 0716c69 (lmms_eval/loggers/evaluation_tracker.py, evaluator.py;
MIT): `MODEL/DATE_results.json`, and for the task `MODEL/DATE_samples_TASK.jsonl`, whose lines hold `input` in place of
the document. Names and hashes are made as there. The metrics are ours, under names of our own (`veripo_accuracy`): a
task of lmms-eval scores by its own rules, which these files cannot stand for.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from veripo_fast.errors import UserError
from veripo_fast.evaluation.compare import items_in
from veripo_fast.rollout.store import read_groups
from veripo_fast.run.atomic import atomic_write_text
from veripo_fast.run.folder import make_out
from veripo_fast.run.inputs import read_inputs
from veripo_fast.run.jsonlines import read_objects
from veripo_fast.types import RolloutGroup

_UNSAFE = re.compile(r"[\"<>:/\|\\?\*\[\]]+")
METRICS = ("veripo_accuracy", "veripo_format", "veripo_inconsistent")


def export(folder: Path, out: Path, mode: str, task: str, model: str) -> list[Path]:
    """Write the results and the samples of a mode of a finished evaluation; returns the files.

    Args:
        folder: of `veripo eval`. out: as `--output_path` of lmms-eval.
        task: name of the task. model: name of the model, which an evaluation knows by its fingerprint alone.

    Raises:
        UserError: the folder holds no finished evaluation or no such mode, or the files cannot be written.
    """
    modes = items_in(folder)
    if mode not in modes:
        raise UserError(f"{folder} has {', '.join(modes)}, and no mode {mode}")
    if not re.fullmatch(r"\w+", task):
        raise UserError(f"--task {task} may hold letters, digits and _ alone, because the name of a file holds it")
    path = folder / f"{mode}.parquet"
    if not path.is_file():
        raise UserError(f"{path} is missing: it holds the completions; evaluate again")
    items = list(modes[mode].values())
    groups = {group.prompt.prompt_id: group for group in read_groups(path)}
    lost = [item["prompt_id"] for item in items if item["prompt_id"] not in groups]
    if lost:
        raise UserError(f"{path} and {mode}.jsonl are of two evaluations: prompt {lost[0]} is in one of them; evaluate "
                        "again")
    samples = [_sample(number, item, groups[item["prompt_id"]]) for number, item in enumerate(items)]
    inputs = read_inputs(folder / "inputs.json")
    record = next(row for row in read_objects(folder / "evals.jsonl")[0] if row.get("mode") == mode)
    began = datetime.fromtimestamp((folder / "evals.jsonl").stat().st_mtime)
    stamp = began.strftime("%Y%m%d_%H%M%S")
    target = out / model_folder(model)
    make_out(target)
    files = [target / f"{stamp}_results.json", target / f"{stamp}_samples_{task}.jsonl"]
    results = _results(task, samples, record, inputs, model, began)
    atomic_write_text(files[0], json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False))
    atomic_write_text(files[1], "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples))
    return files


def model_folder(name: str) -> str:
    """The name of a model as a folder: its last two parts, with what no file system takes written `__`."""
    return _UNSAFE.sub("__", "/".join(name.rstrip("/").split("/")[-2:]))


def _sample(number: int, item: Mapping[str, Any], group: RolloutGroup) -> dict[str, Any]:
    """A line: one request per prompt, with all of its completions as its responses, and their answers behind the
    filter."""
    document = {"id": item["prompt_id"], "question": item["question"], "options": list(group.prompt.options),
                "answer": item["gold"], "media": item["media"], "data_source": item["data_source"],
                "problem_type": item["problem_type"]}
    texts = [completion.text for completion in group.completions]
    answers = [answer or "" for answer in item["answers"]]
    inconsistent = [verdict is False for verdict in item["consistent"]]
    values = zip(METRICS, (item["accuracy"], item["format"], inconsistent), strict=True)
    return {"doc_id": number, "target": item["gold"], "resps": [texts], "filtered_resps": answers,
            "doc_hash": _sha256(json.dumps(document, indent=2, ensure_ascii=False)),
            "prompt_hash": _sha256(item["question"]), "target_hash": _sha256(item["gold"]),
            **{name: _mean(those) for name, those in values}, "input": item["question"]}


def _results(task: str, samples: Sequence[Mapping[str, Any]], record: Mapping[str, Any], inputs: Mapping[str, Any],
             name: str, began: datetime) -> dict[str, Any]:
    options = inputs.get("options") or {}
    scores: dict[str, Any] = {"alias": task}
    for metric in METRICS:
        values = [sample[metric] for sample in samples]
        scores[f"{metric},none"] = _mean(values)
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
        scores[f"{metric}_stderr,none"] = "N/A" if error is None else error
    hashes = "".join(f"sample_{number}{sample['doc_hash']}" for number, sample in enumerate(samples))
    generation = {key: options.get(f"rollout.{key}") for key in ("temperature", "top_p", "top_k", "max_new_tokens")}
    return {"results": {task: scores}, "group_subtasks": {task: []},
            "configs": {task: {"task": task, "output_type": "generate_until", "metadata": {"version": "veripo"}}},
            "versions": {task: "veripo"}, "n-shot": {task: 0},
            "higher_is_better": {task: {metric: metric != METRICS[2] for metric in METRICS}},
            "n-samples": {task: {"original": len(samples) + record.get("skipped_records", 0)
                                 + record.get("skipped_prompts", 0), "effective": len(samples)}},
            "config": {"model": "veripo_fast", "model_args": f"pretrained={name}", "gen_kwargs": generation,
                       "mode": record["mode"], "versions": inputs.get("versions") or {}},
            "date": began.timestamp(), "task_hashes": {task: _sha256(hashes)}, "model_source": "veripo_fast",
            "model_name": name, "model_name_sanitized": model_folder(name), "system_instruction": None,
            "system_instruction_sha": None, "fewshot_as_multiturn": False, "chat_template": None,
            "chat_template_sha": None, "total_evaluation_time_seconds": str(record.get("seconds", ""))}


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", errors="replace")).hexdigest()


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
