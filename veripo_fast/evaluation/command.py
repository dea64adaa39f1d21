"""Evaluate one checkpoint on the held-out files: `veripo eval`, and `veripo_fast.evaluate`."""

from __future__ import annotations

import itertools
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from veripo_fast.cache.loader import PromptLoader
from veripo_fast.config.schema import Config, DistributedConfig
from veripo_fast.data.prompts import load_prompts
from veripo_fast.data.remote import local_files
from veripo_fast.data.skipped import Skipped, SkippedLog
from veripo_fast.distributed.choice import check_backend, distribute
from veripo_fast.distributed.world import World, joined
from veripo_fast.errors import ConfigError
from veripo_fast.evaluation.evaluate import evaluate, summary
from veripo_fast.evaluation.progress import SKIPPED, Progress, check_same, provenance
from veripo_fast.model.checkpoint_files import adapter_folder, resolve_path
from veripo_fast.model.policy import load_policy
from veripo_fast.recipes.checked import check_functions, own_files
from veripo_fast.rollout.engine import make_engine
from veripo_fast.rollout.parity import gate_of
from veripo_fast.run.atomic import atomic_write_text
from veripo_fast.run.folder import check_out, make_out
from veripo_fast.run.inputs import take_inputs
from veripo_fast.run.jsonlines import dump_objects
from veripo_fast.run.lock import RunLock
from veripo_fast.text import rank_prefix
from veripo_fast.types import Prompt


def evaluate_policy(config: Config, out: Path | str | None = None) -> list[dict[str, Any]]:
    """Evaluate `model.path` on `data.eval`, greedy and sampled.

    Ranks that torchrun started share the prompts. One that was stopped goes on where it was, with the same result.

    Args:
        out: folder for evals.jsonl, the completions (MODE.parquet), a line for each prompt (MODE.jsonl), what was
            evaluated (inputs.json) and what was left out (skipped.jsonl); None: `eval` in the run folder.

    Returns:
        one record per mode, as evals.jsonl holds them; `skipped_records` were left out at load, `skipped_prompts`
        while decoding.

    Raises:
        UserError: data.eval is empty or cannot be used, the folder holds a part of another evaluation, or the
            checkpoint cannot be loaded.
    """
    with joined(config.distributed.timeout_seconds, config.model.device) as world, ExitStack() as held:
        folder = world.agreed(lambda: _checked_folder(config, out, world))
        prompts, skipped = world.agreed(lambda: load_prompts(config.data.eval, config.data))
        inputs = world.agreed(lambda: _inputs(config, folder))
        policy = world.agreed(lambda: load_policy(config.model))
        progress = world.agreed(lambda: _progress(folder, inputs, held) if world.main else None)
        distribute(policy, DistributedConfig(), world)  # nothing is trained, so nothing of DeepSpeed's is needed
        left_out: list[Skipped] = []
        log = SkippedLog(folder / SKIPPED) if world.main else None

        def skip(prompt: Prompt, reason: str) -> None:
            left_out.append(Skipped.of_prompt(prompt, reason))
            if log:
                log.add(left_out[-1])

        if log:
            log.add(*skipped)
        loader = PromptLoader(policy, config.video, config.data.max_prompt_tokens, skip, config.cache)
        try:
            engine = make_engine(config, policy)
            try:
                records = evaluate(engine, loader, prompts, config, stage="eval", world=world,
                                   rows=lambda mode: folder / f"{mode}.parquet", gate=gate_of(config, policy, engine),
                                   progress=progress, lines=lambda mode: folder / f"{mode}.jsonl")
            finally:
                engine.close()
        finally:
            loader.close()
        asked, others = len(prompts[:config.eval.limit]), world.gather(left_out)
        records = [record | {"skipped_records": len(skipped), "skipped_prompts": asked - record["prompts"]}
                   for record in records]
        if progress and log:
            log.add(*itertools.chain.from_iterable(others))
            atomic_write_text(folder / "evals.jsonl", dump_objects(records))
            progress.finish()
    return records


def _inputs(config: Config, folder: Path) -> dict[str, Any]:
    """What is evaluated; refused before the policy is loaded where the folder holds a part of something else."""
    taken = take_inputs(local_files(config.data.eval), resolve_path(config.model.path), own_files(config),
                        {"adapter": adapter_folder(config.model)})
    inputs = provenance(config, taken)
    check_same(folder, inputs)
    return inputs


def _progress(folder: Path, inputs: dict[str, Any], held: ExitStack) -> Progress:
    """Of the folder, which is this process's alone until `held` closes."""
    make_out(folder)
    held.enter_context(RunLock(folder))
    return Progress(folder, inputs)


def _checked_folder(config: Config, out: Path | str | None, world: World) -> Path:
    check_backend(config, world)
    if not config.data.eval:
        raise ConfigError("data.eval names no files to evaluate on")
    check_functions(config)
    folder = eval_folder(config, out)
    check_out(folder)
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
    folder = eval_folder(config, out)
    at_load, decoding = records[0]["skipped_records"], records[0]["skipped_prompts"]
    if at_load or decoding:
        print(f"skipped: {at_load} records at load, {decoding} while decoding; {folder / SKIPPED} says why")
    print(f"completions and scores: {folder}")
