"""AOT and WPO in dpo stages: against TRL 1.16 on given log-probs, and against plain forwards one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from veripo_kernels import PreferenceLoss, reference

from tests.kernels import test_loss_oracles as oracles
from tests.kernels.test_loss_oracles import trl, trl_preference_loss  # noqa: F401 (a fixture)
from tests.stages.test_update import (
    WHOLE,
    Gradients,
    assert_close,
    config_of,
    flat,
    masked_sum,
    optimizer_of,
    pairs_of,
)
from tests.support import policies, runs
from tests.support.loss_cases import cu_seqlens, rand
from tests.support.run_compare import assert_resumes
from veripo_fast.config.alignment import DpoConfig
from veripo_fast.distributed.world import ONE
from veripo_fast.model.pair_weights import confidence_weights
from veripo_fast.model.policy import Policy
from veripo_fast.run.folder import RunDir
from veripo_fast.run.metrics import read_records
from veripo_fast.stages.dpo import dpo_update
from veripo_fast.stages.matched_pairs import by_margins, by_ratios
from veripo_fast.stages.pair_rows import PairRow
from veripo_fast.types import LoadedPrompt, PreferencePair

REF = torch.tensor([[-36.0, -22.0], [-44.0, -19.0], [-30.0, -21.0], [-33.0, -20.0]])
"""Whose margins have another order than the policy's."""


# -- what is compared ------------------------------------------------------------------------------------------------


PAIRS = 6
SUMS, REFERENCES = rand(PAIRS, 2, scale=3.0).float(), rand(PAIRS, 2, seed=1, scale=3.0).float()


def bare_rows() -> list[PairRow]:
    """Pairs without media, in an order of their own."""
    prompts = [policies.prompt_of("?", prompt_id=f"p{number}") for number in range(PAIRS)]
    pair = {"family": "accuracy", "chosen_loss_mask": (1,), "rejected_loss_mask": (1,), "chosen_text": "",
            "rejected_text": "", "chosen_index": 0, "rejected_index": 1}
    return [PairRow(10 * number, LoadedPrompt(prompt, None, None), PreferencePair(  # type: ignore
        prompt.prompt_id, chosen_ids=(number,), rejected_ids=(100 + number,), **pair)) for number, prompt in
        enumerate(prompts)]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["aot", "aot_unpaired"])
