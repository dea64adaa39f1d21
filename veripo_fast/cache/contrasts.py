"""Prompts whose videos show their frames in another order (`plan.contrast`), from the tower's output or from frames."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from veripo_fast.cache.loader import PromptLoader
from veripo_fast.config.plans import PlanConfig
from veripo_fast.rollout.plans import Order, contrast_by_patch, frame_order
from veripo_fast.run.seeds import derive_seed
from veripo_fast.types import LoadedPrompt


def contrasted(loader: PromptLoader, prompts: Mapping[int, LoadedPrompt], plan: PlanConfig, seed: int
               ) -> dict[int, LoadedPrompt]:
    """The contrast of each prompt that has one, by its number: of those without a video, and of videos of one picture,
    there is none.

    Args:
        seed: of the step; with the number of a prompt it gives the order of its frames.
    """
    assert plan.contrast != "none"
    found: dict[int, LoadedPrompt] = {}
    for number, item in prompts.items():
        own = derive_seed(seed, number)
        if plan.contrast_by == "patch":
            other = contrast_by_patch(item, plan.contrast, own)
        else:
            other = contrast_by_frame(loader, item, plan.contrast, own)
        if other is not None:
            found[number] = other
    return found


@torch.no_grad()
def contrast_by_frame(loader: PromptLoader, item: LoadedPrompt, order: Order, seed: int) -> LoadedPrompt | None:
    """The prompt with the frames of its videos in another order, decoded and encoded anew; None where there is none.

    Raises:
        MediaError: a file cannot be decoded any more.
    """
    media = item.encoded.media
    if media is None or "video" not in media.kinds:
        return None
    frames, orders = [], []
    for index, (kind, pixels, seconds) in enumerate(loader.frames_of(item.prompt)):
        drawn = frame_order(len(pixels), order, derive_seed(seed, index)) if kind == "video" else None
        orders.append(drawn)
        frames.append((kind, pixels if drawn is None else pixels[drawn], seconds))
    if not any(orders):
        return None
    moved, features = loader.tower_output(frames, f"{media.key}/frames/{derive_seed(str(orders))}")
    encoded = replace(item.encoded, media=replace(moved, pixel_values=None))
    return LoadedPrompt(item.prompt, encoded, features)
