"""Linear layers on reordered weights, against themselves as they are."""

from __future__ import annotations

import pytest
import torch

from tests.support import policies
from veripo_fast.model import skinny
from veripo_fast.model.skinny import reordered
from veripo_fast.rollout.protocol import Sampling
from veripo_fast.rollout.torch_engine import TorchEngine


def layers_of(*shapes: tuple[int, int], bias: bool = True) -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(*(torch.nn.Linear(inner, outer, bias) for inner, outer in shapes))


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 3, 16, 31])
def test_products_are_those_of_the_plain_layers(rows: int, bias: bool) -> None:
    model = layers_of((512, 1408), (1408, 130), (130, 7), bias=bias)
    states = torch.randn(rows, 1, 512, generator=torch.Generator().manual_seed(1))
    exact = model.double()(states.double())
    model.float()
    plain = model(states)
    with reordered([model], 16, 64):
        assert all("forward" in layer.__dict__ for layer in model)
        ours = model(states)
    assert not any("forward" in layer.__dict__ for layer in model)
    assert torch.equal(model(states), plain)
    assert ours.shape == plain.shape
    assert (ours - exact).norm() <= 4 * (plain - exact).norm() + 1e-7 * exact.norm()


@pytest.mark.parametrize(("rows", "tokens", "dtype"), [
    (16, skinny.FEWEST_TOKENS - 1, torch.float32), (16, 64, torch.bfloat16), (16, 64, torch.float64)])
def test_where_it_does_not_pay_layers_stay(rows: int, tokens: int, dtype: torch.dtype) -> None:
    model = layers_of((64, 64)).to(dtype)
    with reordered([model], rows, tokens):
        assert "forward" not in model[0].__dict__


def test_layers_are_given_back_after_an_error() -> None:
    model = layers_of((64, 64), (64, 64))
    with pytest.raises(KeyboardInterrupt), reordered([model], 16, 64):
        raise KeyboardInterrupt
    assert not any("forward" in layer.__dict__ for layer in model)


def test_a_part_that_is_a_layer_itself_and_layers_of_another_kind() -> None:
    class Own(torch.nn.Linear):
        """Whose forward is not a product."""

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return input

    head, own = torch.nn.Linear(64, 64), Own(64, 64)
    with reordered([head, torch.nn.Sequential(own)], 16, 64), torch.no_grad():
        assert "forward" in head.__dict__ and "forward" not in own.__dict__
        assert head(torch.zeros(1, 64)).shape == (1, 64)


def test_a_rollout_reads_reordered_weights_and_trains_on_plain_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = policies.policy("qwen3_vl")
    item = policies.loaded(policy, [("video", 4, 3, 2)])
    calls = []
    product = skinny._product
    monkeypatch.setattr(skinny, "_product", lambda *inputs: calls.append(inputs[2].shape) or product(*inputs))
    ours = TorchEngine(policy).generate([item], Sampling(3, 1.0, 20, 5))
    assert len(calls) > 100 and calls[0][0] == 1, "the first logits are those of the prompt"
    assert all(shape[0] == 3 for shape in calls[1:])
    monkeypatch.setattr(skinny, "FEWEST_TOKENS", 1000)
    calls.clear()
    plain = TorchEngine(policy).generate([item], Sampling(3, 1.0, 20, 5))
    assert not calls
    for one, other in zip(ours[0].completions, plain[0].completions, strict=True):
        assert one.token_ids == other.token_ids
        assert one.rollout_logprobs == pytest.approx(other.rollout_logprobs, abs=1e-5)
    assert not any("forward" in layer.__dict__ for layer in policy.model.modules() if type(layer) is torch.nn.Linear)
