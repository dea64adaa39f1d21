"""group_advantages: the kernel against the definition in float64, exact zeros, cancellation, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from veripo_kernels import group_advantages, reference
from veripo_kernels.scalars import as_tensor

from tests.support.loss_cases import on_device, rand  # noqa: F401 (a fixture)

KINDS = ("std", "no_std", "leave_one_out", "batch_std")


def interleaved(completions: int, groups: int, seed: int = 0) -> torch.Tensor:
    """Group of each completion, in no order, each group present."""
    ids = (rand(completions, seed=seed).abs() * 1e6).long() % groups
    return torch.cat([torch.arange(groups), ids[groups:]])[rand(completions, seed=seed + 1).argsort()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("completions", "groups"), [(1, 1), (40, 6), (129, 30)])
def test_as_exact_as_the_roundings_allow(kind: Any, completions: int, groups: int) -> None:
    """Mean, difference, deviation and quotient are half a step each, the mean's sum one more: three steps, at least
    those of 1, the size of a reward."""
    rewards, ids = rand(completions).float(), interleaved(completions, groups)
    want = reference.group_advantages(rewards.double(), ids, kind=kind)
    got = group_advantages(rewards, ids, kind=kind, impl="triton")
    assert (got - want).abs().max() <= 3 * torch.finfo(torch.float32).eps * max(want.abs().max(), 1)
    wide = group_advantages(rewards.double(), ids, kind=kind, impl="triton")
    torch.testing.assert_close(wide, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("kind", KINDS)
def test_equal_rewards_give_exact_zeros(kind: Any, impl: Any) -> None:
    sizes = torch.tensor([1, 3, 5, 6, 7, 9, 11, 13] * 4)  # the sum of seven times 0.1, divided by 7, may not be 0.1
    ids = torch.arange(len(sizes)).repeat_interleave(sizes)
    rewards = torch.cat([torch.tensor([0.1, 1 / 3, 1e6 + 0.1]), rand(len(sizes) - 3)])[ids].float()
    order = rand(len(ids), seed=1).argsort()
    assert (group_advantages(rewards[order], ids[order], kind=kind, impl=impl) == 0).all()


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("kind", ["std", "batch_std"])
def test_large_rewards_keep_their_spread(kind: Any, impl: Any) -> None:
    rewards = 4096.0 + torch.tensor([0.0, 0.125, 0.25, 0.5, 0.0, 1.0])  # exact in float32; their squares are not
    ids = torch.tensor([0, 0, 0, 0, 1, 1])
    want = reference.group_advantages(rewards.double() - 4096, ids, kind=kind)
    got = group_advantages(rewards, ids, kind=kind, impl=impl).double()
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.sampled_from(KINDS), st.integers(0, 99))
def test_order_does_not_matter_and_groups_are_centred(sizes: list[int], kind: Any, seed: int) -> None:
    ids = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    rewards, order = rand(len(ids), seed=seed).float(), torch.randperm(len(ids))
    got = group_advantages(rewards, ids, kind=kind, impl="triton")
    shuffled = group_advantages(rewards[order], ids[order], kind=kind, impl="triton")
    torch.testing.assert_close(shuffled, got[order], rtol=1e-5, atol=1e-5)
    sums = torch.zeros(len(sizes)).index_add(0, ids, got)
    assert (sums.abs() <= 1e-5 * (1 + got.abs().sum())).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype, impl: Any) -> None:
    rewards, ids = rand(12).to(dtype), interleaved(12, 3)
    got = group_advantages(rewards, ids, impl=impl)
    assert got.dtype == torch.float32
    assert torch.equal(got, group_advantages(rewards.float(), ids, impl=impl))


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_in_a_compiled_graph(impl: Any) -> None:
    compiled = torch.compile(lambda rewards, ids: group_advantages(rewards, ids, impl=impl), fullgraph=True,
                             backend="aot_eager")
    rewards, ids = rand(9).float(), interleaved(9, 2)
    assert torch.equal(compiled(rewards, ids), group_advantages(rewards, ids, impl=impl))


def test_opcheck() -> None:
    arguments = (rand(9).float(), interleaved(9, 2), "std", as_tensor(1e-6))
    torch.library.opcheck(torch.ops.veripo.group_advantages.default, arguments)


@pytest.mark.parametrize(("change", "message"), [
    ({"rewards": torch.ones(2, 3)}, r"rewards .* \[2, 3\]"),
    ({"rewards": torch.ones(4, dtype=torch.int64)}, "rewards .*int64"),
    ({"group_ids": torch.zeros(3, dtype=torch.int64)}, r"group_ids .* \[4\]"),
    ({"group_ids": torch.zeros(4)}, "group_ids must be int64"),
    ({"group_ids": torch.zeros(4, dtype=torch.int64, device="meta")}, "group_ids must be on .*, got meta"),
    ({"kind": "var"}, "kind must be one of std, .* 'var'")])
def test_refusals(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"rewards": torch.ones(4), "group_ids": torch.zeros(4, dtype=torch.int64)} | change
    with pytest.raises(ValueError, match=message):
        group_advantages(arguments["rewards"], arguments["group_ids"], kind=arguments.get("kind", "std"))
