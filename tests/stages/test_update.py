"""One optimizer step of GRPO and of DPO, against gradients from Hugging Face's own forward on every completion alone;
that nothing is computed twice on the way; and the loader that turns real mp4 files into what an update reads."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from veripo_kernels import PolicyLoss, PreferenceLoss

from bench.video.clips import truncated
from tests.support import policies
from veripo_fast.cache.loader import PromptLoader
from veripo_fast.cache.memory import VisionCache
from veripo_fast.config.alignment import DpoConfig
from veripo_fast.config.inputs import ModelConfig, VideoConfig
from veripo_fast.config.objectives import GrpoConfig, RolloutConfig
from veripo_fast.config.schema import Config, OptimizerConfig
from veripo_fast.demo.corpus import write_clip
from veripo_fast.demo.world import random_clip
from veripo_fast.errors import ConfigError
from veripo_fast.model import encoding
from veripo_fast.model.packing import pack
from veripo_fast.model.policy import Policy, load_policy
from veripo_fast.reward.groups import reward_groups
from veripo_fast.stages.dpo import dpo_update, preference_loss_of, reference_logprobs, step_order
from veripo_fast.stages.grpo import GrpoUpdate, policy_loss_of, rollout_metrics
from veripo_fast.stages.optimizer import Optimizer
from veripo_fast.stages.pair_rows import PairRow, pair_logprobs
from veripo_fast.types import (
    Completion,
    LoadedPrompt,
    MediaInputs,
    PreferencePair,
    Prompt,
    RolloutGroup,
    Video,
    VisionFeatures,
)
from veripo_fast.video import buffers

FAMILY = "qwen3_vl"
MEDIA = [[("video", 4, 2, 2)], [], [("image", 2, 2, 3), ("video", 3, 2, 2)], [("video", 2, 2, 3)]]
TEMPERATURE, MAX_NEW_TOKENS, WHOLE = 0.8, 16, 1 << 20


class Counted:
    """How often a function was called, and with what first argument."""

    def __init__(self, owner: object, name: str, patch: pytest.MonkeyPatch) -> None:
        self.calls: list = []
        plain = getattr(owner, name)

        def counted(*args: object, **kwargs: object) -> object:
            self.calls.append(args[0])
            return plain(*args, **kwargs)

        patch.setattr(owner, name, counted)

    def __len__(self) -> int:
        return len(self.calls)


class Gradients(Optimizer):
    """Records the gradient of every step and leaves the weights alone."""

    def step(self) -> float:
        self.recorded = getattr(self, "recorded", [])
        self.recorded.append(flat(self.backend.parameters))
        self.backend.discard()
        self.steps += 1
        return 1.0


def flat(parameters: list[torch.nn.Parameter]) -> torch.Tensor:
    return torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in parameters])


def config_of(max_tokens: int = WHOLE, dpo: DpoConfig | None = None, **grpo: object) -> Config:
    return Config(rollout=RolloutConfig(temperature=TEMPERATURE, max_new_tokens=MAX_NEW_TOKENS),
                  grpo=GrpoConfig(**({"prompts_per_step": 4} | grpo)), dpo=dpo or DpoConfig(),
                  optimizer=OptimizerConfig(max_tokens=max_tokens))


def test_every_option_of_a_loss_reaches_it() -> None:
    grpo = {"loss": "dapo", "aggregation": "sequence", "clip_low": 0.1, "clip_high": 0.3, "dual_clip": 4.0,
            "kl_coef": 0.2, "kl_kind": "k2"}
    assert policy_loss_of(config_of(**grpo)) == PolicyLoss(**grpo, constant_length=MAX_NEW_TOKENS)
    dpo = {"loss": "robust", "dpo_beta": 0.3, "nll_coef": 0.5, "length_normalize": True, "label_smoothing": 0.1,
           "ld_alpha": 0.4, "divergence": "alpha", "divergence_alpha": 0.3}
    assert preference_loss_of(config_of(dpo=DpoConfig(**dpo))) == PreferenceLoss(**dpo)


@pytest.mark.parametrize(("loss", "options"), [
    ("sapo", {"sapo_temperature_pos": 0.9, "sapo_temperature_neg": 1.2, "entropy_coef": 0.01}),
    ("sapo_sequence", {"sapo_temperature_neg": 1.2}),
    ("vespo", {"vespo_k_pos": 1.0, "vespo_lambda_pos": 2.0, "vespo_k_neg": 2.5, "vespo_lambda_neg": 1.5}),
    ("grpo", {"entropy_coef": -0.01}),
    ("gpg", {"squared_coef": 0.2}),
])
def test_numbers_of_a_loss_reach_it(loss: str, options: dict[str, float]) -> None:
    expected = PolicyLoss(loss, constant_length=MAX_NEW_TOKENS, **options)
    assert policy_loss_of(config_of(loss=loss, loss_options=options)) == expected


def test_numbers_of_another_loss_are_refused() -> None:
    assert preference_loss_of(config_of(dpo=DpoConfig(loss="discopop", loss_options={"discopop_tau": 0.1}))
                              ).discopop_tau == 0.1
    with pytest.raises(ConfigError, match=r"loss_options.vespo_k_pos changes nothing while loss is grpo"):
        GrpoConfig(loss_options={"vespo_k_pos": 1.0})
    with pytest.raises(ConfigError, match=r"loss_options.discopop_tau changes nothing while loss is sigmoid"):
        DpoConfig(loss_options={"discopop_tau": 0.1})
    with pytest.raises(ConfigError, match=r"loss_options.squared_coef must be a number above 0, got -1"):
        GrpoConfig(loss="gpg", loss_options={"squared_coef": -1})
    for value in (0, "much", float("nan")):
        with pytest.raises(ConfigError, match=r"must be a number above 0"):
            GrpoConfig(loss="sapo", loss_options={"sapo_temperature_neg": value})


@pytest.mark.parametrize("max_tokens", [WHOLE, 1])
def test_an_entropy_bonus_is_a_metric(policy: Policy, max_tokens: int) -> None:
    """The mean entropy, whatever micro-batches there are; the bonus lowers the loss by its weight times that."""
    prompts, groups = groups_of(policy)
    values = {}
    for weight in (0.0, 0.25):
        config = config_of(max_tokens, loss_options={"entropy_coef": weight} if weight else {})
        values[weight] = GrpoUpdate(policy, optimizer_of(policy, config), config, None).run(prompts, groups)
    assert "entropy" not in values[0.0] and values[0.25]["entropy"] > 0
    assert values[0.25]["loss"] == pytest.approx(values[0.0]["loss"] - 0.25 * values[0.25]["entropy"], abs=1e-5)


def optimizer_of(policy: Policy, config: Config, kind: type[Optimizer] = Gradients, peak: float = 1e-3) -> Optimizer:
    return kind(policy.backend, config.optimizer, peak, 10)


def assert_close(one: torch.Tensor, other: torch.Tensor) -> None:
    assert other.norm() > 0
    assert (one - other).norm() <= 1e-4 * other.norm()


@pytest.mark.parametrize(("importance", "weight"), [
    ("token_truncate", lambda w: w.clamp(0.5, 1.3)), ("token_mask", lambda w: w * ((w >= 0.5) & (w <= 1.3)))])
@pytest.mark.parametrize("updates", [1, 2])
def test_importance_weights_of_another_engine(policy: Policy, importance: str, updates: int,
                                              weight: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """exp(trainer - engine) of each token scales its gradient; a later update compares the trainer with itself as it
    was at the rollout, so the weights are of the same distance and the ratio starts at 1."""
    prompts, groups = groups_of(policy)
    generator = torch.Generator().manual_seed(4)
    weights = []
    for group in groups:
        for row in group.completions:
            gap = torch.randn(len(row.token_ids), generator=generator) * 0.5
            weights.append(weight((-gap).exp()))
            row.rollout_logprobs = (torch.tensor(row.rollout_logprobs) + gap).tolist()
    options = {"importance": importance, "importance_floor": 0.5, "importance_cap": 1.3, "aggregation": "token"}
    config = config_of(updates_per_rollout=updates, **options)
    optimizer = optimizer_of(policy, config)
    GrpoUpdate(policy, optimizer, config, None).run(prompts, groups)
    expected = [torch.zeros(()) for _ in range(updates)]
    rows = iter(weights)
    share = len(groups) // updates
    tokens = [sum(len(c.token_ids) for group in groups[i * share:(i + 1) * share] for c in group.completions)
              for i in range(updates)]
    for number, (item, group) in enumerate(zip(prompts, groups, strict=True)):
        for completion in group.completions:
            scaled = next(rows) * completion.advantage / tokens[number // share]
            logprobs = plain_logprobs(policy, item, completion.token_ids, TEMPERATURE)
            expected[number // share] = expected[number // share] - (scaled * logprobs).sum()
    for ours, loss in zip(optimizer.recorded, expected, strict=True):
        policy.model.zero_grad()
        loss.backward()
        assert_close(ours, flat([p for _, p in policy.parameters()]))
    policy.model.zero_grad()


# -- GRPO ------------------------------------------------------------------------------------------------------------


def groups_of(policy: Policy, shift: float = 0.0) -> tuple[list[LoadedPrompt], list[RolloutGroup]]:
    """Rewarded groups with the policy's log-probs plus `shift` as the engine's; the second carries no signal."""
    prompts, groups = [], []
    for seed, sizes in enumerate(MEDIA):
        item = policies.loaded(policy, sizes, seed)
        ids = policies.random_completions([5, 1, 8 + seed, 3], seed)
        with torch.no_grad():
            logprobs = policy.completion_logprobs(pack([(item.encoded, ids)]), [item.features], temperature=TEMPERATURE)
        advantages = [0.0] * 4 if seed == 1 else [1.2, -0.3, -1.1 + seed, 0.4]
        rows = logprobs.split([len(one) for one in ids])
        groups.append(RolloutGroup(item.prompt, [
            Completion(one, "", (row + shift).tolist(), "stop", 0, advantage=advantage)
            for one, row, advantage in zip(ids, rows, advantages, strict=True)]))
        prompts.append(item)
    return prompts, groups


def update_gradients(policy: Policy, config: Config, ref: Policy | None = None,
                     shift: float = 0.0) -> tuple[list[torch.Tensor], dict[str, float]]:
    optimizer = optimizer_of(policy, config)
    metrics = GrpoUpdate(policy, optimizer, config, ref).run(*groups_of(policy, shift))
    return optimizer.recorded, metrics


def plain_logprobs(policy: Policy, item: LoadedPrompt, ids: list[int], temperature: float) -> torch.Tensor:
    logits = policies.plain_logits(policy, item.encoded, ids)[:-1] / temperature
    return torch.log_softmax(logits, -1).gather(-1, torch.tensor(ids)[:, None])[:, 0]


@pytest.mark.parametrize("aggregation", ["sequence", "token", "constant"])
def test_the_gradient_is_that_of_plain_forwards_one_by_one(policy: Policy, aggregation: str) -> None:
    (ours,), metrics = update_gradients(policy, config_of(aggregation=aggregation))
    prompts, groups = groups_of(policy)
    completions = [c for group in groups for c in group.completions]
    count, tokens = len(completions), sum(len(c.token_ids) for c in completions)
    scale = {"sequence": lambda n: 1 / n / count, "token": lambda n: 1 / tokens,
             "constant": lambda n: 1 / MAX_NEW_TOKENS / count}[aggregation]
    loss = torch.zeros(())
    for item, group in zip(prompts, groups, strict=True):
        for completion in group.completions:
            if completion.advantage:
                logprobs = plain_logprobs(policy, item, completion.token_ids, TEMPERATURE)
                loss = loss - scale(len(completion.token_ids)) * (completion.advantage * logprobs).sum()
    loss.backward()
    theirs = flat([p for _, p in policy.parameters()])
    policy.model.zero_grad()
    assert_close(ours, theirs)
    expected = -sum(scale(len(c.token_ids)) * c.advantage * len(c.token_ids) for c in completions)
    assert metrics["loss"] == pytest.approx(expected, abs=1e-6)
    assert metrics["ratio_max"] == 1 and metrics["clip_share"] == metrics["kl"] == 0
    assert metrics["parity_max"] < 1e-5 and metrics["updates"] == policy.version == 1


@pytest.mark.parametrize("options", [{}, {"aggregation": "token"}, {"aggregation": "constant"}])
def test_micro_batches_add_up_and_cost_one_forward_per_live_group(
        policy: Policy, monkeypatch: pytest.MonkeyPatch, options: dict) -> None:
    whole, expected = update_gradients(policy, config_of(**options))
    prompts, groups = groups_of(policy)
    forwards = Counted(policy.step, "forward", monkeypatch)
    monkeypatch.setattr(policy, "version", 0)
    config = config_of(max_tokens=1, **options)
    optimizer = optimizer_of(policy, config)
    metrics = GrpoUpdate(policy, optimizer, config, None).run(prompts, groups)
    assert [len(batch.groups) for batch in forwards.calls] == [1, 1, 1], "one per live group, none for old log-probs"
    live = [number for number in range(4) if number != 1]
    assert [batch.prompts[0] for batch in forwards.calls] == [prompts[number].encoded for number in live]
    assert metrics["packed_tokens"] == sum(len(batch.token_ids) for batch in forwards.calls)
    assert_close(optimizer.recorded[0], whole[0])
    for name in expected.keys() - {"packed_tokens"}:
        assert metrics[name] == pytest.approx(expected[name], abs=1e-5), name


def test_a_batch_without_signal_costs_nothing(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, groups = groups_of(policy)
    config = config_of()
    optimizer = optimizer_of(policy, config)
    forwards = Counted(policy.step, "forward", monkeypatch)
    metrics = GrpoUpdate(policy, optimizer, config, None).run(prompts[1:2], groups[1:2])
    assert metrics == {"updates": 0} and len(forwards) == 0 and optimizer.steps == 0 and policy.version == 0


def test_later_updates_compare_with_the_rollout(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's log-probs are half a nat too low: the first update must not see it, the second must."""
    forwards = Counted(policy.step, "forward", monkeypatch)
    config = config_of(updates_per_rollout=2, max_tokens=1)
    rollout = groups_of(policy, shift=-0.5)
    forwards.calls.clear()
    optimizer = optimizer_of(policy, config)
    metrics = GrpoUpdate(policy, optimizer, config, None).run(*rollout)
    assert len(optimizer.recorded) == metrics["updates"] == policy.version == 2
    assert len(forwards) == 3
    assert metrics["ratio_max"] == pytest.approx(math.exp(0.5), rel=1e-4)
    assert metrics["parity_max"] == pytest.approx(0.5, rel=1e-4)
    fresh = replace(config, grpo=replace(config.grpo, updates_per_rollout=1, prompts_per_step=2))
    alone = optimizer_of(policy, fresh)
    monkeypatch.setattr(policy, "version", 0)
    GrpoUpdate(policy, alone, fresh, None).run(rollout[0][:2], rollout[1][:2])
    assert torch.equal(alone.recorded[0], optimizer.recorded[0])
    prompts, groups = (part[2:] for part in rollout)
    monkeypatch.setattr(policy, "version", 0)
    GrpoUpdate(policy, alone, fresh, None).run(prompts, groups)
    clipped = [c.advantage > 0 for group in groups for c in group.completions]
    assert True in clipped and False in clipped  # ratio 1.65: positive advantages are clipped, negative ones grow
    assert (optimizer.recorded[1] - alone.recorded[1]).norm() > 0.1 * alone.recorded[1].norm()
    share = sum(c.advantage > 0 for group in groups for c in group.completions) / 8
    assert metrics["clip_share"] == pytest.approx(share / 2)  # mean over the two updates


