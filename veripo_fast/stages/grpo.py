"""A GRPO stage: rollout -> reward -> advantage -> update, step by step (arXiv 2402.03300).

Groups whose advantages are all zero are dropped before any forward pass is paid. While the policy has taken no step
since the rollout, its own log-probs are the old ones; for later updates of the same rollout batch the engine's are, so
no pass is ever run for them.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm
from veripo_kernels import PolicyLoss

from veripo_fast.config.schema import Config, StageConfig
from veripo_fast.data.order import prompt_order
from veripo_fast.distributed.shares import over_ranks, padded
from veripo_fast.distributed.world import ONE
from veripo_fast.errors import DataError
from veripo_fast.model.packing import micro_batches, packed_length
from veripo_fast.model.policy import Policy
from veripo_fast.model.replay import pack_rollouts
from veripo_fast.model.step import PolicyLossInputs
from veripo_fast.reward.groups import has_signal
from veripo_fast.reward.score import scores_of
from veripo_fast.run.seeds import derive_seed
from veripo_fast.stages.batches import Sampler
from veripo_fast.stages.covariance import TokenChoice
from veripo_fast.stages.dealer import Dealer
from veripo_fast.stages.guard import ChosenGuard
from veripo_fast.stages.health import StageHealth, check_rollout_logprobs, parity
from veripo_fast.stages.moving_reference import MovingReference
from veripo_fast.stages.online import Harvest, PairTerm, families_of
from veripo_fast.stages.optimizer import Optimizer, step_policy
from veripo_fast.stages.pair_rows import PairRow
from veripo_fast.stages.reference import Reference, stage_reference
from veripo_fast.stages.rollout_metrics import ROUTER_COUNTS, column_metrics, rollout_metrics, router_shares
from veripo_fast.stages.samples import table
from veripo_fast.stages.session import Session
from veripo_fast.stages.update_rows import UpdateRow, joined, logprobs_of, token_inputs
from veripo_fast.types import LoadedPrompt, Media, PreferencePair, Prompt, RolloutGroup

log = logging.getLogger(__name__)


def run(session: Session, stage: StageConfig, config: Config) -> None:
    """Explore for `grpo.steps` steps, from where the session stands."""
    prompts = stage_prompts(session, stage, config)
    order = prompt_order(prompts, config.grpo, derive_seed(config.seed, stage.name, "order"))
    optimizer = session.stage_optimizer(config, config.grpo.learning_rate,
                                        config.grpo.steps * config.grpo.updates_per_rollout)
    reference = stage_reference(session, config.grpo.reference) if config.needs_reference else None
    moving = None
    if config.grpo.reference == "ema" and isinstance(reference, Policy):
        moving = MovingReference(session, reference, optimizer, config.grpo)
    sampler = Sampler(session, prompts, order, stage, config, reference)
    records = session.stage_records(stage.name)
    health = StageHealth(stage.name, records)
    harvest = guard = term = None
    if config.grpo.dpo_rate and reference is not None:
        harvest, guard = Harvest(session, stage, config), ChosenGuard(stage.name, config, records, session.world)
        term = PairTerm(session.policy, optimizer, reference, session.dealer, guard,
                        derive_seed(config.seed, stage.name))
    update = GrpoUpdate(session.policy, optimizer, config, reference if config.grpo.kl_coef else None,
                        session.dealer, term, derive_seed(config.seed, stage.name))
    for step in session.steps(stage, config.grpo.steps, optimizer):
        batch = sampler.step(step)
        with session.phase("reward"):
            session.keep(batch.groups)
            check_rollout_logprobs(batch.groups, session.run.rollouts(stage.name, step))
        if session.world.main and (every := config.train.show_samples) and (step + 1) % every == 0:
            tqdm.write(table(f"{stage.name}, step {step + 1}", batch.groups))
        means = rollout_metrics(batch.groups) | column_metrics(batch.groups, config.reward) | batch.metrics
        counts = health.observe(batch.groups, means) if session.world.main else {}
        pairs: list[PreferencePair] = []
        if harvest is not None:
            with session.phase("verify"):
                pairs = harvest.pairs(batch.trained, step)
        with session.phase("update"):
            values = means | counts | update.run(batch.prompts, batch.trained, pairs)
        if moving is not None:
            with session.phase("reference"):
                moving.step_done(step)
        if guard is not None:
            values |= families_of(pairs) | guard.observe(values)
        session.finish_step(values, reward=values["reward_mean"], accuracy=values["accuracy_mean"])


# -- what a stage begins with ----------------------------------------------------------------------------------------


def stage_prompts(session: Session, stage: StageConfig, config: Config) -> list[Prompt]:
    """The prompts of the stage, without the share of easy ones that it leaves out."""
    prompts = session.load_prompts(stage.data or config.data.train)
    earlier = session.earlier_stages("grpo")
    if not earlier or not config.grpo.drop_easy:
        return prompts
    easy = easy_prompts(session.stage_groups(earlier[-1]))
    dropped = {prompt for prompt in prompts if without_folders(prompt) in easy and _is_dropped(prompt, stage, config)}
    log.info("%s: %d of %d prompts had group accuracy 1 in %s; %d of them are left out", stage.name, len(easy),
             len(prompts), earlier[-1], len(dropped))
    kept = [prompt for prompt in prompts if prompt not in dropped]
    if not kept:
        raise DataError(f"stage {stage.name} would leave out all {len(prompts)} prompts; lower grpo.drop_easy")
    return kept


def _is_dropped(prompt: Prompt, stage: StageConfig, config: Config) -> bool:
    seed = derive_seed(config.seed, stage.name, "drop", prompt.prompt_id)
    return random.Random(seed).random() < config.grpo.drop_easy


def easy_prompts(groups: Sequence[RolloutGroup]) -> set[Prompt]:
    """Prompts whose latest group was answered right by every completion (VerIPO: group accuracy 1), without folders."""
    latest = {without_folders(group.prompt): group for group in groups}
    return {prompt for prompt, group in latest.items() if min(scores_of(group, "accuracy")) == 1}


def without_folders(prompt: Prompt) -> Prompt:
    """The prompt with the names of its media alone: data that moved to another disk hold the same questions."""
    def part(value: str | Media) -> str | Media:
        return value if isinstance(value, str) else replace(value, path=Path(value.path).name)

    return replace(prompt, messages=tuple(
        replace(message, parts=tuple(map(part, message.parts))) for message in prompt.messages))


# -- one step --------------------------------------------------------------------------------------------------------


class GrpoUpdate:
    """The updates of one stage; `ref` is the policy at its start, or None without a KL term.

    Args:
        dealer: shares the groups out to the ranks; None: one process.
        term: adds the gradient of preference pairs; None: there are none.
        seed: of the stage, for what an update draws.
    """

    def __init__(self, policy: Policy, optimizer: Optimizer, config: Config, ref: Reference | None,
                 dealer: Dealer | None = None, term: PairTerm | None = None, seed: int = 0) -> None:
        self.policy = policy
        self.optimizer = optimizer
        self.config = config
        self.loss = policy_loss_of(config)
        self.ref = ref
        self.dealer = dealer or Dealer.of(policy, ONE)
        self.world = self.dealer.world
        self.term = term
        self.choice = TokenChoice(policy, config.grpo, config.rollout.temperature, self.world, seed)

    def run(self, prompts: Sequence[LoadedPrompt | None], groups: Sequence[RolloutGroup],
            pairs: Sequence[PreferencePair] = ()) -> dict[str, float]:
        """`updates_per_rollout` optimizer steps over a rewarded rollout batch; returns their mean metrics.

        Args:
            prompts: of the groups; None where another rank has loaded it.
            groups: those of all ranks.
            pairs: what the verifier made of them.
        """
        share = self.config.plan.wordings * self.config.grpo.prompts_per_step // self.config.grpo.updates_per_rollout
        version = self.policy.version
        parts = [groups[start:start + share] for start in range(0, len(groups), share)]
        own = [self._own_rows(prompts, groups, range(start, min(start + share, len(groups))))
               for start in range(0, len(groups), share)]
        if self.config.grpo.importance or self.config.plan.pairing == "all":
            own[1:] = [self._with_old_logprobs(rows) for rows in own[1:]]
        rows: list[dict[str, float]] = []
        left = list(pairs)
        for number, (part, dealt) in enumerate(zip(parts, own, strict=True)):
            paired: tuple[list[PairRow], int] = ([], 0)
            if self.term is not None:
                places = range(number * share, number * share + len(part))
                paired = self.term.rows(prompts, groups, places, left)
                taken = {group.prompt.prompt_id for group in part}
                left = [pair for pair in left if pair.prompt_id not in taken]  # a prompt may come twice
            metrics = self._update(part, dealt, self.policy.version == version, paired)
            if metrics is not None:
                rows.append(metrics)
        return _means(rows) | {"updates": self.policy.version - version} | self.dealer.idle_share()

    def _own_rows(self, prompts: Sequence[LoadedPrompt | None], groups: Sequence[RolloutGroup], numbers: range
                  ) -> list[UpdateRow]:
        """The groups of an update that carry a signal and are dealt to this rank."""
        live = [number for number in numbers if has_signal(groups[number])]
        dealt = self.dealer.deal(prompts, groups, live) if live else {}
        return [UpdateRow(prompt, groups[number]) for number, prompt in dealt.items()]

    def _with_old_logprobs(self, rows: Sequence[UpdateRow]) -> list[UpdateRow]:
        """With the trainer's log-probs before the first update, where the loss compares them with the engine's."""
        known = logprobs_of(self.policy, rows, self.config.rollout.temperature, self.world)
        return [row._replace(old_logprobs=old) for row, old in zip(rows, known, strict=True)]

    def _update(self, part: Sequence[RolloutGroup], own: list[UpdateRow], fresh: bool,
                pairs: tuple[list[PairRow], int]) -> dict[str, float] | None:
        """One optimizer step over a part of the groups, and over its pairs, see `PairTerm.rows`; None when no group of
        it carries a signal, and it has no pairs."""
        if not any(map(has_signal, part)) and not pairs[1]:
            return None
        own = self.choice.marked(part, own, fresh)
        completions = [c for group in part for c in group.completions]
        counts = (len(completions), sum(len(c.token_ids) for c in completions))
        lengths = [packed_length(row.prompt.encoded, [c.token_ids for c in row.group.completions]) for row in own]
        metrics = {"loss": 0.0, "clip_share": 0.0, "kl": 0.0, "packed_tokens": float(sum(lengths)), "ratio_max": 0.0,
                   "parity_max": 0.0} | ({"entropy": 0.0} if self.loss.entropy_coef else {})
        for numbers in padded(micro_batches(lengths, self.config.optimizer.max_tokens), self.world):
            if numbers is None:
                self._idle()
                continue
            for name, value in self._backward([own[i] for i in numbers], counts, fresh).items():
                known = metrics.get(name, 0.0)
                metrics[name] = max(known, value) if name.endswith("_max") else known + value
        metrics = over_ranks(metrics, self.world)
        if self.term is not None:
            metrics |= self.term.backward(*pairs, len(part))
        stepped = step_policy(self.policy, self.optimizer)
        largest, routed = metrics.pop("parity_max"), router_shares(metrics)
        compared = fresh and self.config.plan.pairing == "own" and not self.config.model.lora.dropout
        engine = {"parity_max": largest} | routed if compared else {}
        if stepped["skipped_updates"]:
            return stepped | engine
        return metrics | engine | stepped

    def _idle(self) -> None:
        """The passes of a micro-batch, while another rank has one."""
        if self.ref is not None:
            with torch.no_grad():
                self.ref.idle()
        self.optimizer.backward(self.policy.idle())

    def _backward(self, rows: list[UpdateRow], counts: tuple[int, int], fresh: bool) -> dict[str, float]:
        """Forward and backward of one micro-batch; `counts`: completions and tokens of the whole update."""
        device = self.policy.device
        prompts = [row.prompt for row in rows]
        completions = [c for row in rows for c in row.group.completions]
        advantages = [value for row in rows for value in scores_of(row.group, "advantage")]
        batch = pack_rollouts([(row.prompt.encoded, row.group) for row in rows], self.policy.routers)
        rollout_logprobs = torch.tensor([v for c in completions for v in c.rollout_logprobs], device=device)
        ref_logprobs = None
        if self.ref is not None:
            with torch.no_grad():
                ref_logprobs = self.ref.completion_logprobs(
                    replace(batch, experts=None), self.ref.features_of(prompts),  # its routers choose for themselves
                    temperature=self.config.rollout.temperature)
        old_logprobs = None if fresh else joined([row.old_logprobs for row in rows], rollout_logprobs)
        output = self.policy.forward(batch, self.policy.features_of(prompts), PolicyLossInputs(
            self.loss, torch.tensor(advantages, device=device), old_logprobs, ref_logprobs,
            self.config.rollout.temperature, *counts,
            rollout_logprobs=rollout_logprobs if self.config.grpo.importance else None,
            tokens=token_inputs(rows, self.config.grpo.tokens)))
        loss = self.optimizer.backward(output.loss)
        clipped = output.metrics["clip_low_share"] + output.metrics["clip_high_share"]
        bonus = {"entropy": output.metrics["entropy"].item()} if self.loss.entropy_coef else {}
        bonus |= {name: output.metrics[name].item() for name in ROUTER_COUNTS if name in output.metrics}
        return bonus | {
            "loss": loss, "parity_max": parity(output.logprobs, rollout_logprobs), "clip_share": clipped.item(),
            "kl": output.metrics["kl"].item(), "ratio_max": output.metrics["ratio_max"].item()}


def _means(rows: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each metric over the updates that have it; of those that end in _max the largest."""
    means: dict[str, float] = {}
    for name in sorted({name for row in rows for name in row}):
        values = [row[name] for row in rows if name in row]
        means[name] = max(values) if name.endswith("_max") else sum(values) / len(values)
    return means


def policy_loss_of(config: Config) -> PolicyLoss:
    """The loss that a configuration describes."""
    return config.grpo.policy_loss(config.rollout.max_new_tokens)