def test_the_loss_is_trls(trl: Any, kind: str, smoothing: float, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Every completion is one token, whose log-prob is the sum."""
    loss = PreferenceLoss(dpo_beta=0.3, label_smoothing=smoothing)
    monkeypatch.setattr(oracles, "PAIR_LENGTHS", (1,) * 2 * PAIRS)
    want = trl_preference_loss(trl.DPOTrainer, SUMS.flatten(), REFERENCES.flatten(), kind, loss=loss)
    leaf = SUMS.clone().requires_grad_()
    rows = bare_rows()
    if kind == "aot":
        policy_sums, ref = leaf, by_margins(rows, SUMS, REFERENCES, ONE)
        assert torch.equal(ref[:, 0], REFERENCES[:, 0])
    else:
        matched, ref = by_ratios(rows, SUMS, REFERENCES)
        up = torch.tensor([row.pair.chosen_ids[0] for row in matched])
        down = torch.tensor([row.pair.rejected_ids[0] - 100 for row in matched])
        for row, chosen, rejected in zip(matched, up.tolist(), down.tolist(), strict=True):
            assert row.prompt is rows[chosen].prompt and row.number == rows[chosen].number
            assert row.other is (None if chosen == rejected else rows[rejected].prompt)
        policy_sums = torch.stack([leaf[up, 0], leaf[down, 1]], 1)
        assert torch.equal(ref, torch.stack([REFERENCES[up, 0], REFERENCES[down, 1]], 1))
    value, _ = reference.dpo_loss(policy_sums.flatten(), ref, cu_seqlens([1] * 2 * PAIRS), loss=loss)
    value.backward()
    torch.testing.assert_close(value.detach(), want[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(leaf.grad.flatten(), want[1], rtol=1e-5, atol=1e-6)
    plain = trl_preference_loss(trl.DPOTrainer, SUMS.flatten(), REFERENCES.flatten(), "sigmoid", loss=loss)
    assert (plain[1] - want[1]).abs().max() > 1e-3


def test_confidence_is_the_sampled_probability_over_its_square_sum() -> None:
    hidden, head, bounds = rand(9, 5), rand(30, 5, seed=1), cu_seqlens([3, 2, 4, 0])
    ids = torch.arange(9) * 3
    mask = torch.tensor([1.0, 0, 1, 1, 1, 1, 1, 0, 1], dtype=torch.float64)
    logprobs = torch.log_softmax(hidden @ head.T, -1)
    aligned = logprobs.gather(1, ids[:, None])[:, 0] - (2 * logprobs).logsumexp(1)
    means = [aligned[[0, 2]].mean(), aligned[3:5].mean(), aligned[[5, 6, 8]].mean(), torch.zeros(())]
    want = torch.stack([means[0] + means[1], means[2] + means[3]]).exp()
    torch.testing.assert_close(confidence_weights(hidden, head, ids, bounds, mask), want)


# -- updates ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_tokens", [WHOLE, 1])
@pytest.mark.parametrize("kind", ["aot", "aot_unpaired", "wpo"])
def test_the_gradient_is_that_of_plain_forwards(policy: Policy, kind: str, max_tokens: int) -> None:
    """Whatever micro-batches there are: a step is sorted as a whole."""
    dpo = DpoConfig(dpo_beta=0.3, weights="wpo") if kind == "wpo" else DpoConfig(dpo_beta=0.3, match=kind)
    rows, config = pairs_of(policy), config_of(max_tokens, dpo=dpo)
    optimizer = optimizer_of(policy, config)
    metrics = dpo_update(policy, optimizer, rows, REF, config)
    sums = torch.stack([torch.stack([masked_sum(policy, row.prompt, row.pair.chosen_ids, row.pair.chosen_loss_mask),
                                     masked_sum(policy, row.prompt, row.pair.rejected_ids,
                                                row.pair.rejected_loss_mask)]) for row in rows])
    ratios, weights = sums - REF, torch.ones(4)
    delta = ratios[:, 0] - ratios[:, 1]
    if kind == "aot":
        delta = (sums[:, 0] - sums[:, 1]).sort().values - (REF[:, 0] - REF[:, 1]).sort().values
    if kind == "aot_unpaired":
        delta = ratios[:, 0].sort().values - ratios[:, 1].sort().values
    if kind == "wpo":
        weights = torch.stack([confidence_by_hand(policy, row) for row in rows])
    loss = (weights * -F.logsigmoid(0.3 * delta)).mean()
    loss.backward()
    theirs = flat([p for _, p in policy.parameters()])
    policy.model.zero_grad()
    assert isinstance(optimizer, Gradients)
    assert_close(optimizer.recorded[0], theirs)
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-4)
    drift = (ratios[:, 0] / torch.tensor([4.0, 5.0, 6.0, 7.0])).mean().item()
    assert metrics["chosen_drift"] == pytest.approx(drift, rel=1e-3)
    plain = optimizer_of(policy, config)
    dpo_update(policy, plain, rows, REF, config_of(max_tokens, dpo=DpoConfig(dpo_beta=0.3)))
    assert isinstance(plain, Gradients)
    assert (plain.recorded[0] - theirs).norm() > 0.01 * theirs.norm()


def confidence_by_hand(policy: Policy, row: PairRow) -> torch.Tensor:
    total = torch.zeros(())
    for ids, mask in ((row.pair.chosen_ids, row.pair.chosen_loss_mask),
                      (row.pair.rejected_ids, row.pair.rejected_loss_mask)):
        with torch.no_grad():
            logprobs = torch.log_softmax(policies.plain_logits(policy, row.prompt.encoded, list(ids))[:-1], -1)
        aligned = logprobs.gather(1, torch.tensor(ids)[:, None])[:, 0] - (2 * logprobs).logsumexp(1)
        total = total + aligned[torch.tensor(mask).bool()].mean()
    return total.exp()


@pytest.mark.parametrize("options", [{"dpo__match": "aot_unpaired"}, {"dpo__match": "aot", "dpo__weights": "none"},
                                     {"dpo__weights": "wpo"}], ids=["unpaired", "aot", "wpo"])
def test_a_stage_resumes_bitwise(options: dict[str, object], tmp_path: Any) -> None:
    whole, _ = assert_resumes(tmp_path, "rename .*tmp-step_000003", lambda run: runs.config(
        run, stages=[{"kind": "grpo"}, {"kind": "dpo"}], eval__at="never", **options))
    records = [record for record in read_records(RunDir(whole).metrics) if record["kind"] == "dpo"]
    assert len(records) > 1 and all(record["grad_norm"] > 0 for record in records)
