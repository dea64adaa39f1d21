"""Tiny random policies and prompts for tests: real architectures, both families, made on the spot."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import torch

from veripo_fast.demo import tiny_model
from veripo_fast.model.encoding import PromptEncoder
from veripo_fast.model.plain import plain_logits as plain_logits
from veripo_fast.model.policy import Policy
from veripo_fast.types import EncodedPrompt, Image, LoadedPrompt, Media, MediaInputs, Message, Prompt, Video

FAMILIES = ("qwen2_5_vl", "qwen3_vl")
NEW_FAMILIES = ("qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")
ALL_FAMILIES = (*FAMILIES, *NEW_FAMILIES)


@cache
def checkpoint(family: str) -> Path:
    """A randomly initialised checkpoint folder, made once per test process."""
    folder = Path(mkdtemp(prefix=f"veripo-{family}-"))
    tiny_model.init_model(folder, family, seed=1)
    return folder


@cache
def untied_checkpoint(family: str) -> Path:
    """The same with a head that is not the embedding."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    folder = Path(mkdtemp(prefix=f"veripo-untied-{family}-"))
    shutil.copytree(checkpoint(family), folder, dirs_exist_ok=True)
    config = AutoConfig.from_pretrained(folder)
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = False
    model = AutoModelForImageTextToText.from_pretrained(folder, config=config)
    torch.nn.init.normal_(model.lm_head.weight, std=0.08, generator=torch.Generator().manual_seed(2))
    model.save_pretrained(folder)
    return folder


@cache
def policy(family: str, freeze_vision: bool = False) -> Policy:
    """A float32 policy on the CPU; tests must not change its weights."""
    from veripo_fast.config.inputs import ModelConfig
    from veripo_fast.model.policy import load_policy

    return load_policy(ModelConfig(path=str(checkpoint(family)), device="cpu", freeze_vision=freeze_vision))


def _tensors(made: Policy) -> list[torch.Tensor]:
    return [*made.model.parameters(), *made.model.buffers()]


@contextmanager
def typed(family: str, dtype: torch.dtype) -> Iterator[Policy]:
    """The policy of `policy` in a dtype; afterwards it is float32 again, with the weights and buffers that it had."""
    made = policy(family)
    before = [tensor.data.clone() for tensor in _tensors(made)]
    try:
        made.model.to(dtype)
        yield made
    finally:
        made.model.to(torch.float32)
        made.model.zero_grad()
        for tensor, values in zip(_tensors(made), before, strict=True):
            tensor.data.copy_(values)


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


def prompt_around(sizes: list[tuple[str, int, int, int]], **fields: object) -> Prompt:
    """A prompt whose text surrounds media of `sizes`."""
    parts: list[str | Media] = ["Look:"]
    for number, (kind, *_) in enumerate(sizes):
        parts += [Video("") if kind == "video" else Image(""), f" this is number {number}."]
    return prompt_of(*parts, " What moves?", **fields)


def encoded(encoder: PromptEncoder, sizes: list[tuple[str, int, int, int]], seed: int = 0) -> EncodedPrompt:
    """`prompt_around`, encoded with random media."""
    return encoder.encode(prompt_around(sizes), random_media(encoder, sizes, seed) if sizes else None)


def random_completions(lengths: list[int], seed: int = 0) -> list[list[int]]:
    """Random text tokens (no special ones)."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(20, 400, (length,), generator=generator).tolist() for length in lengths]


def loaded(policy: Policy, sizes: list[tuple[str, int, int, int]], seed: int = 0) -> LoadedPrompt:
    """A prompt around random media with the tower's output, ready for an engine or an update."""
    prompt = encoded(policy.encoder, sizes, seed)
    with torch.no_grad():
        features = None if prompt.media is None else policy.vision_features(prompt.media)
    return LoadedPrompt(prompt_around(sizes, prompt_id=f"p{seed}"), prompt, features)


def thinking_checkpoint(folder: Path, start: Path, opening: str = "<think>\n") -> Path:
    """A copy of the checkpoint `start` whose chat template ends every prompt with `opening`."""
    shutil.copytree(start, folder)
    template = folder / "chat_template.jinja"
    turn = "<|im_start|>assistant\\n"
    text = template.read_text()
    assert text.count(turn) == 1
    template.write_text(text.replace(turn, turn + opening.replace("\n", "\\n")))
    return folder
