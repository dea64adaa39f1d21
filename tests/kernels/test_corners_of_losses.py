"""Corners of the losses where a wrong term once went unseen: each test fails for the mutant that its docstring names.

Letters: M packed tokens, S completions.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from veripo_kernels import formulas, linear, linear_loss, linear_torch, reference
from veripo_kernels.jit import grpo as bodies

from tests.support.linear_cases import check, check_loss, packed, rows, use_small_blocks
from tests.support.loss_cases import (
    assert_as_exact_as_torch,
    batch,
    on_device,  # noqa: F401 (a fixture)
    policy,
    preference,
)

IMPLS = ("torch", "triton")


# -- what the workspace cannot hold ----------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("loss", ["gspo", "sigmoid"])
@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_what_does_not_fit_has_its_temperature_once(impl: str, loss: str, temperature: float,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    """`Workspace.add` without the temperature, or with it twice: only completions that are too large pass there."""
    use_small_blocks(monkeypatch)
    added = []
    workspace = linear_loss.engine(impl).Workspace
    add = workspace.add
    monkeypatch.setattr(workspace, "add", lambda self, rows, *more: (added.append(len(rows)),
                                                                        add(self, rows, *more)))
    if loss == "gspo":
        data = packed(policy("gspo"), (3, 7, 2, 6), mask=False, temperature=temperature)
        data = replace(data, advantages=torch.tensor([1.0, -2.0, 0.7, 1.5]))
    else:
        data = packed(preference(loss), (3, 4, 1, 1, 5, 4), ref=True, temperature=temperature)
    assert check_loss(data, impl, 4 * 128 * 4 if impl == "triton" else 4 * 70 * 4, 2) == []
    assert len(added) == 2 and min(added) > 4


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("lengths", [(2, 3, 4, 0), (4, 0), (0, 2, 3, 0, 1, 0)])
def test_a_last_rejected_completion_without_tokens(impl: str, lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
                                                   ) -> None:
    """The padding of an odd last owner in `linear_loss`: the last pair's rejected completion owns no token, or none
    that the mask keeps, so that the last owner is its chosen one."""
    use_small_blocks(monkeypatch)
    data = packed(preference("sigmoid", nll_coef=0.3), lengths, ref=True, token_advantages=True)
    assert data.ref is not None and len(data.ref) == sum(lengths)
    for room in (2, 100):
        assert check_loss(data, impl, room * (128 if impl == "triton" else 70) * 4, 2) == []
    full = packed(preference("sigmoid"), (2, 3, 4, 2), ref=True, token_advantages=True)
    masked = replace(full, mask=torch.tensor([1.0] * 9 + [0.0] * 2))
    assert check_loss(masked, impl, steps=2) == []


# -- fractional masks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gspo", "gspo_token", "gmpo"])
@pytest.mark.parametrize("aggregation", ["sequence", "token"])
def test_a_completion_that_counts_less_than_one_token(name: str, aggregation: Any) -> None:
    """The count of the coupled kernel without its clamp at 1: a mask of fractions adds up to less."""
    inputs = batch((3, 2, 4))
    inputs.named["loss_mask"] = torch.tensor([0.25, 0.125, 0.25, 0.5, 0.25, 1.0, 0.5, 1.0, 0.75], dtype=torch.float64)
    counts = reference.sequence_sums(inputs.named["loss_mask"], inputs.cu_seqlens)
    assert (counts < 1).sum() == 2
    loss = policy(name, aggregation=aggregation)
    assert_as_exact_as_torch(lambda dtype, impl: inputs.run(loss, dtype, impl))


@pytest.mark.parametrize("importance", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
@pytest.mark.parametrize("name", ["grpo", "gspo", "cispo"])
def test_the_engine_gap_counts_by_the_mask(name: str, importance: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine gap without its fractional mask, per token and in the sum of a completion."""
    monkeypatch.setattr(bodies, "BLOCK", 4)
    inputs = batch((3, 2, 6), rollout=True)
    inputs.named["loss_mask"] = torch.tensor([0.5, 0.25, 1, 0.75, 0.5, 0.25, 1, 0.5, 0.75, 0.25, 1]).double()
    loss = policy(name, importance=importance, importance_floor=0.8, importance_cap=1.25)
    assert_as_exact_as_torch(lambda dtype, impl: inputs.run(loss, dtype, impl))


