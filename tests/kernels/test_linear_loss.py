"""linear_policy_loss and linear_dpo_loss against the definition on float64 logits, judged by the error of plain torch.

Letters: M packed tokens, S completions, B pairs, V vocabulary, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from veripo_kernels import linear_loss, linear_policy_loss, linear_torch, linear_triton, reference
from veripo_kernels.jit import linear as kernels
from veripo_kernels.jit import linear_sums
from veripo_kernels.scalars import as_tensor

from tests.support.linear_cases import (
    Packed,
    assert_readme_bounds,
    check_loss,
    counted,
    install,
    mutant,
    packed,
    relative_rms,
    use_small_blocks,
)
from tests.support.loss_cases import (
    POLICY_LOSSES,
    PREFERENCE_LOSSES,
    advantages_per,
    cu_seqlens,
    pairwise_cases,
    policy,
    preference,
)

IMPLS = ("torch", "triton")
SINGLE, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
PAIRS = (3, 1, 2, 4, 0, 3)
NARROW, MIDDLE, WIDE = 4, 6, 100
"""Rows that a workspace holds: less than the longest completion or pair, several runs, one run."""

POLICY_CASES = pairwise_cases(
    name=POLICY_LOSSES, importance=(None, "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"),
    aggregation=(None, "sequence", "token", "constant"), kl=(None, "k1", "k2", "k3"), mask=(False, True),
    token_advantages=(False, True), old=(True, False), entropy=(False, True), room=(NARROW, MIDDLE, WIDE),
    frozen=("", "head", "hidden"), temperature=(1.0, 0.7), squared=(0.0, 0.15))
PAIR_CASES = pairwise_cases(
    name=PREFERENCE_LOSSES, ld_alpha=(None, 0.4), length_normalize=(False, True), nll_coef=(0.0, 0.2),
    mask=(False, True), pair_sums=(False, True), room=(NARROW, MIDDLE, WIDE), frozen=("", "head", "hidden"),
    temperature=(1.0, 0.7), weights=(None, (0.2, 1.7, 0.0)))


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_blocks(monkeypatch)


def workspace(room: int, impl: str, dtype: torch.dtype, vocabulary: int = 70) -> int:
    """Bytes that hold the logits of `room` rows."""
    if impl == "triton":
        return room * -(-vocabulary // 128) * 128 * (4 if dtype == SINGLE else 2)
    return room * vocabulary * (8 if dtype == torch.float64 else 4)


def policy_case(case: dict[str, Any], dtype: torch.dtype) -> Packed:
    loss = policy(case["name"], aggregation=case["aggregation"], importance=case["importance"] or "token_truncate",
                  importance_floor=0.5, importance_cap=1.5, kl_coef=0.3 if case["kl"] else 0.0,
                  kl_kind=case["kl"] or "k3", entropy_coef=0.2 if case["entropy"] else 0.0,
                  squared_coef=case["squared"])
    return packed(loss, dtype=dtype, mask=case["mask"], token_advantages=case["token_advantages"], old=case["old"],
                  ref=case["kl"] is not None, rollout=case["importance"] is not None, frozen=case["frozen"],
                  temperature=case["temperature"])


def pair_case(case: dict[str, Any], dtype: torch.dtype) -> Packed:
    loss = preference(case["name"], dpo_beta=0.3, ld_alpha=case["ld_alpha"], nll_coef=case["nll_coef"],
                      length_normalize=case["length_normalize"])
    weights = {"weights": torch.tensor(case["weights"])} if case["weights"] else {}
    return packed(loss, PAIRS, dtype=dtype, mask=case["mask"], ref=True, pair_sums=case["pair_sums"],
                  frozen=case["frozen"], temperature=case["temperature"], counts=weights)


def label(case: dict[str, Any]) -> str:
    return "-".join(str(value) for value in case.values())


def steps(case: dict[str, Any]) -> int:
    """More where the loss multiplies the rounding of a log-prob: vespo takes the weight of a completion, the sum of up
    to 12, to a third power; the gate of discopop is 20 times as steep as a sigmoid."""
    return {"vespo": 32, "discopop": 16}.get(case["name"], 2)


# -- against the definition ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", POLICY_CASES, ids=label)
def test_torch_policy_loss_is_as_exact_as_the_definition(case: dict[str, Any]) -> None:
    for dtype in (torch.float64, SINGLE, BF16):
        assert check_loss(policy_case(case, dtype), "torch", workspace(case["room"], "torch", dtype), steps(case)) == []


@pytest.mark.parametrize("case", POLICY_CASES, ids=label)
def test_triton_policy_loss_is_as_exact_as_the_definition(case: dict[str, Any]) -> None:
    dtype = (SINGLE, BF16, FP16)[POLICY_CASES.index(case) % 3]
    assert check_loss(policy_case(case, dtype), "triton", workspace(case["room"], "triton", dtype), steps(case)) == []


@pytest.mark.parametrize("case", PAIR_CASES, ids=label)
def test_torch_dpo_loss_is_as_exact_as_the_definition(case: dict[str, Any]) -> None:
    for dtype in (torch.float64, SINGLE, BF16):
        assert check_loss(pair_case(case, dtype), "torch", workspace(case["room"], "torch", dtype), steps(case)) == []


@pytest.mark.parametrize("case", PAIR_CASES, ids=label)
def test_triton_dpo_loss_is_as_exact_as_the_definition(case: dict[str, Any]) -> None:
    dtype = (SINGLE, BF16, FP16)[PAIR_CASES.index(case) % 3]
    assert check_loss(pair_case(case, dtype), "triton", workspace(case["room"], "triton", dtype), steps(case)) == []


@pytest.mark.parametrize("impl", IMPLS)
def test_bounds_that_readme_promises(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    data = packed(policy("grpo", clip_low=1.0, clip_high=9.0), (9, 12, 19), width=64, vocabulary=300, dtype=BF16,
                  head_scale=0.25)
    assert_readme_bounds(data.run(impl), data.define(torch.float64))


# -- nothing to do ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", ["grpo", "gspo"])
def test_without_tokens_everything_is_zero(impl: str, name: str) -> None:
    full = packed(policy(name, kl_coef=0.1, entropy_coef=0.1), ref=True, rollout=True)
    none = replace(full, mask=torch.zeros(14))
    nothing = replace(full, hidden=full.hidden[:0], token_ids=full.token_ids[:0], old=None, ref=full.ref[:0],
                      rollout=None, cu_seqlens=cu_seqlens([0, 0]), advantages=torch.ones(2))
    for data in (none, nothing):
        got = data.run(impl)
        assert not any(value.any() for value in got.values()) and got["dhead"].shape == full.head.shape
        assert check_loss(data, impl) == []


@pytest.mark.parametrize("impl", IMPLS)
def test_what_the_mask_leaves_out_may_be_anything(impl: str) -> None:
    data = packed(policy("gmpo", kl_coef=0.1, importance="sequence_truncate"), ref=True, rollout=True, mask=True,
                  token_advantages=True)
    out = data.mask == 0
    holed = {name: getattr(data, name).masked_fill(out, torch.nan) for name in ("old", "ref", "rollout", "advantages")}
    broken = replace(data, hidden=data.hidden.masked_fill(out[:, None], torch.inf),
                     token_ids=data.token_ids.masked_fill(out, -100), **holed)
    want = data.run(impl)
    for name, value in broken.run(impl).items():
        assert torch.equal(value, want[name]), name


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", ["grpo", "gspo"])
def test_dead_tokens_are_only_looked_at(impl: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Completions of advantage 0 and masked tokens enter no gradient product, masked ones no product at all. Nor do
    clipped ones in torch, where they are an eighth of a run; a GPU would have to be waited for to know."""
    monkeypatch.undo()
    data = packed(policy(name), mask=True, vocabulary=30)
    kept = data.mask != 0
    owner = reference.sequence_index(data.cu_seqlens, 14)
    live = kept & (data.advantages != 0)[owner]
    assert 0 < live.sum() < kept.sum() < 14
    moved = int(data.run(impl)["dhidden"].any(1).sum())
    assert name == "gspo" or 8 * moved <= 7 * live.sum(), "nothing is clipped"
    taken = moved if 8 * moved <= 7 * live.sum() and impl == "torch" else int(live.sum())
    for frozen, products in (("", 2), ("head", 1), ("hidden", 1)):
        with counted(impl) as work:
            replace(data, frozen=frozen).run(impl)
        assert sum(work.logits) == kept.sum()
        assert work.gradients == [taken] * products
    with counted(impl) as work:
        got = replace(data, advantages=torch.zeros(6)).run(impl)
    assert sum(work.logits) == kept.sum() and sum(work.gradients) == 0
    assert not got["dhidden"].any() and not got["dhead"].any()
    with counted(impl) as work, torch.no_grad():
        data.call(data.hidden, data.head, impl=impl)
    assert sum(work.logits) == kept.sum() and work.gradients == []


