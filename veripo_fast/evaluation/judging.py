"""Who says whether answer and reasoning agree in a result, and whether pairs were chosen by the same judge.

A policy that was trained on the verdicts of a judge has learnt to please it. Its blind spots are then in the data and
in the number that reports on them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from veripo_fast.config.judges import judge_name, same_judge
from veripo_fast.config.load import apply_overrides
from veripo_fast.config.objectives import GrpoConfig, VerifierConfig
from veripo_fast.config.schema import Config, EvalConfig
from veripo_fast.distributed.world import World
from veripo_fast.rollout.local_texts import LocalTexts
from veripo_fast.types import RolloutGroup
from veripo_fast.verifier.judges import Judgement, judge_distinct, no_progress
from veripo_fast.verifier.store import judge_cache
from veripo_fast.verifier.verify import judged_by_all, make_judge

Judged: TypeAlias = Sequence[Sequence[Judgement]]
"""Per group and completion."""


def judging(config: Config, folder: Path, world: World, make_room: Callable[[], None]
            ) -> Callable[[list[RolloutGroup]], Judged]:
    """What the judge of `eval.judge` says of groups. Calls are collective.

    Args:
        folder: where a judge that reads keeps its verdicts.
        make_room: called before a judge is loaded into this process.

    Raises:
        JudgeError, CheckpointError: see `make_judge`.
    """
    settings = config.reporting_judge
    own = replace(config, verifier=settings, grpo=GrpoConfig(), eval=EvalConfig(), stages=())
    texts = LocalTexts(own, world.size > 1, make_room)
    judge = make_judge(settings, judge_cache(folder, world), texts=texts)
    return partial(judged_by_all, world, settings.judge != "endpoint",
                   judge=lambda groups: judge_distinct(judge, groups, no_progress))


def curators(config: Config) -> list[VerifierConfig]:
    """The judges that choose pairs in a run of this configuration."""
    found = []
    for stage in config.stages:
        changed = apply_overrides(config, stage.set)
        if stage.kind == "dpo" or (stage.kind == "grpo" and changed.grpo.dpo_rate):
            found.append(changed.verifier)
    return found


def judge_fields(config: Config) -> dict[str, Any]:
    """Of a result: the judge's name, and whether it also chose pairs; null where no stage of the configuration does."""
    settings, others = config.reporting_judge, curators(config)
    return {"judge": judge_name(settings),
            "judge_chose_pairs": any(same_judge(settings, other) for other in others) if others else None}