def test_the_definition_weighs_the_gap_by_the_mask() -> None:
    """One token of mask 1/2 whose engine gap is log 4: its weight is 2, and that of an unmasked one 4."""
    zeros, bounds = torch.zeros(2, dtype=torch.float64), torch.tensor([0, 2])
    _, metrics = reference.grpo_loss(
        zeros, zeros, torch.tensor([1.0]).double(), bounds, loss=policy("dapo", importance_cap=10.0),
        loss_mask=torch.tensor([0.5, 1.0]), rollout_logprobs=zeros - torch.tensor(4.0).double().log())
    assert metrics["importance"].item() == pytest.approx((0.5 * 2 + 4) / 1.5)


# -- flags and bounds ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLS)
def test_cispo_counts_the_cut_of_positive_advantages_alone(impl: str) -> None:
    """The cut counted for both signs: a ratio that is cut where the advantage is negative is no clipped gain."""
    inputs = batch((1, 1, 1, 1))
    log_ratio = torch.tensor([1.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    inputs = replace(inputs, policy=log_ratio - 2, old=torch.full_like(log_ratio, -2.0),
                     advantages=torch.tensor([1.0, -1.0, 1.0, 0.0], dtype=torch.float64))
    _, metrics, _ = inputs.run(policy("cispo", clip_high=0.5), torch.float32, impl)
    assert metrics["clip_high_share"].item() == pytest.approx(0.25) and metrics["clip_low_share"] == 0
    *_, low, high = formulas.cispo_surrogate(log_ratio, log_ratio, inputs.advantages, 0.5)
    assert high.tolist() == [True, False, False, False] and not low.any()


@pytest.mark.parametrize("impl", IMPLS)
def test_an_importance_weight_at_its_bounds_is_kept(impl: str) -> None:
    """A weight exactly at the cap or the floor is inside: `mask` drops what lies beyond, not what lies there."""
    gaps = torch.tensor([-0.5, 0.0, 0.5], dtype=torch.float64)  # exp(0) is 1 to the bit everywhere
    for floor, cap, kept in ((0.0, 1.0, [1, 1, 0]), (1.0, 9.0, [0, 1, 1])):
        inputs = batch((1, 1, 1), rollout=True)
        old = torch.full((3,), -1.0, dtype=torch.float64)
        inputs = replace(inputs, policy=old, old=old, advantages=torch.ones(3, dtype=torch.float64),
                         named={"rollout_logprobs": old - gaps})
        loss = policy("grpo", importance="token_mask", importance_floor=floor, importance_cap=cap)
        _, metrics, (gradient,) = inputs.run(loss, torch.float32, impl)
        assert (gradient != 0).int().tolist() == kept
        assert metrics["importance"].item() == pytest.approx((gaps.exp() @ torch.tensor(kept).double()).item() / 3)


# -- the linear ops --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_temperatures_that_code_might_single_out(impl: str, temperature: float, monkeypatch: pytest.MonkeyPatch
                                                 ) -> None:
    """A division left out at a temperature of 2 instead of 1."""
    use_small_blocks(monkeypatch)
    assert check(rows(7, temperature=temperature, entropy=True, bias=True), impl) == []


@pytest.mark.parametrize("impl", IMPLS)
def test_the_direction_is_not_rounded_before_its_slope(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """d logprob / d hidden of bfloat16 hidden states kept in bfloat16: what multiplies it would round a second time."""
    use_small_blocks(monkeypatch)
    data = rows(7, dtype=torch.bfloat16)
    found, direction = linear.engine(impl).statistics_and_direction(
        data.hidden, linear_torch.Head(data.head), data.token_ids)
    assert direction.dtype == found.logprobs.dtype == torch.float32
    assert (direction != direction.bfloat16().float()).any()
