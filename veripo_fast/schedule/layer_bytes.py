"""Bytes of layers with experts and of layers with a recurrent state, as transformers and model/delta_rule.py run them.

What autograd saves of them, each storage once; what they hold at once besides; and what a recurrent layer keeps of a
sequence while completions are written. tests/schedule/test_activations.py compares the first with what it saves.

Letters: T tokens, D hidden, E experts, A experts of a token, I their width; K key heads, V value heads, dk and dv their
sizes, X channels of the convolution, C tokens in a chunk, b bytes of a weight's number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from veripo_fast.distributed.flops import DeltaCost, ExpertsCost

CHUNK = 64
"""C, that of model/delta_rule.py."""
Sequences: TypeAlias = Sequence[tuple[float, int]]
"""How many sequences there are of how many tokens; those of no tokens do not run."""


# -- experts ----------------------------------------------------------------------------------------------------------


def experts_saved(experts: ExpertsCost, tokens: int, hidden: int, itemsize: int) -> int:
    """Of one layer: transformers' grouped products, whose rows are copies of a token for each of its experts.

    Of such a row: its copy, both projections with the mask over their end, silu and the product, the way out; and
    where rows come from and go to. The router is in float32.
    """
    row = (2 * hidden + 4 * experts.intermediate) * itemsize + 4 * 8 + 1 + itemsize + 4
    token = experts.chosen * row + 4 * experts.experts + 4
    if itemsize < 4:  # the router's own copy of what the norm gives
        token += 4 * hidden
    if experts.shared:
        token += (2 * experts.shared + hidden + 1) * itemsize
    return tokens * token + (4 * experts.experts * hidden if itemsize < 4 else 0)


def experts_working(experts: ExpertsCost, tokens: int, hidden: int, itemsize: int) -> int:
    """Of one layer: the copies with both projections, masked and not, or with all that is made of their way out."""
    row = max(4 * hidden, hidden + 4 * experts.intermediate)
    return tokens * (experts.chosen * row + 3 * hidden + (hidden if experts.shared else 0)) * itemsize


def unread(experts: ExpertsCost, hidden: int, rows: int) -> float:
    """Numbers of experts that none of `rows` tokens passes, if each is chosen as often as another: (1 - A / E)^rows."""
    idle = (1 - experts.chosen / experts.experts) ** rows
    return idle * experts.layers * experts.experts * 3 * hidden * experts.intermediate


# -- recurrent states --------------------------------------------------------------------------------------------------


def chunks_of(sequences: Sequences) -> float:
    """Chunks of sequences that are cut into them one by one."""
    return sum(count * -(-tokens // CHUNK) for count, tokens in sequences)


def delta_saved(delta: DeltaCost, sequences: Sequences, itemsize: int) -> int:
    """Of one layer: prompts and completions by chunks in torch, all in float32 behind the convolution.

    Of a place in a chunk: queries and keys, and four copies of them for products; the system's right side and
    solution, what a state is corrected by, queries and keys with their decay; four [C, C] of each value head, two of
    each key head. Of a chunk: the state that it begins at.
    """
    keys, values = delta.key_heads * delta.key_dim, delta.value_heads * delta.value_dim
    own_keys = delta.value_heads * delta.key_dim
    place = 6 * keys + 2 * (values + own_keys) + values + 2 * own_keys + 3 * delta.value_heads
    place += CHUNK * (4 * delta.value_heads + 2 * delta.key_heads)
    chunks = chunks_of(sequences)
    tokens = sum(count * length for count, length in sequences)
    begun = tokens + (delta.convolution - 1) * sum(count for count, length in sequences if length)
    token = (4 * delta.channels if itemsize == 4 else 8 * keys) + 8 * delta.key_heads
    token += delta.value_heads * (itemsize + 4 + 4 + 4) + values * (12 + 3 * itemsize)
    return round(chunks * (CHUNK * place * 4 + state_bytes(delta)) + begun * 2 * delta.channels * itemsize
                 + tokens * token)


def delta_working(delta: DeltaCost, sequences: Sequences, hidden: int, itemsize: int) -> int:
    """Of one layer while no gradient is wanted: all that its rule makes lives until it returns."""
    keys, values = delta.key_heads * delta.key_dim, delta.value_heads * delta.value_dim
    place = 2 * keys + 7 * values + 4 * delta.value_heads * delta.key_dim + 3 * CHUNK * delta.value_heads
    tokens = sum(count * length for count, length in sequences)
    return round(chunks_of(sequences) * CHUNK * place * 4
                 + tokens * (3 * delta.channels + values + 3 * hidden) * itemsize)


def state_bytes(delta: DeltaCost) -> int:
    """Of one layer and sequence: its state, in float32."""
    return delta.value_heads * delta.key_dim * delta.value_dim * 4


def kept_bytes(delta: DeltaCost, itemsize: int) -> int:
    """Of one layer and sequence: its state, and the last inputs of its convolution."""
    return state_bytes(delta) + (delta.convolution - 1) * delta.channels * itemsize
