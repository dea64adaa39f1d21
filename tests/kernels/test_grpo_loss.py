"""grpo_loss: the kernels against the definition in float64, over every variant, and the properties of a loss."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from veripo_kernels import PolicyLoss, grpo_loss
from veripo_kernels.jit import grpo as bodies

from tests.support.loss_cases import (
    POLICY_LOSSES,
    Batch,
    assert_as_exact_as_torch,
    batch,
    cu_seqlens,
    on_device,  # noqa: F401 (a fixture)
    pairwise_cases,
    policy,
    rand,
)

IMPORTANCES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
CASES = pairwise_cases(
    name=POLICY_LOSSES, importance=(None, *IMPORTANCES), aggregation=(None, "sequence", "token", "constant"),
    kl=(None, "k1", "k2", "k3"), mask=(False, True), token_advantages=(False, True), old=(True, False),
    entropy=(False, True), dual=(None, 1.35), squared=(0.0, 0.15))


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Completions of a few tokens then span several blocks."""
    monkeypatch.setattr(bodies, "BLOCK", 4)


@contextmanager
def counted_launches(*, run_them: bool = True) -> Iterator[list[str]]:
    """Names of the kernels that are launched inside."""
    kernels = (bodies.forward_kernel, bodies.reduce_kernel, bodies.backward_kernel)
    launched: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        for kernel in kernels:
            def run(*arguments: Any, _kernel: Any = kernel, _run: Any = kernel.run, **options: Any) -> Any:
                launched.append(_kernel.fn.__name__)
                return _run(*arguments, **options) if run_them else None

            patch.setattr(kernel, "run", run)
        yield launched


# -- against the definition ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(str(value) for value in case.values()))
@pytest.mark.usefixtures("small_blocks")
def test_as_exact_as_torch(case: dict[str, Any]) -> None:
    loss = policy(case["name"], aggregation=case["aggregation"], dual_clip=case["dual"],
                  importance=case["importance"] or "token_truncate", importance_floor=0.8, importance_cap=1.3,
                  kl_coef=0.3 if case["kl"] else 0.0, kl_kind=case["kl"] or "k3",
                  entropy_coef=0.2 if case["entropy"] else 0.0, squared_coef=case["squared"])
    inputs = batch(token_advantages=case["token_advantages"], mask=case["mask"], old=case["old"],
                   ref=case["kl"] is not None, rollout=case["importance"] is not None, entropy=case["entropy"])
    assert_as_exact_as_torch(lambda dtype, impl: inputs.run(loss, dtype, impl))


def test_every_two_values_meet() -> None:
    assert 45 <= len(CASES) <= 70
    for name in POLICY_LOSSES:
        assert {case["importance"] for case in CASES if case["name"] == name} == {None, *IMPORTANCES}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["grpo", "gspo"])
def test_half_precision_is_computed_in_float32(name: str, dtype: torch.dtype) -> None:
    inputs = batch(ref=True, entropy=True)
    loss = policy(name, kl_coef=0.1, entropy_coef=0.1)
    value, _, gradients = inputs.run(loss, dtype, "triton")
    rounded = replace(inputs, policy=inputs.policy.to(dtype).double(), old=inputs.old.to(dtype).double(),
                      advantages=inputs.advantages.to(dtype).double(),
                      named={key: tensor.to(dtype).double() for key, tensor in inputs.named.items()})
    single, _, want = rounded.run(loss, torch.float32, "triton")
    assert value.dtype == torch.float32 and torch.equal(value, single)
    for gradient, exact in zip(gradients, want, strict=True):
        assert gradient.dtype == dtype and torch.equal(gradient, exact.to(dtype))


@pytest.mark.parametrize("name", ["grpo", "dapo", "gmpo"])
def test_lengths_around_a_block(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "BLOCK", 64)
    inputs = batch((63, 64, 65, 128), ref=True)
    assert_as_exact_as_torch(lambda dtype, impl: inputs.run(policy(name, kl_coef=0.1), dtype, impl))


@pytest.mark.parametrize("name", ["grpo", "gspo"])
def test_a_completion_of_70000_tokens(name: str) -> None:
    inputs = batch((70_000, 3), spread=0.05)
    assert_as_exact_as_torch(lambda dtype, impl: inputs.run(name, dtype, impl), steps=4)


