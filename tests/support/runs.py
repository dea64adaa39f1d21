"""Small real runs for the tests of the trainer: mp4 clips with questions, a policy that answers them, a configuration.

A random policy earns no reward, so nothing would be learned, verified or aligned. This one is taught in a few seconds
to write `<think>so X.</think><answer>Y</answer>` with answers that vary and do not always agree.
"""

from __future__ import annotations

import fcntl
import json
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import numpy as np
import torch
from PIL import Image as Picture

from tests.support.forks import Ended, Forks, forks
from veripo_fast.cache.loader import PromptLoader
from veripo_fast.config.inputs import DataConfig, ModelConfig, VideoConfig
from veripo_fast.config.load import apply_overrides
from veripo_fast.config.schema import Config
from veripo_fast.data.prompts import load_prompts
from veripo_fast.demo import tiny_model
from veripo_fast.demo.corpus import write_corpus
from veripo_fast.model.packing import pack
from veripo_fast.model.policy import load_policy, save_policy
from veripo_fast.types import Prompt

__all__ = ["Ended", "Forks", "config", "corpus", "folder", "forks", "model"]
VIDEO = VideoConfig(fps=None, num_frames=4, min_pixels=1024, max_pixels=4096)
TRAIN, HELDOUT = 6, 4


@cache
def folder() -> Path:
    """Shared by the xdist workers of one test run."""
    path = Path(gettempdir()) / f"veripo-runs-{os.environ.get('PYTEST_XDIST_TESTRUNUID', os.getpid())}"
    path.mkdir(exist_ok=True)
    return path


@contextmanager
def made_once(name: str) -> Iterator[tuple[Path, bool]]:
    """(folder()/name, whether the caller has to fill it), one process at a time."""
    path = folder() / name
    with (folder() / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = folder() / f"{name}.done"
        yield path, not done.exists()
        done.touch()


@cache
def corpus() -> Path:
    """train.jsonl: questions on clips, one on a picture, one on text; heldout.jsonl: questions on other clips."""
    with made_once("corpus") as (path, new):
        if new:
            write_corpus(path, TRAIN, HELDOUT, seed=0)
            pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
            Picture.fromarray(pixels).save(path / "picture.png")
            with (path / "train.jsonl").open("a") as file:
                for record in ({"problem_id": "picture", "problem": "How many shapes?", "path": "picture.png",
                                "data_type": "image", "problem_type": "numerical", "solution": "2"},
                               {"problem_id": "text", "problem": "Which is up?", "problem_type": "multiple choice",
                                "data_type": "text", "options": ["A. top", "B. left"], "solution": "A"}):
                    file.write(json.dumps(record) + "\n")
    return path


@cache
def model(family: str = "qwen3_vl") -> Path:
    """A checkpoint that answers the questions of `corpus`, rightly about every second time."""
    with made_once(family) as (path, new):
        if new:
            tiny_model.init_model(folder() / f"{family}-random", family, seed=1)
            teach(folder() / f"{family}-random", path)
    return path


def teach(start: Path, out: Path, steps: int = 40) -> None:
    """Teacher forcing on a handful of prompts, `steps` times with other answers."""
    rng = random.Random(0)
    policy = load_policy(ModelConfig(path=str(start), device="cpu"))
    data = corpus()
    prompts, _ = load_prompts([str(data / "train.jsonl"), str(data / "heldout.jsonl")], DataConfig())
    loader = PromptLoader(policy, VIDEO, 4096, lambda prompt, reason: None)
    loaded = loader.load(prompts)
    loader.close()
    encoder = policy.encoder
    optimizer = torch.optim.AdamW([p for _, p in policy.parameters()], lr=2e-3, betas=(0.9, 0.95))
    for step in range(steps):
        groups = [(item.encoded, [[*encoder.encode_completion(answer(item.prompt, rng)), encoder.eos_id]
                                  for _ in range(3)]) for item in loaded]
        loss = -policy.completion_logprobs(pack(groups), [item.features for item in loaded]).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1.0, (step + 1) / 10)
        optimizer.step()
    out.mkdir()
    policy.model.to(torch.bfloat16)  # as shipped checkpoints are; a run trains in float32
    save_policy(policy, out)


def answer(prompt: Prompt, rng: random.Random) -> str:
    """A completion: half the answers are right, three quarters agree with their reasoning."""
    names = ["A", "B", "C", "D"][:len(prompt.options)] or ["1", "2", "3", "40"]

    def drawn() -> str:
        return prompt.gold if rng.random() < 0.4 else rng.choice(names)

    given = drawn()
    return f"<think>so {given if rng.random() < 0.7 else drawn()}.</think><answer>{given}</answer>"


def config(run: Path, **changes: Any) -> Config:
    """GRPO -> DPO -> GRPO on `corpus`; `changes` by dotted name with two underscores for a dot (`grpo__steps=1`)."""
    data = corpus()
    defaults: dict[str, Any] = {
        "run_dir": str(run), "threads": 1, "model.path": "", "model.device": "cpu",
        "video.fps": None, "video.num_frames": VIDEO.num_frames, "video.min_pixels": VIDEO.min_pixels,
        "video.max_pixels": VIDEO.max_pixels, "data.train": [str(data / "train.jsonl")],
        "data.eval": [str(data / "heldout.jsonl")], "rollout.group_size": 4, "rollout.max_new_tokens": 24,
        "grpo.steps": 2, "grpo.prompts_per_step": 4, "grpo.learning_rate": 1e-3, "dpo.learning_rate": 1e-4,
        "dpo.pairs_per_step": 3, "dpo.max_steps": 2, "checkpoint.every": 1, "checkpoint.keep": 2,
        "eval.samples": 2, "eval.prompts_per_batch": 3, "eval.bootstrap": 50,
        "stages": [{"kind": "grpo"}, {"kind": "dpo"}, {"kind": "grpo", "set": {"grpo.drop_easy": 1.0}}]}
    given = {name.replace("__", "."): value for name, value in changes.items()}
    if "model.path" not in given:
        given["model.path"] = str(model())
    return apply_overrides(Config(), defaults | given)
