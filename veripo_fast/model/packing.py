"""Groups -> packed rows: [prompt, completion_1, ..., completion_G] side by side, with what the loss needs to find them.

The last token of a completion is not packed: nothing is predicted from it. Logits are asked for only where a completion
token is predicted: at the last prompt token and at every packed completion token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from veripo_fast.model.shared_prefix import GroupSpan
from veripo_fast.types import EncodedPrompt


@dataclass(frozen=True)
class PackedBatch:
    """One packed row of T tokens holding M completion tokens to predict.

    Completion tokens run group by group, completion by completion, token by token.
    """

    prompts: tuple[EncodedPrompt, ...]
    """The prompt of each group."""
    groups: tuple[GroupSpan, ...]
    """Where each group lies in the row."""
    token_ids: torch.Tensor
    """int64 [T]."""
    positions: torch.Tensor
    """int64 [3, T]."""
    logit_index: torch.Tensor
    """int64 [M]: the number, among the tokens that are read (`read_tokens`), of the one that predicts each target."""
    targets: torch.Tensor
    """int64 [M]: completion tokens."""
    cu_seqlens: torch.Tensor
    """int64 [completions + 1]: completion i owns targets cu_seqlens[i] to cu_seqlens[i + 1]."""
    experts: torch.Tensor | None = None
    """int16 [T, layers, k]: which experts are replayed (`model/replay.py`), below 0 where the router chooses; None: it
    does everywhere."""


def packed_length(prompt: EncodedPrompt, completions: Sequence[Sequence[int]]) -> int:
    """Tokens that a group takes in a packed row."""
    return len(prompt.token_ids) + sum(max(len(c) - 1, 0) for c in completions)


def pack(groups: Sequence[tuple[EncodedPrompt, Sequence[Sequence[int]]]]) -> PackedBatch:
    """Pack groups of (prompt, completions as token ids) into one row.

    Raises:
        ValueError: a completion without tokens.
    """
    spans: list[GroupSpan] = []
    ids: list[torch.Tensor] = []
    positions: list[torch.Tensor] = []
    index: list[torch.Tensor] = []
    lengths: list[int] = []
    start = read = 0
    for prompt, completions in groups:
        size = len(prompt.token_ids)
        ids.append(prompt.token_ids)
        positions.append(prompt.positions)
        offset, first = start + size, read
        read += 1
        for completion in completions:
            if not completion:
                raise ValueError("a completion without tokens cannot be packed")
            packed = len(completion) - 1
            ids.append(torch.tensor(completion[:-1], dtype=torch.long))
            positions.append((torch.arange(packed) + prompt.next_position).expand(3, -1))
            index.append(torch.cat([torch.tensor([first]), torch.arange(packed) + read]))
            lengths.append(len(completion))
            offset += packed
            read += packed
        spans.append(GroupSpan(start, size, tuple(len(c) - 1 for c in completions)))
        start = offset
    targets = [torch.tensor(c, dtype=torch.long) for _, completions in groups for c in completions]
    return PackedBatch(
        prompts=tuple(prompt for prompt, _ in groups), groups=tuple(spans), token_ids=torch.cat(ids),
        positions=torch.cat(positions, 1), logit_index=torch.cat(index) if index else torch.zeros(0, dtype=torch.long),
        targets=torch.cat(targets) if targets else torch.zeros(0, dtype=torch.long),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0))


def micro_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Split groups of `lengths` packed tokens, in order, into runs of at most `max_tokens`; a larger one runs alone."""
    runs: list[list[int]] = []
    total = 0
    for number, length in enumerate(lengths):
        if not runs or total + length > max_tokens:
            runs.append([])
            total = 0
        runs[-1].append(number)
        total += length
    return runs
