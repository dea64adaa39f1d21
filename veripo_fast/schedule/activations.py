"""Bytes that a forward pass leaves for its backward pass, and what both need besides, counted from the code that runs.

The counts are those of transformers' families in eager mode with veripo's attention (model/shared_prefix.py,
model/packed_attention.py) and with what is computed again left out (model/recomputation.py): what autograd saves, each
storage once. tests/schedule/test_activations.py compares them with what it saves. Layers with experts or a recurrent
state are in layer_bytes.py.

Letters: T packed tokens, P prompt, R completion tokens, G group, M predicted tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from veripo_fast.config.families import FAMILIES
from veripo_fast.schedule.blocks import blocks_of
from veripo_fast.schedule.layer_bytes import (
    Sequences,
    delta_saved,
    delta_working,
    experts_saved,
    experts_working,
)
from veripo_fast.schedule.shapes import ModelShape, TowerShape

TILE = 1024
"""That of veripo_kernels/linear_torch.py."""
WORKSPACE_BYTES, RUN_BYTES, GPU_WORKSPACE_BYTES = 1 << 30, 1 << 27, 5 << 28
"""Those of veripo_kernels/linear_torch.py and linear_triton.py."""
QUERY_NORMED = [name for name, family in FAMILIES.items() if family.query_norm]
"""Families that normalise queries and keys."""


@dataclass(frozen=True)
class Row:
    """A packed row of equal groups; their number may be broken, where groups of several sizes fill a row."""

    groups: float
    prompt: int
    """P."""
    completions: int
    """G."""
    length: int
    """R, of each completion; its last token is not packed."""

    @property
    def group_tokens(self) -> int:
        return self.prompt + self.completions * (self.length - 1)

    @property
    def tokens(self) -> int:
        """T."""
        return round(self.groups * self.group_tokens)

    @property
    def predicted(self) -> int:
        """M."""
        return round(self.groups * self.completions * self.length)

    @property
    def unread(self) -> int:
        """Prompt tokens whose last hidden state nobody reads."""
        return round(self.groups * (self.prompt - 1))

    @property
    def sequences(self) -> Sequences:
        """Of a recurrent layer: the prompts, and the completions that begin at their ends."""
        return (self.groups, self.prompt), (self.groups * self.completions, self.length - 1)

    def blocks(self) -> list[int]:
        """Completion tokens of each block of a group."""
        return [sum(block) for block in blocks_of(self.prompt, [self.length - 1] * self.completions)]

    @property
    def mask_numbers(self) -> int:
        """Elements of the masks of all blocks."""
        return round(self.groups * sum(tokens * (self.prompt + tokens) for tokens in self.blocks()))


def row_of(prompt: int, completions: int, length: int, share: int, max_tokens: int) -> Row:
    """The largest micro-batch of `share` groups: `max_tokens` filled, or a larger group alone."""
    group = Row(1, prompt, completions, length)
    tokens = min(max(max_tokens, group.group_tokens), share * group.group_tokens)
    return Row(tokens / group.group_tokens, prompt, completions, length)


def _norm(width: int, itemsize: int) -> int:
    """An RMS norm of a token: its input and its scale."""
    return width * itemsize + 4


def attention_bytes(shape: ModelShape, row: Row, itemsize: int, masked: bool) -> int:
    """What an attention layer saves for its backward pass, norms, MLP and masks left out.

    Args:
        masked: attention by SDPA in blocks, with copies of the prompt's keys and values each; else by one varlen call,
            with copies for every completion but the first.
    """
    heads = shape.heads
    token = 2 * shape.queries * itemsize + 2 * shape.keys * itemsize  # rotated, attended; keys and values
    token += 4 * heads
    if shape.family in QUERY_NORMED:
        token += (shape.queries + shape.keys) * itemsize + 8 * heads
    if shape.delta:  # the gate, before (it lies with the queries that are normed) and behind, and what it lets through
        token += 3 * shape.queries * itemsize
    blocks = row.blocks()
    if masked:
        copied = row.groups * sum(row.prompt + tokens for tokens in blocks)
    else:
        copied = row.tokens + row.groups * max(row.completions - 1, 0) * row.prompt
    return row.tokens * token + round(copied) * 2 * shape.keys * itemsize


def kinds_of_layers(shape: ModelShape, row: Row, itemsize: int, masked: bool) -> tuple[list[tuple[int, int]], ...]:
    """How many layers save how many bytes: of those that attend and those with a state, and of dense MLPs and
    mixtures."""
    mixers = [(shape.attending, attention_bytes(shape, row, itemsize, masked))]
    if shape.delta:
        mixers.append((shape.delta.layers, delta_saved(shape.delta, row.sequences, itemsize)))
    mixtures = shape.experts.layers if shape.experts else 0
    feeds = [(shape.layers - mixtures, row.tokens * 2 * shape.intermediate * itemsize)]
    if shape.experts:
        feeds.append((mixtures, experts_saved(shape.experts, row.tokens, shape.hidden, itemsize)))
    return mixers, feeds


def layer_bytes(shape: ModelShape, row: Row, itemsize: int, masked: bool) -> int:
    """What the largest decoder layer saves for its backward pass where gradient checkpointing runs it again: what its
    linear layers read, too; `masked` as in `attention_bytes`."""
    read = output_bytes(shape, 1, 0 if shape.experts else 1, itemsize) + shape.queries * itemsize
    kinds = kinds_of_layers(shape, row, itemsize, masked)
    return (row.tokens * (2 * _norm(shape.hidden, itemsize) + read)
            + sum(max(size for count, size in kind if count) for kind in kinds))


def output_bytes(shape: ModelShape, layers: int, dense: int, itemsize: int) -> int:
    """What the norms of `layers` layers give of a token, and what the MLPs of the `dense` ones multiply: saved where
    nothing computes it again."""
    return (layers * 2 * shape.hidden + dense * shape.intermediate) * itemsize


def liger_bytes(shape: ModelShape, row: Row, itemsize: int) -> int:
    """What all layers save more where norms and dense MLPs are Liger's, which nothing computes again."""
    mixtures = shape.experts.layers if shape.experts else 0
    return row.tokens * output_bytes(shape, shape.layers, shape.layers - mixtures, itemsize)


