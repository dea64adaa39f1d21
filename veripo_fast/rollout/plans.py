"""Further groups of a prompt: one that sees its frames in another order, and completions paired with other wordings.

A vision tower of Qwen2.5-VL or Qwen3-VL attends within a temporal patch and places a token by row and column alone, so
that putting temporal patches into another order commutes with it exactly. A contrast by patch is therefore a gather of
the output at hand, its deepstack levels with it, and no pass of the tower. Positions and time stamps stay: the policy
sees another picture at each time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch

from veripo_fast.run.seeds import derive_seed
from veripo_fast.types import LoadedPrompt, MediaInputs, RolloutGroup, VisionFeatures

Order = Literal["shuffle", "reverse"]


def frame_order(count: int, order: Order, seed: int) -> list[int] | None:
    """Numbers of `count` pictures in another order; None where there is no other one.

    A shuffle is drawn evenly from all orders but the one that is there.
    """
    if count < 2:
        return None
    if order == "reverse":
        return list(range(count))[::-1]
    attempt = 0
    while True:
        generator = torch.Generator().manual_seed(derive_seed(seed, attempt))
        drawn: list[int] = torch.randperm(count, generator=generator).tolist()
        if drawn != list(range(count)):
            return drawn
        attempt += 1


def patch_orders(media: MediaInputs, order: Order, seed: int) -> list[list[int] | None]:
    """Of each medium the order of its temporal patches; None for an image, and for a video of one patch."""
    return [frame_order(int(grid[0]), order, derive_seed(seed, index)) if kind == "video" else None
            for index, (kind, grid) in enumerate(zip(media.kinds, media.grid_thw, strict=True))]


def contrast_by_patch(item: LoadedPrompt, order: Order, seed: int) -> LoadedPrompt | None:
    """The prompt with the temporal patches of its videos in another order; None where there is no other order.

    What was cut from the video goes with it: `features` and, where the tower trains, `pixel_values`.
    """
    media, features = item.encoded.media, item.features
    if media is None or features is None:
        return None
    orders = patch_orders(media, order, seed)
    if not any(orders):
        return None
    merged = _rows_per_patch(media, len(features.embeddings))
    rows = _rows(orders, merged, media.grid_thw[:, 0].tolist()).to(features.embeddings.device)
    moved = VisionFeatures(features.embeddings[rows], tuple(level[rows] for level in features.deepstack))
    pixels = media.pixel_values
    if pixels is not None:
        pixels = pixels[_rows(orders, _rows_per_patch(media, len(pixels)), media.grid_thw[:, 0].tolist())]
    key = f"{media.key}/{order}/{derive_seed(str(orders))}"
    encoded = replace(item.encoded, media=replace(media, pixel_values=pixels, key=key))
    return LoadedPrompt(item.prompt, encoded, moved)


def _rows_per_patch(media: MediaInputs, total: int) -> list[int]:
    """Rows of one temporal patch of each medium, where all media have `total` rows: merged tokens, or patches."""
    share = int(media.grid_thw.prod(-1).sum()) // total
    return [int(grid[1] * grid[2]) // share for grid in media.grid_thw]


def _rows(orders: Sequence[list[int] | None], per_patch: Sequence[int], counts: Sequence[int]) -> torch.Tensor:
    """int64 [rows]: where each row of the reordered media comes from."""
    parts, start = [], 0
    for order, size, count in zip(orders, per_patch, counts, strict=True):
        block = torch.arange(start, start + count * size).view(count, size)
        parts.append((block if order is None else block[order]).flatten())
        start += count * size
    return torch.cat(parts)


def pair_all(groups: Sequence[RolloutGroup], wordings: int, own: Sequence[Sequence[float]],
             shared: Sequence[Sequence[float]]) -> list[RolloutGroup]:
    """Groups in which every completion of a prompt stands under each of its wordings (Share-GRPO, arXiv 2505.16673).

    Args:
        groups: those of a prompt's wordings stand next to each other.
        own, shared: of each completion the advantage among those of its own wording, and among all of its prompt. It
            counts `shared` under every wording, and `own` beside it under the one that it was sampled with.
    """
    paired: list[RolloutGroup] = []
    for first in range(0, len(groups), wordings):
        members = range(first, first + wordings)
        for shown in members:
            completions = []
            for source in members:
                for row, alone, together in zip(groups[source].completions, own[source], shared[source], strict=True):
                    advantage = together + alone if source == shown else together
                    completions.append(replace(row, advantage=advantage))
            paired.append(replace(groups[shown], completions=completions))
    return paired
