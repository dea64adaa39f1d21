"""Layers of vLLM's build for CPUs that are computed in torch, because vLLM packs their weights or wants bfloat16.

It packs the weights of linear layers, convolutions and experts into another order, where no trainer can write them or
share them. Its recurrent layers run in bfloat16 with heads of 128 alone. What takes their place has the same parameters
in the same shapes as on a GPU. It lasts as long as the process, and engines that were built before keep their own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from veripo_kernels.once import once

from veripo_fast.config.families import Family
from veripo_fast.model.delta_rule import delta_rule, delta_step, wide

log = logging.getLogger(__name__)
_PLAIN = "veripo_plain"
"""Attribute of a layer's experts: whether their weights were left as they are."""


@once
def compute_in_torch(family: Family, linear: Any, mixtures: Any, recurrent: Any, context: Any, states: Any) -> None:
    """Let engines that are built from now on keep their weights as they are; said in the log where it costs time.

    Args:
        linear, mixtures, recurrent, context, states: the modules of vLLM with `dispatch_cpu_unquantized_gemm`,
            `CPUUnquantizedExperts`, `QwenGatedDeltaNetAttention`, `get_forward_context`, `is_conv_state_dim_first`.
    """
    linear.dispatch_cpu_unquantized_gemm = _keep_weights
    if family.router_class:
        _keep_expert_weights(mixtures.CPUUnquantizedExperts)
        log.warning("on a CPU torch multiplies the experts of the engine, one after the other: vLLM packs their "
                    "weights there, which could not be shared or written then")
    if family.delta_class:
        recurrent.QwenGatedDeltaNetAttention.forward_cpu = _recurrent_layer(context, states)
        log.warning("on a CPU torch computes the recurrent layers of the engine: vLLM's own take bfloat16 and heads of "
                    "128 there, and nothing else")


def forget_shared_memory() -> None:
    """Let a tensor-parallel engine start where another was killed. vLLM calls the memory that ranks share on a CPU the
    same in every run, and stops where it is there. An engine that runs keeps what it has open."""
    for file in Path("/dev/shm").glob("*-tp:*-cpushm_*"):
        file.unlink(missing_ok=True)


def _keep_weights(layer: torch.nn.Module, remove_weight: bool) -> None:
    linear: Any = F.linear
    layer.cpu_linear = linear


# -- experts ----------------------------------------------------------------------------------------------------------

def _keep_expert_weights(kind: Any) -> None:
    plain = kind.apply
    if getattr(plain, _PLAIN, False):
        return

    def keep(self: Any, layer: torch.nn.Module) -> None:
        setattr(self, _PLAIN, True)

    def apply(self: Any, output: torch.Tensor, hidden_states: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor,
              topk_weights: torch.Tensor, topk_ids: torch.Tensor, activation: Any, *others: Any, **named: Any) -> None:
        if not getattr(self, _PLAIN, False):
            plain(self, output, hidden_states, w1, w2, topk_weights, topk_ids, activation, *others, **named)
            return
        assert activation.value == "silu" and self.w1_bias is None and self.w2_bias is None
        output.copy_(experts(hidden_states, w1, w2, topk_weights, topk_ids))

    setattr(apply, _PLAIN, True)
    kind.process_weights_after_loading = keep
    kind.apply = apply


def experts(tokens: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, weights: torch.Tensor,
            chosen: torch.Tensor) -> torch.Tensor:
    """[T, D]: of each token the weighted sum of the experts that it chose.

    Args:
        tokens: [T, D]. gate_up: [E, 2 I, D], gate above up. down: [E, D, I].
        weights, chosen: [T, k], of the experts of each token, and their indices.
    """
    total = torch.zeros_like(tokens)
    for number in chosen.unique().tolist():
        rows, places = torch.where(chosen == number)
        gate, up = F.linear(tokens[rows], gate_up[number]).chunk(2, -1)
        out = F.linear(F.silu(gate) * up, down[number]) * weights[rows, places, None]
        total.index_add_(0, rows, out.to(total.dtype))
    return total


# -- recurrent layers -------------------------------------------------------------------------------------------------