def unread_bytes(shape: ModelShape, row: Row, itemsize: int) -> int:
    """What a trimmed last layer (model/last_layer.py) saves less than others: of the prompt tokens that nobody reads
    all behind their attention. Its parts have copies of the others' inputs."""
    tokens, read = row.unread, row.tokens - row.unread
    less = tokens * (_norm(shape.hidden, itemsize) + shape.queries * itemsize + 4 * shape.heads)
    less += shape.queries * itemsize * (tokens if shape.delta else -read) - read * shape.queries * itemsize
    if shape.experts and shape.experts.last:
        less += (experts_saved(shape.experts, row.tokens, shape.hidden, itemsize)
                 - experts_saved(shape.experts, read, shape.hidden, itemsize))
    else:
        less += tokens * 2 * shape.intermediate * itemsize
    return less - read * shape.hidden * itemsize


def saved_bytes(shape: ModelShape, row: Row, itemsize: int, masked: bool, checkpointing: bool, trimmed: bool) -> int:
    """What the language model saves: every layer, or with gradient checkpointing the input of each and one layer.

    Args:
        trimmed: whether the last layer leaves out what nobody reads.
    """
    read = row.tokens - (row.unread if trimmed else 0)
    angles = row.tokens * 2 * shape.queries // shape.heads * itemsize
    once = angles + read * _norm(shape.hidden, itemsize) + (row.mask_numbers * itemsize if masked else 0)
    if checkpointing:
        layer = layer_bytes(shape, row, itemsize, masked)
        return once + layer + shape.layers * row.tokens * shape.hidden * itemsize
    norms = shape.layers * row.tokens * 2 * _norm(shape.hidden, itemsize)
    kinds = kinds_of_layers(shape, row, itemsize, masked)
    unread = unread_bytes(shape, row, itemsize) if trimmed else 0
    return once + norms + sum(count * size for kind in kinds for count, size in kind) - unread


class Widths(Protocol):
    """How wide the layers of a language model are."""

    @property
    def hidden(self) -> int: ...
    @property
    def intermediate(self) -> int: ...
    @property
    def queries(self) -> int: ...
    @property
    def keys(self) -> int: ...


def working_bytes(shape: Widths, tokens: int, itemsize: int) -> int:
    """Tensors that a layer holds at once besides what it saves: the gated MLP with the residual stream around it."""
    mlp = 3 * shape.intermediate + 3 * shape.hidden
    attention = 4 * shape.queries + 4 * shape.keys + 3 * shape.hidden
    return tokens * max(mlp, attention) * itemsize


def layer_working_bytes(shape: ModelShape, sequences: Sequences, itemsize: int) -> int:
    """The same of the layer that takes most, on sequences that run side by side."""
    tokens = round(sum(count * length for count, length in sequences))
    found = [working_bytes(shape, tokens, itemsize)]
    if shape.experts:
        found.append(experts_working(shape.experts, tokens, shape.hidden, itemsize))
    if shape.delta:
        found += [delta_working(shape.delta, [part], shape.hidden, itemsize) for part in sequences]
    return max(found)


def tower_saved_bytes(tower: TowerShape, patches: int, itemsize: int) -> int:
    """What a tower that trains saves for its backward pass."""
    hidden = tower.hidden
    norms = 2 * hidden * (4 + 2 * itemsize) if tower.gated else 4 * hidden * itemsize
    block = norms + (7 * hidden + (4 if tower.gated else 2) * tower.intermediate) * itemsize + 4 * tower.heads
    mergers = (3 * (1 + tower.deepstack) + 1) * hidden * itemsize
    return patches * (tower.depth * block + mergers + tower.features * itemsize)


def tower_working_bytes(tower: TowerShape, patches: int, itemsize: int) -> int:
    """Tensors that a block holds at once while no gradient is wanted; queries and keys are rotated in float32."""
    mlp = ((3 if tower.gated else 2) * tower.intermediate + 2 * tower.hidden) * itemsize
    attention = tower.hidden * (5 * itemsize + 4 * 6)
    return patches * max(mlp, attention)


def loss_bytes(shape: ModelShape, row: Row, itemsize: int, on_gpu: bool, whole: int = 0) -> dict[str, int]:
    """Of the fused loss: the logits of a run, and the gradients by hidden states and head that it forms on the way.

    On a GPU a head of two bytes is held as float16 beside the logits.

    Args:
        whole: completions that the loss takes together: 2 of a preference loss, 1 where the tokens of a completion are
            coupled, else 0.
    """
    wide, most, usual = (2, GPU_WORKSPACE_BYTES, GPU_WORKSPACE_BYTES) if on_gpu else (4, WORKSPACE_BYTES, RUN_BYTES)
    logit_row = shape.vocabulary * wide
    rows = min(row.predicted, max(usual // logit_row, min(whole * row.length, most // logit_row), 1))
    tiled = min(TILE, shape.vocabulary)
    if on_gpu:
        tile = shape.vocabulary * shape.hidden * 2 if itemsize == 2 else 0
    else:
        tile = 3 * rows * tiled * 4 + tiled * shape.hidden * 4
    hidden = row.predicted * shape.hidden * (2 * itemsize + 4)
    return {"logits": rows * logit_row + tile, "loss": hidden, "head gradient": shape.head_numbers * 4}
