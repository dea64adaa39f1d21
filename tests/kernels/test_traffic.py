"""Bytes that the fused losses move beside their products, and how often the host waits for a GPU, counted without one.

What is counted, and what is not, stands in veripo_kernels/testing/traffic.py: each launch at its full shape, products
with their operands and one result apart. Times are not: whether fewer bytes are faster is for a GPU to say.

Letters: T tokens, V vocabulary, D hidden.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from veripo_kernels import dispatch, linear_dpo_loss, linear_policy_loss, linear_triton
from veripo_kernels.testing.traffic import counted

from bench.bench_traffic import CASES, TOKENS, VOCABULARY, WIDTH, count
from tests.support.loss_cases import POLICY_LOSSES, PREFERENCE_LOSSES, policy, preference

pytestmark = pytest.mark.skipif(not dispatch.interpreted(), reason="Triton takes CPU tensors only as an interpreter")
BILLION = 10**9


# -- the counter -----------------------------------------------------------------------------------------------------


def test_each_op_counts_what_it_reads_and_writes() -> None:
    matrix, place = torch.ones(100, 40, dtype=torch.bfloat16), torch.arange(7)
    wide = torch.ones(1000, 1).expand(1000, 40)
    for operation, read, written in (
            (lambda: matrix.float(), 8000, 16000), (lambda: matrix[place], 560 + 56, 560), (lambda: matrix.t(), 0, 0),
            (lambda: torch.zeros(100), 0, 400), (lambda: matrix.zero_(), 0, 8000), (lambda: wide + 1, 4000, 160000),
            (lambda: torch.mul(matrix, 2.0, out=torch.empty(100, 40)), 8000, 16000),
            (lambda: torch.empty(1 << 20).copy_(torch.ones(1)), 4, (1 << 22) + 4),
            (lambda: torch.zeros(1 << 15, 1 << 10).bfloat16(), 1 << 27, (1 << 27) + (1 << 26))):
        with counted() as traffic:
            operation()
        assert (traffic.read.total(), traffic.written.total(), traffic.waits.total()) == (read, written, 0)


def test_a_product_that_adds_counts_its_sum_again() -> None:
    total, a, b = torch.empty(30, 20), torch.ones(30, 5), torch.ones(5, 20)
    for added, read, written in ((False, 0, 0), (True, 2400, 2400), (False, 0, 2400)):
        with counted() as traffic:
            linear_triton.add_product(total, a, b, add=added)
        assert (traffic.read.total(), traffic.written.total()) == (read, written)
    with pytest.raises(AssertionError, match="a product that is not add_product"), counted():
        torch.mm(a, b)


def test_what_waits_is_seen() -> None:
    values = torch.arange(5)
    for operation in (lambda: int(values[3]), lambda: values.tolist(), lambda: values[values > 2],
                      lambda: bool(values[0]), lambda: (values > 1).nonzero(),
                      lambda: values.masked_select(values > 2)):
        with counted() as traffic:
            operation()
        assert traffic.waits.total() >= 1


# -- the losses ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "most_gb"), [
    ("linear_policy_loss", 6), ("linear_policy_loss, gspo", 6), ("linear_dpo_loss", 6), ("linear_logprobs", 6),
    ("linear_policy_loss, entropy unasked", 6), ("linear_policy_loss, entropy bonus", 11),
    ("linear_policy_loss, frozen head", 2), ("linear_dpo_loss, frozen head", 2), ("linear_logprobs, frozen head", 2),
    ("grpo_loss", 0.001), ("dpo_loss", 0.001)])
def test_bytes_beside_the_products_and_waits(case: str, most_gb: float) -> None:
    """T 8,192, D 2,048, V 151,936 in bfloat16. An entropy bonus reads and writes the kept logits once more."""
    assert (TOKENS, WIDTH, VOCABULARY) == (8192, 2048, 151_936)
    traffic = count(case)
    assert traffic.beside <= most_gb * BILLION, traffic.largest()
    assert traffic.waits.total() <= (0 if case in ("grpo_loss", "dpo_loss") else 1)


def test_every_case_is_bounded() -> None:
    marks = test_bytes_beside_the_products_and_waits.pytestmark
    assert {case for case, _ in marks[0].args[1]} == set(CASES)


@pytest.mark.parametrize(("tokens", "width", "vocabulary", "room", "runs"), [
    (1024, 64, 3000, 1024, 1), (1024, 64, 3000, 400, 3), (2048, 128, 120_000, 1024, 2)])
def test_the_count_is_its_formula(tokens: int, width: int, vocabulary: int, room: int, runs: int) -> None:
    """What grows with T D, V D and T V; and the small ops on vectors [T], which move 1.8 kB for each token."""
    head, hidden = vocabulary * width, tokens * width
    pitch = -(-vocabulary // 128) * 128
    traffic = count("linear_policy_loss", tokens, width, vocabulary, workspace_bytes=2 * pitch * room)
    slabs = -(-vocabulary // linear_triton._SLAB)
    expected = (2 * head  # the head in float16, which the first run writes
                + (runs - 1) * 8 * head  # its gradient, read and written by each later run
                + 6 * head  # and scaled by the upstream gradient
                + (slabs - 1) * 8 * hidden  # sums of the hidden states' gradient
                + hidden * (4 + 4 + 4 + 6 + 4)  # taken, read for own logits, scaled; spread, scaled by the upstream one
                + 24 * tokens * -(-vocabulary // 256))  # three numbers of each tile, written and read
    assert len(traffic.rows) == runs
    assert 1700 * tokens <= traffic.beside - expected <= 1900 * tokens


def test_runs_are_of_one_length() -> None:
    assert count("linear_policy_loss").rows == [4096, 4096]
    assert count("linear_policy_loss", workspace_bytes=1 << 30).rows == [2816, 2816, 2560]
    assert count("linear_policy_loss, gspo").rows == [4096, 4096]  # whole completions of 512 tokens


def test_entropy_is_compiled_in_only_where_it_is_asked_for() -> None:
    for case in CASES:
        asked = case.startswith("linear_policy_loss") and not case.endswith("unasked")
        assert {entropy for _, entropy in count(case, 1024, 64, 3000).modes} <= {asked}, case


LOSSES: dict[str, Any] = {
    **{f"{name} {scope}": policy(name, importance=scope, kl_coef=0.1, entropy_coef=bonus)
       for name in POLICY_LOSSES for scope, bonus in (("token_truncate", 0.0), ("sequence_mask", 0.1))},
    **{name: preference(name, ld_alpha=0.5, nll_coef=0.1, length_normalize=True) for name in PREFERENCE_LOSSES}}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("frozen", [False, True])
def test_no_loss_waits_twice(name: str, frozen: bool) -> None:
    """Several runs, one completion that no workspace holds, masked tokens, and completions without an advantage."""
    loss, lengths = LOSSES[name], torch.tensor([40, 30, 0, 200, 25, 33])
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    tokens = int(lengths.sum())
    hidden = torch.zeros(tokens, 32, dtype=torch.bfloat16).requires_grad_()
    head = torch.zeros(300, 32, dtype=torch.bfloat16).requires_grad_(not frozen)
    ids, known = torch.zeros(tokens, dtype=torch.int64), torch.full((tokens,), -1.0)
    options: dict[str, Any] = {"loss": loss, "loss_mask": torch.arange(tokens) % 5 != 0, "impl": "triton",
                               "workspace_bytes": 100 * 384 * 2}
    with counted() as traffic:
        if name in PREFERENCE_LOSSES:
            value = linear_dpo_loss(hidden, head, ids, known, cu_seqlens, **options)[0]
        else:
            advantages = torch.tensor([1.0, 0.0, 1.0, -1.0, 2.0, 0.0])
            value = linear_policy_loss(hidden, head, ids, known, advantages, cu_seqlens, ref_logprobs=known,
                                       rollout_logprobs=known, **options)[0]
        value.backward()
    assert traffic.waits == {"tolist": 1} and len(traffic.rows) > 1
    assert hidden.grad is not None and (head.grad is None) == frozen
