"""`veripo eval`: evaluate one checkpoint on the held-out files."""

from __future__ import annotations

from pathlib import Path

from veripo_fast.cache.loader import PromptLoader
from veripo_fast.config.schema import Config
from veripo_fast.errors import ConfigError
from veripo_fast.evaluation.evaluate import evaluate, summary
from veripo_fast.model.policy import load_policy
from veripo_fast.rollout.engine import make_engine
from veripo_fast.run.atomic import atomic_write_text
from veripo_fast.run.jsonlines import dump_objects


def evaluate_command(config: Config, out: Path | None) -> None:
    """`veripo eval`: evaluate `model.path` on `data.eval` and print one line per mode.

    With `out`, evals.jsonl and the completions are written there.
    """
    from veripo_fast.data.prompts import load_prompts

    if not config.data.eval:
        raise ConfigError("data.eval names no files to evaluate on")
    prompts, skipped = load_prompts(config.data.eval, config.data)
    policy = load_policy(config.model)
    loader = PromptLoader(policy, config.video, config.data.max_prompt_tokens, lambda prompt, reason: None,
                          config.cache)
    folder = out or Path(config.run_dir) / "eval"
    try:
        records = evaluate(make_engine(config, policy), loader, prompts, config, stage="eval",
                           rows=lambda mode: folder / f"{mode}.parquet")
    finally:
        loader.close()
    atomic_write_text(folder / "evals.jsonl", dump_objects(records))
    for record in records:
        print(summary(record))
    if skipped or loader.bad:
        print(f"skipped: {len(skipped)} records at load, {len(loader.bad)} while decoding")
    print(f"completions and scores: {folder}")
