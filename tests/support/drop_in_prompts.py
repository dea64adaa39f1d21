"""Questions on the videos of `runs.corpus`, for our engine and for `tests.support.drop_in`, and what both write."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch

from tests.support import runs
from tests.support.children import run
from tests.support.paths import PYTHONPATH
from veripo_fast.cache.loader import PromptLoader
from veripo_fast.config.inputs import DataConfig, ModelConfig
from veripo_fast.data.prompts import load_prompts
from veripo_fast.model.encoding import decode_frames
from veripo_fast.model.policy import load_policy
from veripo_fast.rollout.protocol import Sampling
from veripo_fast.rollout.torch_engine import TorchEngine
from veripo_fast.run.folder import RunDir
from veripo_fast.trainer import train
from veripo_fast.types import Prompt, Video

MOST_TOKENS = 32


def trained(family: str, folder: Path) -> Path:
    """The last checkpoint of a run of one step."""
    config = runs.config(folder / "run", model__path=str(runs.model(family)), stages=[{"kind": "grpo"}], grpo__steps=1,
                         eval__samples=0)
    train(config)
    checkpoints = RunDir(folder / "run").checkpoints
    return checkpoints / (checkpoints / "latest").read_text().strip()


def questions() -> list[Prompt]:
    data = runs.corpus()
    prompts, _ = load_prompts([str(data / "heldout.jsonl"), str(data / "train.jsonl")], DataConfig())
    return [prompt for prompt in prompts if any(isinstance(medium, Video) for medium in prompt.media)]


def our_texts(checkpoint: Path) -> list[str]:
    """Greedy completions of the torch engine."""
    policy = load_policy(ModelConfig(path=str(checkpoint), device="cpu"))
    loader = PromptLoader(policy, runs.VIDEO, 4096, lambda prompt, reason: None)
    groups = TorchEngine(policy).generate(loader.load(questions()), Sampling(1, 0.0, MOST_TOKENS, 0))
    loader.close()
    return [policy.encoder.decode_completion(group.completions[0].token_ids) for group in groups]


def texts_of_others(library: str, checkpoint: Path, factor: int, folder: Path, oracle: str | None = None) -> list[str]:
    """Greedy completions by transformers or vLLM of the same frames; `factor` is the encoder's, in pixels."""
    asked = [_asked(prompt, factor) for prompt in questions()]
    torch.save((str(checkpoint), MOST_TOKENS, asked), folder / "asked.pt")
    done = run(sys.executable, "-m", "tests.support.drop_in", library, folder / "asked.pt", folder / "texts.pt",
               env={**os.environ, "VERIPO_TEST_ORACLE": oracle or "", "PYTHONPATH": PYTHONPATH})
    assert done.returncode == 0, done.stderr
    return list(torch.load(folder / "texts.pt"))


def _asked(prompt: Prompt, factor: int) -> tuple[list[dict[str, Any]], list[torch.Tensor], list[dict[str, Any]]]:
    """Chat messages, frames and their metadata: each frame's number is its time in milliseconds."""
    messages = [{"role": message.role, "content": [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "video"} for part in message.parts]}
        for message in prompt.messages]
    frames, known = [], []
    for _, pixels, seconds in decode_frames(prompt.media, runs.VIDEO, factor):
        numbers = [round(1000 * second) for second in seconds.tolist()]
        frames.append(pixels)
        known.append({"fps": 1000.0, "frames_indices": numbers, "total_num_frames": 2 * numbers[-1] - numbers[-2]})
    return messages, frames, known
