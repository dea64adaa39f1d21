"""The last decoder layer computes what is read: keys and values of every token, all else where a token is predicted.

Of a prompt only the last hidden state is read, since no other predicts a completion token. The layers below need all of
them; the last needs keys and values, and neither the queries, the attention, nor the MLP of the tokens before. What
comes out is what comes out of all tokens, and so is every gradient: those of the tokens left out are zero. The slow
sibling is the layer's own forward (tests/model/test_last_layer.py).

Letters: T packed tokens, n of them that are read, D hidden.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from veripo_fast.model.shared_prefix import GroupSpan, read_tokens


def trim_last_layer(language_model: Any) -> None:
    """Let the last layer of one model take [1, T, D] and give [1, n, D] where it is told `groups` and `trim`; else it
    stays as it was. It must be one that can (`flops.trims_last_layer`)."""
    layer = language_model.layers[-1]
    if "forward" in layer.__dict__:
        return  # another policy of the same model has done so
    parts = _Parts()
    layer.self_attn.q_proj.register_forward_pre_hook(parts.take)
    layer.self_attn.q_proj.register_forward_hook(parts.put_back)
    layer.self_attn.o_proj.register_forward_pre_hook(parts.take)
    layer.forward = partial(_forward, layer, type(layer).forward, parts)


class _Parts:
    """The tokens that the layer's parts compute now; None: all."""

    def __init__(self) -> None:
        self.tokens: torch.Tensor | None = None
        self.total = 0

    def take(self, module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor] | None:
        """[1, T, X] -> [1, n, X]."""
        return None if self.tokens is None else (inputs[0][:, self.tokens],)

    def put_back(self, module: torch.nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor
                 ) -> torch.Tensor | None:
        """[1, n, X] -> [1, T, X], zeros elsewhere."""
        if self.tokens is None:
            return None
        return output.new_zeros(1, self.total, output.shape[-1]).index_copy(1, self.tokens, output)


def _forward(layer: Any, plain: Any, parts: _Parts, hidden_states: torch.Tensor, *,
             groups: tuple[GroupSpan, ...] | None = None, trim: bool = False, **others: Any) -> torch.Tensor:
    """[1, T, D] of a packed row to [1, n, D]; what transformers' decoder layers have in common."""
    if groups is None or not trim:
        output: torch.Tensor = plain(layer, hidden_states, groups=groups, **others)
        return output
    tokens = read_tokens(groups, hidden_states.device)
    parts.tokens, parts.total = tokens, hidden_states.shape[1]
    try:
        attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), groups=groups, tails=True,
                                      **others)
    finally:
        parts.tokens = None
    hidden = hidden_states[:, tokens] + attended
    added = layer.mlp(layer.post_attention_layernorm(hidden))
    return hidden + (added[0] if isinstance(added, tuple) else added)