@pytest.mark.parametrize("impl", IMPLS)
def test_only_what_does_not_fit_is_computed_twice(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    data = packed(policy("gspo"), (3, 2, 5, 2), vocabulary=30)
    data.advantages[:] = torch.tensor([1.0, -1.0, 2.0, 0.5])
    with counted(impl) as work:
        data.run(impl, workspace(4, impl, SINGLE, 30))
    again = [5] if impl == "torch" else [1, 4]  # in the workspace's own room
    assert sorted(work.logits) == sorted([2, 2, 3, 5, *again])
    assert sorted(work.gradients) == sorted([2, 2, 2, 2, 3, 3, *again, *again])
    with counted(impl) as work:
        data.run(impl, workspace(5, impl, SINGLE, 30))
    assert sorted(work.logits) == [2, 5, 5] and sorted(work.gradients) == [2, 2, 5, 5, 5, 5]
    with counted(impl) as work:
        replace(data, loss=policy("grpo")).run(impl, workspace(4, impl, SINGLE, 30))
    assert work.logits == [4, 4, 4]


@pytest.mark.parametrize("loss", ["grpo", "gspo", "sigmoid"])
def test_runs_are_short_unless_a_completion_is_taken_whole(loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    data = packed(preference(loss), (3, 2, 5, 2), ref=True, vocabulary=30) if loss == "sigmoid" else packed(
        policy(loss), (3, 2, 5, 2), vocabulary=30)
    if loss != "sigmoid":
        data.advantages[:] = torch.tensor([1.0, -1.0, 2.0, 0.5])
    want = data.run("torch", workspace(99, "torch", SINGLE, 30))
    for run, most, runs in ((4, 99, {"grpo": [4, 4, 4], "gspo": [5, 5, 2], "sigmoid": [5, 7]}),
                            (8, 99, {"grpo": [8, 4], "gspo": [5, 7], "sigmoid": [5, 7]}),
                            (2, 3, {"grpo": [2] * 6})):
        monkeypatch.setattr(linear_torch, "RUN_BYTES", workspace(run, "torch", SINGLE, 30))
        monkeypatch.setattr(linear_torch, "WORKSPACE_BYTES", workspace(most, "torch", SINGLE, 30))
        with counted("torch") as work:
            got = data.run("torch", 0)
        assert loss not in runs or work.logits == runs[loss], "no completion needs its logits twice"
        for key, value in want.items():
            torch.testing.assert_close(got[key], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", ["grpo", "gspo"])
def test_an_entropy_that_nobody_asks_for_changes_nothing_else(impl: str, name: str) -> None:
    data = packed(policy(name, kl_coef=0.1), ref=True, mask=True)
    want = data.run(impl)
    got = replace(data, counts={"entropy": False}).run(impl)
    assert got.pop("entropy") == 0 < want.pop("entropy")
    assert all(torch.equal(value, want[key]) for key, value in got.items())
    bonus = replace(data, loss=policy(name, entropy_coef=0.1))
    assert replace(bonus, counts={"entropy": False}).run(impl)["entropy"] == bonus.run(impl)["entropy"] > 0


@settings(max_examples=100, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=20), rows=st.integers(1, 60), whole=st.integers(0, 2),
       step=st.sampled_from([1, 4, 16]))
def test_even_runs_are_no_more_and_no_longer(lengths: list[int], rows: int, whole: int, step: int) -> None:
    borders = cu_seqlens(lengths + [0] * (len(lengths) % max(whole, 1))).tolist()
    before = list(linear_loss._runs(borders, rows, whole))
    even = linear_loss._even(borders, rows, whole, step)
    after = list(linear_loss._runs(borders, even, whole))
    sizes = [end - start for start, end in after]
    assert even <= rows and len(after) <= len(before) and sum(sizes) == borders[-1]
    assert max(sizes, default=0) <= max((end - start for start, end in before), default=0)
    if not whole and after:
        assert max(sizes) < borders[-1] / len(after) + step
    assert linear_loss._even(borders, rows, whole, 0) == rows


# -- extremes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [SINGLE, BF16])
@pytest.mark.parametrize("entropy", [0.0, 0.1])
@pytest.mark.parametrize("error", [-30.0, -3.0, 3.0, 30.0])
def test_a_wrong_guess_changes_nothing(dtype: torch.dtype, entropy: float, error: float) -> None:
    """The rollout's log-probs serve as the guess where there are no old ones, and as nothing else at importance 1."""
    loss = policy("grpo", entropy_coef=entropy, importance_floor=1.0, importance_cap=1.0)
    data = packed(loss, dtype=dtype, old=False, rollout=True, token_advantages=True, head_scale=1.5)
    likely = reference.linear_logits(data.hidden, data.head).argmax(-1)
    data.token_ids[::2] = likely[::2]
    now = reference.linear_logprobs(data.hidden, data.head, data.token_ids)
    data = replace(data, rollout=now + error)
    truth = data.define(torch.float64)
    assert truth["logprobs"].min() < -10 and truth["logprobs"].max() > -1
    assert check_loss(data, "triton") == []


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [SINGLE, BF16])
@pytest.mark.parametrize("entropy", [0.0, 0.1])
def test_saturated_rows(impl: str, dtype: torch.dtype, entropy: float) -> None:
    """One token holds all of the mass: sometimes the own one, sometimes one that is 100 or 3,000 nats above it."""
    data = packed(policy("grpo", entropy_coef=entropy), dtype=dtype, old=False, token_advantages=True)
    hidden, head = 0.1 * data.hidden, data.head.clone()
    hidden[:, 0] = torch.linspace(-3000, 3000, 14).to(dtype)
    head[:, 0], head[5, 0] = 0, 1
    data = replace(data, hidden=hidden, head=head)
    data.token_ids[3:9] = data.token_ids[12] = 5
    assert check_loss(data, impl) == []


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("slope", [1e-8, 1e4])
@pytest.mark.parametrize("scale", [1e-3, 300.0])
def test_the_range_of_float16_is_never_left(impl: str, dtype: torch.dtype, slope: float, scale: float) -> None:
    data = packed(policy("grpo"), dtype=dtype, old=False, token_advantages=True, hidden_scale=scale, upstream=1.0)
    data = replace(data, advantages=data.advantages * slope * 14)
    got, want = data.run(impl), data.define(torch.float64)
    for name in ("dhidden", "dhead"):
        inside = torch.finfo(dtype).tiny * 2000 < want[name].abs().max() < torch.finfo(dtype).max
        assert not inside or relative_rms(got[name], want[name]) <= 2e-3
    if dtype == BF16:
        assert relative_rms(got["dhidden"], want["dhidden"]) <= 2e-3


@pytest.mark.parametrize("impl", IMPLS)
def test_the_slopes_of_a_run_may_differ_by_ten_powers(impl: str) -> None:
    data = packed(policy("grpo"), dtype=BF16, old=False, token_advantages=True)
    data.advantages[:] *= 10.0 ** torch.linspace(-8, 2, 14)
    got, want = data.run(impl), data.define(torch.float64)
    for row in range(14):
        if want["dhidden"][row].any():
            assert relative_rms(got["dhidden"][row], want["dhidden"][row]) <= 5e-3
    assert relative_rms(got["dhead"], want["dhead"]) <= 2e-3


def of_many_sizes(first: float, last: float, dtype: torch.dtype) -> Packed:
    """Completions whose advantages go from 10^first to 10^last; four rows of them are a run."""
    data = packed(policy("grpo"), (4, 4, 4, 4), dtype=dtype, old=False, token_advantages=True, upstream=1.0)
    return replace(data, advantages=data.advantages.sign().masked_fill(data.advantages == 0, 1.0)
                   * 10.0 ** torch.linspace(first, last, 16))


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(("first", "last"), [(-7.0, 2.0), (2.0, -7.0), (0.0, 1.0), (-20.0, -14.0)])
def test_runs_whose_gradients_differ_in_size(dtype: torch.dtype, first: float, last: float) -> None:
    """Their sum has one unit, which a later run may have to change; float16 alone has nine powers of ten. Allowed are
    the last rounding and, of logits and hidden states, two of float16: 2.8e-4 each as a root mean square."""
    data = of_many_sizes(first, last, dtype)
    got, want = data.run("triton", workspace(NARROW, "triton", dtype)), data.define(torch.float64)
    for name in ("dhead", "dhidden"):
        if dtype == BF16 or first > -20:  # as float16 such gradients are 0
            assert relative_rms(got[name], want[name]) <= relative_rms(want[name].to(dtype), want[name]) + 5.6e-4


@pytest.mark.parametrize(("right", "wrong"), [
    ("if change != 1.0:", "if change == 2.0:"), ("inverse = tl.where(fits, before, inverse)", "inverse = before"),
    ("tl.store(unit, ((254 - inverse)", "tl.store(unit, ((255 - inverse)")])
def test_a_wrong_unit_is_seen(right: str, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_triton, "sums", mutant(linear_sums, right, wrong, tmp_path))
    data = of_many_sizes(-7.0, 2.0, BF16)
    got, want = data.run("triton", workspace(NARROW, "triton", BF16)), data.define(torch.float64)
    assert not relative_rms(got["dhead"], want["dhead"]) <= 2e-3


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("upstream", [1 / 3, 65536.0])
def test_upstream_gradients_are_not_rounded(impl: str, dtype: torch.dtype, upstream: float) -> None:
    """65,536 is where loss scaling starts, and no float16."""
    assert check_loss(packed(policy("grpo"), dtype=dtype, upstream=upstream), impl) == []


# -- the op ----------------------------------------------------------------------------------------------------------


def ops(loss: str) -> Packed:
    return (packed(policy("gspo", kl_coef=0.1), (2, 1, 3), ref=True, vocabulary=40) if loss == "policy" else
            packed(preference("sigmoid"), (2, 1, 3, 2), ref=True, vocabulary=40))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("loss", ["policy", "dpo"])
@pytest.mark.parametrize("frozen", ["", "head"])
def test_opcheck(impl: str, loss: str, frozen: str) -> None:
    data = ops(loss)
    leaves = [data.hidden.requires_grad_(), data.head.requires_grad_(frozen != "head")]
    needs = [True, frozen != "head", False] + ([True] if loss == "policy" else [])
    rest = [as_tensor(0.7), *linear_loss._encoded(data.loss), 1 << 20, needs, impl]
    if loss == "policy":
        torch.library.opcheck(torch.ops.veripo.linear_policy_loss.default, [
            *leaves, data.token_ids, data.old, data.advantages, data.cu_seqlens, None, data.ref, None, 0, 0, *rest])
    else:
        torch.library.opcheck(torch.ops.veripo.linear_dpo_loss.default, [
            *leaves, data.token_ids, data.ref, data.cu_seqlens, None, torch.ones(2), 0, *rest])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("loss", ["policy", "dpo"])
def test_compiles_as_one_graph(impl: str, loss: str) -> None:
    data = ops(loss)

    def total(hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        return 2 * data.call(hidden * 3, head, impl=impl)[0]

    gradients = []
    for function in (total, torch.compile(total, fullgraph=True, backend="aot_eager")):
        leaves = [data.hidden.clone().requires_grad_(), data.head.clone().requires_grad_()]
        gradients.append(torch.autograd.grad(function(*leaves), leaves))
    torch.testing.assert_close(gradients[1], gradients[0])


def test_compiled_losses_are_not_taken_for_each_other() -> None:
    data = packed(policy("grpo"))

    def total(loss: Any) -> torch.Tensor:
        return replace(data, loss=loss).call(data.hidden, data.head, impl="torch")[0]

    hidden, head, rest = data.hidden, data.head, (data.token_ids, data.old, data.advantages, data.cu_seqlens)
    compiled = torch.compile(lambda loss: linear_policy_loss(hidden, head, *rest, loss=loss, impl="torch")[0],
                             fullgraph=True, backend="aot_eager")
    for loss in ("grpo", "gspo", policy("grpo", clip_low=0.01), policy("grpo", clip_low=0.05), policy("gmpo")):
        assert compiled(loss) == total(loss)


def test_losses_arrive_as_they_were() -> None:
    for loss in (policy("gspo", dual_clip=1e30, clip_high=1e-7, importance_cap=float("inf")), policy("grpo"),
                 preference("exo", ld_alpha=0.5, length_normalize=True)):
        assert linear_loss._decoded(type(loss), *linear_loss._encoded(loss)) == loss


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("loss", ["policy", "dpo"])
def test_a_second_backward_gives_the_same_and_the_rest_is_detached(impl: str, loss: str) -> None:
    data = ops(loss)
    leaves = [data.hidden.clone().requires_grad_(), data.head.clone().requires_grad_()]
    value, metrics, logprobs = data.call(*leaves, impl=impl)
    first, second = (torch.autograd.grad(3 * value, leaves, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) and a.any() for a, b in zip(first, second, strict=True))
    assert not logprobs.requires_grad and not any(metric.requires_grad for metric in metrics.values())
    assert torch.equal(leaves[0], data.hidden) and torch.equal(leaves[1], data.head)
    with torch.no_grad():
        assert torch.allclose(data.call(*leaves, impl=impl)[0], value, rtol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("loss", ["policy", "dpo"])
def test_of_a_single_use_gradients_are_given_away(impl: str, loss: str) -> None:
    data = ops(loss)
    leaves = [data.hidden.clone().requires_grad_(), data.head.clone().requires_grad_()]
    want = torch.autograd.grad(-3 * data.call(*leaves, impl=impl)[0], leaves)
    value = data.call(*leaves, impl=impl, single_use=True)[0]
    saved = value.grad_fn.saved_tensors[1].data_ptr()
    (-3 * value).backward()
    assert all(torch.equal(leaf.grad, gradient) for leaf, gradient in zip(leaves, want, strict=True))
    assert leaves[1].grad.data_ptr() == saved, "no copy of the head's gradient"
    value = data.call(*leaves, impl=impl, single_use=True)[0]
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward pass through a loss of single_use"):
        value.backward()
    compiled = torch.compile(lambda *leaves: data.call(*leaves, impl=impl, single_use=True)[0], fullgraph=True,
                             backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(-3 * compiled(*leaves), leaves), want)


@pytest.mark.parametrize(("changes", "message"), [
    ({"old": torch.zeros(3)}, r"old_logprobs must have shape \[14\], got \[3\]"),
    ({"mask": torch.zeros(3)}, r"loss_mask must have shape \[14\], got \[3\]"),
    ({"rollout": torch.zeros(3)}, r"rollout_logprobs must have shape \[14\], got \[3\]"),
    ({"advantages": torch.zeros(5)}, r"advantages must have shape \[14\] or \[6\], got \[5\]"),
    ({"loss": policy("grpo", kl_coef=0.1)}, "kl_coef 0.1 needs ref_logprobs"), ({"temperature": 0.0}, "temperature"),
    ({"loss": preference("ipo"), "cu_seqlens": cu_seqlens([14]), "ref": torch.zeros(14)},
     r"2 \* pairs \+ 1 entries, got 2"),
    ({"loss": preference("ipo"), "ref": torch.zeros(3)}, r"ref_logprobs must have shape \[14\] or \[3, 2\], got \[3\]"),
])
def test_errors_name_the_argument_and_its_value(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(packed(policy("grpo")), **changes).run("torch")


# -- properties ------------------------------------------------------------------------------------------------------


def part(data: Packed, order: list[int], unit: int, **counts: int) -> tuple[Packed, torch.Tensor]:
    """Units (completions, or pairs of them) of a batch in another order, and the tokens they own."""
    bounds = data.cu_seqlens.tolist()
    picked = [sequence for first in order for sequence in range(first * unit, first * unit + unit)]
    spans = [torch.arange(bounds[sequence], bounds[sequence + 1]) for sequence in picked]
    tokens = torch.cat([torch.zeros(0, dtype=torch.int64), *spans])
    moved: dict[str, Any] = {name: None if getattr(data, name) is None else getattr(data, name)[tokens]
                             for name in ("hidden", "token_ids", "old", "ref", "mask", "advantages")}
    return replace(data, cu_seqlens=cu_seqlens(len(span) for span in spans), counts=counts, **moved), tokens


BATCHES: dict[str, Callable[[int], tuple[Packed, int]]] = {
    **{name: lambda seed, name=name: (packed(
        policy(name, kl_coef=0.1), ref=True, mask=True, seed=seed, token_advantages=True), 1)
       for name in ("grpo", "dapo", "dr_grpo", "gspo", "gmpo")},
    **{name: lambda seed, name=name: (packed(
        preference(name), PAIRS, ref=True, mask=True, seed=seed, token_advantages=True), 2)
       for name in ("sigmoid", "sppo")}}


@settings(max_examples=25, deadline=None, derandomize=True)
@given(name=st.sampled_from(sorted(BATCHES)), seed=st.integers(0, 50), shuffle=st.randoms(), cuts=st.sets(
    st.integers(1, 5), max_size=2), room=st.integers(2, 30))
def test_order_and_micro_batches_change_nothing(name: str, seed: int, shuffle: Any, cuts: set[int], room: int) -> None:
    data, unit = BATCHES[name](seed)
    want, units = data.run("torch"), len(data.cu_seqlens) // unit - (unit == 1)
    order = list(range(units))
    shuffle.shuffle(order)
    counts = {"num_pairs": units}
    if unit == 1:
        counts = {"num_sequences": units, "num_tokens": int(data.mask.sum()),
                  "advantages_per": advantages_per(data.advantages, data.cu_seqlens) or "token"}
    borders = [0, *sorted(cut for cut in cuts if cut < units), units]
    got = {key: torch.zeros_like(value) for key, value in want.items()}
    for start, end in pairwise(borders):
        micro_batch, tokens = part(data, order[start:end], unit, **counts)
        for key, value in micro_batch.run("torch", workspace(room, "torch", SINGLE)).items():
            if key in ("logprobs", "dhidden"):
                got[key][tokens] = value
            elif key == "ratio_max":
                got[key] = torch.maximum(got[key], value)
            else:
                got[key] += value
    for key, value in want.items():
        torch.testing.assert_close(got[key], value, rtol=1e-4, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")


@settings(max_examples=15, deadline=None, derandomize=True)
@given(name=st.sampled_from(sorted(BATCHES)), seed=st.integers(0, 50), after=st.lists(st.integers(0, 5), max_size=4))
def test_masked_tokens_are_padding(name: str, seed: int, after: list[int]) -> None:
    data, _ = BATCHES[name](seed)
    owner = reference.sequence_index(data.cu_seqlens, len(data.hidden))
    extra = torch.tensor(after, dtype=torch.int64)
    place = torch.cat([owner, extra]).argsort(stable=True)
    more: dict[str, Any] = {}
    for key in ("hidden", "token_ids", "old", "ref", "mask", "advantages"):
        value = getattr(data, key)
        filler = torch.zeros(len(after), *value.shape[1:], dtype=value.dtype)
        more[key] = torch.cat([value, filler if key in ("mask", "token_ids") else filler + torch.nan])[place]
    lengths = data.cu_seqlens.diff() + torch.bincount(extra, minlength=len(data.cu_seqlens) - 1)
    padded = replace(data, cu_seqlens=cu_seqlens(lengths.tolist()), **more)
    got, want = padded.run("torch"), data.run("torch")
    real = place < len(owner)
    assert not got["dhidden"][~real].any() and not got["logprobs"][~real].any()
    for key, value in want.items():
        shown = got[key][real] if key in ("logprobs", "dhidden") else got[key]
        torch.testing.assert_close(shown, value, rtol=1e-5, atol=1e-7)


# -- memory ----------------------------------------------------------------------------------------------------------

PEAK = """
import ctypes, sys
from pathlib import Path
import torch
from veripo_kernels.linear import linear_logprobs
from veripo_kernels.linear_loss import linear_policy_loss

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))

def peak(tokens, which):
    hidden = torch.randn(tokens, 32).requires_grad_()
    head, ids = torch.randn(4096, 32).requires_grad_(which != "frozen"), torch.randint(4096, (tokens,))
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    if which == "loss":
        linear_policy_loss(hidden, head, ids, None, torch.ones(tokens), torch.tensor([0, tokens]), impl="torch",
                           workspace_bytes=1 << 24)[0].backward()
    else:
        linear_logprobs(hidden, head, ids, impl="torch").sum().backward()
    return status("VmHWM") - before

for which in ("loss", "logprobs", "frozen"):
    peak(300, which)
    print(peak(2048, which), peak(8192, which))
"""


def test_memory_of_torch_does_not_grow_with_the_tokens(python: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
                                                       ) -> None:
    """Four times the tokens would be 100 MB more of logits, and 50 MB more of one tile of them. What may grow is a few
    copies of hidden states and log-probs. The C library gives blocks back at once here, so that holes do not count."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    done = python("-c", PEAK)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        few, many = (int(kilobytes) * 1024 for kilobytes in line.split())
        assert many - few <= 6144 * (8 * 32 * 4 + 200) + (8 << 20) and many <= 128 << 20, done.stdout


# -- proof that the checker bites ------------------------------------------------------------------------------------

MUTANTS: dict[str, tuple[ModuleType, str, str]] = {
    "torch: no 1/temperature": (linear_torch, "(dx / self.head.temperature)", "dx"),
    "torch: own token in the gradient": (linear_torch, "            dlogits[own] = own_slopes[own[0]]\n", ""),
    "kernel: no repair": (kernels, "if ENTROPY or final != guess:", "if ENTROPY:"),
    "kernel: repair of the wrong tile": (kernels, "tl.cast(tile, tl.int64) * rows + row",
                                         "tl.cast(first, tl.int64) * rows + row"),
    "kernel: own token kept": (kernels, "(v[None, :] == token[:, None]) | (v >= vocabulary)", "(v >= vocabulary)"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_checker_rejects(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, right, wrong = MUTANTS[name]
    install(module, mutant(module, right, wrong, tmp_path), monkeypatch)
    data = packed(policy("grpo"), dtype=BF16, token_advantages=True, temperature=0.7, head_scale=1.5)
    data = replace(data, old=None, rollout=data.old * 0, loss=policy("grpo", importance_floor=1.0, importance_cap=1.0))
    assert check_loss(data, "torch" if module is linear_torch else "triton") != []