def test_more_completions_than_a_block_of_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "_REDUCE_BLOCK", 4)
    monkeypatch.setattr(bodies, "BLOCK", 4)
    inputs = batch((2, 1, 3, 1, 2, 4, 1, 1, 2), mask=True)
    for name in ("dapo", "grpo"):
        assert_as_exact_as_torch(lambda dtype, impl, name=name: inputs.run(name, dtype, impl))


# -- extremes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_extreme_log_ratios_stay_finite(name: str) -> None:
    old = torch.tensor([-80.0, 0, -80, 0, -1e4, -0.5], dtype=torch.float64)
    new = torch.tensor([0.0, -80, 0, -80, -1e4, -0.5], dtype=torch.float64)
    advantages = torch.tensor([1.0, -1, -1, 1, 1, 0], dtype=torch.float64)
    inputs = Batch(new, old, advantages, cu_seqlens([1] * 6), {"rollout_logprobs": old + new.sign() * 90})
    assert_as_exact_as_torch(lambda dtype, impl: inputs.run(policy(name), dtype, impl), steps=40)  # exp(80 +- rounding)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_what_the_mask_leaves_out_may_be_nan(name: str, impl: str) -> None:
    inputs = batch(mask=True, ref=True, rollout=True, entropy=True, token_advantages=True)
    loss = policy(name, kl_coef=0.1, entropy_coef=0.1, importance="sequence_truncate")
    keep = inputs.named["loss_mask"]

    def holed(values: torch.Tensor) -> torch.Tensor:
        return torch.where(keep, values, torch.nan)

    broken = replace(inputs, policy=holed(inputs.policy), old=holed(inputs.old), advantages=holed(inputs.advantages),
                     named={key: value if key == "loss_mask" else holed(value) for key, value in inputs.named.items()})
    value, metrics, gradients = broken.run(loss, torch.float32, impl)
    want, want_metrics, want_gradients = inputs.run(loss, torch.float32, impl)
    assert torch.equal(value, want) and metrics == want_metrics
    for gradient, expected in zip(gradients, want_gradients, strict=True):
        assert torch.equal(gradient, expected) and (gradient[~keep] == 0).all()


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_without_tokens_everything_is_zero(name: str, impl: str) -> None:
    inputs = batch((3, 0, 2))
    inputs.named["loss_mask"] = torch.zeros(5)
    for case in (inputs, batch((0, 0))):
        value, metrics, (gradient,) = case.run(policy(name), torch.float32, impl)
        assert value == 0 and not gradient.any() and not any(metrics.values())


# -- properties ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", POLICY_LOSSES)
@pytest.mark.usefixtures("small_blocks")
def test_at_ratio_one_the_gradient_is_reinforce(name: str) -> None:
    inputs = replace(batch((4, 4, 4), old=False), advantages=torch.tensor([0.5, -1, 2]).double())
    _, metrics, (gradient,) = inputs.run(policy(name, constant_length=4), torch.float32, "triton")
    tokens = 3 if name == "luspo" else 12  # which sums over a completion
    torch.testing.assert_close(gradient, -inputs.advantages.float().repeat_interleave(4) / tokens, rtol=1e-6, atol=0)
    assert metrics["ratio_max"] == 1 and metrics["clip_low_share"] == 0


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_zero_advantages_give_no_gradient(name: str) -> None:
    inputs = batch(mask=True, rollout=True)
    value, _, (gradient,) = replace(inputs, advantages=torch.zeros_like(inputs.advantages)).run(
        policy(name), torch.float32, "triton")
    assert value == 0 and (gradient == 0).all()


def assert_same_results(got: list[torch.Tensor], want: list[torch.Tensor]) -> None:
    for value, expected in zip(got, want, strict=True):
        torch.testing.assert_close(value, expected, rtol=2e-5, atol=2e-6)


def part(inputs: Batch, pieces: list[torch.Tensor], lengths: list[int], sequences: list[int]) -> Batch:
    """A batch of some completions (or padded ones) of another: `pieces` are the tokens' places."""
    at = torch.cat([*pieces, torch.zeros(0, dtype=torch.int64)])
    return Batch(inputs.policy[at], inputs.old[at], inputs.advantages[sequences], cu_seqlens(lengths),
                 {name: value[at] for name, value in inputs.named.items()})


OPTIONS = {"kl_coef": 0.2, "entropy_coef": 0.1, "importance": "sequence_truncate", "constant_length": 9}


