"""What tokens count in the policy loss (`grpo.tokens`), on the tiny policy against plain forwards one by one."""

from __future__ import annotations

import pytest
import torch
from veripo_kernels.divergence import divergence_weights, group_divergence

from tests.stages.test_update import (
    FAMILY,
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
from veripo_fast.config.objectives import GrpoConfig
from veripo_fast.config.tokens import TokensConfig
from veripo_fast.errors import ConfigError
from veripo_fast.model.policy import Policy
from veripo_fast.stages.grpo import GrpoUpdate
from veripo_fast.types import LoadedPrompt, RolloutGroup

WHOLE = 1 << 20


@pytest.fixture
def policy(monkeypatch: pytest.MonkeyPatch) -> Policy:
    """The shared frozen-tower policy; `Gradients` keeps its weights, and its version is put back."""
    shared = policies.policy(FAMILY, freeze_vision=True)
    shared.model.zero_grad()
    monkeypatch.setattr(shared, "version", 0)
    return shared


@pytest.mark.parametrize(("options", "sentence"), [
    ({"tokens": {"largest_weight": 2.0}}, "largest_weight changes nothing while weights is none"),
    ({"tokens": {"weights": "divergence", "largest_weight": 1.0}}, "largest_weight must be greater than 1, got 1.0"),
    ({"tokens": {"weights": "divergence"}, "loss": "gspo"}, "loss gspo has one ratio for all of them"),
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
