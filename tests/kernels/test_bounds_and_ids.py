"""cu_seqlens and ids that cannot be right are named with their value, compiled or not, wherever a CPU can see them.

Letters: M tokens, S completions, V vocabulary, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from veripo_kernels import (
    dispatch,
    dpo_loss,
    gather_logprobs,
    group_advantages,
    grpo_loss,
    linear_dpo_loss,
    linear_logprobs,
    linear_policy_loss,
)

pytestmark = pytest.mark.skipif(torch.cuda.is_available() and not dispatch.interpreted(),
                                reason="a GPU would have to be waited for")
IMPLS = ["torch", "triton"]
HIDDEN, HEAD, IDS, VALUES = torch.ones(4, 6), torch.ones(9, 6), torch.arange(4), torch.zeros(4)

OPS: dict[str, Callable[..., Any]] = {
    "grpo_loss": lambda bounds, impl: grpo_loss(VALUES, None, VALUES, bounds, advantages_per="token", impl=impl)[0],
    "dpo_loss": lambda bounds, impl: dpo_loss(VALUES, VALUES, bounds, impl=impl)[0],
    "linear_policy_loss": lambda bounds, impl: linear_policy_loss(
        HIDDEN, HEAD, IDS, None, VALUES, bounds, advantages_per="token", impl=impl)[0],
    "linear_dpo_loss": lambda bounds, impl: linear_dpo_loss(HIDDEN, HEAD, IDS, VALUES, bounds, impl=impl)[0]}

WRONG = {
    "ends early": (torch.tensor([0, 2, 3]), "cu_seqlens must run from 0 to 4, the number of tokens, got 0 to 3"),
    "ends late": (torch.tensor([0, 2, 5]), "cu_seqlens must run from 0 to 4, the number of tokens, got 0 to 5"),
    "starts late": (torch.tensor([1, 2, 4]), "cu_seqlens must run from 0 to 4, the number of tokens, got 1 to 4"),
    "starts early": (torch.tensor([-1, 2, 4]), "cu_seqlens must run from 0 to 4, the number of tokens, got -1 to 4"),
    "falls": (torch.tensor([0, 3, 1, 2, 4]), "cu_seqlens must not decrease, got 1 after 3"),
    "beyond and back": (torch.tensor([0, 9, 4]), "cu_seqlens must not decrease, got 4 after 9"),
    "no integers": (torch.tensor([0.0, 2.0, 4.0]), r"cu_seqlens must be int32 or int64 of shape \[S \+ 1\], got .*32"),
    "short integers": (torch.tensor([0, 2, 4]).short(), "cu_seqlens must be int32 or int64 .* got torch.int16"),
    "a matrix": (torch.tensor([[0, 2, 4]]), r"cu_seqlens must be int32 or int64 of shape .* \[1, 3\]"),
    "nothing": (torch.zeros(0, dtype=torch.int64), r"cu_seqlens must be int32 or int64 of shape .* \[0\]"),
    "elsewhere": (torch.tensor([0, 2, 4], device="meta"), "cu_seqlens must be on cpu, got meta")}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("op", OPS)
def test_bounds(op: str, wrong: str, impl: str) -> None:
    bounds, message = WRONG[wrong]
    with pytest.raises(ValueError, match=message):
        OPS[op](bounds, impl)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("op", OPS)
def test_right_bounds(op: str, dtype: torch.dtype) -> None:
    for bounds in ([0, 2, 4], [0, 0, 4], [0, 4, 4], [0, 0, 2, 2, 4]):
        assert OPS[op](torch.tensor(bounds, dtype=dtype), "torch").isfinite()


@pytest.mark.parametrize("op", ["linear_policy_loss", "linear_dpo_loss"])
@pytest.mark.parametrize("wrong", ["ends early", "falls"])
def test_bounds_in_a_compiled_graph(op: str, wrong: str) -> None:
    """The door of a graph sees no values; the op that runs in it does."""
    bounds, message = WRONG[wrong]
    torch._dynamo.reset()
    with pytest.raises(ValueError, match=message):
        torch.compile(lambda cu: OPS[op](cu, "torch"), backend="eager", fullgraph=True)(bounds)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("token", [-1, -100, 9, 1 << 40])
def test_ids_outside_of_the_vocabulary(token: int, impl: Any) -> None:
    """A loss names one that counts; one that the mask leaves out may be anything. Log-probs of it are NaN."""
    ids, mask = torch.tensor([1, token, 2, 3]), torch.tensor([1.0, 0.0, 1.0, 1.0])
    bounds, message = torch.tensor([0, 2, 4]), rf"token_ids must be in \[0, 9\) where loss_mask is not 0, got {token}"
    for masked in (None, mask):
        calls = (
            lambda m=masked: linear_policy_loss(HIDDEN, HEAD, ids, None, VALUES + 1, bounds, loss_mask=m,
                                                advantages_per="token", impl=impl)[0],
            lambda m=masked: linear_dpo_loss(HIDDEN, HEAD, ids, VALUES, bounds, loss_mask=m, impl=impl)[0])
        for call in calls:
            if masked is None:
                with pytest.raises(ValueError, match=message):
                    call()
            else:
                assert call().isfinite()
    for logprobs in (linear_logprobs(HIDDEN, HEAD, ids, impl=impl), gather_logprobs(HIDDEN @ HEAD.T, ids, impl=impl)):
        assert logprobs.isnan().tolist() == [False, True, False, False]


@pytest.mark.parametrize(("ids", "message"), [
    (torch.arange(4).int(), r"token_ids must be int64 \[4\], got torch.int32"),
    (torch.arange(4, device="meta"), "token_ids must be on cpu, got meta"),
    (torch.arange(3), r"token_ids must be int64 \[4\], got torch.int64 \[3\]")])
def test_ids_of_another_kind(ids: torch.Tensor, message: str) -> None:
    bounds = torch.tensor([0, 2, 4])
    for call in (lambda: linear_logprobs(HIDDEN, HEAD, ids), lambda: linear_dpo_loss(HIDDEN, HEAD, ids, VALUES, bounds),
                 lambda: linear_policy_loss(HIDDEN, HEAD, ids, None, VALUES, bounds)):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("impl", IMPLS)
def test_groups_below_0(impl: Any) -> None:
    with pytest.raises(ValueError, match="group_ids must be 0 or larger, got -2"):
        group_advantages(torch.ones(3), torch.tensor([0, -2, 1]), impl=impl)
