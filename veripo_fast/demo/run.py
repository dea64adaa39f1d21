"""`veripo demo`: the whole loop on a laptop, from rendering the clips to the report.

GRPO -> verifier -> DPO -> GRPO on real H.264 files with the tiny policy shipped in the package, held-out evaluation
before and after every stage.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from veripo_fast.config.alignment import DpoConfig
from veripo_fast.config.inputs import DataConfig, ModelConfig, VideoConfig
from veripo_fast.config.load import check_stages, load_config, with_options
from veripo_fast.config.objectives import GrpoConfig, RolloutConfig, VerifierConfig
from veripo_fast.config.schema import CheckpointConfig, Config, EvalConfig, OptimizerConfig, StageConfig
from veripo_fast.distributed.world import joined
from veripo_fast.errors import ConfigError
from veripo_fast.evaluation.intervals import paired_difference
from veripo_fast.report.page import write_report
from veripo_fast.reward.score import scores_of
from veripo_fast.run.folder import RunDir
from veripo_fast.run.metrics import read_records
from veripo_fast.text import rank_prefix

TRAIN, HELDOUT = 480, 180
TRAIN_QUICK, HELDOUT_QUICK = 48, 24


def demo_config(out: Path, seed: int, quick: bool) -> Config:
    """The demo's configuration: VerIPO's loop at the scale of a tiny policy, whose learning rates are larger."""
    corpus = out / "corpus"
    return check_stages(Config(
        run_dir=str(out / "run"), seed=seed,
        model=ModelConfig(path="tiny"),
        video=VideoConfig(fps=None, num_frames=8, min_pixels=32 * 32, max_pixels=10_000),
        data=DataConfig(train=(str(corpus / "train.jsonl"),), eval=(str(corpus / "heldout.jsonl"),)),
        rollout=RolloutConfig(group_size=8, temperature=1.0, max_new_tokens=80),
        grpo=GrpoConfig(steps=2 if quick else 40, prompts_per_step=8 if quick else 24, learning_rate=3e-4,
                        clip_high=0.28),
        verifier=VerifierConfig(families=("consistency", "repetition")),
        dpo=DpoConfig(learning_rate=1e-4, pairs_per_step=32, nll_coef=0.1, max_steps=2 if quick else 20),
        optimizer=OptimizerConfig(max_tokens=8192),
        checkpoint=CheckpointConfig(every=20, keep=2),
        eval=EvalConfig(samples=2 if quick else 4, prompts_per_batch=60),
        stages=(StageConfig("grpo"), StageConfig("dpo"),
                StageConfig("grpo", set={"grpo.learning_rate": 1.5e-4, "grpo.drop_easy": 0.8,
                                         "grpo.steps": 2 if quick else 20}))))


def run_demo(out: Path, seed: int, quick: bool, options: Sequence[str] = ()) -> None:
    """Make the corpus, run the loop, write the report, and say how accuracy and consistency moved.

    A run that was stopped goes on where it was. `options` are those of `veripo train`, as typed. Raises
    ConfigError when `out` holds another demo.
    """
    from veripo_fast.trainer import train

    started = time.monotonic()
    config = with_options(demo_config(out, seed, quick), options)
    run = RunDir(config.run_dir)
    with joined(config.distributed.timeout_seconds, config.model.device) as world:
        begun = world.on_main(lambda: _prepared(run, config, out / "corpus", quick))
        train(config, resume=begun)
    if rank_prefix():
        return
    report = write_report(run.root)
    for line in headline(run):
        print(line)
    print(f"took {(time.monotonic() - started) / 60:.1f} minutes; report: {report}")


def _prepared(run: RunDir, config: Config, corpus: Path, quick: bool) -> bool:
    """Make the corpus, unless it is there; returns whether the run has begun before."""
    from veripo_fast.demo.corpus import write_corpus

    _check_same(run, config)
    begun = run.config.is_file()
    if not (corpus / "heldout.jsonl").is_file() or not begun:
        _remove_unfinished(corpus)
        write_corpus(corpus, TRAIN_QUICK if quick else TRAIN, HELDOUT_QUICK if quick else HELDOUT, config.seed)
    return begun


def _check_same(run: RunDir, config: Config) -> None:
    if run.config.is_file() and load_config(run.config) != config:
        raise ConfigError(f"{run.root} holds a demo with another seed, size or options; name another folder with --out")


def _remove_unfinished(corpus: Path) -> None:
    """A corpus that a kill left half rendered; only what `write_corpus` makes is touched."""
    for pattern in ("clips/*.mp4", "*.jsonl"):
        for file in corpus.glob(pattern):
            file.unlink()
    if (corpus / "clips").is_dir():
        (corpus / "clips").rmdir()


def headline(run: RunDir) -> list[str]:
    """How held-out accuracy moved from the start to the end, and inconsistency over the DPO stages."""
    lines = []
    records = read_records(run.evals)
    for mode in ("greedy", "sampled"):
        rows = {record["stage"]: record for record in records if record["mode"] == mode}
        if len(rows) < 2:
            continue
        names = list(rows)
        first, last = names[0], names[-1]
        change = paired_difference(prompt_accuracy(run, first, mode), prompt_accuracy(run, last, mode))
        lines.append(f"held-out accuracy, {mode}: {rows[first]['accuracy']:.1%} -> {rows[last]['accuracy']:.1%} "
                     f"({100 * change.mean:+.1f} points, 95 % interval {100 * change.low:+.1f} to "
                     f"{100 * change.high:+.1f})")
        for before, after in pairwise(names):
            if after.startswith("dpo"):
                lines.append(f"think/answer inconsistency over {after}, {mode}: "
                             f"{rows[before]['inconsistency_rate']:.1%} -> {rows[after]['inconsistency_rate']:.1%}")
    return lines


def prompt_accuracy(run: RunDir, stage: str, mode: str) -> list[float]:
    """Mean accuracy of each held-out prompt, by prompt id, from the stored completions."""
    from veripo_fast.rollout.store import read_groups

    groups = sorted(read_groups(run.eval_rows(stage, mode)), key=lambda group: group.prompt.prompt_id)
    return [sum(scores_of(group, "accuracy")) / len(group.completions) for group in groups]
