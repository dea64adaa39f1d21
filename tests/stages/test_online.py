"""A preference term beside the policy loss: its gradient, what it leaves alone, and that a run goes on bitwise."""

import json
import signal
from dataclasses import replace

import pytest
import torch

from tests.stages.test_update import Gradients, assert_close, config_of, groups_of, optimizer_of
from tests.support import policies, runs
from tests.support.run_compare import assert_same, records, written
from veripo_fast.config.alignment import DpoConfig
from veripo_fast.distributed.world import ONE
from veripo_fast.errors import ConfigError
from veripo_fast.run.folder import RunDir
from veripo_fast.schedule.costs import grpo_work
from veripo_fast.schedule.ledger import predict
from veripo_fast.schedule.rates import Lengths
from veripo_fast.schedule.shapes import read_shape
from veripo_fast.stages.dealer import Dealer
from veripo_fast.stages.dpo import dpo_update, preference_loss_of
from veripo_fast.stages.grpo import GrpoUpdate
from veripo_fast.stages.guard import ChosenGuard
from veripo_fast.stages.online import PairTerm
from veripo_fast.stages.pair_rows import PairRow, pair_logprobs
from veripo_fast.types import PreferencePair
from veripo_fast.verifier.store import read_pairs

RATE = 0.7
ONLINE = {"grpo__dpo_rate": RATE, "stages": [{"kind": "grpo"}], "eval__at": "never"}


@pytest.fixture
def policy(monkeypatch):
    shared = policies.policy("qwen3_vl", freeze_vision=True)
    shared.model.zero_grad()
    monkeypatch.setattr(shared, "version", 0)
    return shared


def term_of(policy, optimizer, config, reference):
    return PairTerm(policy, optimizer, reference, Dealer.of(policy, ONE), ChosenGuard("grpo-1", config, []), 0)


def pairs_of(groups):
    """One pair of each group; the first tokens of the chosen side are masked, as those of a spliced one are."""
    pairs = []
    for group in groups:
        better, worse = (tuple(row.token_ids) for row in group.completions[:2])
        masks = (0, *[1] * (len(better) - 1)), (1,) * len(worse)
        pairs.append(PreferencePair(group.prompt.prompt_id, "reflection", better, worse, *masks, "", "", -1, 1))
    return pairs


def test_the_gradient_is_the_sum_of_both(policy):
    """Of the policy loss alone, and of the preference loss alone, weighed."""
    prompts, groups = groups_of(policy)
    pairs, config = pairs_of(groups), config_of(dpo=DpoConfig(nll_coef=0.3))
    config = replace(config, grpo=replace(config.grpo, dpo_rate=RATE))
    alone = optimizer_of(policy, config)
    GrpoUpdate(policy, alone, config, None).run(prompts, groups)
    rows = [PairRow(number, item, pair) for number, (item, pair) in enumerate(zip(prompts, pairs, strict=True))]
    with torch.no_grad():
        ref = pair_logprobs(policy, rows, preference_loss_of(config))
    preferences = optimizer_of(policy, config)
    values = dpo_update(policy, preferences, rows, ref, config)
    policy.version = 0
    both = optimizer_of(policy, config)
    metrics = GrpoUpdate(policy, both, config, None, None, term_of(policy, both, config, policy)).run(
        prompts, groups, pairs)
    assert isinstance(both, Gradients)
    assert_close(both.recorded[0], alone.recorded[0] + RATE * preferences.recorded[0])
    assert metrics["dpo_loss"] == pytest.approx(values["loss"], rel=1e-4) and metrics["pairs"] == 4
    assert metrics["chosen_drift"] == pytest.approx(0, abs=1e-5)


def test_a_pair_weighs_the_same_in_a_step_with_many(policy):
    """The gradients of steps with a part of the pairs add up to that of all."""
    prompts, groups = groups_of(policy)
    for row in [row for group in groups for row in group.completions]:
        row.advantage = 0.0
    config = config_of()
    config = replace(config, grpo=replace(config.grpo, dpo_rate=RATE))
    gradients = []
    for pairs in (pairs_of(groups), pairs_of(groups)[:1], pairs_of(groups)[1:]):
        optimizer = optimizer_of(policy, config)
        GrpoUpdate(policy, optimizer, config, None, None, term_of(policy, optimizer, config, policy)).run(
            prompts, groups, pairs)
        gradients.append(optimizer.recorded[0])
    assert_close(gradients[1] + gradients[2], gradients[0])


def test_pairs_teach_where_no_group_has_a_signal(policy):
    prompts, groups = groups_of(policy)
    for group in groups:
        for row in group.completions:
            row.advantage = 0.0
    config = config_of()
    config = replace(config, grpo=replace(config.grpo, dpo_rate=RATE))
    optimizer = optimizer_of(policy, config)
    update = GrpoUpdate(policy, optimizer, config, None, None, term_of(policy, optimizer, config, policy))
    assert update.run(prompts, groups, [])["updates"] == 0 and not hasattr(optimizer, "recorded")
    metrics = update.run(prompts, groups, pairs_of(groups))
    assert metrics["updates"] == 1 and metrics["loss"] == 0 and optimizer.recorded[0].norm() > 0