def _recurrent_layer(context: Any, states: Any) -> Callable[[Any, torch.Tensor], torch.Tensor]:
    def forward(layer: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        """A recurrent layer on the tokens [T, D] of a step: one of each completion, behind them pieces of prompts."""
        inputs, gate = layer.in_proj_qkvz(hidden_states)[0].split(
            [(2 * layer.key_dim + layer.value_dim) // layer.tp_size, layer.value_dim // layer.tp_size], -1)
        reads = layer.in_proj_ba(hidden_states)[0]
        out = torch.zeros(len(hidden_states), layer.num_v_heads // layer.tp_size, layer.head_v_dim,
                          dtype=hidden_states.dtype)
        steps = context.get_forward_context().attn_metadata
        if steps is not None:
            cache = _Cache(layer, turned=states.is_conv_state_dim_first())
            _write(layer, cache, steps[layer.prefix], inputs, reads, out)
        projected: torch.Tensor = layer._output_projection(out, gate.unflatten(-1, (-1, layer.head_v_dim)))
        return projected

    return forward


def _write(layer: Any, cache: _Cache, step: Any, inputs: torch.Tensor, reads: torch.Tensor, out: torch.Tensor
           ) -> None:
    """Fill the rows of `out`, and keep the states behind the last tokens in the slots of the engine's cache.

    Args:
        inputs: [T, X], of the convolution. reads: [T, 2 V], what strengths and decays are made of.
    """
    assert step.spec_sequence_masks is None and step.num_accepted_tokens is None
    strengths, decays = reads[:step.num_actual_tokens].chunk(2, -1)
    strengths = strengths.sigmoid()
    decays = -wide(layer.A_log).exp() * F.softplus(wide(decays) + layer.dt_bias)
    starts = step.non_spec_query_start_loc.tolist()
    first, last = step.num_decodes, step.num_decodes + step.num_prefills
    slots = step.non_spec_state_indices_tensor[:last].long()
    if first:
        own = slice(0, step.num_decode_tokens)
        mixed = cache.convolve_tokens(inputs[own], slots[:first])
        values, states = delta_step(*_heads(layer, mixed), decays[own], strengths[own], cache.states[slots[:first]])
        out[own], cache.states[slots[:first]] = values, states
    if first < last:
        own = slice(starts[first], starts[last])
        lengths = [stop - start for start, stop in zip(starts[first:last], starts[first + 1:last + 1], strict=True)]
        slots, begun = slots[first:], step.has_initial_state[first:last]
        cache.clear(slots[~begun])
        mixed = cache.convolve(inputs[own], lengths, slots)
        values, states = delta_rule(*_heads(layer, mixed), decays[own], strengths[own], tuple(lengths),
                                    cache.states[slots])
        out[own], cache.states[slots] = values, states


class _Cache:
    """What the engine keeps of a recurrent layer for each sequence: the last inputs of the convolution, and a state."""

    def __init__(self, layer: Any, *, turned: bool) -> None:
        """
        Args:
            turned: whether the engine keeps inputs as [slots, X, W - 1].
        """
        inputs, states = layer.kv_cache
        self.inputs = inputs.transpose(1, 2) if turned else inputs
        """[slots, W - 1, X]."""
        self.states = states.view(len(states), -1, layer.head_k_dim, layer.head_v_dim)
        """float32 [slots, V, dk, dv]; vLLM's own kernels of a GPU have dv before dk."""
        self.weight = layer.conv1d.weight
        self.before = self.inputs.shape[1]

    def clear(self, slots: torch.Tensor) -> None:
        """Before the first token of a sequence there is nothing; a slot holds what its last sequence left."""
        self.inputs[slots] = 0
        self.states[slots] = 0

    def convolve_tokens(self, tokens: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """[n, X] of one token of each sequence."""
        inputs = torch.cat([self.inputs[slots], tokens[:, None]], 1)
        self.inputs[slots] = inputs[:, 1:]
        return F.silu((inputs * self.weight[:, 0].t()).sum(1))

    def convolve(self, tokens: torch.Tensor, lengths: list[int], slots: torch.Tensor) -> torch.Tensor:
        """[n, X] of sequences of `lengths` tokens one behind the other."""
        mixed = []
        for slot, part in zip(slots.tolist(), tokens.split(lengths), strict=True):
            inputs = torch.cat([self.inputs[slot], part])
            self.inputs[slot] = inputs[-self.before:]
            mixed.append(F.silu(F.conv1d(inputs.t()[None], self.weight, groups=len(self.weight))[0].t()))
        return torch.cat(mixed)


def _heads(layer: Any, mixed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries and keys [T, K, dk] and values [T, V, dv]."""
    keys = layer.key_dim // layer.tp_size
    query, key, value = mixed.split([keys, keys, mixed.shape[1] - 2 * keys], -1)
    return (query.unflatten(-1, (-1, layer.head_k_dim)), key.unflatten(-1, (-1, layer.head_k_dim)),
            value.unflatten(-1, (-1, layer.head_v_dim)))
