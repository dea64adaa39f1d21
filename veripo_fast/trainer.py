"""The loop: GRPO explores, the verifier turns its rollouts into pairs, DPO aligns on them, and it repeats.

Each stage continues from the policy of the one before. Everything random comes from derived seeds, and the state is
written after whole steps, so a run killed anywhere resumes to bitwise the same metrics (same machine and thread count).

The whole GRPO step reads in this order: stages/grpo.py (a stage), stages/batches.py (what it samples),
stages/session.py (what it stands on), model/step.py (what is computed).
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from tqdm import tqdm

from veripo_fast.config.describe import to_tree
from veripo_fast.config.load import apply_overrides
from veripo_fast.config.schema import Config
from veripo_fast.distributed.world import joined
from veripo_fast.evaluation.evaluate import evaluate, summary
from veripo_fast.model.checkpoint_files import resolve_path
from veripo_fast.run.atomic import atomic_write_text
from veripo_fast.run.card import write_card
from veripo_fast.run.failure import forget
from veripo_fast.run.folder import RunDir
from veripo_fast.run.interrupt import StopRequests
from veripo_fast.run.jsonlines import dump_objects
from veripo_fast.run.metrics import MetricsLog, read_records
from veripo_fast.run.trackers import trackers_of
from veripo_fast.schedule.timeline import span
from veripo_fast.stages import dpo, grpo, sft
from veripo_fast.stages.inside import Score
from veripo_fast.stages.memory import EVALUATION, check_memory
from veripo_fast.stages.session import Session
from veripo_fast.stages.start import check_ranks, check_run, claimed
from veripo_fast.types import Prompt

STAGES = {"grpo": grpo.run, "dpo": dpo.run, "sft": sft.run}


def train(config: Config, resume: bool = False, allow_changes: Collection[str] = ()) -> None:
    """Run all stages of a configuration, or go on where its run folder stopped.

    Args:
        allow_changes: what may differ from the run that is resumed: code, config, data, media, model, rollouts.

    Raises:
        UserError: anything a user can mend.
        Interrupted: after Ctrl-C, SIGTERM, SIGHUP or train.max_hours, with the state saved; of several ranks on the
            first, PeerFailed on others.
    """
    try:
        _train(config, resume, allow_changes)
    except BaseException as error:
        forget(error)  # else who keeps the error, as a notebook does, keeps the policy
        raise


def _train(config: Config, resume: bool, allow_changes: Collection[str]) -> None:
    with joined(config.distributed.timeout_seconds, config.model.device) as world, ExitStack() as folder:
        run = world.on_main(lambda: check_run(config, resume, allow_changes))
        inputs = check_ranks(config, world)
        plan = check_memory(config, world)
        torch.set_num_threads(config.threads or torch.get_num_threads())
        began = world.agreed(lambda: folder.enter_context(
            claimed(run, config, inputs, resume, allow_changes, plan)) if world.main else None)
        with (StopRequests(config.train.max_hours, say=world.main) as requests,
              metrics_log(config, run) as metrics):
            session = Session(config, run, metrics, requests, allow_changes, world)
            world.begun()
            if began is not None:
                began()
            session.inside.score = scorer_inside(session)
            try:
                run_stages(session)
                world.leave()  # before the engine is closed, and its groups with it
            finally:
                session.close()


def metrics_log(config: Config, run: RunDir) -> MetricsLog:
    """What writes the metrics, with the trackers that are asked for."""
    wanted = config.train.trackers
    return MetricsLog(run.metrics, run.tensorboard if "tensorboard" in wanted else None,
                      trackers_of(wanted, config.train.project, run.root, to_tree(config)))


def run_stages(session: Session) -> None:
    """Every stage that is not finished, with evaluations between them; the last checkpoint gets its model card."""
    stages = session.config.stages
    if not session.state.step:  # inside a stage the policy is no longer the one that this evaluation is about
        evaluate_stage(session)
    while session.state.stage < len(stages):
        stage = stages[session.state.stage]
        STAGES[stage.kind](session, stage, apply_overrides(session.config, stage.set))
        session.finish_stage()
        session.stop_if_asked()
        evaluate_stage(session)
    if session.world.main:
        write_card(session.run, session.config, resolve_path(session.config.model.path))


def evaluate_stage(session: Session) -> None:
    """Evaluate the policy after the finished stages, unless it is recorded already or not wanted."""
    config, run, finished = session.config, session.run, session.state.stage
    if not config.data.eval or not _evaluation_due(config, finished):
        return
    names = ["start", *(stage.name for stage in config.stages[:finished])]
    records = session.world.on_main(lambda: read_records(run.evals))
    done = [record for record in records if record["stage"] in names]
    if any(record["stage"] == names[-1] for record in done):
        return
    session.world.doing(f"evaluating after {names[-1]}")
    prompts = session.load_prompts(config.data.eval)[:config.eval.limit]
    session.world.on_main(lambda: session.books.media.check(prompts))
    with span("eval"), session.high_water.phase(EVALUATION):
        records = evaluate(session.engine, session.loader, prompts, config, stage=names[-1],
                           rows=partial(run.eval_rows, names[-1]), check=session.stop_if_asked, gate=session.gate,
                           world=session.world)
        session.engine.sleep()
    session.memory.evaluated(names[-1])
    session.books.write(names[-1], session.state.global_step)
    if session.world.main:
        atomic_write_text(run.evals, dump_objects([*done, *records]))
        for record in records:
            tqdm.write(summary(record))


def scorer_inside(session: Session) -> Score:
    """What evaluates the policy inside of a stage: greedily, on the first `eval.every_limit` prompts."""
    config, run = session.config, session.run
    inside = replace(config, eval=replace(config.eval, samples=0, limit=config.eval.every_limit))

    @cache
    def prompts() -> list[Prompt]:
        return session.load_prompts(config.data.eval)[:config.eval.every_limit]

    def score(stage: str, step: int) -> dict[str, Any]:
        session.world.on_main(lambda: session.books.media.check(prompts()))
        [record] = evaluate(session.engine, session.loader, prompts(), inside, stage=stage,
                            rows=partial(run.eval_rows, f"{stage}_step_{step:06d}"), world=session.world)
        session.engine.sleep()
        return record

    return score


def _evaluation_due(config: Config, finished: int) -> bool:
    at = config.eval.at
    return at == "stages" or (at == "ends" and finished in (0, len(config.stages)))
