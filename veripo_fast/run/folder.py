"""What lies where in a run folder: the one place that knows the names.

    RUN/
      config.yaml            resolved configuration
      inputs.json            fingerprints of data and model, versions, every command that worked on the run
      media.jsonl            what each medium was when it was first used
      .lock                  who works in the folder
      metrics.jsonl          one line per optimizer phase (see stages/session.py): stage, step, losses, rewards, seconds
      memory.json            what each phase of each stage was predicted to hold, by owner, before the run began
      memory.jsonl           one line per finished stage: most bytes held in each phase, beside the prediction
      timeline.jsonl         one line per step, and for what is done between two: spans, waits and counters of each rank
      evals.jsonl            one line per evaluation: stage, mode (greedy or sampled), scores with bootstrap intervals
      skipped.jsonl          media and records that were left out, each with its reason
      rollouts/STAGE/step_000000.parquet
      contrasts/STAGE/step_000000.parquet  completions that saw their frames in another order (plan.contrast)
      verifier/STAGE/verdicts.parquet, pairs.parquet, account.json
      verifier/STAGE/pairs/step_000000.parquet  pairs of a GRPO step's own rollouts (grpo.dpo_rate)
      eval/STAGE_MODE.parquet  every evaluated completion
      checkpoints/step_000000/  HF checkpoint + trainer/ state; `checkpoints/latest` names the newest complete one;
                             the last one of a finished run has a model card, README.md
      tensorboard/
      trackers.json          what trackio and wandb know the run by; wandb/ holds what wandb notes
      report.html
"""

from __future__ import annotations

import os
from pathlib import Path

from veripo_fast.errors import ConfigError


class RunDir:
    """Paths inside one run folder; creates nothing by itself."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.config = self.root / "config.yaml"
        self.metrics = self.root / "metrics.jsonl"
        self.inputs = self.root / "inputs.json"
        self.media = self.root / "media.jsonl"
        self.memory = self.root / "memory.jsonl"
        self.timeline = self.root / "timeline.jsonl"
        self.memory_plan = self.root / "memory.json"
        self.evals = self.root / "evals.jsonl"
        self.skipped = self.root / "skipped.jsonl"
        self.checkpoints = self.root / "checkpoints"
        self.tensorboard = self.root / "tensorboard"
        self.report = self.root / "report.html"

    def rollouts(self, stage: str, step: int) -> Path:
        return self.root / "rollouts" / stage / f"step_{step:06d}.parquet"

    def contrasts(self, stage: str, step: int) -> Path:
        return self.root / "contrasts" / stage / f"step_{step:06d}.parquet"

    def rollout_files(self, stage: str) -> list[Path]:
        return sorted((self.root / "rollouts" / stage).glob("step_*.parquet"))

    def verifier(self, stage: str) -> Path:
        return self.root / "verifier" / stage

    def step_pairs(self, stage: str, step: int) -> Path:
        return self.verifier(stage) / "pairs" / f"step_{step:06d}.parquet"

    def eval_rows(self, stage: str, mode: str) -> Path:
        return self.root / "eval" / f"{stage}_{mode}.parquet"


def check_out(folder: Path) -> None:
    """Refuse a folder of results that could not be made or written, before they cost anything.

    Raises:
        ConfigError: naming what is in the way.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ConfigError(f"--out {folder} is not a folder" if there == folder else
                          f"--out {folder} cannot be made: {there} is not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"--out {folder} cannot be written: {there} is read-only for this user")


def make_out(folder: Path) -> None:
    """Make a folder of results, or take the one that is there. Raises ConfigError."""
    check_out(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # some file systems take no folder, whoever asks
        raise ConfigError(f"--out {folder} cannot be made: {error.strerror or error}") from error
