"""Tiny random policies and prompts for tests: real architectures, both families, made on the spot."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import torch

from veripo_fast import tiny
from veripo_fast.encoding import PromptEncoder
from veripo_fast.model import Policy
from veripo_fast.types import EncodedPrompt, Image, Media, MediaInputs, Message, Prompt, Video

FAMILIES = ("qwen2_5_vl", "qwen3_vl")


@cache
def checkpoint(family: str) -> Path:
    """A randomly initialised checkpoint folder, made once per test process."""
    folder = Path(mkdtemp(prefix=f"veripo-{family}-"))
    tiny.init_model(folder, family, seed=1)
    return folder


@cache
def policy(family: str, freeze_vision: bool = False) -> Policy:
    """A float32 policy on the CPU; tests must not change its weights."""
    from veripo_fast.config import ModelConfig
    from veripo_fast.model import load_policy

    return load_policy(ModelConfig(path=str(checkpoint(family)), device="cpu", freeze_vision=freeze_vision))


def prompt_of(*parts: str | Media, **fields: object) -> Prompt:
    """A one-turn prompt."""
    known: dict = {"problem_type": "text", "gold": "yes"} | fields
    return Prompt(known.pop("prompt_id", "p"), (Message("user", parts),), **known)


def random_media(encoder: PromptEncoder, sizes: list[tuple[str, int, int, int]], seed: int = 0) -> MediaInputs:
    """Random pixels: (kind, frames, height, width) per medium, sides in units of the factor; 2 frames a second."""
    generator = torch.Generator().manual_seed(seed)
    factor, frames = encoder.vision.factor, []
    for kind, count, height, width in sizes:
        pixels = torch.randint(0, 256, (count, 3, height * factor, width * factor), generator=generator,
                               dtype=torch.uint8)
        frames.append((kind, pixels, torch.arange(count, dtype=torch.float64) / 2))
    return encoder.media_inputs(frames, f"random-{seed}-{sizes}")


def encoded(encoder: PromptEncoder, sizes: list[tuple[str, int, int, int]], seed: int = 0) -> EncodedPrompt:
    """A prompt whose text surrounds random media of `sizes`."""
    parts: list[str | Media] = ["Look:"]
    for number, (kind, *_) in enumerate(sizes):
        parts += [Video("") if kind == "video" else Image(""), f" this is number {number}."]
    return encoder.encode(prompt_of(*parts, " What moves?"), random_media(encoder, sizes, seed) if sizes else None)


def random_completions(lengths: list[int], seed: int = 0) -> list[list[int]]:
    """Random text tokens (no special ones)."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(20, 400, (length,), generator=generator).tolist() for length in lengths]
