"""Verdicts, pairs and account on disk, and `veripo verify`: stored rollouts in, such a folder out.

pairs.parquet is written last, so its presence means that the folder is complete. The rollout package and the model are
imported where they are used: they bring torch, which the checks do not need.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from veripo_fast.config.schema import Config
from veripo_fast.distributed.world import World, joined
from veripo_fast.errors import DataError
from veripo_fast.reward.math_answers import math_budget
from veripo_fast.run.atomic import atomic_write_text
from veripo_fast.text import rank_prefix
from veripo_fast.types import PreferencePair
from veripo_fast.verifier.judge_likelihood import AnswerLogprobs
from veripo_fast.verifier.verify import VerifierResult, judged_by_all, make_judge, verify

_VERDICTS = pa.schema([
    ("group", pa.int64()), ("prompt_id", pa.string()), ("index", pa.int64()), ("accuracy", pa.float64()),
    ("format_ok", pa.bool_()), ("finished", pa.bool_()), ("length_tokens", pa.int64()), ("repetition", pa.float64()),
    ("consistent", pa.bool_()), ("supported_answer", pa.string()), ("judge_score", pa.float64()),
    ("flags", pa.list_(pa.string()))])
_PAIRS = pa.schema([
    ("prompt_id", pa.string()), ("family", pa.string()), ("chosen_ids", pa.list_(pa.int64())),
    ("rejected_ids", pa.list_(pa.int64())), ("chosen_loss_mask", pa.list_(pa.int8())),
    ("rejected_loss_mask", pa.list_(pa.int8())), ("chosen_text", pa.string()), ("rejected_text", pa.string()),
    ("chosen_index", pa.int64()), ("rejected_index", pa.int64()), ("reason", pa.string())])
_TUPLES = ("chosen_ids", "rejected_ids", "chosen_loss_mask", "rejected_loss_mask")


def write_result(folder: Path, result: VerifierResult) -> None:
    """Write verdicts.parquet (one row per completion, `group` is its group's number), account.json, pairs.parquet."""
    from veripo_fast.rollout.store import write_table

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pairs.parquet").unlink(missing_ok=True)
    rows = [{"group": number, **asdict(verdict)} for number, row in enumerate(result.verdicts) for verdict in row]
    write_table(pa.Table.from_pylist(rows, _VERDICTS), folder / "verdicts.parquet")
    atomic_write_text(folder / "account.json", json.dumps(result.account.to_json(), indent=2) + "\n")
    write_pairs(folder / "pairs.parquet", result.pairs)


def write_pairs(path: Path, pairs: Sequence[PreferencePair]) -> None:
    """A file that `read_pairs` reads."""
    from veripo_fast.rollout.store import write_table

    write_table(pa.Table.from_pylist([asdict(pair) for pair in pairs], _PAIRS), path)


def judge_cache(folder: Path, world: World) -> Path:
    """Where a rank keeps the verdicts of a judge that reads; each has its own, because no file takes appends of two."""
    return folder / (f"judge_cache_{world.rank}.jsonl" if world.rank else "judge_cache.jsonl")


def read_pairs(path: Path) -> list[PreferencePair]:
    """The pairs of a pairs.parquet, in the order they were written.

    Raises:
        DataError: not such a file.
    """
    try:
        rows = pq.read_table(path).select(_PAIRS.names).to_pylist()
    except (FileNotFoundError, pa.ArrowInvalid, KeyError) as error:
        raise DataError(f"{path} is not a file of preference pairs: {error}") from error
    for row in rows:
        row.update({name: tuple(row[name]) for name in _TUPLES})
    return [PreferencePair(**row) for row in rows]


def verify_files(paths: Sequence[Path], out: Path | None, config: Config,
                 model_path: str | None = None) -> VerifierResult:
    """Verify stored rollouts and write the result. Ranks that torchrun started share the judging.

    Args:
        paths: rollout files, or folders of step_*.parquet.
        out: folder of the result; None: `verifier` beside the first file.
        model_path: checkpoint whose tokenizer, and for the likelihood judge weights, are used; None: config.model.path.

    Raises:
        DataError: no rollouts there.
        JudgeError: the judge cannot give verdicts.
    """
    from veripo_fast.model.checkpoint_files import resolve_path
    from veripo_fast.model.encoding import PromptEncoder
    from veripo_fast.rollout.local_texts import LocalTexts
    from veripo_fast.rollout.store import read_groups

    with ExitStack() as stack:
        world = stack.enter_context(joined(config.distributed.timeout_seconds, config.model.device))
        files = world.agreed(lambda: _rollout_files(paths))
        out = out or files[0].parent / "verifier"
        config = replace(config, model=replace(config.model, path=model_path or config.model.path))
        encoder = world.agreed(lambda: PromptEncoder(resolve_path(config.model.path)))
        groups = world.on_main(lambda: [group for file in files for group in read_groups(file)])
        judge = make_judge(config.verifier, judge_cache(out, world), lambda: policy_scorer(config, stack),
                           LocalTexts(config, world.size > 1))
        with math_budget(config.reward.math_seconds_per_batch):
            result = verify(groups, config.verifier, judge, lambda text: len(encoder.encode_completion(text)),
                            encoder.encode_completion, encoder.eos_id, config.seed,
                            share=partial(judged_by_all, world, config.verifier.judge != "endpoint"))
        world.on_main(lambda: write_result(out, result))
    if not rank_prefix():
        print(f"{result.account.completions} completions, {len(result.pairs)} pairs, in {out}")
    return result


def _rollout_files(paths: Sequence[Path]) -> list[Path]:
    files: list[Path] = []
    for path in map(Path, paths):
        found = sorted(path.glob("step_*.parquet")) if path.is_dir() else [path] if path.is_file() else []
        if not found:
            raise DataError(f"{path} holds no rollouts; name a Parquet file or a folder of step_*.parquet")
        files += found
    return list(dict.fromkeys(files))


def policy_scorer(config: Config, stack: ExitStack) -> AnswerLogprobs:
    """Scores under the policy of the configuration; `stack` stops its decoding threads."""
    from veripo_fast.cache.loader import PromptLoader
    from veripo_fast.model.policy import load_policy
    from veripo_fast.model.scorer import answer_scorer

    policy = load_policy(config.model)
    loader = PromptLoader(policy, config.video, sys.maxsize, lambda prompt, reason: None, config.cache)
    stack.callback(loader.close)
    return answer_scorer(policy, loader.load_one)
