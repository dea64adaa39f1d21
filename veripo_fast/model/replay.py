"""Router replay: an update runs the experts that the engine chose while it sampled (R3, arXiv 2510.11370).

A router that is close to a tie chooses by the last digits. Where engine and trainer part, a token goes another way, and
its log-prob differs by far more than rounding. With m_i 1 on the experts that the engine chose for a token, and s the
trainer's own logits, expert i weighs

    m_i exp(s_i) / sum_j m_j exp(s_j)

(the replayed gating weights of R3), so that gradients reach the router through the experts that are replayed. The
choice comes with the batch and goes to each decoder layer as an argument. So a layer that gradient checkpointing runs
again in the backward pass finds that of its own batch, whatever else was run since.

Letters: T packed tokens, n of them that a layer computes, L layers with experts, E experts, k that a token takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from veripo_fast.config.families import Family
from veripo_fast.model.packing import PackedBatch, pack
from veripo_fast.model.shared_prefix import read_tokens
from veripo_fast.types import EncodedPrompt, RolloutGroup

STORED = np.dtype("<i2")
"""How a choice of experts is stored in a completion, and of its prompt in the group."""
UNKNOWN = -1
"""In place of an expert that is not known."""


class Routers(NamedTuple):
    """What chooses experts in a model."""

    layers: tuple[int, ...]
    """Numbers of the decoder layers that have experts."""
    experts: int
    """E of each of them."""
    top_k: int
    """k."""


def routers_of(model: Any, family: Family) -> dict[int, Any]:
    """Number of a decoder layer -> its router, of those that have one."""
    found: dict[int, Any] = {}
    for number, layer in enumerate(model.model.language_model.layers):
        for part in layer.modules():
            if family.router_class and type(part).__name__ == family.router_class:
                found[number] = part
    return found


def describe(model: Any, family: Family) -> Routers | None:
    """The routers of a model; None without any."""
    routers = routers_of(model, family)
    if not routers:
        return None
    first = next(iter(routers.values()))
    return Routers(tuple(routers), first.num_experts, first.top_k)


# -- from the engine into a batch -------------------------------------------------------------------------------------


def stored(experts: np.ndarray) -> bytes:
    """Integers [tokens, L, k] as they are kept in a group."""
    return experts.astype(STORED).tobytes()


def pack_rollouts(rows: Sequence[tuple[EncodedPrompt, RolloutGroup]], routers: Routers | None) -> PackedBatch:
    """Pack groups with the experts that the engine chose for them, where it was asked for these.

    Tokens of groups without them, as those that were sampled before the option was set, choose their own.

    Raises:
        ValueError: what a group holds does not fit its tokens or the model's routers.
    """
    batch = pack([(prompt, [c.token_ids for c in group.completions]) for prompt, group in rows])
    if routers is None or all(group.prompt_experts is None for _, group in rows):
        return batch
    parts: list[torch.Tensor] = []
    for prompt, group in rows:
        parts.append(_experts(group.prompt_experts, len(prompt.token_ids), routers))
        parts += [_experts(c.experts, len(c.token_ids) - 1, routers) for c in group.completions]
    return replace(batch, experts=torch.cat(parts))


def _experts(data: bytes | None, tokens: int, routers: Routers) -> torch.Tensor:
    """int16 [tokens, L, k]."""
    shape = (tokens, len(routers.layers), routers.top_k)
    if data is None:
        return torch.full(shape, UNKNOWN, dtype=torch.int16)
    values = np.frombuffer(data, STORED)
    if values.size != tokens * shape[1] * shape[2]:
        raise ValueError(f"a group holds {values.size} experts where {tokens} tokens take {shape[2]} in each of "
                         f"{shape[1]} layers")
    if values.size and values.max() >= routers.experts:
        raise ValueError(f"a group holds expert {values.max()} of a model with {routers.experts}")
    return torch.from_numpy(values.astype(np.int16)).view(shape)


# -- one pass ---------------------------------------------------------------------------------------------------------


class Replay:
    """What one pass of a packed row replays, and how often the trainer would have chosen otherwise.

    Args:
        experts: int16 [T, L, k], below 0 where the router chooses.
    """

    def __init__(self, experts: torch.Tensor) -> None:
        self.experts = experts
        self.choices = torch.zeros((), dtype=torch.long, device=experts.device)
        """(token, layer) of which the engine's choice is known."""
        self.differing = torch.zeros_like(self.choices)
        """Those of them in which the trainer's router would take another set of experts."""
        self.unknown = torch.zeros_like(self.choices)

    @classmethod
    def of(cls, batch: PackedBatch, device: torch.device) -> Replay | None:
        """None where a batch replays nothing."""
        return None if batch.experts is None else cls(batch.experts.to(device))

    def counts(self) -> dict[str, torch.Tensor]:
        """int64 scalars, as they are between forward and backward: a layer that runs again counts again."""
        return {"router_choices": self.choices.clone(), "router_differing": self.differing.clone(),
                "router_unknown": self.unknown.clone()}


def serve_replays(model: Any, family: Family) -> None:
    """Let the decoder layers of one model take `replay`, and hand their routers what is theirs."""
    last = len(model.model.language_model.layers) - 1
    for column, (number, router) in enumerate(routers_of(model, family).items()):
        router.replayed = None
        layer = model.model.language_model.layers[number]
        layer.register_forward_pre_hook(partial(_hand_over, router, column, number == last), with_kwargs=True)


def _hand_over(router: Any, column: int, last: bool, layer: torch.nn.Module, inputs: tuple[Any, ...],
               named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Before each run of a decoder layer, also inside of gradient checkpointing."""
    others = dict(named)
    replay: Replay | None = others.pop("replay", None)
    router.replayed = None
    if replay is not None:
        experts = replay.experts[:, column]
        if last and others.get("trim"):  # model/last_layer.py: its experts get no other tokens
            experts = experts[read_tokens(others["groups"], experts.device)]
        router.replayed = replay, experts.long()
    return inputs, others


def instead_of(own: torch.Tensor, replay: Replay, experts: torch.Tensor) -> torch.Tensor:
    """int64 [n, k]: the experts that are replayed, and `own` int64 [n, k] where the engine's are not known.

    Args:
        experts: int64 [n, k]. replay: counts where both differ as sets.
    """
    known = (experts >= 0).all(-1)
    differs = (own.sort(-1).values != experts.sort(-1).values).any(-1) & known
    replay.choices += known.sum()
    replay.differing += differs.sum()
    replay.unknown += (~known).sum()
    return torch.where(known[:, None], experts, own)
