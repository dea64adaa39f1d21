"""dpo_loss: the kernels against the definition in float64, over every variant, and the properties of a loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from veripo_kernels import PreferenceLoss, dpo_loss, reference
from veripo_kernels.jit import dpo as bodies
from veripo_kernels.jit import grpo as grpo_bodies
from veripo_kernels.scalars import as_tensor

from tests.support.loss_cases import (
    PREFERENCE_LOSSES,
    assert_as_exact_as_torch,
    cu_seqlens,
    on_device,  # noqa: F401 (a fixture)
    pairwise_cases,
    preference,
    rand,
    run_pairs,
)

LENGTHS = (3, 9, 5, 0, 6, 6)
CASES = pairwise_cases(name=PREFERENCE_LOSSES, ld_alpha=(None, 0.4), nll_coef=(0.0, 0.5), mask=(False, True),
                       length_normalize=(False, True), sums=(False, True))
DIVERGENCES = pairwise_cases(name=("sigmoid", "ipo", "hinge", "robust", "exo", "discopop"),
                             divergence=("reverse_kl", "forward_kl", "js", "alpha"), alpha=(0.4, 2.0),
                             length_normalize=(False, True), sums=(False, True), weights=(False, True))

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Completions of a few tokens then span several blocks."""
    monkeypatch.setattr(bodies, "BLOCK", 4)


def pairs(lengths: tuple[int, ...] | list[int] = LENGTHS, *, seed: int = 0, spread: float = 0.5) -> Inputs:
    """Log-probs of policy and reference, rounded to bfloat16, and the bounds."""
    bounds = cu_seqlens(lengths)
    ref = -rand(int(bounds[-1]), seed=seed).abs() - 0.1
    policy = ref + rand(int(bounds[-1]), seed=seed + 1, scale=spread)
    return policy.bfloat16().double(), ref.bfloat16().double(), bounds


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(str(value) for value in case.values()))
@pytest.mark.usefixtures("small_blocks")
def test_as_exact_as_torch(case: dict[str, Any]) -> None:
    loss = preference(case["name"], dpo_beta=0.3, ld_alpha=case["ld_alpha"], nll_coef=case["nll_coef"],
                      length_normalize=case["length_normalize"])
    policy, ref, bounds = pairs()
    mask = rand(len(policy), seed=7) > -0.7 if case["mask"] else None
    if case["sums"]:
        ref = reference.pair_sums(ref, bounds, loss=loss, loss_mask=mask).float().double()
    steps = 3 if case["name"] == "discopop" else 1  # its gate is 20 times as steep
    assert_as_exact_as_torch(lambda dtype, impl: run_pairs((policy, ref, bounds), loss, dtype, impl, loss_mask=mask),
                             steps=steps)


@pytest.mark.parametrize("case", DIVERGENCES, ids=lambda case: "-".join(str(value) for value in case.values()))
@pytest.mark.usefixtures("small_blocks")
def test_divergences_and_weights_are_as_exact_as_torch(case: dict[str, Any]) -> None:
    loss = preference(case["name"], dpo_beta=0.3, divergence=case["divergence"], divergence_alpha=case["alpha"],
                      length_normalize=case["length_normalize"], nll_coef=0.3, discopop_tau=1.0)
    policy, ref, bounds = pairs(spread=0.2)
    if case["sums"]:
        ref = reference.pair_sums(ref, bounds, loss=loss).float().double()
    weights = torch.tensor([0.5, 0.0, 1.5]) if case["weights"] else None
    run = lambda dtype, impl: run_pairs((policy, ref, bounds), loss, dtype, impl, weights=weights)
    assert_as_exact_as_torch(run, steps=4)
    _, _, (gradient,) = run(torch.float32, "triton")
    if weights is not None:
        assert not gradient[bounds[2]:bounds[4]].any() and gradient[:bounds[2]].any()
        plain = run_pairs((policy, ref, bounds), loss, torch.float32, "triton")
        torch.testing.assert_close(gradient[:bounds[2]], 0.5 * plain[2][0][:bounds[2]])


def test_alpha_near_1_is_the_reverse_kl() -> None:
    inputs = pairs()
    near, plain = (run_pairs(inputs, preference("sigmoid", **options), torch.float32, "triton")
                   for options in ({"divergence": "alpha", "divergence_alpha": 1.0 + 1e-8}, {}))
    assert torch.equal(near[0], plain[0])


@pytest.mark.parametrize(("options", "message"), [
    ({"loss": "nca", "divergence": "js"}, "loss 'nca' has no divergence 'js'"),
    ({"divergence": "kl"}, "divergence must be"), ({"dpo_beta": -0.1}, "dpo_beta must be 0 or larger"),
    ({"loss": "ipo", "dpo_beta": 0.0}, "'ipo' divides by dpo_beta"),
    ({"loss": "discopop", "discopop_tau": 0.0}, "discopop_tau must be above 0")])
