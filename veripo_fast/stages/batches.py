"""The groups of one GRPO step: sampled in one round, or in several until enough of them carry a signal.

What is sampled follows from the weights, the step's number and the place in the order of prompts, which the checkpoint
holds. So a resumed run samples the same rounds again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from veripo_fast.cache.contrasts import contrasted
from veripo_fast.config.schema import Config, StageConfig
from veripo_fast.data.order import PromptOrder
from veripo_fast.data.wordings import worded
from veripo_fast.errors import DataError
from veripo_fast.model.vision_text import VisionText
from veripo_fast.reward.groups import StreamedScores, advantages_of, has_signal, reward_groups
from veripo_fast.reward.score import scores_of
from veripo_fast.rollout.plans import pair_all
from veripo_fast.rollout.protocol import Sampling
from veripo_fast.rollout.store import write_groups
from veripo_fast.run.seeds import derive_seed
from veripo_fast.stages.frame_likeness import FrameLikeness
from veripo_fast.stages.moving_reference import tell_logprobs
from veripo_fast.stages.plan_metrics import contrast_metrics, round_metrics
from veripo_fast.stages.reference import Reference
from veripo_fast.stages.session import Session
from veripo_fast.types import LoadedPrompt, Prompt, RolloutGroup, Video


class Batch(NamedTuple):
    """What a step has sampled."""

    groups: list[RolloutGroup]
    """All of them, of all ranks, with rewards and advantages."""
    trained: list[RolloutGroup]
    """Those that the update takes, as it takes them."""
    prompts: list[LoadedPrompt | None]
    """Of `trained`; None where another rank has loaded it."""
    metrics: dict[str, Any]
    """Of what the section `plan` asks for; empty without."""


class Sampler:
    """Samples the steps of a stage.

    Args:
        prompts: of the stage. order: in which they are taken.
        reference: of the stage, for rewards that are told its log-probs.

    Raises:
        DataError: the plan needs what the prompts do not have.
    """

    def __init__(self, session: Session, prompts: Sequence[Prompt], order: PromptOrder, stage: StageConfig,
                 config: Config, reference: Reference | None = None) -> None:
        self.session, self.prompts, self.order, self.stage, self.config = session, prompts, order, stage, config
        self.plan = config.plan
        self.told_by = reference if config.reward.reference_logprobs else None
        self.likeness = _likeness(session, config)
        if self.plan.contrast != "none" and not any(_shows_video(prompt) for prompt in prompts):
            raise DataError(f"stage {stage.name} has plan.contrast {self.plan.contrast}, and none of its "
                            f"{len(prompts)} prompts shows a video")
        if self.plan.wordings > 1:
            worded(prompts, self.plan)

    def step(self, step: int) -> Batch:
        """The batch of a step; takes its prompts from the order. Collective."""
        wanted, before = self.config.grpo.prompts_per_step, self.session.loader.work
        count = self.plan.sampled_prompts(wanted)
        loaded: dict[int, LoadedPrompt] = {}
        groups: dict[int, RolloutGroup] = {}
        rounds = taken = contrast_runs = 0
        while True:
            batch = self._take(count)
            own, runs = self._round(batch, step, rounds, taken, loaded)
            contrast_runs += runs
            with self.session.phase("reward"):
                groups |= self.session.gathered(own)
                moments = reward_groups(list(groups.values()), self.config, moments=self.session.state.moments)
            rounds, taken = rounds + 1, taken + len(batch)
            live = [number for number, group in groups.items() if has_signal(group)]
            if self.plan.selects:
                for number in [number for number in loaded if number not in live]:
                    del loaded[number]  # its tower output makes room for that of the next round
            if not self.plan.selects or len(live) >= wanted or rounds > self.plan.refill:
                break
            count = self.plan.sampled_prompts(wanted - len(live))
        numbers = live[:wanted] if self.plan.selects else list(groups)
        everything = list(groups.values())
        metrics = contrast_metrics(everything, self.config, contrast_runs)
        if self.plan.selects or self.plan.contrast != "none":
            self.session.work.loaded(self.session.loader.work - before)  # of all that was loaded for the step
        if self.plan.selects:
            metrics |= round_metrics(rounds, len(everything), len(live), wanted)
            with self.session.phase("reward"):
                moments = reward_groups([groups[number] for number in numbers], self.config,  # a std is of these
                                        moments=self.session.state.moments)
        self.session.state.moments = moments
        trained = {number: groups[number] for number in numbers}
        if self.plan.pairing == "all":
            trained = self._paired(trained)
            metrics["prompts_without_pairs"] = (len(groups) - len(trained)) // self.plan.wordings
        self._keep_contrasts(everything, step)
        return Batch(everything, [self._entering(group) for group in trained.values()],
                     [loaded.get(number) for number in trained], metrics)

    def _take(self, count: int) -> list[Prompt]:
        """The next prompts of the order, with all their wordings."""
        state = self.session.state
        indices, state.position = self.order.take(state.position, count)
        return self._worded(indices)

    def _worded(self, indices: Sequence[int]) -> list[Prompt]:
        chosen = [self.prompts[index] for index in indices]
        return worded(chosen, self.plan) if self.plan.wordings > 1 else chosen

    def _round(self, batch: Sequence[Prompt], step: int, rounds: int, first: int, loaded: dict[int, LoadedPrompt]
               ) -> tuple[dict[int, RolloutGroup], int]:
        """This rank's scored groups of a round, and the tower's runs for their contrasts.

        Args:
            first: number of the round's first prompt in the step. loaded: gets its prompts by number.
        """
        session = self.session
        with session.phase("vision"):
            own = {first + place: item for place, item in session.load_share(batch).items()}
        if step + 1 < self.config.grpo.steps:
            count = self.plan.sampled_prompts(self.config.grpo.prompts_per_step)
            following, _ = self.order.take(session.state.position, count)
            session.prefetch_share(self._worded(following))
        session.check_some_loaded(self.prompts, f"prompts of stage {self.stage.name}")
        loaded |= own
        contrasts, runs = self._contrasts(own, step, rounds)
        items = list(own.values())
        with StreamedScores(self.config, items) as scores:
            def add(place: int, group: RolloutGroup) -> None:
                group.contrast = contrasts.get(numbers[place])
                if self.told_by is None and self.likeness is None:
                    scores.add(place, group)

            numbers = list(own)
            groups = session.generate(own, sampling(self.stage, self.config, step), add,
                                      session.run.rollouts(self.stage.name, step) if rounds == 0 else None)
            for number, group in groups.items():
                group.contrast = contrasts.get(number)  # those that were stored were not added
            if self.told_by is not None:
                with session.phase("reference"):
                    tell_logprobs(self.told_by, own, groups, self.config.rollout.temperature, session)
            with session.phase("reward"):
                if self.likeness is not None:
                    self.likeness.tell(own, groups)
                scores.wait(list(groups.values()))
        return groups, runs

    def _contrasts(self, own: dict[int, LoadedPrompt], step: int, rounds: int
                   ) -> tuple[dict[int, RolloutGroup], int]:
        """Completions of this rank's prompts that see the frames in another order, and the tower's runs for them."""
        if self.plan.contrast == "none":
            return {}, 0
        session, seed = self.session, derive_seed(self.config.seed, self.stage.name, "order of frames", step)
        with session.phase("vision"):
            before = session.loader.work
            shown = contrasted(session.loader, own, self.plan, seed)
            runs = (session.loader.work - before).tower_runs
        drawn = sampling(self.stage, self.config, step)
        drawn = replace(drawn, group_size=self.plan.contrast_size,
                        seed=derive_seed(self.config.seed, self.stage.name, "contrast", step))
        path = session.run.contrasts(self.stage.name, step) if rounds == 0 else None
        return session.generate(shown, drawn, kept=path, check=False), runs

    def _paired(self, groups: dict[int, RolloutGroup]) -> dict[int, RolloutGroup]:
        """Every completion under each wording of its prompt; prompts of which a wording could not be loaded are out.

        What is stored of a completion is its advantage under the wording that it was sampled with.
        """
        wordings = self.plan.wordings
        whole = [number for number in groups if all(
            number - number % wordings + other in groups for other in range(wordings))]
        kept = [groups[number] for number in whole]
        if not kept:
            return {}
        own = [scores_of(group, "advantage") for group in kept]
        owners = torch.tensor([place // wordings for place, group in enumerate(kept) for _ in group.completions])
        rewards = torch.tensor([value for group in kept for value in scores_of(group, "reward")], dtype=torch.float64)
        values = iter(advantages_of(rewards, owners, kept, self.config.grpo, {})[0])
        shared = [[next(values) for _ in group.completions] for group in kept]
        paired = pair_all(kept, wordings, own, shared)
        for group, alone, together in zip(kept, own, shared, strict=True):
            for completion, one, other in zip(group.completions, alone, together, strict=True):
                completion.advantage = one + other
        return dict(zip(whole, paired, strict=True))

    def _entering(self, group: RolloutGroup) -> RolloutGroup:
        """The group as it enters the loss."""
        if not self.plan.mask_unfinished:
            return group
        return replace(group, completions=[row for row in group.completions if row.finish_reason == "stop"])

    def _keep_contrasts(self, groups: Sequence[RolloutGroup], step: int) -> None:
        contrasts = [group.contrast for group in groups if group.contrast is not None]
        if contrasts and self.session.world.main:
            write_groups(self.session.run.contrasts(self.stage.name, step), contrasts, self.stage.name, step)


def sampling(stage: StageConfig, config: Config, step: int) -> Sampling:
    """How the completions of a step are drawn."""
    rollout = config.rollout
    return Sampling(rollout.group_size, rollout.temperature, rollout.max_new_tokens,
                    derive_seed(config.seed, stage.name, "rollout", step), rollout.top_p, rollout.top_k)


def _likeness(session: Session, config: Config) -> FrameLikeness | None:
    """Of `reward.vision_text`, in the type of the policy's weights and on its device; None without it."""
    if not config.reward.vision_text:
        return None
    model = VisionText(Path(config.reward.vision_text), config.model.dtype, session.policy.device)
    return FrameLikeness(model, session.loader)


def _shows_video(prompt: Prompt) -> bool:
    return any(isinstance(medium, Video) for medium in prompt.media)
