"""What a run carries from stage to stage: policy, loader, engine, the state on disk, and the books of each step.

A stage asks the session for its steps, puts each piece of work into a `phase`, and hands the step's values to
`finish_step`. `phase` is the one place where time and memory are measured.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from veripo_fast.cache.loader import PromptLoader
from veripo_fast.config.schema import Config, StageConfig
from veripo_fast.distributed.choice import distribute
from veripo_fast.distributed.world import ONE, World
from veripo_fast.model.checkpoint_files import resolve_device, resolve_path
from veripo_fast.model.policy import in_own_memory, load_policy
from veripo_fast.rollout.engine import make_engine
from veripo_fast.rollout.parity import gate_of
from veripo_fast.rollout.protocol import OnGroup, Sampling
from veripo_fast.rollout.store import write_groups
from veripo_fast.run.checkpoint import checkpoint_path, latest_checkpoint
from veripo_fast.run.folder import RunDir
from veripo_fast.run.interrupt import Request, StopRequests
from veripo_fast.run.memory import HighWater
from veripo_fast.run.metrics import MetricsLog, read_records
from veripo_fast.schedule.timeline import span
from veripo_fast.stages.books import Books
from veripo_fast.stages.dealer import Dealer
from veripo_fast.stages.inside import Inside
from veripo_fast.stages.loading import Loading
from veripo_fast.stages.memory import MemoryBooks
from veripo_fast.stages.optimizer import Optimizer
from veripo_fast.stages.phases import Phases
from veripo_fast.stages.rollouts import stage_rollouts, stored_groups
from veripo_fast.stages.saves import Saves, State, name_best, read_state
from veripo_fast.stages.step_work import StepWork
from veripo_fast.stages.stops import end_all, request_of_any
from veripo_fast.types import LoadedPrompt, RolloutGroup


class Session(Loading):
    """One run, at the point where its newest checkpoint left it.

    Args:
        requests: whether the run was asked to stop.
        metrics: of rank 0, which alone writes into the run folder.
        allow_changes: what may differ from the run that is resumed (`start.CHANGES`).
    """

    def __init__(self, config: Config, run: RunDir, metrics: MetricsLog, requests: StopRequests,
                 allow_changes: Collection[str] = (), world: World = ONE) -> None:
        self.config = config
        self.run = run
        self.world = world
        self.metrics = metrics
        self.requests = requests
        self.allow_changes = allow_changes
        self.checkpoint = world.on_main(lambda: latest_checkpoint(run.checkpoints))
        self.state = read_state(self.checkpoint)
        self.books = Books(run, world, "media" in allow_changes, config.train.timeline, self.state.global_step)
        self._began_at = self.state.global_step
        if world.main:
            metrics.truncate_after(self.state.global_step)
            name_best(run.checkpoints, self.state)
        world.doing("loading the policy")
        self.high_water = HighWater(resolve_device(config.model.device))
        self.memory = MemoryBooks(run, self.high_water, world)
        with span("load"), self.high_water.phase("load"):
            self.policy = in_own_memory(load_policy(config.model, self.checkpoint, seed=config.seed))
        self.memory.loaded()
        self.policy.version = self.state.policy_version
        # checkpoints copy their processor files from here; the checkpoint that is resumed will be deleted
        self.policy.encoder.path = resolve_path(config.model.path)
        distribute(self.policy, config.distributed, world)
        self.dealer = Dealer.of(self.policy, world)
        self.loader = PromptLoader(self.policy, config.video, config.data.max_prompt_tokens, self.books.skip_prompt,
                                   config.cache)
        self.saves = Saves(run.checkpoints, self.policy, config.checkpoint, world)
        self.work = StepWork(self.policy, config.rollout, world)
        self._phases = Phases(self.loader, self.work, self.high_water, world, self._let_go)
        self._stage: StageConfig
        self._optimizer: Optimizer | None = None
        self._bar: Any = None
        self.engine = make_engine(config, self.policy)  # last: what is built must be closed
        self.gate = gate_of(config, self.policy, self.engine)
        self._checked_parity = False
        self.inside = Inside(config.eval)

    def close(self) -> None:
        """Stop the decoding threads, finish writing to cache and checkpoints, and end timeline and engine."""
        self.books.times.close()
        self.loader.close()
        try:
            self.saves.flush()
        finally:
            self.engine.close()

    # -- steps and phases -----------------------------------------------------------------------------------------

    def steps(self, stage: StageConfig, total: int, optimizer: Optimizer) -> Iterator[int]:
        """The numbers of the steps that are left of a stage; each ends with `finish_step`."""
        self._stage, self._optimizer = stage, optimizer
        with tqdm(total=total, initial=self.state.step, desc=stage.name, unit="step") as self._bar:
            while self.state.step < total and not self.inside.ends(self.state):
                self.work.begin(self.state.global_step)
                self.books.times.begin_step(stage.name, self.state.step)
                yield self.state.step
        if self.world.main and self.inside.ends(self.state):
            self.inside.say_end(self.state, stage.name, total)

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Measure a block: its wall time goes into the metrics of the step that runs or comes next. A block that fails
        gives its memory back.

        Of `vision`, the wait for videos is told apart as `decode`, and what was loaded is counted.
        """
        return self._phases.phase(name, self.state.global_step)

    def _let_go(self) -> None:
        """Drop what a failed phase has left behind: gradients, and an engine's key/value cache. Ranks that hold a
        policy together end together."""
        if not self.policy.backend.distributed:
            self.policy.backend.discard()
        with suppress(RuntimeError):  # an engine or a GPU that is broken: the first error says why
            self.engine.sleep()

    def generate(self, loaded: Mapping[int, LoadedPrompt], sampling: Sampling, on_group: OnGroup | None = None,
                 kept: Path | None = None, *, check: bool = True) -> dict[int, RolloutGroup]:
        """Sample groups of this rank's share, or take those `kept` in a file; `check` log-probs when it is time.

        Raises:
            TrainingError: the engine failed twice, or its log-probs are not the trainer's.
        """
        prompts = list(loaded.values())
        replayed = check and self.config.rollout.router_replay  # what is not checked is not trained on either
        groups, sampled = self._stored(loaded, sampling, kept, replayed), False
        if groups is None:
            if self._optimizer is not None and self._optimizer.config.offload:
                with self.phase("offload"):
                    self.work.counts["offloaded_bytes"] = float(self._optimizer.offload())
            with self.phase("sync"):
                self.work.counts |= self.engine.sync()
            with self.phase("rollout"):
                groups = self.engine.generate(prompts, sampling, on_group, numbers=list(loaded))
            self.engine.sleep()
            self.work.sampled(prompts, groups)
            sampled = True
        due = self.state.global_step % self.config.rollout.parity_every == 0
        if check and self.gate is not None and (due or not self._checked_parity):
            with self.phase("parity"), self.policy.passes.spare():
                parity = self.gate.check(prompts, groups, sampling)
            self._checked_parity |= sampled
            if due:
                self.work.counts["engine_parity_max"] = parity.largest
        if self.engine.rebuilds:
            self.work.counts["engine_rebuilds"] = float(self.engine.rebuilds)
        return dict(zip(loaded, groups, strict=True))

    def _stored(self, loaded: Mapping[int, LoadedPrompt], sampling: Sampling, path: Path | None, replayed: bool
                ) -> list[RolloutGroup] | None:
        """The finished groups of the first step behind the checkpoint, which a stop kept from their update."""
        if path is None or self.state.global_step != self._began_at or self.allow_changes:
            return None
        return stored_groups(path, loaded, sampling, self.policy.version, self.world, replayed=replayed)

    def finish_step(self, values: Mapping[str, Any], **shown: float) -> None:
        """Count the step, write its metrics, then save if it is time or the run was asked to stop.

        In this order a run killed in between resumes before the step and writes the same line again. `shown` stands
        behind the progress bar.
        """
        self.state.step += 1
        self.state.global_step += 1
        stage = self._stage
        self.saves.check()
        work = self.work.metrics() | self._evaluated()
        self.books.write(stage.name, self.state.global_step)
        if self.world.main:
            self.metrics.log({"global_step": self.state.global_step, "stage": stage.name, "kind": stage.kind,
                              "step": self.state.step - 1, **values, **work})
        self.memory.step_done(self.loader.cached_bytes)
        self._bar.set_postfix({name: f"{value:.3f}" for name, value in shown.items()}, refresh=False)
        self._bar.update(1)
        if self.state.step == self._bar.total or self.inside.ends(self.state):
            return
        request = request_of_any(self.requests, self.world)
        best = self.state.best == checkpoint_path(self.run.checkpoints, self.state.global_step).name
        if self.state.global_step % self.config.checkpoint.every == 0 or best or request:
            with self.phase("checkpoint"):
                self.save(self._optimizer)
        self.requests.step_done()
        self._stop(request)

    def _evaluated(self) -> dict[str, float]:
        """Scores of an evaluation that is due. Its time is that of the next step, as a checkpoint's is."""
        if not self.inside.due(self.state):
            return {}
        if self._optimizer is not None and self._optimizer.config.offload:
            self._optimizer.offload()
        with self.phase("eval"):
            return self.inside.scores(self.state, self._stage.name, checkpoint_path(
                self.run.checkpoints, self.state.global_step).name)

    def stop_if_asked(self) -> None:
        """End all ranks, see `end_all`, when any of them was asked to stop. Collective."""
        self._stop(request_of_any(self.requests, self.world))

    def stop_if_asked_alone(self) -> None:
        """The same where ranks do different things: of several ranks none stops there."""
        if self.world.size == 1:
            self.requests.stop()

    def _stop(self, request: Request | None) -> None:
        if request is not None:
            self.saves.flush()  # while the ranks still watch each other
            end_all(request, self.world)

    # -- stages ---------------------------------------------------------------------------------------------------

    def stage_optimizer(self, config: Config, peak: float, total_steps: int) -> Optimizer:
        """A new optimizer, or the saved one inside a stage."""
        optimizer = Optimizer(self.policy.backend, config.optimizer, peak, total_steps, self.world)
        if self.state.step and self.checkpoint is not None:
            optimizer.load(self.checkpoint / "trainer" / "optimizer")
        elif not self.state.step:
            self.state.stage_start = self.checkpoint.name if self.checkpoint else ""
        return optimizer

    def stage_start(self) -> Path | None:
        """The checkpoint that the current stage began from; None: the model of the configuration."""
        return self.run.checkpoints / self.state.stage_start if self.state.stage_start else None

    def stage_records(self, name: str) -> list[dict[str, Any]]:
        """The metrics of a stage's finished steps, on all ranks. Collective."""
        return self.world.on_main(lambda: [row for row in read_records(self.run.metrics) if row["stage"] == name])

    def earlier_stages(self, kind: str) -> list[str]:
        """Names of the finished stages of a kind."""
        return [stage.name for stage in self.config.stages[:self.state.stage] if stage.kind == kind]

    def finish_stage(self) -> None:
        """Count the stage and write a checkpoint of its end."""
        stage = self.config.stages[self.state.stage]
        self.state = State(stage=self.state.stage + 1, global_step=self.state.global_step, best=self.state.best,
                           best_score=self.state.best_score)
        with span("checkpoint"), self.high_water.phase("checkpoint"):
            self.save(None)
        self.memory.stage_done(stage.name, self._optimizer)
        if self._optimizer is not None:
            self._optimizer.backend.end()
        self._optimizer = None
        self.books.write(stage.name, self.state.global_step)

    # -- what is on disk ------------------------------------------------------------------------------------------

    def keep(self, groups: Sequence[RolloutGroup]) -> None:
        """Store the groups of the step that runs."""
        if self.world.main:
            stage, step = self._stage.name, self.state.step
            write_groups(self.run.rollouts(stage, step), groups, stage, step, experts=True)

    def stage_groups(self, name: str) -> list[RolloutGroup]:
        """All rollouts of an earlier stage, in the order they were made. Raises DataError when some are gone."""
        return self.world.on_main(
            lambda: stage_rollouts(self.run, self.config, name, "rollouts" in self.allow_changes))

    def save(self, optimizer: Optimizer | None) -> None:
        """Write a checkpoint of the state as it is; without optimizer, and waiting for it, at the end of a stage."""
        self.state.policy_version = self.policy.version
        self.world.doing(f"writing the checkpoint of step {self.state.global_step}")
        needed = [self.run.checkpoints / name for name in (self.state.stage_start, self.state.best) if name]
        self.checkpoint = self.saves.save(self.state, optimizer, needed, wait=optimizer is None)
