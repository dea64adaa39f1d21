"""Updates of a tiny policy, by one process or by the ranks of a backend: uneven micro-batches, losses that move."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from veripo_kernels import PolicyLoss

from tests.support import policies
from veripo_fast.config.inputs import ModelConfig
from veripo_fast.config.schema import OptimizerConfig
from veripo_fast.model.packing import PackedBatch, pack
from veripo_fast.model.policy import Policy, in_own_memory, load_policy
from veripo_fast.model.step import LogprobInputs, PolicyLossInputs
from veripo_fast.types import LoadedPrompt

OPTIMIZER = OptimizerConfig(weight_decay=0.01)
RATE, MAX_NORM = 1e-4, 1.0
VIDEO, IMAGE = [("video", 4, 2, 2)], [("image", 1, 2, 2)]
MEDIA: list[list] = [VIDEO, [], VIDEO, IMAGE, [], VIDEO]
LENGTHS = [[3, 5, 4], [6, 2, 3], [2, 7, 5], [4, 1, 4], [5, 5, 2], [1, 6, 3]]
PLAN = [([0, 1], [2]), ([3], []), ([4, 5, 0], [1]), ([], [2]), ([1, 3], [0, 5])]
"""Groups of rank 0 and of rank 1 in each update, one a micro-batch; repeated. Further ranks have none."""
LOSS = PolicyLoss("grpo", kl_coef=0.05)


@dataclass
class Groups:
    """Prompts with completions, and what the loss compares with: the policy's log-probs where it started."""

    prompts: list[LoadedPrompt]
    batches: list[PackedBatch]
    advantages: list[torch.Tensor]
    old_logprobs: list[torch.Tensor]


def load(folder: Path, *, frozen: bool, dtype: str = "float32", checkpointing: bool = False) -> Policy:
    """A policy whose weights may change."""
    return in_own_memory(load_policy(ModelConfig(path=str(folder), device="cpu", dtype=dtype, freeze_vision=frozen,
                                                 gradient_checkpointing=checkpointing)))


def groups_of(policy: Policy) -> Groups:
    """The same for every rank."""
    prompts = [policies.loaded(policy, media, seed) for seed, media in enumerate(MEDIA)]
    batches = [pack([(prompt.encoded, policies.random_completions(lengths, seed))])
               for seed, (prompt, lengths) in enumerate(zip(prompts, LENGTHS, strict=True))]
    with torch.no_grad():
        old = [policy.step(batch, [prompt.features], LogprobInputs()).logprobs - 0.05
               for prompt, batch in zip(prompts, batches, strict=True)]
    return Groups(prompts, batches, [torch.linspace(-1, 1, 3) * (1 + seed) - 0.5 for seed in range(len(prompts))], old)


def one_update(policy: Policy, backend: Any, groups: Groups, number: int, *, rank: int | None = None,
               broken: bool = False, told: float | None = None) -> tuple[float, float]:
    """An update of the plan: its loss and gradient norm.

    Args:
        rank: which rank this is; None runs the groups of both.
        broken: whether the last micro-batch of this rank has a NaN gradient.
        told: what the step is told that the loss is.
    """
    plan = PLAN[number % len(PLAN)]
    mine = plan[0] + plan[1] if rank is None else [*plan, []][min(rank, 2)]
    passes = len(mine) if rank is None else max(map(len, plan))
    chosen = plan[0] + plan[1]
    sequences = sum(len(LENGTHS[i]) for i in chosen)
    tokens = sum(sum(LENGTHS[i]) for i in chosen)
    total = torch.zeros((), dtype=torch.float64)
    for turn in range(passes):
        last = turn == passes - 1
        if turn < len(mine):
            index = mine[turn]
            output = backend.forward(groups.batches[index], policy.features_of([groups.prompts[index]]),
                                     PolicyLossInputs(LOSS, groups.advantages[index], groups.old_logprobs[index],
                                                      groups.old_logprobs[index] - 0.1, 1.0, sequences, tokens))
            loss = output.loss
        else:
            loss = backend.forward(*policy.idle_inputs()).logprobs.sum() * 0.0
        total += loss.detach().double()
        backend.backward(loss * float("nan") if broken and last else loss)
    if rank is not None:
        dist.all_reduce(total)
    loss_value = float(total)
    return loss_value, backend.step(loss_value if told is None else told, RATE * (1 + number % 3), MAX_NORM)


def run(policy: Policy, backend: Any, groups: Groups, numbers: range, rank: int | None = None
        ) -> list[tuple[float, float]]:
    """Updates in a row."""
    return [one_update(policy, backend, groups, number, rank=rank) for number in numbers]
