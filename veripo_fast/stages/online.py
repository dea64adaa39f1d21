"""A preference term beside the policy loss (`grpo.dpo_rate`): the loop of VerIPO without its stages.

After the rewards of a step the verifier builds pairs from its rollouts. Each optimizer step adds dpo_rate times the
preference losses of the pairs of its own prompts, per prompt, to the policy loss. So prompts that all completions
answer right still teach through their consistency pairs. Pairs follow from the rollouts and a seed: nothing is kept
between steps.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from veripo_fast.config.schema import Config, StageConfig
from veripo_fast.distributed.shares import over_ranks, padded
from veripo_fast.model.packing import micro_batches
from veripo_fast.model.policy import Policy
from veripo_fast.model.step import PairLossInputs
from veripo_fast.reward.math_answers import math_budget
from veripo_fast.run.seeds import derive_seed
from veripo_fast.stages.dealer import Dealer
from veripo_fast.stages.dpo import preference_loss_of
from veripo_fast.stages.guard import ChosenGuard
from veripo_fast.stages.optimizer import Optimizer
from veripo_fast.stages.pair_rows import PairRow, pack_pairs, pair_length, pair_logprobs
from veripo_fast.stages.reference import Reference
from veripo_fast.stages.session import Session
from veripo_fast.stages.step_work import repeated_flops
from veripo_fast.types import Completion, LoadedPrompt, PreferencePair, RolloutGroup
from veripo_fast.verifier.store import judge_cache, write_pairs
from veripo_fast.verifier.verify import judged_by_all, make_judge, verify


class Harvest:
    """Builds the pairs of each step of a stage."""

    def __init__(self, session: Session, stage: StageConfig, config: Config) -> None:
        self.session, self.stage, self.config = session, stage, config
        self.judge = make_judge(config.verifier, judge_cache(session.run.verifier(stage.name), session.world))
        self._tried = False

    def pairs(self, groups: Sequence[RolloutGroup], step: int) -> list[PreferencePair]:
        """The pairs of the groups of a step; stored in the run folder. Collective.

        Raises:
            JudgeError: see `verify`; a judge is tried once, in the first step.
        """
        session, config, world = self.session, self.config.verifier, self.session.world
        encoder = session.policy.encoder
        if self._tried:
            config = replace(config, calibration="")
        with math_budget(self.config.reward.math_seconds_per_batch):
            result = verify(list(groups), config, self.judge, lambda text: len(encoder.encode_completion(text)),
                            encoder.encode_completion, encoder.eos_id,
                            derive_seed(self.config.seed, self.stage.name, "pairs", step), progress=False,
                            check=session.stop_if_asked_alone,
                            share=partial(judged_by_all, world, config.judge != "endpoint"))
        self._tried = True
        world.on_main(lambda: write_pairs(session.run.step_pairs(self.stage.name, step), result.pairs))
        return result.pairs


class PairTerm:
    """Adds the gradient of the pairs to that of the policy loss.

    Args:
        reference: frozen.
        step: the configuration of a step, with what the guard of the chosen side adds.
    """

    def __init__(self, policy: Policy, optimizer: Optimizer, reference: Reference, dealer: Dealer, guard: ChosenGuard,
                 seed: int) -> None:
        self.policy, self.optimizer, self.reference = policy, optimizer, reference
        self.dealer, self.guard, self.seed = dealer, guard, seed

    def rows(self, prompts: Sequence[LoadedPrompt | None], groups: Sequence[RolloutGroup], numbers: Sequence[int],
             pairs: Sequence[PreferencePair]) -> tuple[list[PairRow], int]:
        """This rank's pairs of one optimizer step, and how many all ranks have. Collective.

        Args:
            prompts, groups: of the rollout batch. numbers: places of those that the optimizer step takes.
        """
        place: dict[str, int] = {}
        for number in numbers:
            place.setdefault(groups[number].prompt.prompt_id, number)
        own = [pair for pair in pairs if pair.prompt_id in place]
        most = self.guard.dpo.pairs_per_step
        if len(own) > most:
            draw = random.Random(derive_seed(self.seed, "pairs", self.policy.version))
            own = [own[index] for index in sorted(draw.sample(range(len(own)), most))]
        by_group: dict[int, list[PreferencePair]] = {}
        for pair in own:
            by_group.setdefault(place[pair.prompt_id], []).append(pair)
        sides = [_sides(group, by_group.get(number, [])) for number, group in enumerate(groups)]
        dealt = self.dealer.deal(prompts, sides, sorted(by_group)) if by_group else {}
        return [PairRow(number, prompt, pair) for number, prompt in dealt.items()
                for pair in by_group[number]], len(own)

    def backward(self, rows: Sequence[PairRow], total: int, prompts: int) -> dict[str, float]:
        """Forward and backward of this rank's pairs; metrics are means over the `total` pairs of all ranks. Collective.

        Args:
            prompts: of the optimizer step. The loss is the sum over its pairs divided by them: a pair that is alone in
                its step weighs as much as one among many, and not as much as all prompts together.
        """
        if not total:
            return {"pairs": 0.0}
        config, policy = self.guard.of_step(), self.policy
        loss, weight = preference_loss_of(config), config.grpo.dpo_rate * total / prompts
        metrics: dict[str, float] = dict.fromkeys(_METRICS, 0.0)
        lengths = [pair_length(row) for row in rows]
        for part in padded(micro_batches(lengths, config.optimizer.max_tokens), self.dealer.world):
            if part is None:
                with torch.no_grad():
                    self.reference.idle()
                self.optimizer.backward(policy.idle())
                continue
            own = [rows[index] for index in part]
            with torch.no_grad():
                ref_logprobs = pair_logprobs(self.reference, own, loss)
            batch, mask = pack_pairs(own, policy.device)
            output = policy.forward(batch, policy.features_of([row.prompt for row in own]),
                                    PairLossInputs(loss, ref_logprobs, mask, total))
            assert output.loss is not None
            metrics["dpo_loss"] += self.optimizer.backward(weight * output.loss) / weight
            for name, value in output.metrics.items():
                metrics[name] += value.item()
        policy.passes.spare_flops += repeated_flops(
            self.dealer.cost, [(row.prompt.encoded, row.pair) for row in rows])
        return over_ranks(metrics, self.dealer.world) | {"pairs": float(total)}


_METRICS = ("dpo_loss", "preference_accuracy", "margin", "chosen_logprobs_mean", "rejected_logprobs_mean",
            "chosen_drift")


def _sides(group: RolloutGroup, pairs: Sequence[PreferencePair]) -> RolloutGroup:
    """The sides of a group's pairs as completions, by which a dealer knows what they cost."""
    ids = [side for pair in pairs for side in (pair.chosen_ids, pair.rejected_ids)]
    return RolloutGroup(group.prompt, [Completion(list(side), "", [], "stop", 0) for side in ids])


def families_of(pairs: Sequence[PreferencePair]) -> dict[str, Any]:
    """As a metric: the pairs of a step by family; nothing where there are none."""
    counts = Counter(pair.family for pair in pairs)
    return {"pairs_by_family": dict(sorted(counts.items()))} if counts else {}
