"""Tokens of probability near 1: log p and its gradient p - 1 keep their digits, in every implementation.

Letters: T rows, V vocabulary, D hidden.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from veripo_kernels import dispatch, gather_logprobs, gather_logprobs_fused, linear_logprobs

DEVICE = torch.device("cuda" if torch.cuda.is_available() and not dispatch.interpreted() else "cpu")
GATHER = [(name, impl) for name in ("forward", "fused", "entropy") for impl in dispatch.OPS["gather_logprobs"]]
OWN = 5
GAPS = (8.0, 16.0, 21.0, 30.0, 60.0)
"""1 - p is 3e-2 to 1e-24 for 300 logits; in float32 a sum beside 1 has lost all of it from 17 on."""


def usable(impl: Any) -> None:
    reason = dispatch.refusal(impl, DEVICE)
    if reason is not None:
        pytest.skip(reason)


def exact(logits: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """float64 log p and 1 - p [T] of the own token, from the sum of the others alone."""
    scaled = logits.double() / temperature
    gap = torch.cat([scaled[:, :OWN], scaled[:, OWN + 1:]], 1).logsumexp(-1) - scaled[:, OWN]
    return -gap.exp().log1p(), gap.sigmoid()


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want) / want).abs().max().item()


@pytest.mark.parametrize("gap", GAPS)
@pytest.mark.parametrize(("name", "impl"), GATHER)
@pytest.mark.parametrize("vocabulary", [300, 5000])
def test_gather(name: str, impl: Any, gap: float, vocabulary: int) -> None:
    usable(impl)
    logits = 0.3 * torch.randn(4, vocabulary, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    logits[:, OWN] = gap
    ids, slopes = torch.full((4,), OWN, device=DEVICE), torch.tensor([1.0, -2.0, 0.5, 3.0], device=DEVICE)
    logprobs, doubt = exact(logits, 0.9)
    if name == "fused":
        got, gradient = gather_logprobs_fused(logits, ids, slopes, temperature=0.9, impl=impl)
    else:
        leaf = logits.clone().requires_grad_()
        both = gather_logprobs(leaf, ids, temperature=0.9, entropy=True, impl=impl)
        got = both[0] if name == "entropy" else gather_logprobs(leaf, ids, temperature=0.9, impl=impl)
        gradient, = torch.autograd.grad((got * slopes).sum(), leaf)
    # an exponent of up to 96 binary digits is rounded to 2^-18: 96 ln(2) 2^-24 times a few
    assert relative(got, logprobs) <= 2e-5 and relative(gradient[:, OWN], slopes.double() * doubt / 0.9) <= 2e-5


@pytest.mark.parametrize("gap", GAPS)
@pytest.mark.parametrize("impl", dispatch.OPS["linear_logprobs"])
@pytest.mark.parametrize("frozen", [False, True])
def test_linear(impl: Any, gap: float, frozen: bool) -> None:
    """The gradient by the bias is that by the logit; of a frozen head, d log p / d hidden is (1 - p) times a mean."""
    usable(impl)
    generator = torch.Generator().manual_seed(0)
    hidden, head = 0.1 * torch.randn(4, 8, generator=generator), torch.randn(70, 8, generator=generator)
    hidden[:, 0], head[:, 0], head[OWN, 0] = gap, 0, 1
    hidden, head, ids = hidden.to(DEVICE), head.to(DEVICE), torch.full((4,), OWN, device=DEVICE)
    logprobs, doubt = exact(hidden.double() @ head.double().T, 1.0)
    leaf = hidden.clone().requires_grad_()
    bias = torch.zeros(70, device=DEVICE).requires_grad_(not frozen)
    got = linear_logprobs(leaf, head.clone().requires_grad_(not frozen), ids, bias=bias, impl=impl)
    got.sum().backward()
    assert relative(got, logprobs) <= 2e-5
    assert relative(leaf.grad[:, 0], doubt) <= 2e-5  # the own row of the head alone has this column
    if not frozen:
        assert relative(bias.grad[OWN], doubt.sum()) <= 2e-5


@pytest.mark.parametrize("impl", dispatch.OPS["gather_logprobs"])
def test_the_definition_loses_what_the_ops_keep(impl: Any) -> None:
    """What makes the tests above bite: log_softmax in float32 gives 0 where p is 1 - 1e-10."""
    usable(impl)
    logits = torch.zeros(1, 300, device=DEVICE)
    logits[0, OWN] = 30.0
    assert torch.log_softmax(logits, -1)[0, OWN] == 0
    assert gather_logprobs(logits, torch.tensor([OWN], device=DEVICE), impl=impl) < 0
