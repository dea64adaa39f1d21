"""Evaluate one checkpoint on the held-out files: `veripo eval`, and `veripo_fast.evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from veripo_fast.cache.loader import PromptLoader
from veripo_fast.config.schema import Config, DistributedConfig
from veripo_fast.data.prompts import load_prompts
from veripo_fast.distributed.choice import check_backend, distribute
from veripo_fast.distributed.world import World, joined
from veripo_fast.errors import ConfigError
from veripo_fast.evaluation.evaluate import evaluate, summary
from veripo_fast.model.policy import load_policy
from veripo_fast.recipes.checked import check_functions
from veripo_fast.rollout.engine import make_engine
from veripo_fast.rollout.parity import gate_of
from veripo_fast.run.atomic import atomic_write_text
from veripo_fast.run.jsonlines import dump_objects
from veripo_fast.text import rank_prefix


def evaluate_policy(config: Config, out: Path | str | None = None) -> list[dict[str, Any]]:
    """Evaluate `model.path` on `data.eval`, greedy and sampled.

    Ranks that torchrun started share the prompts.

    Args:
        out: folder for evals.jsonl and the completions; None: `eval` in the run folder.

    Returns:
        one record per mode, as evals.jsonl holds them; `skipped_records` were left out at load, `skipped_prompts`
        while decoding.

    Raises:
        UserError: data.eval is empty or cannot be used, or the checkpoint cannot be loaded.
    """
    with joined(config.distributed.timeout_seconds, config.model.device) as world:
        folder = world.agreed(lambda: _checked_folder(config, out, world))
        prompts, skipped = load_prompts(config.data.eval, config.data)
        policy = load_policy(config.model)
        distribute(policy, DistributedConfig(), world)  # nothing is trained, so nothing of DeepSpeed's is needed
        loader = PromptLoader(policy, config.video, config.data.max_prompt_tokens, lambda prompt, reason: None,
                              config.cache)
        try:
            engine = make_engine(config, policy)
            try:
                records = evaluate(engine, loader, prompts, config, stage="eval", world=world,
                                   rows=lambda mode: folder / f"{mode}.parquet", gate=gate_of(config, policy, engine))
            finally:
                engine.close()
        finally:
            loader.close()
        bad = set().union(*world.gather(set(loader.bad)))
        counts = {"skipped_records": len(skipped), "skipped_prompts": len(bad)}
        records = [record | counts for record in records]
        if world.main:
            atomic_write_text(folder / "evals.jsonl", dump_objects(records))
    return records


def _checked_folder(config: Config, out: Path | str | None, world: World) -> Path:
    check_backend(config, world)
    if not config.data.eval:
        raise ConfigError("data.eval names no files to evaluate on")
    check_functions(config)
    folder = eval_folder(config, out)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--out {folder} is not a folder")
    return folder


def eval_folder(config: Config, out: Path | str | None) -> Path:
    """Where an evaluation is written."""
    return Path(out) if out else Path(config.run_dir) / "eval"


def evaluate_command(config: Config, out: Path | None) -> None:
    """`veripo eval`: evaluate and print one line per mode; of several ranks the first one prints."""
    records = evaluate_policy(config, out)
    if rank_prefix():
        return
    for record in records:
        print(summary(record))
    at_load, decoding = records[0]["skipped_records"], records[0]["skipped_prompts"]
    if at_load or decoding:
        print(f"skipped: {at_load} records at load, {decoding} while decoding")
    print(f"completions and scores: {eval_folder(config, out)}")
