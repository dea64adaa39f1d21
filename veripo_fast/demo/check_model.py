"""`veripo check-model FOLDER`: whether a checkpoint can be trained, and whether packed groups compute what it computes.

A rendered clip, an image of it and a text become prompts with uneven completions. Their log-probs as packed groups are
compared with Hugging Face's own forward on the repeated prompt. The checkpoint's code is never run.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from PIL import Image as Picture

from veripo_fast.config.families import FAMILIES, names
from veripo_fast.config.inputs import ModelConfig, VideoConfig
from veripo_fast.demo.corpus import write_clip
from veripo_fast.demo.world import random_clip, render
from veripo_fast.errors import CheckpointError
from veripo_fast.model.delta_layers import select
from veripo_fast.model.packing import pack
from veripo_fast.model.plain import plain_logprobs
from veripo_fast.model.policy import Policy, load_policy
from veripo_fast.types import EncodedPrompt, Image, Message, Prompt, Video

LENGTHS = (23, 1, 70, 8)
"""Tokens of the completions: uneven, and one longer than a chunk of the recurrent layers."""
ALLOWED = {"float32": 1e-3, "bfloat16": 0.1}
"""Mean difference of a token's log-probability, in nats. bfloat16 rounds to 0.004 of a logit's size."""
_CONTRACT = VideoConfig(fps=None, num_frames=4, min_pixels=4 * 28 * 28, max_pixels=64 * 28 * 28)


@dataclass(frozen=True)
class Difference:
    """Of the log-probabilities of a group's tokens."""

    name: str
    prompt_tokens: int
    tokens: int
    mean: float
    largest: float


def check_model(folder: Path, device: str, dtype: str) -> str:
    """What a checkpoint is, what is supported, and how far packed groups are off; raises if they are.

    Raises:
        CheckpointError: it cannot be trained, by name; or its packed groups compute something else.
    """
    config = ModelConfig(path=str(folder), device=device, dtype=dtype)  # type: ignore[arg-type]
    policy = load_policy(config)
    lines = [f"{folder}: {policy.encoder.family.title} ({policy.encoder.family.name}), "
             f"{sum(p.numel() for _, p in policy.all_parameters()) / 1e6:,.1f} M weights", *supported(policy)]
    differences = [difference(policy, name, prompt) for name, prompt in prompts(policy)]
    for each in differences:
        lines.append(f"  {each.name}: {each.prompt_tokens} prompt and {each.tokens} completion tokens, log-probs "
                     f"differ by {each.mean:.1e} on average, {each.largest:.1e} at most")
    wrong = [each for each in differences if not each.mean <= ALLOWED[dtype]]  # a NaN is no agreement
    if wrong:
        raise CheckpointError("\n".join([*lines, f"packed groups are off the plain forward by {wrong[0].mean:.1e} on "
                                                 f"{wrong[0].name}, allowed {ALLOWED[dtype]:.0e} in {dtype}"]))
    return "\n".join([*lines, f"packed groups agree with the plain forward of transformers in {dtype}"])


def supported(policy: Policy) -> list[str]:
    """A line on each part of the trainer that a family may or may not have."""
    family = policy.encoder.family
    attention = policy.model.model.language_model.config._attn_implementation
    rows = [("attention", attention.removeprefix("veripo_shared_prefix").lstrip("_") or "sdpa")]
    if family.delta_class:
        rows.append(("recurrent layers", f"gated delta rule by {select(policy.device).__name__}"))
    if family.router_class:
        rows.append(("experts", "chosen in float32; model.router_balance weighs their load"))
    rows += [("rollout.engine",
              "torch, vllm" if family.engine_rules else f"torch; vllm with {_others('engine_rules')}"),
             ("distributed.backend", "fsdp, deepspeed"),
             ("model.liger", "norms and shared experts" if family.shared_expert else "norms"
              if family.router_class else "norms and MLPs")]
    return [f"  {name}: {value}" for name, value in rows]


def _others(field: str) -> str:
    return f"{names({name: entry for name, entry in FAMILIES.items() if getattr(entry, field)})} alone"


def prompts(policy: Policy) -> list[tuple[str, EncodedPrompt]]:
    """Prompts around an mp4 file, two of them with an image, an image, and nothing; each encoded."""
    with TemporaryDirectory() as folder:
        clips = [Path(folder) / f"{seed}.mp4" for seed in range(2)]
        for seed, path in enumerate(clips):
            write_clip(path, random_clip(seed))
        picture = Path(folder) / "picture.png"
        Picture.fromarray(render(random_clip(2), [0.5])[0]).save(picture)
        first, second = (Video(str(path)) for path in clips)
        parts = {"a video": (first, "What moves?"),
                 "two videos and an image": (first, "or", second, "or", Image(str(picture)), "Which is it?"),
                 "an image": (Image(str(picture)), "What is it?"),
                 "text": ("Which is up?",)}
        made = []
        for name, content in parts.items():
            prompt = Prompt(name, (Message("user", content),), "text", "")
            made.append((name, policy.encoder.encode(prompt, policy.encoder.load_media(prompt, _CONTRACT))))
        return made


@torch.no_grad()
def difference(policy: Policy, name: str, prompt: EncodedPrompt) -> Difference:
    """A packed group against the plain forward on each of its completions."""
    completions = completions_of(policy)
    batch = pack([(prompt, completions)])
    features = None if prompt.media is None else policy.vision_features(prompt.media)
    packed = policy.completion_logprobs(batch, [features])
    plain = torch.cat([plain_logprobs(policy, prompt, completion).float() for completion in completions])
    off = (packed - plain).abs()
    return Difference(name, len(prompt.token_ids), len(plain), float(off.mean()), float(off.max()))


def completions_of(policy: Policy) -> list[list[int]]:
    """Random tokens that a policy may write, the same every time."""
    banned = {*policy.encoder.banned_ids, *policy.encoder.end_ids}
    allowed = torch.tensor([token for token in range(policy.vocabulary) if token not in banned])
    generator = torch.Generator().manual_seed(0)
    return [allowed[torch.randint(len(allowed), (length,), generator=generator)].tolist() for length in LENGTHS]