@settings(max_examples=8, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=3), st.sampled_from(POLICY_LOSSES), st.randoms())
def test_packing_order_does_not_matter(lengths: list[int], name: str, random: Any) -> None:
    lengths = [5, *lengths]  # more tokens than completions: else advantages are read per token
    inputs = batch(lengths, ref=True, rollout=True, entropy=True)
    order = list(range(len(lengths)))
    random.shuffle(order)
    places = torch.arange(len(inputs.policy)).split(lengths)
    moved = part(inputs, [places[number] for number in order], [lengths[number] for number in order], order)
    value, metrics, gradients = inputs.run(policy(name, **OPTIONS), torch.float32, "triton")
    got, got_metrics, got_gradients = moved.run(policy(name, **OPTIONS), torch.float32, "triton")
    at = torch.cat([places[number] for number in order])
    assert_same_results([got, *got_metrics.values(), *got_gradients],
                        [value, *metrics.values(), *(gradient[at] for gradient in gradients)])


@settings(max_examples=8, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3)), min_size=1, max_size=3),
       st.sampled_from(POLICY_LOSSES))
def test_padding_does_not_matter(shape: list[tuple[int, int]], name: str) -> None:
    shape = [(5, 1), *shape]
    inputs = batch([length for length, _ in shape], ref=True, rollout=True, entropy=True)
    places = torch.arange(len(inputs.policy)).split([length for length, _ in shape])
    pads = [torch.randint(len(inputs.policy), (pad,)) for _, pad in shape]
    padded = part(inputs, [torch.cat(both) for both in zip(places, pads, strict=True)], [sum(both) for both in shape],
                  list(range(len(shape))))
    padded.named["loss_mask"] = torch.cat([torch.cat([torch.ones(length), torch.zeros(pad)]) for length, pad in shape])
    value, metrics, gradients = inputs.run(policy(name, **OPTIONS), torch.float32, "triton")
    got, got_metrics, got_gradients = padded.run(policy(name, **OPTIONS), torch.float32, "triton")
    kept = padded.named["loss_mask"] == 1
    assert_same_results([got, *got_metrics.values(), *(gradient[kept] for gradient in got_gradients)],
                        [value, *metrics.values(), *gradients])


@settings(max_examples=8, deadline=None)
@given(st.lists(st.integers(0, 5), max_size=2), st.lists(st.integers(0, 5), max_size=2), st.sampled_from(POLICY_LOSSES))
def test_micro_batches_add_up(first: list[int], second: list[int], name: str) -> None:
    lengths, cut = [5, *first, 6, *second], 1 + len(first)
    inputs = batch(lengths, ref=True, rollout=True, entropy=True)
    counts = {"num_sequences": len(lengths), "num_tokens": sum(lengths)}
    places = torch.arange(sum(lengths)).split(lengths)
    sides = [part(inputs, list(places[side]), lengths[side], list(range(len(lengths)))[side]).run(
        policy(name, **OPTIONS), torch.float32, "triton", **counts) for side in (slice(cut), slice(cut, None))]
    value, metrics, gradients = inputs.run(policy(name, **OPTIONS), torch.float32, "triton")
    assert_same_results([sides[0][0] + sides[1][0]], [value])
    assert_same_results([torch.cat(both) for both in zip(sides[0][2], sides[1][2], strict=True)], gradients)
    for key, want in metrics.items():
        both = (sides[0][1][key], sides[1][1][key])
        assert_same_results([torch.maximum(*both) if key == "ratio_max" else both[0] + both[1]], [want])


# -- as an op --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gspo", "luspo", "vespo", "cispo_sequence", "sapo_sequence", "gpg"])
def test_three_launches_and_nothing_else_on_the_device(name: str) -> None:
    inputs = batch(mask=True, ref=True, rollout=True, entropy=True)
    with counted_launches() as launched:
        inputs.run(policy(name, kl_coef=0.1, entropy_coef=0.1, squared_coef=0.1), torch.float32, "triton")
    assert launched == ["forward_kernel", "reduce_kernel", "backward_kernel"]


