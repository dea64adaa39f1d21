"""The Rollout-Aware Verifier as one step: judge, check, pair."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from tqdm import tqdm

from veripo_fast.config.objectives import VerifierConfig
from veripo_fast.distributed.shares import gathered
from veripo_fast.distributed.world import World
from veripo_fast.errors import JudgeError
from veripo_fast.types import PreferencePair, RolloutGroup, Verdict
from veripo_fast.verifier.account import Account
from veripo_fast.verifier.calibration import Calibration, Item, check_judge, groups_of, read_set
from veripo_fast.verifier.checks import check_group
from veripo_fast.verifier.judge_likelihood import AnswerLogprobs, LikelihoodJudge
from veripo_fast.verifier.judge_rules import RulesJudge
from veripo_fast.verifier.judges import Judge, Judgement, judge_distinct
from veripo_fast.verifier.pairs import Encode, build_pairs

if TYPE_CHECKING:
    from veripo_fast.rollout.local_texts import LocalTexts

_PAUSE_SECONDS = 0.2

Judging: TypeAlias = Callable[[list[RolloutGroup]], list[list[Judgement]]]
Share: TypeAlias = Callable[[list[RolloutGroup], Judging], list[list[Judgement]]]


@dataclass
class VerifierResult:
    """What the verifier says of some groups."""

    verdicts: list[list[Verdict]]
    """Per group and completion, in the order of the groups that were verified."""
    pairs: list[PreferencePair]
    account: Account


def judged_by_all(world: World, spread: bool, groups: list[RolloutGroup], judge: Judging) -> list[list[Judgement]]:
    """What a judge says of each group. Collective.

    Args:
        spread: whether each rank judges a share; else rank 0 judges all.
    """
    if not spread:
        return _judged_on_main(world, groups, judge)
    own = range(world.rank, len(groups), world.size)
    return list(gathered(dict(zip(own, judge([groups[number] for number in own]), strict=True)), world).values())


def _judged_on_main(world: World, groups: list[RolloutGroup], judge: Judging) -> list[list[Judgement]]:
    """Rank 0 judges in a thread; the others hear of it again and again, because an exchange may not take hours."""
    with ThreadPoolExecutor(1) as pool:
        work = pool.submit(judge, groups) if world.main else None
        while not world.broadcast(work is None or work.done()):
            time.sleep(_PAUSE_SECONDS)
        return world.on_main(lambda: work.result() if work else [])


def make_judge(config: VerifierConfig, cache_path: Path | None = None,
               scorer: Callable[[], AnswerLogprobs] | None = None, texts: LocalTexts | None = None) -> Judge:
    """The judge that the configuration names.

    Args:
        cache_path: JSONL file in which the judges that read keep their verdicts.
        scorer: makes the frozen model's scorer; called for the likelihood judge alone.
        texts: makes the engine of the judge `llm`.
    """
    if config.judge == "llm":
        from veripo_fast.verifier.judge_llm import LlmJudge

        if texts is None:
            raise JudgeError("judge `llm` needs an engine to run its model")
        return LlmJudge(config, texts, cache_path)
    if config.judge == "endpoint":
        from veripo_fast.verifier.judge_endpoint import EndpointJudge

        return EndpointJudge(config, cache_path)
    if config.judge == "likelihood":
        if scorer is None:
            raise JudgeError("judge `likelihood` needs a model to score answers with")
        return LikelihoodJudge(scorer(), config.likelihood_margin, config.likelihood_floor)
    return RulesJudge()


def calibrate(items: Sequence[Item], judging: Judging) -> Calibration:
    """What a judge says of labelled items."""
    groups, where = groups_of(items)
    judged = judging(groups)
    return Calibration(tuple(items), tuple(judged[number][index] for number, index in where))


def verify(groups: list[RolloutGroup], config: VerifierConfig, judge: Judge, count_tokens: Callable[[str], int],
           encode: Encode, eos_id: int, seed: int, progress: bool = True,
           check: Callable[[], None] = lambda: None, share: Share | None = None) -> VerifierResult:
    """Judge every distinct completion once, run the checks, build the pairs.

    Args:
        groups: scored rollouts; a prompt may occur in several groups, its pairs are capped together.
        count_tokens: tokens of a text, for the length check.
        encode: text to token ids without special tokens, for assembled sides of pairs.
        progress: show a bar when standard error is a terminal.
        check: called again and again while a judge works; what it raises ends the judging, verdicts kept so far stay.
        share: judges groups together with other ranks, which all verify the same ones.

    Raises:
        JudgeError: the judge cannot give (enough) verdicts, or fails the trial that the configuration asks for.
    """
    if config.calibration:
        def tried(some: list[RolloutGroup]) -> list[list[Judgement]]:
            return judge_distinct(judge, some, lambda count: check())

        trial = calibrate(read_set(config.calibration), tried if share is None else lambda some: share(some, tried))
        check_judge(config.judge, trial, config)
    total = sum(len(group.completions) for group in groups)
    with tqdm(total=total, desc="verifier", unit="completion", disable=None if progress else True) as bar:
        def advance(count: int) -> None:
            bar.update(count)
            check()

        def judged(some: list[RolloutGroup]) -> list[list[Judgement]]:
            return judge_distinct(judge, some, advance)

        judgements = judged(groups) if share is None else share(groups, judged)
    reasons = Counter(judgement.why for row in judgements for judgement in row if judgement.consistent is None)
    verdicts = [check_group(group, row, config, count_tokens) for group, row in zip(groups, judgements, strict=True)]
    pairs, account = build_pairs(groups, verdicts, config, encode, eos_id, seed)
    account.no_verdict.update(reasons)
    return VerifierResult(verdicts, pairs, account)
