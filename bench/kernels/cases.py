"""The problems that the kernel benches and the GPU check compute: peaked distributions, packed lengths, idle tokens.

Random hidden states against a random head give a near-uniform softmax, which no trained policy has. Here every row has
a likely token and a rival, so that the entropy is 0.1 to 0.7 nat as in reinforcement learning, and the token of the row
is drawn from the two. Letters: T tokens, S completions, V vocabulary, D hidden.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from veripo_kernels import reference

COMPLETION = 512
"""Tokens of a completion; all of one length, so that peers that pad have nothing to pad."""


class Shape(NamedTuple):
    """T, D, V."""

    tokens: int
    hidden: int
    vocabulary: int


CPU_SHAPES = {"linear_logprobs": [Shape(2048, 1024, 151936)], "linear_nll": [Shape(2048, 1024, 151936)],
              "linear_policy_loss": [Shape(2048, 1024, 32768)], "gather_logprobs": [Shape(256, 1, 151936)],
              "gather_logprobs_backward": [Shape(256, 1, 151936)], "grpo_loss": [Shape(65536, 1, 1)],
              "dpo_loss": [Shape(65536, 1, 1)]}
GPU_SHAPES = [*(Shape(tokens, 2048, 151936) for tokens in (2048, 8192, 16384, 65536)),
              Shape(8192, 1024, 151936), Shape(8192, 3584, 152064)]


def shapes_of(op: str, device: torch.device, divisor: int = 1) -> list[Shape]:
    """What every bench times an op at, where no shape is asked for; sizes are divided by `divisor`, for a trial."""
    shapes = GPU_SHAPES if device.type == "cuda" else CPU_SHAPES[op]
    return [Shape(*(max(size // divisor, 1) for size in shape)) for shape in shapes]


@dataclass(frozen=True)
class Problem:
    """Inputs of the linear ops."""

    hidden: torch.Tensor
    """[T, D]"""
    head: torch.Tensor
    """[V, D]"""
    token_ids: torch.Tensor
    """int64 [T]"""
    advantages: torch.Tensor
    """[S] float32; 0 in the idle completions."""
    cu_seqlens: torch.Tensor
    """int64 [S + 1]"""
    old_logprobs: torch.Tensor
    """[T] float32: the policy's own, moved a little."""
    train_head: bool = True
    workspace_bytes: int | None = None
    """None: the default of the implementation."""

    @property
    def slopes(self) -> torch.Tensor:
        """[T] float32: an upstream gradient of the log-probs, 0 on the tokens of idle completions."""
        return self.advantages[reference.sequence_index(self.cu_seqlens, len(self.hidden))] / len(self.hidden)

    def leaves(self) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden and head as new leaves; the head with a gradient when it is trained."""
        return self.hidden.detach().requires_grad_(), self.head.detach().requires_grad_(self.train_head)

    def to(self, dtype: torch.dtype) -> Problem:
        """The same numbers in another type (float64: for the truth)."""
        wide = torch.promote_types(dtype, torch.float32)
        return replace(self, hidden=self.hidden.to(dtype), head=self.head.to(dtype),
                       advantages=self.advantages.to(wide),
                       old_logprobs=self.old_logprobs.to(wide))


def problem(shape: Shape, dtype: torch.dtype, device: torch.device, *, idle: float = 0.0, train_head: bool = True,
            seed: int = 0) -> Problem:
    """Inputs of a shape. `idle`: share of the completions whose advantage is 0."""
    random = torch.Generator(device).manual_seed(seed)
    tokens, width, vocabulary = shape

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=random, device=device)

    head = (normal(vocabulary, width) / math.sqrt(width)).to(dtype)
    likely, rival = torch.randint(vocabulary, (2, tokens), generator=random, device=device)
    gap = 0.5 + 3.5 * torch.rand(tokens, generator=random, device=device)
    margin = math.log(vocabulary) + 8  # the tail, exp of its spread included, holds about 1 in 1,000
    hidden = 0.5 * normal(tokens, width)
    hidden += margin * head[likely] + (margin - gap)[:, None] * head[rival]
    chosen = torch.rand(tokens, generator=random, device=device) < torch.sigmoid(gap)
    cu_seqlens = completions(tokens, device)
    advantages = normal(len(cu_seqlens) - 1)
    advantages += 0.1 * advantages.sign()  # none is 0 by chance
    advantages[:round(idle * len(advantages))] = 0
    token_ids = torch.where(chosen, likely, rival)
    old_logprobs = torch.log(torch.sigmoid(torch.where(chosen, gap, -gap))) + 0.05 * normal(tokens)
    return Problem(hidden.to(dtype), head, token_ids, advantages, cu_seqlens, old_logprobs, train_head)


def completions(tokens: int, device: torch.device) -> torch.Tensor:
    """cu_seqlens of completions of one length, at least two of them; the last takes what is left over."""
    count = max(tokens // COMPLETION // 2 * 2, 2)
    bounds = torch.arange(count + 1, device=device) * (tokens // count)
    bounds[-1] = tokens
    return bounds


def mean_entropy(case: Problem) -> float:
    """Nats, of the first 64 rows."""
    return float(reference.entropy(reference.linear_logits(case.hidden[:64], case.head)).mean())


@dataclass(frozen=True)
class Logits:
    """Inputs of `gather_logprobs`."""

    logits: torch.Tensor
    """[T, V]"""
    token_ids: torch.Tensor
    slopes: torch.Tensor
    """[T] float32"""

    def to(self, dtype: torch.dtype) -> Logits:
        wide = torch.promote_types(dtype, torch.float32)
        return replace(self, logits=self.logits.to(dtype), slopes=self.slopes.to(wide))


def logits(shape: Shape, dtype: torch.dtype, device: torch.device, *, seed: int = 0) -> Logits:
    """Peaked logits [T, V]; D is not used."""
    random = torch.Generator(device).manual_seed(seed)
    tokens, _, vocabulary = shape
    values = torch.empty(tokens, vocabulary, dtype=dtype, device=device)
    for rows in values.split(1024):  # in float32 as a whole 65,536 rows would not fit beside the result
        rows.copy_(torch.randn(rows.shape, generator=random, device=device))
    likely, rival = torch.randint(vocabulary, (2, tokens, 1), generator=random, device=device)
    gap = 0.5 + 3.5 * torch.rand(tokens, 1, generator=random, device=device)
    margin = math.log(vocabulary) + 8
    values.scatter_(1, rival, (margin - gap).to(dtype)).scatter_(1, likely, margin)
    slopes = torch.randn(tokens, generator=random, device=device)
    return Logits(values, torch.where(slopes[:, None] > 0, likely, rival)[:, 0], slopes)


@dataclass(frozen=True)
class Rollouts:
    """Inputs of `grpo_loss` and `dpo_loss`, all [T] float32 but cu_seqlens int64 [S + 1] and advantages [S]."""

    policy_logprobs: torch.Tensor
    old_logprobs: torch.Tensor
    ref_logprobs: torch.Tensor
    advantages: torch.Tensor
    cu_seqlens: torch.Tensor

    def to(self, dtype: torch.dtype) -> Rollouts:
        return Rollouts(*(value.to(dtype) for value in (
            self.policy_logprobs, self.old_logprobs, self.ref_logprobs, self.advantages)), self.cu_seqlens)


def rollouts(tokens: int, device: torch.device, *, seed: int = 0) -> Rollouts:
    """Log-probs of a policy that has moved a little from the old and the reference one."""
    random = torch.Generator(device).manual_seed(seed)
    old, step, drift = torch.randn(3, tokens, generator=random, device=device)
    old = -old.abs()
    cu_seqlens = completions(tokens, device)
    advantages = torch.randn(len(cu_seqlens) - 1, generator=random, device=device)
    return Rollouts(old + 0.1 * step, old, old + 0.1 * drift, advantages, cu_seqlens)