def test_no_more_pairs_than_asked_for_and_each_in_its_own_update(policy):
    prompts, groups = groups_of(policy)
    config = config_of(dpo=DpoConfig(pairs_per_step=2), updates_per_rollout=2)
    term = term_of(policy, optimizer_of(policy, config), config, policy)
    rows, total = term.rows(prompts, groups, range(4), pairs_of(groups))
    assert total == len(rows) == 2
    for numbers in (range(2), range(2, 4)):
        rows, total = term.rows(prompts, groups, numbers, pairs_of(groups))
        assert total == 2 and {row.prompt.prompt for row in rows} == {groups[number].prompt for number in numbers}


def test_a_prompt_that_comes_twice_trains_on_its_pairs_once(policy):
    """Its second group belongs to another update."""
    prompts, groups = groups_of(policy)
    config = config_of(updates_per_rollout=2)
    config = replace(config, grpo=replace(config.grpo, dpo_rate=RATE))
    optimizer = optimizer_of(policy, config)
    term = term_of(policy, optimizer, config, policy)
    taken = []
    rows = term.rows
    term.rows = lambda *arguments: (found := rows(*arguments), taken.append(found[1]))[0]
    update = GrpoUpdate(policy, optimizer, config, None, None, term)
    update.run([prompts[0], prompts[1], prompts[0], prompts[3]], [groups[0], groups[1], groups[0], groups[3]],
               [*pairs_of([groups[0], groups[1], groups[3]]), *pairs_of([groups[0]])])
    assert taken == [3, 1]


@pytest.fixture(scope="module")
def forks():
    return runs.forks()


def test_a_run_that_is_killed_goes_on_bitwise(forks, tmp_path):
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    configs = {name: written(runs.config(tmp_path / name / "run", grpo__steps=3, grpo__kl_coef=0.01, **ONLINE),
                             tmp_path / name) for name in ("whole", "killed")}
    assert forks.run("train", "--config", configs["whole"]).code == 0
    for moment in ("rename .*verifier/grpo-1/pairs/step_000001", r"mkdir .*\.tmp-step_000003$"):
        resume = ["--resume"] if (tmp_path / "killed" / "run" / "config.yaml").exists() else []
        ended = forks.run("train", "--config", configs["killed"], *resume, at=moment)
        assert ended.code == -signal.SIGKILL, ended.output
    assert forks.run("train", "--config", configs["killed"], "--resume").code == 0
    assert_same(tmp_path / "killed" / "run", tmp_path / "whole" / "run")
    run = RunDir(tmp_path / "whole" / "run")
    rows = records(run.metrics)
    assert all(row["pairs_by_family"] for row in rows) and rows[0]["chosen_drift"] == pytest.approx(0, abs=1e-5)
    assert any(abs(row["chosen_drift"]) > 1e-4 for row in rows[1:])
    for row in rows:
        assert sum(row["pairs_by_family"].values()) == len(read_pairs(run.step_pairs("grpo-1", row["step"])))


def test_off_nothing_is_built(forks, tmp_path):
    config = written(runs.config(tmp_path / "run", **{**ONLINE, "grpo__dpo_rate": 0.0}), tmp_path)
    assert forks.run("train", "--config", config).code == 0
    assert not (tmp_path / "run" / "verifier").exists()
    assert "pairs" not in json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])


@pytest.mark.parametrize(("changes", "sentence"), [
    ({"verifier__judge": "likelihood"}, "for which verifier.judge likelihood would load a model or run the policy"),
    ({"plan__wordings": 2, "data__keep_keys": ["problem", "new_questions"]}, "cannot be combined with plan.wordings"),
    ({"grpo__dpo_rate": -1.0}, "dpo_rate must be 0 or larger, got -1.0")])
def test_what_is_refused(tmp_path, changes, sentence):
    with pytest.raises(ConfigError, match=sentence):
        runs.config(tmp_path, **(ONLINE | changes))


def test_a_plan_counts_the_pairs(tmp_path):
    """As many as an update may have: twice as many cost twice as much, and none cost nothing."""
    shape, lengths = read_shape(runs.model()), Lengths(60, 64, 20, 24)
    changes = {"grpo__dpo_rate": 0.0}, {"dpo__pairs_per_step": 4}, {"dpo__pairs_per_step": 8}
    none, some, more = (grpo_work(shape, runs.config(tmp_path, **(ONLINE | one)), 1, lengths).update_flops
                        for one in changes)
    assert none < some < more and more - none == pytest.approx(2 * (some - none))


def test_the_reference_is_in_the_ledger(tmp_path):
    shape = read_shape(runs.model())
    with_term, without = (predict(shape, runs.config(tmp_path, **(ONLINE | {"grpo__dpo_rate": rate})))
                          for rate in (RATE, 0.0))
    owners = {name for phase in with_term["grpo-1"] for name in phase.device}
    assert "reference policy" in owners
    assert "reference policy" not in {name for phase in without["grpo-1"] for name in phase.device}
