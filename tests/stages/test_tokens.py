"""What tokens count in the policy loss (`grpo.tokens`), on the tiny policy against plain forwards one by one."""

from __future__ import annotations

import pytest
import torch
from veripo_kernels.divergence import divergence_weights, group_divergence

from tests.stages.test_update import (
    MAX_NEW_TOKENS,
    TEMPERATURE,
    Gradients,
    assert_close,
    config_of,
    flat,
    groups_of,
    optimizer_of,
    plain_logprobs,
)
from tests.support import policies
from tests.support.loss_cases import rand
from veripo_fast.config.inputs import DataConfig
from veripo_fast.config.objectives import GrpoConfig
from veripo_fast.config.plans import PlanConfig
from veripo_fast.config.schema import Config
from veripo_fast.config.tokens import TokensConfig
from veripo_fast.errors import ConfigError
from veripo_fast.model.policy import Policy
from veripo_fast.recipes.advantages import live_scaled
from veripo_fast.run.seeds import derive_seed
from veripo_fast.stages.covariance import covariances, left_out, pulled_back
from veripo_fast.stages.grpo import GrpoUpdate
from veripo_fast.types import LoadedPrompt, RolloutGroup

WHOLE = 1 << 20


@pytest.mark.parametrize(("options", "sentence"), [
    ({"tokens": {"largest_weight": 2.0}}, "largest_weight changes nothing while weights is none"),
    ({"tokens": {"weights": "divergence", "largest_weight": 1.0}}, "largest_weight must be greater than 1, got 1.0"),
    ({"tokens": {"weights": "divergence"}, "loss": "gspo"}, "loss gspo has one ratio for all of them"),
    ({"tokens": {"covariance": "clip"}, "loss": "gmpo"}, "loss gmpo has one ratio for all of them"),
    ({"tokens": {"covariance_range": (0.0, 1.0)}}, "covariance_range changes nothing while covariance is none"),
    ({"tokens": {"covariance": "clip", "covariance_coef": 2.0}},
     "covariance_coef changes nothing while covariance is clip"),
    ({"tokens": {"covariance": "clip", "covariance_range": (2.0, 1.0)}},
     r"covariance_range must be two numbers, the smaller first, got \[2.0, 1.0\]"),
    ({"tokens": {"covariance": "clip", "covariance_share": 0.0}},
     "covariance_share must be greater than 0 and at most 1, got 0.0"),
    ({"tokens": {"covariance": "kl", "covariance_coef": 0.0}, "updates_per_rollout": 2, "prompts_per_step": 2},
     "covariance_coef must be greater than 0, got 0.0"),
    ({"tokens": {"covariance": "kl"}}, "covariance kl changes nothing while updates_per_rollout is 1"),
])
def test_what_does_not_go_together(options: dict, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        GrpoConfig(**(options | {"tokens": TokensConfig(**options["tokens"])}))


# -- weights by divergence -------------------------------------------------------------------------------------------


def weights_of(policy: Policy, item: LoadedPrompt, group: RolloutGroup, largest: float) -> torch.Tensor:
    """Weights of a group's tokens in a row, from its whole logits."""
    with torch.no_grad():
        logits = torch.cat([policies.plain_logits(policy, item.encoded, c.token_ids)[:-1] for c in group.completions])
    bounds = torch.tensor([0, *(len(c.token_ids) for c in group.completions)]).cumsum(0)
    groups = torch.tensor([0, len(group.completions)])
    divergence = group_divergence(logits.double() / TEMPERATURE, bounds, groups)
    return divergence_weights(divergence, bounds, groups, largest=largest).float()


@pytest.mark.parametrize("max_tokens", [WHOLE, 1])
def test_the_gradient_is_weighted_token_by_token(policy: Policy, max_tokens: int) -> None:
    prompts, groups = groups_of(policy)
    config = config_of(max_tokens, aggregation="token", tokens=TokensConfig(weights="divergence", largest_weight=3.0))
    optimizer = optimizer_of(policy, config)
    GrpoUpdate(policy, optimizer, config, None).run(prompts, groups)
    tokens = sum(len(c.token_ids) for group in groups for c in group.completions)
    loss, weights = torch.zeros(()), []
    for item, group in zip(prompts, groups, strict=True):
        if not any(c.advantage for c in group.completions):
            continue
        own = weights_of(policy, item, group, 3.0)
        weights.append(own)
        for completion, weight in zip(group.completions, own.split([len(c.token_ids) for c in group.completions]),
                                      strict=True):
            logprobs = plain_logprobs(policy, item, completion.token_ids, TEMPERATURE)
            loss = loss - (weight * completion.advantage * logprobs).sum() / tokens
    loss.backward()
    theirs = flat([p for _, p in policy.parameters()])
    policy.model.zero_grad()
    assert isinstance(optimizer, Gradients)
    assert_close(optimizer.recorded[0], theirs)
    assert torch.cat(weights).min() == 1 and torch.cat(weights).max() > 2.99


# -- the squared log-ratio of a completion ---------------------------------------------------------------------------


def test_later_updates_pull_completions_back(policy: Policy) -> None:
    """With an engine that is half a nat per token too low: the log-ratio of n tokens is n / 2 in the second update, and
    0 in the first."""
    prompts, groups = groups_of(policy, shift=-0.5)
    config = config_of(WHOLE, updates_per_rollout=2, loss="gpg", aggregation="constant",
                       loss_options={"squared_coef": 0.3})
    optimizer = optimizer_of(policy, config)
    GrpoUpdate(policy, optimizer, config, None).run(prompts, groups)
    assert isinstance(optimizer, Gradients)
    for number, gradient in enumerate(optimizer.recorded):
        loss = torch.zeros(())
        for item, group in zip(prompts[2 * number:2 * number + 2], groups[2 * number:2 * number + 2], strict=True):
            for completion in group.completions if any(c.advantage for c in group.completions) else ():
                logprob = plain_logprobs(policy, item, completion.token_ids, TEMPERATURE).sum()
                drift = logprob - sum(completion.rollout_logprobs) if number else logprob - logprob.detach()
                loss = loss - (completion.advantage * logprob - 0.15 * drift.square()) / 8 / MAX_NEW_TOKENS
        loss.backward()
        assert_close(gradient, flat([p for _, p in policy.parameters()]))
        policy.model.zero_grad()


# -- tokens by covariance --------------------------------------------------------------------------------------------


def verls_clip(logprobs: torch.Tensor, old: torch.Tensor, advantages: torch.Tensor, low: float, high: float
               ) -> torch.Tensor:
    """Candidates of verl's `clip_cov` for clip 0.2, bool [N], as its code finds them."""
    ratio = (logprobs - old).exp()
    clipped = -advantages * ratio.clamp(0.8, 1.2) > -advantages * ratio
    covariance = (advantages - advantages.mean()) * (logprobs - logprobs.mean())
    return (covariance < high) & (covariance > low) & ~clipped


def test_candidates_and_counts_are_verls() -> None:
    logprobs, old, advantages = rand(400), rand(400, seed=1, scale=0.1), rand(400, seed=2)
    old = logprobs + old
    candidates = verls_clip(logprobs, old, advantages, 0.5, 2.0)
    ratio = (logprobs - old).exp()
    unclipped = ~torch.where(advantages > 0, ratio > 1.2, ratio < 0.8)
    covariance = covariances(logprobs, advantages)
    for share, count in ((1e-4, 1), (0.02, 8), (1.0, int(candidates.sum()))):
        chosen = left_out(covariance, unclipped, share, 0.5, 2.0, seed=5)
        assert chosen.sum() == count and not (chosen & ~candidates).any()
        assert torch.equal(chosen, left_out(covariance, unclipped, share, 0.5, 2.0, seed=5))
    assert not torch.equal(left_out(covariance, unclipped, 0.02, 0.5, 2.0, seed=5),
                           left_out(covariance, unclipped, 0.02, 0.5, 2.0, seed=6))
    assert left_out(covariance, unclipped, 0.02, 1e3, 1e4, seed=5).sum() == 0
    largest = torch.zeros(400, dtype=torch.bool)
    largest[covariance.topk(8).indices] = True
    assert torch.equal(pulled_back(covariance, 0.02), largest)
    assert pulled_back(covariance, 1e-4).sum() == 1


def noisy(groups: list[RolloutGroup]) -> list[RolloutGroup]:
    """The engine's log-probs are another number off for each token."""
    for seed, group in enumerate(groups):
        for number, row in enumerate(group.completions):
            noise = rand(len(row.token_ids), seed=10 * seed + number, scale=0.4)
            row.rollout_logprobs = (torch.tensor(row.rollout_logprobs) + noise).tolist()
    return groups


def live_tokens(policy: Policy, prompts: list[LoadedPrompt], groups: list[RolloutGroup]
                ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probs with a gradient, the engine's and advantages of all tokens of the groups with a signal, in a row."""
    rows, old, advantages = [], [], []
    for item, group in zip(prompts, groups, strict=True):
        for completion in group.completions if any(c.advantage for c in group.completions) else ():
            rows.append(plain_logprobs(policy, item, completion.token_ids, TEMPERATURE))
            old += completion.rollout_logprobs
            advantages += [completion.advantage] * len(completion.token_ids)
    return torch.cat(rows), torch.tensor(old), torch.tensor(advantages)


@pytest.mark.parametrize("max_tokens", [WHOLE, 1])
def test_clip_cov_takes_tokens_out_of_the_gradient(policy: Policy, max_tokens: int) -> None:
    """The same ones whatever micro-batches there are; what the loss is divided by stays. The first update looks at the
    engine's log-probs, the second at the policy's, and leaves alone what the clip has taken out."""
    prompts, groups = groups_of(policy)
    noisy(groups)
    tokens = TokensConfig(covariance="clip", covariance_share=0.2, covariance_range=(-0.5, 9.0))
    config = config_of(max_tokens, aggregation="token", tokens=tokens, updates_per_rollout=2)
    optimizer = optimizer_of(policy, config)
    GrpoUpdate(policy, optimizer, config, None, seed=3).run(prompts, groups)
    assert isinstance(optimizer, Gradients)
    for number, gradient in enumerate(optimizer.recorded):
        part = slice(2 * number, 2 * number + 2)
        now, old, advantages = live_tokens(policy, prompts[part], groups[part])
        ratio = (now - (old if number else now.detach())).exp()
        clipped = torch.where(advantages > 0, ratio > 1.2, ratio < 0.8)
        covariance = covariances((now.detach() if number else old).double(), advantages.double())
        out = left_out(covariance, ~clipped, 0.2, -0.5, 9.0, derive_seed(3, "covariance", number))
        assert out.sum() == int(0.2 * len(out)) > 2 and clipped.any() == bool(number)
        surrogate = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
        count = sum(len(c.token_ids) for group in groups[part] for c in group.completions)
        (-(surrogate * ~out).sum() / count).backward()
        theirs = flat([p for _, p in policy.parameters()])
        policy.model.zero_grad()
        assert_close(gradient, theirs)


@pytest.mark.parametrize("max_tokens", [WHOLE, 1])
def test_kl_cov_pulls_tokens_back_from_the_second_update_on(policy: Policy, max_tokens: int) -> None:
    prompts, groups = groups_of(policy)
    noisy(groups)
    tokens = TokensConfig(covariance="kl", covariance_share=0.2, covariance_coef=1.5)
    plain = {"aggregation": "token", "updates_per_rollout": 2, "clip_low": 1.0, "clip_high": 1e6}
    recorded = []
    for options in (plain, plain | {"tokens": tokens}):
        policy.version = 0
        config = config_of(max_tokens, **options)
        optimizer = optimizer_of(policy, config)
        GrpoUpdate(policy, optimizer, config, None).run(prompts, groups)
        assert isinstance(optimizer, Gradients)
        recorded.append(optimizer.recorded)
    assert torch.equal(recorded[0][0], recorded[1][0])
    now, old, advantages = live_tokens(policy, prompts[2:], groups[2:])
    pulled = pulled_back(covariances(now.detach().double(), advantages.double()), 0.2)
    assert not torch.equal(pulled, pulled_back(covariances(old.double(), advantages.double()), 0.2))
    (1.5 * ((now - old).abs() * pulled).sum() / len(now)).backward()
    theirs = flat([p for _, p in policy.parameters()])
    policy.model.zero_grad()
    assert_close(recorded[1][1] - recorded[0][1], theirs)


def test_a_pairing_has_no_logprobs_of_the_engine() -> None:
    with pytest.raises(ConfigError, match=r"grpo.tokens.covariance cannot be combined with plan.pairing all"):
        Config(data=DataConfig(keep_keys=("problem", "new_questions")), plan=PlanConfig(wordings=2, pairing="all"),
               grpo=GrpoConfig(tokens=TokensConfig(covariance="clip")))


def test_groups_that_say_nothing_do_not_make_a_step_smaller() -> None:
    rewards = torch.tensor([1.0, 0.0, 2.0, 2.0, 0.0, 3.0], dtype=torch.float64)
    owners = torch.tensor([0, 0, 1, 1, 2, 2])
    assert live_scaled(rewards, owners).tolist() == [0.75, -0.75, 0.0, 0.0, -2.25, 2.25]
    assert live_scaled(torch.ones(4, dtype=torch.float64), torch.tensor([0, 0, 1, 1])).tolist() == [0.0] * 4