def test_losses_that_do_not_exist(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PreferenceLoss(**options)


@pytest.mark.parametrize("ld_alpha", [None, 0.3])
def test_a_completion_of_70000_tokens(ld_alpha: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "BLOCK", 8192)  # the interpreter's time is that of the blocks
    inputs = pairs((70_000, 66_000), spread=0.01)
    loss = preference("sigmoid", ld_alpha=ld_alpha, length_normalize=True)
    assert_as_exact_as_torch(lambda dtype, impl: run_pairs(inputs, loss, dtype, impl), steps=8)


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_extreme_margins_stay_finite(name: str) -> None:
    policy = torch.tensor([0.0, -1e4, -1e4, 0.0], dtype=torch.float64)
    inputs = policy, torch.zeros(4, dtype=torch.float64), cu_seqlens((1, 1, 1, 1))
    assert_as_exact_as_torch(lambda dtype, impl: run_pairs(inputs, preference(name), dtype, impl), steps=2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    policy, ref, bounds = pairs()
    policy, ref = policy.to(dtype), ref.to(dtype)
    value, _, (gradient,) = run_pairs((policy, ref, bounds), "sigmoid", dtype, "triton")
    single, _, (exact,) = run_pairs((policy, ref, bounds), "sigmoid", torch.float32, "triton")
    assert value.dtype == torch.float32 and torch.equal(value, single)
    assert gradient.dtype == dtype and torch.equal(gradient, exact.to(dtype))


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_what_the_mask_leaves_out_may_be_nan(name: str, impl: str) -> None:
    policy, ref, bounds = pairs()
    mask = rand(len(policy), seed=7) > -0.3
    loss = preference(name, nll_coef=0.2, ld_alpha=0.5)
    holed = [torch.where(mask, values, torch.nan) for values in (policy, ref)]
    value, metrics, (gradient,) = run_pairs((*holed, bounds), loss, torch.float32, impl, loss_mask=mask)
    want, want_metrics, (expected,) = run_pairs((policy, ref, bounds), loss, torch.float32, impl, loss_mask=mask)
    assert torch.equal(value, want) and metrics == want_metrics
    assert torch.equal(gradient, expected) and (gradient[~mask] == 0).all()


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_empty_completions_are_a_log_ratio_of_zero(name: str, impl: str) -> None:
    empty = torch.zeros(0)
    value, metrics, _ = run_pairs((empty, empty, torch.tensor([0, 0, 0])), preference(name), torch.float32, impl)
    zero = torch.zeros(2)
    same, _, _ = run_pairs((zero, zero, torch.tensor([0, 1, 2])), preference(name), torch.float32, impl)
    assert torch.equal(value, same) and not any(metrics.values())


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_the_gradient_raises_the_margin(name: str) -> None:
    value = torch.full((4,), -2.0, dtype=torch.float64)
    _, _, (gradient,) = run_pairs((value, value, torch.tensor([0, 2, 4])), preference(name), torch.float32, "triton")
    chosen, rejected = gradient[0], gradient[2]
    assert torch.equal(gradient[:2], chosen.expand(2)) and torch.equal(gradient[2:], rejected.expand(2))
    if name == "discopop":  # raises margins that are below 0 and far above, and at 0 lowers them
        assert chosen > 0 and rejected == -chosen
        return
    assert (chosen < rejected) and rejected > 0
    assert chosen < 0 or name == "apo_down"  # which also lowers what was chosen


def assert_same_results(got: list[torch.Tensor], want: list[torch.Tensor]) -> None:
    for value, expected in zip(got, want, strict=True):
        torch.testing.assert_close(value, expected, rtol=2e-5, atol=2e-6)


def pieces(inputs: Inputs, lengths: list[int], order: list[int], pads: list[int]
           ) -> tuple[Inputs, torch.Tensor, torch.Tensor]:
    """Some completions in an order, each followed by padding; their mask, and where their tokens were."""
    places = torch.arange(len(inputs[0])).split(lengths)
    at = torch.cat([torch.cat([places[number], torch.zeros(pads[number], dtype=torch.int64)]) for number in order])
    mask = torch.cat([torch.cat([torch.ones(lengths[number]), torch.zeros(pads[number])]) for number in order])
    bounds = cu_seqlens([lengths[number] + pads[number] for number in order])
    return (inputs[0][at], inputs[1][at], bounds), mask, at


@settings(max_examples=12, deadline=None)
@given(st.lists(st.tuples(*[st.integers(0, 4)] * 4), min_size=1, max_size=3), st.sampled_from(PREFERENCE_LOSSES),
       st.randoms())
def test_order_padding_and_micro_batches_do_not_matter(shape: list[tuple[int, ...]], name: str, random: Any) -> None:
    shape = [(3, 5, 1, 0), *shape]
    lengths = [length for pair in shape for length in pair[:2]]
    pads = [pad for pair in shape for pad in pair[2:]]
    inputs, loss = pairs(lengths), preference(name, ld_alpha=0.5, nll_coef=0.3)
    value, metrics, (gradient,) = run_pairs(inputs, loss, torch.float32, "triton")
    order = list(range(len(shape)))
    random.shuffle(order)
    total, sums, collected = torch.zeros(()), dict.fromkeys(metrics, torch.zeros(())), torch.zeros_like(gradient)
    for part in (order[:1], order[1:]):
        moved, mask, at = pieces(inputs, lengths, [2 * pair + side for pair in part for side in (0, 1)], pads)
        got, got_metrics, (got_gradient,) = run_pairs(moved, loss, torch.float32, "triton", loss_mask=mask,
                                                      num_pairs=len(shape))
        total, sums = total + got, {key: sums[key] + got_metrics[key] for key in metrics}
        collected[at[mask == 1]] = got_gradient[mask == 1]
    assert_same_results([total, *sums.values(), collected], [value, *metrics.values(), gradient])


# -- as an op --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "divergence"), [("sigmoid", "js"), ("bco", "reverse_kl"), ("discopop", "alpha")])
def test_three_launches(name: str, divergence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[str] = []
    for kernel in (bodies.forward_kernel, grpo_bodies.reduce_kernel, grpo_bodies.backward_kernel):
        def run(*arguments: Any, _kernel: Any = kernel, _run: Any = kernel.run, **options: Any) -> Any:
            launched.append(_kernel.fn.__name__)
            return _run(*arguments, **options)

        monkeypatch.setattr(kernel, "run", run)
    run_pairs(pairs(), preference(name, divergence=divergence), torch.float32, "triton", weights=torch.ones(3))
    assert launched == ["forward_kernel", "reduce_kernel", "backward_kernel"]


def test_backward_twice() -> None:
    policy, ref, bounds = pairs()
    leaf = policy.float().requires_grad_()
    value, metrics = dpo_loss(leaf, ref.float(), bounds, impl="triton")
    first, = torch.autograd.grad(value, leaf, retain_graph=True)
    second, = torch.autograd.grad(-3 * value, leaf)
    assert_same_results([second], [-3 * first])
    assert not any(metric.requires_grad for metric in metrics.values())


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_in_a_compiled_graph(impl: Any) -> None:
    policy, ref, bounds = pairs()

    def run(values: torch.Tensor) -> torch.Tensor:
        return dpo_loss(values * 1.0, ref.float(), bounds, loss=preference("ipo", ld_alpha=0.5), impl=impl)[0]

    leaf = policy.float().requires_grad_()
    torch._dynamo.reset()
    got, want = torch.compile(run, fullgraph=True, backend="aot_eager")(leaf), run(leaf)
    assert_same_results([got, *torch.autograd.grad(got, leaf)], [want, *torch.autograd.grad(want, leaf)])


def test_opcheck() -> None:
    policy, ref, bounds = pairs((3, 0, 2, 4))
    torch.library.opcheck(torch.ops.veripo.dpo_loss.default, (
        policy.float().requires_grad_(), ref.float(), bounds, None, torch.ones(2), "sigmoid js",
        as_tensor(0.1, 0.0, 0.5, 0.2, 0.05, 0.5), True, 2))


@pytest.mark.parametrize(("change", "message"), [
    ({"cu_seqlens": torch.tensor([0, 2, 3, 4])}, "even number of completions, got 3"),
    ({"ref_logprobs": torch.zeros(3)}, r"ref_logprobs must have shape \[4\] or \[1, 2\], got \[3\]"),
    ({"ref_logprobs": torch.zeros(4, device="meta")}, "ref_logprobs must be on .*, got meta"),
    ({"loss_mask": torch.zeros(3)}, r"loss_mask must have shape \[4\]"),
    ({"weights": torch.zeros(2)}, r"weights must have shape \[1\], got \[2\]"),
    ({"num_pairs": 0}, "num_pairs must be at least 1"),
    ({"loss": "simpo"}, "loss must be one of sigmoid, .* 'simpo'")])
def test_refusals(change: dict[str, Any], message: str) -> None:
    arguments = {"policy_logprobs": torch.zeros(4), "ref_logprobs": torch.zeros(4),
                 "cu_seqlens": torch.tensor([0, 2, 4])} | change
    with pytest.raises(ValueError, match=message):
        dpo_loss(**arguments)