def test_no_fill_no_copy_no_sync_beside_the_launches() -> None:
    inputs = batch()
    leaf, old = inputs.policy.float().requires_grad_(), inputs.old.float()
    advantages = inputs.advantages.float()
    with counted_launches(run_them=False) as launched, torch.profiler.profile() as profile:  # the interpreter copies
        value, _ = grpo_loss(leaf, old, advantages, inputs.cu_seqlens, impl="triton")
        value.backward(torch.ones(()))
    called = {event.name for event in profile.events() if event.name.startswith("aten::")}
    views = {"aten::detach", "aten::select", "aten::as_strided", "aten::view", "aten::alias"}
    allocations = {"aten::empty", "aten::empty_like", "aten::new_empty", "aten::empty_strided"}
    own = {"aten::ones", "aten::fill_"}  # the upstream gradient that this test makes
    # the loss's numbers, a tensor that stays on the CPU
    own |= {"aten::lift_fresh", "aten::to", "aten::detach_", "aten::resolve_neg", "aten::resolve_conj"}
    if inputs.cu_seqlens.device.type == "cpu":  # where nothing has to be waited for, the lengths are checked
        own |= {"aten::item", "aten::_local_scalar_dense"}
    assert len(launched) == 3 and called <= views | allocations | own, called


@pytest.mark.parametrize("name", ["grpo", "gspo"])
def test_backward_twice_and_a_scaled_upstream(name: str) -> None:
    inputs = batch(entropy=True)
    leaf, bonus = inputs.policy.float().requires_grad_(), inputs.named["entropy"].float().requires_grad_()
    value, metrics = grpo_loss(leaf, inputs.old.float(), inputs.advantages.float(), inputs.cu_seqlens, entropy=bonus,
                               loss=policy(name, entropy_coef=0.2), impl="triton")
    first = torch.autograd.grad(value, (leaf, bonus), retain_graph=True)
    second = torch.autograd.grad(value * 2.5, (leaf, bonus), retain_graph=True)
    third = torch.autograd.grad(value, (leaf, bonus))
    assert all(torch.equal(a, c) for a, c in zip(first, third, strict=True))
    assert_same_results(list(second), [2.5 * gradient for gradient in first])
    assert not any(metric.requires_grad for metric in metrics.values())


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_both_kinds_of_lengths_and_masks_of_any_dtype(dtype: torch.dtype) -> None:
    inputs = batch(mask=True)
    value, _, (gradient,) = inputs.run("grpo", torch.float32, "triton")
    for mask_dtype in (torch.bool, torch.uint8, torch.int64, torch.float32, torch.bfloat16):
        other = replace(inputs, cu_seqlens=inputs.cu_seqlens.to(dtype),
                        named={"loss_mask": inputs.named["loss_mask"].to(mask_dtype)})
        got, _, (got_gradient,) = other.run("grpo", torch.float32, "triton")
        assert torch.equal(got, value) and torch.equal(got_gradient, gradient)


def test_strided_inputs_are_read_right() -> None:
    inputs = batch()
    wide = torch.stack([inputs.policy, inputs.old], 1).float()
    value, _ = grpo_loss(wide[:, 0], wide[:, 1], inputs.advantages.float(), inputs.cu_seqlens, impl="triton")
    assert torch.equal(value, inputs.run("grpo", torch.float32, "triton")[0])


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_in_a_compiled_graph(impl: str) -> None:
    inputs = batch(mask=True, entropy=True)
    loss = policy("gspo", entropy_coef=0.1)

    def run(leaf: torch.Tensor, bonus: torch.Tensor) -> torch.Tensor:
        return grpo_loss(leaf * 1.0, inputs.old.float(), inputs.advantages.float(), inputs.cu_seqlens, loss=loss,
                         loss_mask=inputs.named["loss_mask"], entropy=bonus, impl=impl)[0]

    leaves = (inputs.policy.float().requires_grad_(), inputs.named["entropy"].float().requires_grad_())
    torch._dynamo.reset()
    results = [(value, torch.autograd.grad(value, leaves)) for value in (
        torch.compile(run, fullgraph=True, backend="aot_eager")(*leaves), run(*leaves))]
    assert_same_results([results[0][0], *results[0][1]], [results[1][0], *results[1][1]])


def test_no_recompilation_when_the_shapes_change() -> None:
    torch._dynamo.reset()
    graphs = 0

    def backend(graph: torch.fx.GraphModule, _inputs: list[torch.Tensor]) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    compiled = torch.compile(lambda *tensors: grpo_loss(*tensors, impl="triton")[0], fullgraph=True, dynamic=True,
                             backend=backend)
    for lengths in ((3, 2), (7, 4, 5), (2, 2, 2, 9)):
        inputs = batch(lengths)
        got = compiled(inputs.policy.float(), inputs.old.float(), inputs.advantages.float(), inputs.cu_seqlens)
        assert torch.equal(got, inputs.run("grpo", torch.float32, "triton")[0])
    assert graphs == 1


