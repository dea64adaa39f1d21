"""How often a step runs the model: what the plan says against what real steps count."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support import policies, runs
from veripo_fast.config.load import apply_overrides
from veripo_fast.config.plans import PlanConfig
from veripo_fast.config.schema import Config
from veripo_fast.distributed.flops import group_flops, tower_flops
from veripo_fast.report.plan import lengths_of
from veripo_fast.run.metrics import read_records
from veripo_fast.schedule.costs import dpo_work, grpo_work, model_cost, tower_cost
from veripo_fast.schedule.passes import rounds_of, trained_groups
from veripo_fast.schedule.rates import Lengths
from veripo_fast.schedule.shapes import read_shape
from veripo_fast.trainer import train

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "kl": {"grpo__kl_coef": 0.1},
    "old log-probs": {"grpo__updates_per_rollout": 2, "grpo__importance": "token_truncate"},
    "covariance": {"grpo__updates_per_rollout": 2, "grpo__tokens__covariance": "clip"},
    "trained tower": {"model__freeze_vision": False},
    "told": {"reward__reference_logprobs": True},
    "oversample": {"plan__oversample": 2.0},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_real_step_takes_as_many_flops(name: str, tmp_path: Path) -> None:
    made = runs.config(tmp_path / "run", **({"stages": [{"kind": "grpo"}], "grpo__steps": 2, "eval__at": "never"}
                                            | OPTIONS[name]))
    train(made)
    shape = read_shape(Path(made.model.path))
    for row in read_records(tmp_path / "run" / "metrics.jsonl"):
        lengths = lengths_of([row])
        work = grpo_work(shape, made, 1, lengths)
        told = work.encode_flops + work.prefill_flops + work.decode_flops + work.reference_flops + work.update_flops
        assert told == pytest.approx(row["speed"]["flops"] * row["speed"]["needed_share"], rel=0.08), row


@pytest.mark.parametrize(("options", "live_share", "rounds", "trained"), [
    ({}, 0.5, [8], 4),
    ({"wordings": 2}, 0.5, [8], 8),
    ({"oversample": 2.0}, 0.75, [16], 8),
    ({"oversample": 1.5}, 0.5, [12], 6),
    ({"refill": 1}, 0.5, [8, 4], 6),
    ({"refill": 9}, 0.5, [8, 4, 2, 1, 1], 8),
    ({"refill": 9, "oversample": 2.0}, 0.5, [16], 8),
    ({"refill": 2}, 0.0, [8, 8, 8], 0),
    ({"refill": 2}, 1.0, [8], 8)])
def test_rounds_of_sampling(options: dict[str, Any], live_share: float, rounds: list[int], trained: float) -> None:
    assert rounds_of(PlanConfig(**options), 8, live_share) == rounds
    assert trained_groups(PlanConfig(**options), 8, live_share) == trained


def test_what_a_rollout_takes_with_its_rounds_and_wordings() -> None:
    shape = read_shape(policies.checkpoint("qwen3_vl"))
    lengths = Lengths(60, 64, 20, 24, live_share=0.5, spread=0.0)

    def work(**options: Any) -> Any:
        return grpo_work(shape, apply_overrides(Config(), {"grpo.prompts_per_step": 8, **options}), 1, lengths)

    plain, refilled, worded = work(), work(**{"plan.refill": 1}), work(**{"plan.wordings": 2, "data.keep_keys":
                                                                          ["problem", "new_questions"]})
    assert refilled.decode_flops == pytest.approx(plain.decode_flops * 12 / 8)
    assert refilled.encode_flops == pytest.approx(plain.encode_flops * 12 / 8)
    assert refilled.update_flops == pytest.approx(plain.update_flops * 6 / 4) and refilled.tokens == plain.tokens * 1.5
    weights = 24 * shape.language_numbers * 4
    assert refilled.decode_bytes == pytest.approx((plain.decode_bytes - weights) * 1.5 + 2 * weights, rel=1e-3)
    assert worded.update_flops == pytest.approx(2 * plain.update_flops)
    assert worded.decode_flops == 2 * plain.decode_flops
    assert worded.encode_flops == plain.encode_flops and worded.prompts == plain.prompts
    patches, frames = (work(**{"plan.contrast": "shuffle", "plan.contrast_by": by}) for by in ("patch", "frame"))
    assert patches.decode_flops == pytest.approx(plain.decode_flops * 1.5, rel=1e-3)
    assert patches.prefill_flops == 2 * plain.prefill_flops
    assert patches.encode_flops == plain.encode_flops and patches.update_flops == plain.update_flops
    assert frames.encode_flops == 2 * plain.encode_flops and frames.prompts == 2 * plain.prompts


def test_what_an_update_takes_with_further_passes() -> None:
    shape = read_shape(policies.checkpoint("qwen3_vl"))
    cost, lengths = model_cost(shape), Lengths(60, 64, 20, 24, spread=0.0)
    one = group_flops(cost, 60, [20] * 8)
    head = 2 * shape.hidden * shape.vocabulary * 20 * 8

    def flops(**options: Any) -> float:
        asked = {"grpo.prompts_per_step": 8, **options}
        return float(grpo_work(shape, apply_overrides(Config(), asked), 1, lengths).update_flops) / 8

    moved = {"grpo.updates_per_rollout": 4, "grpo.importance": "token_truncate"}
    assert flops() == pytest.approx(one)
    assert flops(**moved) == pytest.approx(one * (1 + 3 / 4 / 3))
    assert flops(**moved, **{"grpo.tokens.covariance": "kl", "grpo.kl_coef": 0.1}) == pytest.approx(
        one * (1 + (3 / 4 + 3 / 4 + 1) / 3))
    assert flops(**{"grpo.tokens.weights": "divergence"}) == pytest.approx(one + 2 * head)
    tower = tower_flops(tower_cost(shape), [[1, 64, 1]])
    assert flops(**{"model.freeze_vision": False, "model.gradient_checkpointing": True}) == pytest.approx(
        4 / 3 * (one + tower), rel=1e-6)


def test_what_a_dpo_step_takes_with_further_passes() -> None:
    shape = read_shape(policies.checkpoint("qwen3_vl"))
    pair = group_flops(model_cost(shape), 60, [20, 20])
    head = 2 * shape.hidden * shape.vocabulary * 40

    def flops(**options: Any) -> float:
        asked = apply_overrides(Config(), {"dpo.pairs_per_step": 4, **options})
        return float(dpo_work(shape, asked, 1, Lengths(60, 64, 20, 24)).update_flops) / 4

    assert flops(**{"dpo.epochs": 1}) == pytest.approx(pair * 4 / 3)
    assert flops(**{"dpo.epochs": 2}) == pytest.approx(pair * 7 / 6)
    assert flops(**{"dpo.epochs": 1, "dpo.match": "aot"}) == pytest.approx(pair * 5 / 3)
    assert flops(**{"dpo.epochs": 1, "dpo.weights": "wpo"}) == pytest.approx(pair * 4 / 3 + 2 * head)
