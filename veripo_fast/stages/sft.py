"""An SFT stage: a supervised warm start on demonstrations, before the loop explores.

A prompt is a group whose completions are all that is demonstrated of it, so several answers to one video share its
prefix. The loss is the mean negative log-likelihood of the learnt tokens of a step, whatever prompts, micro-batches and
ranks they lie on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from veripo_fast.config.schema import Config, StageConfig
from veripo_fast.data.demonstrations import Demonstrated, load_demonstrations
from veripo_fast.data.order import steps_of
from veripo_fast.distributed.balance import deal
from veripo_fast.distributed.shares import over_ranks, padded
from veripo_fast.errors import DataError
from veripo_fast.model.packing import micro_batches, pack, packed_length
from veripo_fast.model.policy import Policy
from veripo_fast.model.step import SupervisedLossInputs
from veripo_fast.model.targets import Target, target_of
from veripo_fast.run.seeds import derive_seed
from veripo_fast.stages.optimizer import Optimizer, step_policy
from veripo_fast.stages.session import Session
from veripo_fast.types import LoadedPrompt, Prompt


@dataclass(frozen=True)
class SftRow:
    """A loaded prompt with what is learnt of it."""

    prompt: LoadedPrompt
    targets: tuple[Target, ...]

    @property
    def packed(self) -> int:
        """Packed tokens."""
        return packed_length(self.prompt.encoded, [target.token_ids for target in self.targets])

    @property
    def learnt(self) -> int:
        """Tokens that enter the loss."""
        return sum(sum(target.learnt) for target in self.targets)


def run(session: Session, stage: StageConfig, config: Config) -> None:
    """Learn from demonstrations, from where the session stands."""
    shown, skipped = load_demonstrations(stage.data or config.data.train, config.data)
    session.books.skip_records(skipped)
    source = Source(session, shown, config)
    prompts = [one.prompt for one in shown]
    steps = steps_of(len(shown), config.sft.prompts_per_step, config.sft.epochs, config.sft.max_steps,
                     derive_seed(config.seed, stage.name, "order"))
    optimizer = session.stage_optimizer(config, config.sft.learning_rate, len(steps))
    for step in session.steps(stage, len(steps), optimizer):
        with session.phase("vision"):
            rows = source.load(steps[step])
        source.prefetch(steps[step + 1] if step + 1 < len(steps) else [])
        session.check_some_loaded(prompts, f"prompts of stage {stage.name}")
        with session.phase("update"):
            values = sft_update(session.policy, optimizer, rows, config)
        session.finish_step(values, loss=values.get("loss", float("nan")))


class Source:
    """The demonstrations of a stage by the number of their prompt."""

    def __init__(self, session: Session, shown: Sequence[Demonstrated], config: Config) -> None:
        self.session, self.shown = session, shown
        self.most_tokens = config.sft.max_completion_tokens
        self._refused: set[str] = set()

    def load(self, numbers: Sequence[int]) -> list[SftRow]:
        """This rank's share of a step, without what cannot be loaded or learnt."""
        own = self._share(numbers)
        loaded = {item.prompt: item for item in self.session.load([self.shown[number].prompt for number in own])}
        return [SftRow(loaded[prompt], own[number]) for number in own
                if (prompt := self.shown[number].prompt) in loaded]

    def prefetch(self, numbers: Sequence[int]) -> None:
        """Decode the media that come next."""
        self.session.loader.prefetch([self.shown[number].prompt for number in self._share(numbers)])

    def _share(self, numbers: Sequence[int]) -> dict[int, tuple[Target, ...]]:
        """Number -> targets, of the prompts of a step that this rank learns from; those without any are left out."""
        targets = {number: found for number in numbers if (found := self._targets(self.shown[number]))}
        costs = [sum(len(target.token_ids) for target in found) for found in targets.values()]
        numbered, world = list(targets), self.session.world
        return {numbered[index]: targets[numbered[index]] for index in sorted(deal(costs, world.size)[world.rank])}

    def _targets(self, one: Demonstrated) -> tuple[Target, ...]:
        """What of a prompt can be learnt; the rest is named in skipped.jsonl, once."""
        targets = []
        for number, demonstration in enumerate(one.demonstrations):
            try:
                target = target_of(self.session.policy.encoder, one.prompt, demonstration.turns)
                if len(target.token_ids) > self.most_tokens:
                    raise DataError(f"the answer to learn has {len(target.token_ids)} tokens; "
                                    f"sft.max_completion_tokens is {self.most_tokens}")
                targets.append(target)
            except DataError as error:
                self._refuse(one.prompt, number, str(error))
        return tuple(targets)

    def _refuse(self, prompt: Prompt, number: int, reason: str) -> None:
        name = f"{prompt.prompt_id}/{number}"
        if name not in self._refused:
            self._refused.add(name)
            if self.session.world.main:  # every rank sees all of them
                self.session.books.skip_prompt(prompt, reason)


def sft_update(policy: Policy, optimizer: Optimizer, rows: Sequence[SftRow], config: Config) -> dict[str, float]:
    """One optimizer step over the rows of this rank; returns metrics, nothing where no rank has a row."""
    world = optimizer.world
    prompts, answers, learnt, packed = (int(value) for value in world.total([
        len(rows), sum(len(row.targets) for row in rows), sum(row.learnt for row in rows),
        sum(row.packed for row in rows)]))
    if not learnt:
        return {}
    counts = {"prompts": float(prompts), "demonstrations": float(answers), "learnt_tokens": float(learnt),
              "packed_tokens": float(packed)}
    loss = 0.0
    for part in padded(micro_batches([row.packed for row in rows], config.optimizer.max_tokens), world):
        if part is None:
            optimizer.backward(policy.idle())
            continue
        loss += _backward(policy, optimizer, [rows[number] for number in part], learnt)
    loss = over_ranks({"loss": loss}, world)["loss"]
    stepped = step_policy(policy, optimizer)
    return counts | stepped if stepped["skipped_updates"] else {"loss": loss} | counts | stepped


def _backward(policy: Policy, optimizer: Optimizer, rows: Sequence[SftRow], learnt: int) -> float:
    """Forward and backward of one micro-batch; its share of the loss of a step of `learnt` tokens."""
    batch = pack([(row.prompt.encoded, [target.token_ids for target in row.targets]) for row in rows])
    mask = torch.tensor([bit for row in rows for target in row.targets for bit in target.learnt],
                        dtype=torch.float32, device=policy.device)
    output = policy.forward(batch, policy.features_of([row.prompt for row in rows]), SupervisedLossInputs(mask, learnt))
    return optimizer.backward(output.loss)
