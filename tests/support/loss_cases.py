"""Packed batches for the tests of the losses, and the yardstick: rounding steps of the largest number."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import pytest
import torch
from veripo_kernels import dpo_loss, grpo_loss
from veripo_kernels.dispatch import interpreted
from veripo_kernels.options import PolicyLoss, PreferenceLoss

LENGTHS = (3, 0, 12, 5)
POLICY_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "gspo", "gspo_token", "gmpo", "luspo", "vespo",
                 "cispo_sequence", "sapo_sequence", "gpg")
PREFERENCE_LOSSES = ("sigmoid", "ipo", "hinge", "robust", "exo", "nca", "apo_zero", "apo_down", "sppo", "bco",
                     "discopop")

DEVICE = torch.device("cuda" if torch.cuda.is_available() and not interpreted() else "cpu")

Result = tuple[torch.Tensor, dict[str, torch.Tensor], list[torch.Tensor | None]]


@pytest.fixture(autouse=True)
def on_device() -> Iterator[None]:
    """In the files that import it tensors are made where kernels run: on a GPU if there is one."""
    with DEVICE:
        yield


def rand(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu").to(DEVICE)


def cu_seqlens(lengths: Iterable[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths], device=DEVICE).cumsum(0)


def policy(name: str, **options: Any) -> PolicyLoss:
    return PolicyLoss(name, **({"constant_length": 16} | options))  # type: ignore[arg-type]


def preference(name: str, **options: Any) -> PreferenceLoss:
    return PreferenceLoss(name, **({"label_smoothing": 0.1} if name in ("robust", "exo") else {}) | options)


@dataclass(frozen=True)
class Batch:
    """Inputs of grpo_loss in float64, rounded to what every dtype holds."""

    policy: torch.Tensor
    old: torch.Tensor | None
    advantages: torch.Tensor
    cu_seqlens: torch.Tensor
    named: dict[str, torch.Tensor]

    def run(self, loss: PolicyLoss | str, dtype: torch.dtype, impl: str, **counts: int) -> Result:
        """Loss, metrics, gradients by the policy's log-probs and by the entropy."""
        leaf = self.policy.to(dtype).requires_grad_()
        named = {name: value if name == "loss_mask" else value.to(dtype) for name, value in self.named.items()}
        leaves = [leaf]
        if "entropy" in named:
            named["entropy"] = named["entropy"].requires_grad_()
            leaves.append(named["entropy"])
        old = None if self.old is None else self.old.to(dtype)
        value, metrics = grpo_loss(leaf, old, self.advantages.to(dtype), self.cu_seqlens, loss=loss, impl=impl,
                                   advantages_per=advantages_per(self.advantages, self.cu_seqlens), **named, **counts)
        return value, metrics, list(torch.autograd.grad(value, leaves, allow_unused=True))


def batch(lengths: Iterable[int] = LENGTHS, *, seed: int = 0, token_advantages: bool = False, mask: bool = False,
          old: bool = True, ref: bool = False, rollout: bool = False, entropy: bool = False, spread: float = 0.3
          ) -> Batch:
    """Log-ratios of standard deviation `spread`; rounded to bfloat16, so that each dtype sees the same numbers."""
    bounds = cu_seqlens(lengths)
    tokens, sequences = int(bounds[-1]), len(bounds) - 1

    def rounded(values: torch.Tensor) -> torch.Tensor:
        return values.bfloat16().double()

    base = rounded(-rand(tokens, seed=seed).abs() - 0.1)
    drift = [rounded(base + rand(tokens, seed=seed + number, scale=spread)) for number in (1, 2, 3)]
    named = {}
    if mask:
        named["loss_mask"] = rand(tokens, seed=seed + 4) > -0.5
        named["loss_mask"][:lengths[0] if isinstance(lengths, tuple) else 1] = False  # a completion without tokens
    if ref:
        named["ref_logprobs"] = drift[1]
    if rollout:
        named["rollout_logprobs"] = drift[2]
        named["rollout_logprobs"][-2] = torch.nan
    if entropy:
        named["entropy"] = rounded(rand(tokens, seed=seed + 5).abs())
    advantages = rounded(rand(tokens if token_advantages else sequences, seed=seed + 6))
    return Batch(drift[0], base if old else None, advantages, bounds, named)


def advantages_per(advantages: torch.Tensor, cu_seqlens: torch.Tensor) -> str | None:
    """What the advantages of these batches are: one per completion where there are as many; None: their shape says."""
    return "sequence" if len(advantages) == len(cu_seqlens) - 1 else None


def run_pairs(inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor], loss: PreferenceLoss | str, dtype: torch.dtype,
              impl: str, **named: Any) -> Result:
    """dpo_loss of (policy, ref, cu_seqlens): loss, metrics, gradient."""
    leaf = inputs[0].to(dtype).requires_grad_()
    value, metrics = dpo_loss(leaf, inputs[1].to(dtype), inputs[2], loss=loss, impl=impl, **named)
    return value, metrics, list(torch.autograd.grad(value, [leaf]))


def assert_as_exact_as_torch(run: Callable[[torch.dtype, str], Result], *, dtype: torch.dtype = torch.float32,
                             steps: float = 1.0) -> None:
    """The kernel's error is at most 2 + `steps` rounding steps, whatever torch errs by.

    A step is that of the largest number in the result, for a scalar at least that of 1: the size of its terms. A term
    has a difference, an exponential and two or three products, each half a step, and the sums of up to 20 terms walk
    at random by one step more; `steps` is higher where a log-ratio of 8 or more is exponentiated.
    """
    truth, got = run(torch.float64, "torch"), run(dtype, "triton")
    assert got[1].keys() == truth[1].keys()
    for want, value in zip(_flat(truth), _flat(got), strict=True):
        assert value.dtype == dtype and value.isfinite().all()
        size = max(want.abs().max().item() if want.numel() else 0.0, 1.0 if want.ndim == 0 else 0.0)
        error, allowed = _error(value, want), (2 + steps) * torch.finfo(value.dtype).eps * size
        assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}\n{value}\n{want}"


def _flat(result: Result) -> list[torch.Tensor]:
    value, metrics, gradients = result
    return [value.detach(), *(metrics[name] for name in sorted(metrics)),
            *(gradient for gradient in gradients if gradient is not None)]


def _error(got: torch.Tensor, want: torch.Tensor) -> float:
    return (got.double() - want).abs().max().item() if want.numel() else 0.0


def pairwise_cases(**factors: Iterable[Any]) -> list[dict[str, Any]]:
    """Few combinations in which every two values of different factors meet."""
    values = {name: list(choices) for name, choices in factors.items()}
    left = {(a, x, b, y) for a, b in combinations(values, 2) for x in values[a] for y in values[b]}
    cases = []
    while left:
        case: dict[str, Any] = {}
        for name, choices in values.items():
            case[name] = max(choices, key=lambda choice, name=name: (
                sum((other, value, name, choice) in left for other, value in case.items()),
                sum(name in (pair[0], pair[2]) and choice == pair[1 if pair[0] == name else 3] for pair in left)))
        left -= {(a, case[a], b, case[b]) for a, b in combinations(values, 2)}
        cases.append(case)
    return cases
