"""The optimizer against plain AdamW: schedule, clipping, float32 masters, the guard against NaN, and saving."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from veripo_fast.config.schema import OptimizerConfig
from veripo_fast.distributed.backend import LocalBackend
from veripo_fast.distributed.state_files import write_state
from veripo_fast.distributed.world import ONE
from veripo_fast.errors import TrainingError
from veripo_fast.stages.optimizer import Optimizer

SHAPES = ((3, 4), (5,))


def parameters(dtype: torch.dtype = torch.float32) -> list[tuple[str, torch.nn.Parameter]]:
    generator = torch.Generator().manual_seed(0)
    return [(f"p{i}", torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)))
            for i, shape in enumerate(SHAPES)]


def backend_of(named: list[tuple[str, torch.nn.Parameter]]) -> LocalBackend:
    """One process that holds these and no model."""
    return LocalBackend(torch.nn.Identity(), lambda: named)


def set_gradients(named: list[tuple[str, torch.nn.Parameter]], step: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for _, parameter in named:
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def step_after(optimizer: Optimizer, loss: float) -> float | None:
    """A step as if `backward` had been given losses of this sum."""
    optimizer.loss += loss
    return optimizer.step()


def values(named: list[tuple[str, torch.nn.Parameter]]) -> list[torch.Tensor]:
    return [parameter.detach().clone() for _, parameter in named]


def assert_equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> None:
    assert len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# -- schedule --------------------------------------------------------------------------------------------------------


def rates(steps: int, **options: object) -> list[float]:
    named = parameters()
    optimizer = Optimizer(backend_of(named), OptimizerConfig(**options), peak=0.02, total_steps=10)
    found = []
    for step in range(steps):
        set_gradients(named, step)
        found.append(optimizer.learning_rate())
        step_after(optimizer, 0.0)
        assert optimizer.backend.adamw.param_groups[0]["lr"] == found[-1]
    return found


def test_constant_after_warm_up() -> None:
    assert rates(6, warmup_steps=4) == pytest.approx([0.005, 0.01, 0.015, 0.02, 0.02, 0.02])
    assert rates(3) == [0.02] * 3


def test_cosine_falls_to_a_tenth_and_stays_there() -> None:
    falling = [0.02 * (0.1 + 0.45 * (1 + math.cos(math.pi * done / 8))) for done in range(8)]
    assert rates(13, warmup_steps=2, schedule="cosine") == pytest.approx([0.01, 0.02, *falling, 0.002, 0.002, 0.002])


# -- steps -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scale", "clips"), [(0.05, False), (50.0, True)])
def test_steps_are_those_of_adamw_with_clipped_gradients(scale: float, clips: bool) -> None:
    ours, theirs = parameters(), parameters()
    config = OptimizerConfig(betas=(0.8, 0.9), weight_decay=0.1, max_grad_norm=1.0, warmup_steps=3)
    optimizer = Optimizer(backend_of(ours), config, peak=0.01, total_steps=100)
    adamw = torch.optim.AdamW([p for _, p in theirs], lr=0.01, betas=(0.8, 0.9), weight_decay=0.1)
    for step in range(6):
        set_gradients(ours, step, scale)
        set_gradients(theirs, step, scale)
        expected = torch.nn.utils.clip_grad_norm_([p for _, p in theirs], 1.0)
        adamw.param_groups[0]["lr"] = 0.01 * min((step + 1) / 3, 1)
        adamw.step()
        norm = step_after(optimizer, 0.0)
        assert norm == pytest.approx(expected.item()) and (norm > 1) == clips
        assert all(p.grad is None for _, p in ours)
        for one, other in zip(values(ours), values(theirs), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
    assert optimizer.steps == 6


def test_a_parameter_without_gradient_stays() -> None:
    named = parameters()
    optimizer = Optimizer(backend_of(named), OptimizerConfig(weight_decay=0.5), peak=0.1, total_steps=1)
    before = values(named)
    set_gradients(named, 0)
    named[1][1].grad = None
    step_after(optimizer, 0.0)
    assert not torch.equal(named[0][1], before[0]) and torch.equal(named[1][1], before[1])


def test_updates_below_bfloat16_resolution_add_up_in_the_master_weights() -> None:
    parameter = torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    optimizer = Optimizer(backend_of([("p", parameter)]), OptimizerConfig(), peak=1e-4, total_steps=100)
    plain = torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    adamw = torch.optim.AdamW([plain], lr=1e-4, weight_decay=0.0)
    for _ in range(100):
        parameter.grad, plain.grad = torch.ones_like(parameter), torch.ones_like(plain)
        step_after(optimizer, 0.0)
        adamw.step()
    assert torch.equal(plain, torch.ones_like(plain)), "bfloat16 alone forgets every step"
    torch.testing.assert_close(optimizer.backend.masters[0].detach(), torch.full((8,), 0.99), rtol=1e-4, atol=0)
    assert torch.equal(parameter, optimizer.backend.masters[0].bfloat16())
    assert optimizer.backend.adamw.state[optimizer.backend.masters[0]]["exp_avg"].dtype == torch.float32


# -- what is not finite ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("loss", "gradient"), [
    (float("nan"), 1.0), (float("inf"), 1.0), (0.0, float("nan")), (0.0, float("-inf"))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bad_step_is_skipped_and_leaves_no_trace(loss: float, gradient: float, dtype: torch.dtype) -> None:
    trained, spared = parameters(dtype), parameters(dtype)
    with_bad, without = (Optimizer(backend_of(named), OptimizerConfig(warmup_steps=5), peak=0.01, total_steps=9)
                         for named in (trained, spared))
    for step in range(4):
        for named, optimizer in ((trained, with_bad), (spared, without)):
            set_gradients(named, step)
            assert step_after(optimizer, 0.0) is not None
        before = values(trained)
        set_gradients(trained, 50 + step)
        trained[1][1].grad[2] *= gradient
        assert step_after(with_bad, loss) is None
        assert all(p.grad is None for _, p in trained)
        assert_equal(values(trained), before)
        assert with_bad.bad_steps == 1 and with_bad.steps == step + 1
    assert_equal(values(trained), values(spared))


def test_the_run_stops_after_too_many_bad_steps_in_a_row() -> None:
    named = parameters()
    optimizer = Optimizer(backend_of(named), OptimizerConfig(max_bad_steps=3), peak=0.01, total_steps=9)
    for step, loss in enumerate([math.nan, math.nan, 0.0, math.nan, math.nan]):
        set_gradients(named, step)
        assert (step_after(optimizer, loss) is None) == math.isnan(loss)
    before = values(named)
    set_gradients(named, 9)
    with pytest.raises(TrainingError, match=r"3 optimizer steps in a row .*last loss nan"):
        step_after(optimizer, math.nan)
    assert_equal(values(named), before)


def test_losses_of_micro_batches_add_up_and_one_that_is_nan_spoils_the_step() -> None:
    named = parameters()
    optimizer = Optimizer(backend_of(named), OptimizerConfig(), peak=0.01, total_steps=9)
    weights = named[0][1]
    assert [optimizer.backward((weights * scale).sum()) for scale in (0.0, 0.0)] == [0.0, 0.0] and optimizer.loss == 0
    value = optimizer.backward(weights.sum())
    assert optimizer.loss == value == pytest.approx(weights.sum().item())
    torch.testing.assert_close(weights.grad, torch.ones_like(weights))
    assert optimizer.step() is not None and optimizer.loss == 0
    optimizer.backward(weights.sum())
    optimizer.backward(weights.sum() * math.nan)
    assert optimizer.step() is None and optimizer.loss == 0 and optimizer.bad_steps == 1


# -- on disk ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_optimizer_continues_bitwise(tmp_path: Path, dtype: torch.dtype) -> None:
    config = OptimizerConfig(warmup_steps=2, schedule="cosine", weight_decay=0.01)
    straight, resumed = parameters(dtype), parameters(dtype)
    first = Optimizer(backend_of(straight), config, peak=1e-3, total_steps=8)

    def advance(named: list, optimizer: Optimizer, steps: range) -> None:
        for step in steps:
            set_gradients(named, step)
            step_after(optimizer, 0.0)

    advance(straight, first, range(4))
    write_state(tmp_path / "optimizer", first.state(), ONE)
    with torch.no_grad():  # the parameters come with the model
        for (_, own), (_, other) in zip(resumed, straight, strict=True):
            own.copy_(other)
    advance(straight, first, range(4, 8))
    second = Optimizer(backend_of(resumed), config, peak=1e-3, total_steps=8)
    second.load(tmp_path / "optimizer")
    advance(resumed, second, range(4, 8))
    assert_equal(values(resumed), values(straight))
    assert_equal([m.detach() for m in second.backend.masters], [m.detach() for m in first.backend.masters])
    assert second.steps == first.steps == 8 and second.learning_rate() == first.learning_rate()
