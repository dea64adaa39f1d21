"""A DPO stage: rollouts of an earlier stage -> verifier -> pairs -> update, step by step (arXiv 2305.18290).

A pair is a group of two completions that share their prompt. Reference log-probs are those of the policy at the start
of the stage, computed once and stored beside the pairs.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm import tqdm
from veripo_kernels import PreferenceLoss

from veripo_fast.config.schema import Config, StageConfig
from veripo_fast.distributed.balance import deal
from veripo_fast.distributed.shares import gathered, over_ranks, padded
from veripo_fast.distributed.world import ONE, World
from veripo_fast.errors import TrainingError
from veripo_fast.model.packing import micro_batches
from veripo_fast.model.policy import Policy
from veripo_fast.model.scorer import answer_scorer
from veripo_fast.model.step import PairLossInputs
from veripo_fast.reward.math_answers import math_budget
from veripo_fast.rollout.local_texts import LocalTexts
from veripo_fast.rollout.store import write_table
from veripo_fast.run.seeds import derive_seed
from veripo_fast.stages.guard import ChosenGuard
from veripo_fast.stages.matched_pairs import matched
from veripo_fast.stages.optimizer import Optimizer, step_policy
from veripo_fast.stages.pair_rows import PairRow, all_pair_logprobs, pack_pairs, pair_length, prompts_of
from veripo_fast.stages.session import Session
from veripo_fast.stages.step_work import repeated_flops
from veripo_fast.types import PreferencePair, Prompt, RolloutGroup
from veripo_fast.verifier.store import judge_cache, read_pairs, write_result
from veripo_fast.verifier.verify import judged_by_all, make_judge, verify

log = logging.getLogger(__name__)


def run(session: Session, stage: StageConfig, config: Config) -> None:
    """Verify the rollouts of an earlier stage, then align on the pairs, from where the session stands."""
    groups = session.stage_groups(stage.rollouts_from)
    with session.phase("verify"):
        pairs = verified_pairs(session, stage, config, groups)
    if not pairs:
        if session.world.main:
            log.warning("%s: the verifier built no pairs from %s, so there is nothing to align on (%s says why)",
                        stage.name, stage.rollouts_from, session.run.verifier(stage.name) / "account.json")
        return
    source = PairSource(session, pairs, {group.prompt.prompt_id: group.prompt for group in groups})
    with session.phase("reference"):
        ref_logprobs = stage_reference(session, stage, config, source)
    steps = usable_steps(step_order(len(pairs), config, derive_seed(config.seed, stage.name)), ref_logprobs)
    optimizer = session.stage_optimizer(config, config.dpo.learning_rate, len(steps))
    guard = ChosenGuard(stage.name, config, session.stage_records(stage.name), session.world)
    for step in session.steps(stage, len(steps), optimizer):
        with session.phase("vision"):
            rows = source.load(source.share(steps[step]))
        source.prefetch(source.share(steps[step + 1]) if step + 1 < len(steps) else [])
        with session.phase("update"):
            used = torch.tensor([row.number for row in rows], dtype=torch.long)
            values = dpo_update(session.policy, optimizer, rows, ref_logprobs[used], guard.of_step())
            values |= guard.observe(values)
            session.policy.passes.spare_flops += repeated_flops(
                session.dealer.cost, [(row.prompt.encoded, row.pair) for row in rows])
        session.finish_step(values, loss=values.get("loss", float("nan")))


class PairSource:
    """The pairs of a stage by number, with the prompts that their media come from."""

    def __init__(self, session: Session, pairs: Sequence[PreferencePair], prompts: dict[str, Prompt]) -> None:
        self.session = session
        self.pairs = pairs
        self.prompts = prompts

    def share(self, numbers: Sequence[int]) -> list[int]:
        """Those of a step that this rank trains on: the pairs of a prompt stay together, which is loaded once."""
        numbered: dict[str, list[int]] = {}
        for number in numbers:
            numbered.setdefault(self.pairs[number].prompt_id, []).append(number)
        prompts = list(numbered.values())
        costs = [sum(len(self.pairs[n].chosen_ids) + len(self.pairs[n].rejected_ids) for n in part) for part in prompts]
        world = self.session.world
        return sorted(number for index in deal(costs, world.size)[world.rank] for number in prompts[index])

    def load(self, numbers: Sequence[int]) -> list[PairRow]:
        """Pairs with their loaded prompts; those whose media are gone are left out."""
        wanted = {self.pairs[number].prompt_id: self.prompt_of(number) for number in numbers}
        loaded = {item.prompt.prompt_id: item for item in self.session.load(list(wanted.values()))}
        rows = []
        for number in numbers:
            pair = self.pairs[number]
            if pair.prompt_id in loaded:
                rows.append(PairRow(number, loaded[pair.prompt_id], pair))
        return rows

    def prefetch(self, numbers: Sequence[int]) -> None:
        """Decode the media of the pairs that come next."""
        self.session.loader.prefetch([self.prompt_of(number) for number in numbers])

    def prompt_of(self, number: int) -> Prompt:
        """The prompt of a pair."""
        return self.prompts[self.pairs[number].prompt_id]


# -- what a stage begins with ----------------------------------------------------------------------------------------


def verified_pairs(session: Session, stage: StageConfig, config: Config, groups: list[RolloutGroup]
                   ) -> list[PreferencePair]:
    """Pairs of the stage, from disk when the verifier has finished before."""
    folder = session.run.verifier(stage.name)
    if not session.world.on_main((folder / "pairs.parquet").is_file):
        session.world.on_main(lambda: (folder / "ref_logprobs.parquet").unlink(missing_ok=True))  # of other pairs
        encoder, world = session.policy.encoder, session.world
        judge = make_judge(config.verifier, judge_cache(folder, world),
                           lambda: answer_scorer(session.policy, session.loader.load_one),
                           LocalTexts(config, world.size > 1, session.engine.sleep))
        runs_the_policy = config.verifier.judge == "likelihood"
        weights = session.policy.backend.whole() if runs_the_policy else nullcontext()
        with math_budget(config.reward.math_seconds_per_batch), weights:
            result = verify(groups, config.verifier, judge, lambda text: len(encoder.encode_completion(text)),
                            encoder.encode_completion, encoder.eos_id,
                            derive_seed(config.seed, stage.name, "pairs"), check=session.stop_if_asked_alone,
                            share=partial(judged_by_all, world, config.verifier.judge != "endpoint"))
        world.on_main(lambda: write_result(folder, result))
    return session.world.on_main(lambda: read_pairs(folder / "pairs.parquet"))


def stage_reference(session: Session, stage: StageConfig, config: Config, source: PairSource) -> torch.Tensor:
    """Reference log-probs [pairs, 2] of the stage, from disk when they were computed before.

    Raises:
        TrainingError: not one of them is finite.
    """
    path = session.run.verifier(stage.name) / "ref_logprobs.parquet"
    with tqdm(total=len(source.pairs), desc=f"{stage.name} reference", unit="pair") as bar:

        def load(numbers: Sequence[int]) -> list[PairRow]:
            rows = source.load(source.share(numbers))
            end = numbers[-1] + 1
            source.prefetch(source.share(range(end, min(end + config.dpo.pairs_per_step, len(source.pairs)))))
            return rows

        ref_logprobs = reference_logprobs(session.policy, len(source.pairs), load, config, path, bar.update,
                                          session.world)
    if not ref_logprobs.isfinite().any():
        if session.world.main:
            path.unlink()  # a resume computes them again
        raise TrainingError(f"no pair of stage {stage.name} has a finite reference log-prob: its media are gone "
                            f"({session.run.skipped} says which), or the weights hold NaN or infinity")
    return ref_logprobs


@torch.no_grad()
def reference_logprobs(policy: Policy, pairs: int, load: Callable[[Sequence[int]], list[PairRow]], config: Config,
                       path: Path, advance: Callable[[int], object], world: World = ONE) -> torch.Tensor:
    """Log-probs [pairs, 2] of the policy at the start of the stage, read from `path` when it is there. Collective.

    A pair whose media cannot be loaded any more gets NaN.

    Args:
        load: gives this rank's share of some pairs.
    """
    known = world.on_main(lambda: pq.read_table(path).column("ref_logprobs").to_pylist() if path.is_file() else None)
    if known is not None:
        return torch.tensor(known)
    own: dict[int, list[float]] = {}
    for start in range(0, pairs, config.dpo.pairs_per_step):
        numbers = range(start, min(start + config.dpo.pairs_per_step, pairs))
        rows = load(numbers)
        sums = all_pair_logprobs(policy, rows, preference_loss_of(config), config.optimizer.max_tokens, world)
        own |= {row.number: value for row, value in zip(rows, sums.tolist(), strict=True)}
        advance(len(numbers))
    values = torch.full((pairs, 2), float("nan"))
    for number, value in gathered(own, world).items():
        values[number] = torch.tensor(value)
    world.on_main(lambda: write_table(pa.table({"ref_logprobs": values.tolist()}), path))
    return values


def step_order(pairs: int, config: Config, seed: int) -> list[list[int]]:
    """Pair numbers of every optimizer step, reshuffled each epoch; the last step of an epoch may be short."""
    steps: list[list[int]] = []
    for epoch in range(config.dpo.epochs):
        order = list(range(pairs))
        random.Random(derive_seed(seed, "pairs", epoch)).shuffle(order)
        size = config.dpo.pairs_per_step
        steps += [order[start:start + size] for start in range(0, pairs, size)]
    return steps[:config.dpo.max_steps]


def usable_steps(steps: list[list[int]], ref_logprobs: torch.Tensor) -> list[list[int]]:
    """The steps without the pairs that have no finite reference log-probs."""
    finite = ref_logprobs.isfinite().all(1)
    return [[number for number in numbers if finite[number]] for numbers in steps]


# -- one step --------------------------------------------------------------------------------------------------------


def preference_loss_of(config: Config) -> PreferenceLoss:
    """The loss that a configuration describes."""
    return config.dpo.preference_loss()


def dpo_update(policy: Policy, optimizer: Optimizer, rows: Sequence[PairRow], ref_logprobs: torch.Tensor,
               config: Config) -> dict[str, float]:
    """One optimizer step over pairs with their reference log-probs [B, 2]; returns metrics, means over the pairs.

    `rows` are those of this rank; nothing is returned where no rank has any.
    """
    world = optimizer.world
    total = int(world.total([len(rows)])[0])
    if not total:
        return {}
    rows, ref_logprobs = matched(policy, rows, ref_logprobs, config, world)
    metrics = {"loss": 0.0, "preference_accuracy": 0.0, "margin": 0.0, "chosen_logprobs_mean": 0.0,
               "rejected_logprobs_mean": 0.0, "chosen_drift": 0.0}
    for part in padded(micro_batches([pair_length(row) for row in rows], config.optimizer.max_tokens), world):
        if part is None:
            optimizer.backward(policy.idle())
            continue
        values = _backward(policy, optimizer, [rows[i] for i in part], ref_logprobs[part], config, total)
        metrics = {name: value + values[name] for name, value in metrics.items()}
    metrics = over_ranks(metrics, world)
    stepped = step_policy(policy, optimizer)
    if stepped["skipped_updates"]:
        return stepped | {"pairs": float(total)}
    return metrics | stepped | {"pairs": float(total)}


def _backward(policy: Policy, optimizer: Optimizer, rows: Sequence[PairRow], ref_logprobs: torch.Tensor,
              config: Config, total: int) -> dict[str, float]:
    """Forward and backward of one micro-batch; every metric is its share of the mean over `total` pairs.

    chosen_drift is policy minus reference log-prob of the chosen completion, per token: strongly negative means that
    DPO pushes both sides down and only widens the gap.
    """
    batch, mask = pack_pairs(rows, policy.device)
    output = policy.forward(batch, policy.features_of(prompts_of(rows)), PairLossInputs(
        preference_loss_of(config), ref_logprobs.to(policy.device), mask, total, config.dpo.weights == "wpo"))
    loss = optimizer.backward(output.loss)
    return {"loss": loss, **{name: value.item() for name, value in output.metrics.items()}}