def test_kernels_are_compiled_once_for_all_lengths(python: Any) -> None:
    code = """
import os; os.environ.pop("TRITON_INTERPRET", None)
import torch
from veripo_kernels.jit import dpo, grpo
from veripo_kernels.testing import sm90

def launches(lengths, offset):
    wide = torch.zeros(sum(lengths) + offset)[offset:]
    advantages = torch.zeros(len(lengths) + offset)[offset:]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    tensors = (wide, wide, advantages, bounds, None, None, None, None)
    grpo.forward(tensors, ["clip", "token", "k3", "token", "mask", "plain"], [0.1 + offset] * 16, None,
                 False)
    grpo.backward(torch.ones(()), torch.zeros(8), torch.zeros(len(wide)), None, torch.float32, torch.float32)
    numbers = [0.1 + offset, 0.0, 1.0, 0.0, 1.0, 0.5]
    dpo.forward(wide, wide, bounds, None, None, ["sigmoid", "reverse_kl"], numbers, False, 0.5)

kernels = [grpo.forward_kernel, grpo.reduce_kernel, grpo.backward_kernel, dpo.forward_kernel]
keys = sm90.launch_keys(kernels, lambda: [launches(*case) for case in (
    ((3, 0), 0), ((16, 16), 0), ((3, 5, 1, 2), 1), ((2,) * 32, 3))])
print(len(keys))
"""
    result = python("-c", code)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "5\n"  # reduce_kernel counts tokens for dapo and gets the number of pairs from dpo


@pytest.mark.parametrize("name", ["grpo", "gspo"])
def test_opcheck(name: str) -> None:
    inputs = batch((3, 0, 4), entropy=True)
    loss = policy(name, entropy_coef=0.1)
    from veripo_kernels.grpo import _divisor, _kinds, _numbers

    tensors = (inputs.policy.float().requires_grad_(), inputs.old.float(), inputs.advantages.float(), inputs.cu_seqlens,
               None, None, None, inputs.named["entropy"].float().requires_grad_())
    torch.library.opcheck(torch.ops.veripo.grpo_loss.default,
                          (*tensors, _kinds(loss), _numbers(loss), _divisor(loss, 3, None, None), True))
    torch.library.opcheck(torch.ops.veripo.grpo_loss_backward.default, (
        torch.ones(()), torch.ones(8), torch.ones(7), torch.ones(0), torch.bfloat16, torch.float32))


# -- at the door -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("change", "message"), [
    ({"policy_logprobs": torch.zeros(2, 2)}, r"policy_logprobs .* \[2, 2\]"),
    ({"policy_logprobs": torch.zeros(4, dtype=torch.int64)}, "policy_logprobs .*int64"),
    ({"old_logprobs": torch.zeros(3)}, r"old_logprobs must have shape \[4\], got \[3\]"),
    ({"advantages": torch.zeros(3)}, r"advantages must have shape \[4\] or \[2\], got \[3\]"),
    ({"cu_seqlens": torch.tensor([0.0, 2, 4])}, "cu_seqlens .*float32"),
    ({"cu_seqlens": torch.zeros(0, dtype=torch.int64)}, r"cu_seqlens .*\[0\]"),
    ({"loss_mask": torch.zeros(5)}, r"loss_mask must have shape \[4\], got \[5\]"),
    ({"entropy": torch.zeros(4, device="meta")}, "entropy must be on .*, got meta"),
    ({"loss": PolicyLoss(kl_coef=0.1)}, "kl_coef=0.1 needs ref_logprobs"),
    ({"loss": PolicyLoss(entropy_coef=0.1)}, "entropy_coef=0.1 needs entropy"),
    ({"num_tokens": 0}, "num_tokens must be at least 1, got 0"),
    ({"policy_logprobs": torch.zeros(4, dtype=torch.float64), "impl": "triton"}, "no float64")])
def test_refusals(change: dict[str, Any], message: str) -> None:
    arguments = {"policy_logprobs": torch.zeros(4), "old_logprobs": torch.zeros(4), "advantages": torch.zeros(2),
                 "cu_seqlens": torch.tensor([0, 2, 4])} | change
    with pytest.raises(ValueError, match=message):
        grpo_loss(**arguments)


def test_float64_is_the_torch_implementations() -> None:
    assert grpo_loss(rand(4), None, rand(2), torch.tensor([0, 2, 4]))[0].dtype == torch.float64