def test_a_part_without_signal_leaves_the_next_one_fresh(policy: Policy) -> None:
    prompts, groups = groups_of(policy, shift=-0.5)
    config = config_of(updates_per_rollout=2, prompts_per_step=2)
    metrics = GrpoUpdate(policy, optimizer_of(policy, config), config, None).run(
        [prompts[1], prompts[0]], [groups[1], groups[0]])
    assert metrics["updates"] == 1 and metrics["ratio_max"] == 1


@pytest.fixture(scope="module")
def other() -> Policy:
    """A policy with other weights."""
    moved = load_policy(ModelConfig(path=str(policies.checkpoint(FAMILY)), device="cpu"))
    with torch.no_grad():
        for _, parameter in moved.parameters():
            parameter.mul_(1.03)
    moved.model.requires_grad_(False)
    return moved


def test_the_kl_term_runs_the_reference(policy: Policy, other: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, groups = groups_of(policy)
    config = config_of(max_tokens=1, kl_coef=0.4, kl_kind="k3")
    forwards = Counted(other.step, "forward", monkeypatch)
    ours, metrics = update_gradients(policy, config, other)
    assert len(forwards) == 3
    loss, kl = torch.zeros(()), 0.0
    for item, group in zip(prompts, groups, strict=True):
        for completion in group.completions if item is not prompts[1] else ():
            logprobs = plain_logprobs(policy, item, completion.token_ids, TEMPERATURE)
            with torch.no_grad():
                ref = plain_logprobs(other, item, completion.token_ids, TEMPERATURE)
            k3 = (ref - logprobs).exp() - 1 - (ref - logprobs)
            loss = loss + (0.4 * k3 - completion.advantage * logprobs).mean() / 16
            kl += k3.mean().item() / 16
    loss.backward()
    theirs = flat([p for _, p in policy.parameters()])
    policy.model.zero_grad()
    assert_close(ours[0], theirs)
    assert metrics["kl"] == pytest.approx(kl, rel=1e-3) and kl > 1e-4
    same, at_reference = update_gradients(policy, config, policy)
    assert at_reference["kl"] == pytest.approx(0, abs=1e-9)
    assert_close(same[0], update_gradients(policy, config_of())[0][0])


def test_a_loss_that_is_not_finite_changes_nothing() -> None:
    policy = load_policy(ModelConfig(path=str(policies.checkpoint(FAMILY)), device="cpu"))
    before = {name: value.clone() for name, value in policy.model.state_dict().items()}
    prompts, groups = groups_of(policy)
    groups[0].completions[2].advantage = math.nan
    config = config_of()
    update = GrpoUpdate(policy, optimizer_of(policy, config, Optimizer), config, None)
    metrics = update.run(prompts, groups)
    assert metrics.pop("parity_max") < 1e-5 and metrics == {"skipped_updates": 1.0, "updates": 0}
    assert all(torch.equal(value, before[name]) for name, value in policy.model.state_dict().items())
    groups[0].completions[2].advantage = 0.5
    metrics = update.run(prompts, groups)
    assert metrics["updates"] == policy.version == 1 and metrics["skipped_updates"] == 0
    moved = {name for name, value in policy.model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved and not any("visual" in name for name in moved)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("max_tokens", [1, WHOLE])
def test_parity_with_log_probs_that_are_not_finite_is_infinite(
        policy: Policy, value: float, max_tokens: int) -> None:
    prompts, groups = groups_of(policy)
    groups[0].completions[2].rollout_logprobs[-1] = value
    config = config_of(max_tokens)
    metrics = GrpoUpdate(policy, optimizer_of(policy, config), config, None).run(prompts, groups)
    assert metrics["parity_max"] == math.inf


def test_rewards_become_advantages_group_by_group() -> None:
    config = config_of(advantage="no_std")
    texts = [["<think>so left</think><answer>A</answer>", "<answer>A</answer>", "nothing"],
             ["<answer>3</answer>", "<answer> 3 </answer>"]]
    asked = [Prompt("a", (), "choice", "A", ("left", "right")), Prompt("b", (), "number", "3")]
    groups = [RolloutGroup(prompt, [Completion([1, 2], text, [], "stop", 0) for text in written])
              for prompt, written in zip(asked, texts, strict=True)]
    reward_groups(groups, config)
    assert [[c.accuracy for c in group.completions] for group in groups] == [[1, 1, 0], [1, 1]]
    assert [[c.reward for c in group.completions] for group in groups] == [[1.5, 1, 0], [1, 1]]
    assert [c.advantage for c in groups[0].completions] == pytest.approx([2 / 3, 1 / 6, -5 / 6])
    assert [c.advantage for c in groups[1].completions] == [0, 0]
    metrics = rollout_metrics(groups)
    assert metrics["reward_mean"] == pytest.approx(0.9) and metrics["accuracy_mean"] == pytest.approx(0.8)
    assert metrics["zero_variance_share"] == 0.5 and metrics["prompts"] == 2 and metrics["finished_share"] == 1
    reward_groups([], config)


# -- the tower -------------------------------------------------------------------------------------------------------


def test_a_frozen_tower_does_not_run_in_updates(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    tower = Counted(policy.model.model.visual, "forward", monkeypatch)
    rollout = groups_of(policy)
    assert len(tower) == sum(bool(sizes) for sizes in MEDIA)  # once per prompt that shows something
    config = config_of(max_tokens=1, updates_per_rollout=2)
    GrpoUpdate(policy, optimizer_of(policy, config), config, None).run(*rollout)
    assert len(tower) == 3


def test_a_trained_tower_runs_once_per_micro_batch_and_learns(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = policies.policy(FAMILY, freeze_vision=False)
    monkeypatch.setattr(trained, "version", 0)
    rollout = groups_of(trained)
    tower = Counted(trained.model.model.visual, "forward", monkeypatch)
    config = config_of()
    optimizer = optimizer_of(trained, config)
    GrpoUpdate(trained, optimizer, config, None).run(*rollout)
    assert len(tower) == 1, "all prompts of a micro-batch in one call"
    names = [name for name, p in trained.parameters() for _ in range(p.numel())]
    vision = torch.tensor(["visual" in name for name in names])
    assert optimizer.recorded[0][vision].norm() > 0
    frozen, _ = update_gradients(policy, config)
    assert_close(optimizer.recorded[0][~vision], frozen[0])


# -- DPO -------------------------------------------------------------------------------------------------------------


def pairs_of(policy: Policy) -> list[PairRow]:
    """Pairs of ragged completions; tokens 3 and 4 of each chosen one and the first of each rejected one are masked."""
    rows = []
    for seed, sizes in enumerate(MEDIA):
        chosen, rejected = policies.random_completions([6 + seed, 4], seed)
        masks = tuple(int(i not in (3, 4)) for i in range(len(chosen))), (0, 1, 1, 1)
        pair = PreferencePair(f"p{seed}", "accuracy", tuple(chosen), tuple(rejected), *masks, "", "", 0, 1)
        rows.append(PairRow(seed, policies.loaded(policy, sizes, seed), pair))
    return rows


def masked_sum(policy: Policy, item: LoadedPrompt, ids: tuple[int, ...], mask: tuple[int, ...]) -> torch.Tensor:
    return (plain_logprobs(policy, item, list(ids), 1.0) * torch.tensor(mask)).sum()


REF = torch.tensor([[-30.0, -21.0], [-33.0, -20.0], [-36.0, -22.0], [-44.0, -19.0]])
DPO = [DpoConfig(dpo_beta=0.3), DpoConfig(dpo_beta=0.3, loss="ipo"), DpoConfig(length_normalize=True),
       DpoConfig(nll_coef=0.5)]


@pytest.mark.parametrize("dpo", DPO)
def test_dpo_is_the_loss_of_plain_forwards_one_by_one(policy: Policy, dpo: DpoConfig) -> None:
    rows, config = pairs_of(policy), config_of(dpo=dpo)
    optimizer = optimizer_of(policy, config)
    metrics = dpo_update(policy, optimizer, rows, REF, config)
    chosen = torch.stack([masked_sum(policy, item, pair.chosen_ids, pair.chosen_loss_mask)
                          for _, item, pair, _ in rows])
    rejected = torch.stack([masked_sum(policy, item, pair.rejected_ids, pair.rejected_loss_mask)
                            for _, item, pair, _ in rows])
    lengths = torch.tensor([[4.0 + seed, 3.0] for seed in range(4)])
    ratios = torch.stack([chosen, rejected], 1) - REF
    if dpo.length_normalize:
        ratios = ratios / lengths
    margin = dpo.dpo_beta * (ratios[:, 0] - ratios[:, 1])
    losses = (margin / dpo.dpo_beta - 1 / (2 * dpo.dpo_beta)).square() if dpo.loss == "ipo" else -F.logsigmoid(margin)
    loss = (losses - dpo.nll_coef * chosen / lengths[:, 0]).mean()
    loss.backward()
    theirs = flat([p for _, p in policy.parameters()])
    policy.model.zero_grad()
    assert_close(optimizer.recorded[0], theirs)
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert metrics["margin"] == pytest.approx(margin.mean().item(), rel=1e-3)
    assert metrics["preference_accuracy"] == (margin > 0).float().mean().item()
    assert metrics["chosen_logprobs_mean"] == pytest.approx((chosen / lengths[:, 0]).mean().item(), rel=1e-4)
    assert metrics["rejected_logprobs_mean"] == pytest.approx((rejected / lengths[:, 1]).mean().item(), rel=1e-4)
    assert metrics["chosen_drift"] == pytest.approx(((chosen - REF[:, 0]) / lengths[:, 0]).mean().item(), rel=1e-3)
    assert metrics["pairs"] == 4 and policy.version == 1


@pytest.mark.parametrize("dpo", [DPO[0], DPO[3]])
def test_dpo_micro_batches_add_up(policy: Policy, monkeypatch: pytest.MonkeyPatch, dpo: DpoConfig) -> None:
    rows, results = pairs_of(policy), []
    forwards = Counted(policy.step, "forward", monkeypatch)
    for max_tokens, expected in ((WHOLE, 1), (1, 4)):
        config = config_of(max_tokens, dpo)
        optimizer = optimizer_of(policy, config)
        results.append((dpo_update(policy, optimizer, rows, REF, config), optimizer.recorded[0]))
        assert len(forwards) == expected
        forwards.calls.clear()
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-4)
    assert_close(results[1][1], results[0][1])


def test_masked_tokens_do_not_enter(policy: Policy) -> None:
    row = pairs_of(policy)[0]
    pair = row.pair
    with torch.no_grad():
        sums = pair_logprobs(policy, [row], PreferenceLoss())[0]
        others = replace(pair, rejected_loss_mask=(1, 1, 1, 1), chosen_ids=(*pair.chosen_ids, 99),
                         chosen_loss_mask=(*pair.chosen_loss_mask, 0))  # behind the end nothing else can change
        more = pair_logprobs(policy, [row._replace(pair=others)], PreferenceLoss())[0]
    assert more[0].item() == pytest.approx(sums[0].item(), abs=1e-5) and more[1] < sums[1] - 0.1


def test_reference_logprobs_are_computed_once_and_kept(policy: Policy, tmp_path: Path,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    rows, path, done = pairs_of(policy), tmp_path / "verifier" / "ref.parquet", []
    config = config_of(max_tokens=60, dpo=DpoConfig(pairs_per_step=3))

    def load(numbers: Sequence[int]) -> list[PairRow]:
        return [rows[number] for number in numbers if number != 1]  # the media of pair 1 are gone

    values = reference_logprobs(policy, len(rows), load, config, path, done.append)
    assert done == [3, 1]
    with torch.no_grad():
        expected = torch.cat([pair_logprobs(policy, [row], PreferenceLoss()) for row in rows])
    expected[1] = math.nan
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    forwards = Counted(policy.step, "forward", monkeypatch)
    again = reference_logprobs(policy, len(rows), load, config, path, done.append)
    torch.testing.assert_close(again, values, rtol=0, atol=0, equal_nan=True)
    assert len(forwards) == 0 and [file.name for file in path.parent.iterdir()] == [path.name]


def test_every_epoch_takes_every_pair_once_in_another_order() -> None:
    config = config_of(dpo=DpoConfig(pairs_per_step=4, epochs=3))
    steps = step_order(10, config, seed=5)
    assert [len(step) for step in steps] == [4, 4, 2] * 3
    epochs = [[number for step in steps[start:start + 3] for number in step] for start in (0, 3, 6)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert step_order(10, config, seed=5) == steps != step_order(10, config, seed=6)
    short = replace(config, dpo=replace(config.dpo, max_steps=4))
    assert step_order(10, short, seed=5) == steps[:4]


# -- prompts from files ----------------------------------------------------------------------------------------------


CONTRACT = VideoConfig(fps=None, num_frames=4, min_pixels=32 * 32, max_pixels=64 * 64)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Video]:
    folder = tmp_path_factory.mktemp("clips")
    for seed in range(3):
        write_clip(folder / f"{seed}.mp4", random_clip(seed))
    truncated(folder / "0.mp4", folder / "broken.mp4", 0.3)
    return [Video(str(folder / name)) for name in ("0.mp4", "1.mp4", "2.mp4", "broken.mp4", "missing.mp4")]


@pytest.fixture
def loader_of(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> Callable[..., PromptLoader]:
    """Makes loaders with `decoded`, `tower_runs` and `skipped` to look at."""
    made: list[PromptLoader] = []

    def make(owner: Policy = policy, max_prompt_tokens: int = 4096) -> PromptLoader:
        skipped: list[tuple[str, str]] = []
        loader = PromptLoader(owner, CONTRACT, max_prompt_tokens,
                              lambda prompt, reason: skipped.append((prompt.prompt_id, reason)))
        loader.skipped = skipped
        loader.decoded = Counted(encoding, "decode", monkeypatch)
        loader.tower_runs = Counted(owner.model.model.visual, "forward", monkeypatch)
        made.append(loader)
        return loader

    yield make
    for loader in made:
        loader.close()


def about(video: Video | None, name: str, text: str = "What moves?") -> Prompt:
    return policies.prompt_of(*([] if video is None else [video]), text, prompt_id=name)


def test_a_video_is_decoded_and_encoded_once(loader_of: Callable[..., PromptLoader], files: list[Video]) -> None:
    loader = loader_of()
    prompts = [about(files[0], "a"), about(None, "b"), about(files[1], "c"), about(files[0], "d", "Where is it?")]
    first = loader.load(prompts)
    assert [item.prompt.prompt_id for item in first] == ["a", "b", "c", "d"]
    assert sorted(video.path for video in loader.decoded.calls) == [files[0].path, files[1].path]
    assert len(loader.tower_runs) == 2, "each new video once"
    assert first[0].features is first[3].features and first[1].features is None
    assert len(first[0].encoded.token_ids) != len(first[3].encoded.token_ids)
    second = loader.load([about(files[1], "e"), about(files[0], "f")])
    assert len(loader.decoded) == 2 and len(loader.tower_runs) == 2
    assert second[0].features is first[2].features and second[1].features is first[0].features
    assert torch.equal(second[1].encoded.token_ids, first[0].encoded.token_ids)
    assert torch.equal(second[1].encoded.positions, first[0].encoded.positions)
    assert (loader.cache.hits, loader.skipped) == (2, [])


def test_cached_output_is_the_towers_and_holds_no_more_memory(policy: Policy, loader_of: Callable[..., PromptLoader],
                                                              files: list[Video]) -> None:
    loader = loader_of()
    for item in loader.load([about(video, video.path) for video in files[:3]]):
        media = policy.encoder.load_media(item.prompt, CONTRACT)
        with torch.no_grad():
            alone = policy.vision_features(media)
        own = (item.features.embeddings, *item.features.deepstack)
        for ours, theirs in zip(own, (alone.embeddings, *alone.deepstack), strict=True):
            assert (ours - theirs).abs().max() < 1e-4 and not ours.requires_grad
            assert ours.untyped_storage().nbytes() == ours.nbytes
        assert item.encoded.media.pixel_values is None
        assert item.encoded.media.grid_seconds == media.grid_seconds
    assert loader.cache.bytes == sum(f.nbytes for _, f in loader.cache._entries.values()) > 0


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_the_towers_output_does_not_depend_on_the_company(loader_of: Callable[..., PromptLoader], files: list[Video],
                                                          frozen: bool) -> None:
    """What a resumed run computes alone must be what the first one computed among others, bit for bit."""
    owner = policies.policy(FAMILY, freeze_vision=frozen)
    prompts = [about(video, video.path) for video in files[:3]]
    together = loader_of(owner).load(prompts)
    for prompt, item in zip(prompts, together, strict=True):
        (alone,) = loader_of(owner).load([prompt])
        assert torch.equal(alone.features.embeddings, item.features.embeddings)
        if not frozen:
            assert torch.equal(alone.encoded.media.pixel_values, item.encoded.media.pixel_values)


def test_patches_are_made_in_the_type_of_the_tower(loader_of: Callable[..., PromptLoader], files: list[Video]) -> None:
    owner = policies.policy(FAMILY, freeze_vision=False)
    exact = loader_of(owner).load_one(about(files[0], "a")).encoded.media.pixel_values
    owner.model.model.visual.to(torch.bfloat16)
    halved = loader_of(owner).load_one(about(files[0], "a")).encoded.media.pixel_values
    assert exact.dtype == torch.float32 and torch.equal(halved, exact.to(torch.bfloat16))


@pytest.mark.parametrize(("frozen", "memories"), [(True, 1), (False, 3)], ids=["frozen", "trained"])
def test_patches_of_a_frozen_tower_share_one_memory(files: list[Video], frozen: bool, memories: int,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "SMALL_BYTES", 0)
    monkeypatch.setattr(buffers, "_ROOM", buffers.Room(1 << 24))
    owner = policies.policy(FAMILY, freeze_vision=frozen)
    places, plain = [], owner.vision_features
    monkeypatch.setattr(owner, "vision_features",
                        lambda media: places.append(media.pixel_values.data_ptr()) or plain(media))
    loader = PromptLoader(owner, CONTRACT, 4096, lambda prompt, reason: pytest.fail(reason))
    loaded = loader.load([about(video, video.path) for video in files[:3]])
    loader.close()
    assert len(places) == 3 and len(set(places)) == memories
    assert all((item.encoded.media.pixel_values is None) == frozen for item in loaded)


def test_a_trained_tower_is_not_cached(loader_of: Callable[..., PromptLoader], files: list[Video]) -> None:
    loader = loader_of(policies.policy(FAMILY, freeze_vision=False))
    for number in (1, 2):
        (item,) = loader.load([about(files[0], "a")])
        assert len(loader.decoded) == len(loader.tower_runs) == number
        assert item.encoded.media.pixel_values is not None and not item.features.embeddings.requires_grad


def test_bad_media_are_reported_once_and_never_replaced(loader_of: Callable[..., PromptLoader],
                                                        files: list[Video]) -> None:
    loader = loader_of()
    prompts = [about(files[3], "broken"), about(files[0], "good"), about(files[4], "missing"),
               about(files[3], "broken too")]
    for _ in range(2):
        assert [item.prompt.prompt_id for item in loader.load(prompts)] == ["good"]
        assert sorted(name for name, _ in loader.skipped) == ["broken", "broken too", "missing"]
    reasons = dict(loader.skipped)
    assert "broken.mp4" in reasons["broken"] and "missing.mp4 cannot be read" in reasons["missing"]
    assert sum("broken" in video.path for video in loader.decoded.calls) == 1, "what is bad is not tried again"
    assert loader.load([prompts[0]]) == []


def test_a_prompt_that_is_too_long_is_left_out_whole(loader_of: Callable[..., PromptLoader],
                                                     files: list[Video]) -> None:
    (item,) = loader_of().load([about(files[0], "a")])
    tokens = len(item.encoded.token_ids)
    assert len(loader_of(max_prompt_tokens=tokens).load([about(files[0], "a")])) == 1
    loader = loader_of(max_prompt_tokens=tokens - 1)
    (kept,) = loader.load([about(files[0], "a"), about(None, "short", "?")])
    assert kept.prompt.prompt_id == "short"
    ((name, reason),) = loader.skipped
    assert name == "a" and f"the prompt has {tokens} tokens, more than data.max_prompt_tokens {tokens - 1}" in reason


def test_the_cache_forgets_the_least_recently_used() -> None:
    cache = VisionCache(max_bytes=1000)

    def put(key: str, floats: int) -> None:
        media = MediaInputs(None, torch.zeros(1, 3), ("video",), ((0.0,),), key)
        cache.put(media, VisionFeatures(torch.zeros(floats // 2), (torch.zeros(floats - floats // 2),)))

    for key in "ab":
        put(key, 100)
    put("a", 100)  # the same again takes no more room
    assert cache.bytes == 800 and cache.get("a") is not None
    put("c", 100)
    assert cache.get("b") is None and cache.get("a") is not None and cache.get("c") is not None
    assert cache.bytes == 800
    put("d", 240)
    assert [key for key in "abcd" if cache.get(key) is not None] == ["d"] and cache.bytes == 960
    put("e", 251)
    assert cache.get("e") is None and cache.get("d") is not None, "one that never fits evicts nobody"
    assert cache.hits == 5
