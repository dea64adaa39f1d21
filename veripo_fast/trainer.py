"""The loop: GRPO explores, the verifier turns its rollouts into pairs, DPO aligns on them, and it repeats.

Each stage continues from the policy of the one before. Everything random comes from derived seeds, and the state is
written after whole steps, so a run killed anywhere resumes to bitwise the same metrics (same machine and thread count).
"""

from __future__ import annotations

import json
import logging
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from tqdm import tqdm

from veripo_fast.cache.loader import PromptLoader
from veripo_fast.config.load import apply_overrides, load_config, to_yaml
from veripo_fast.config.schema import Config, StageConfig
from veripo_fast.data.order import PromptOrder
from veripo_fast.data.prompts import load_prompts
from veripo_fast.data.skipped import Skipped, SkippedLog
from veripo_fast.errors import ConfigError, DataError, TrainingError
from veripo_fast.evaluation.evaluate import evaluate, summary
from veripo_fast.model.checkpoint_files import resolve_path
from veripo_fast.model.policy import Policy, load_policy, save_policy
from veripo_fast.model.scorer import answer_scorer
from veripo_fast.reward.groups import reward_groups
from veripo_fast.rollout.protocol import Sampling
from veripo_fast.rollout.store import read_groups, write_groups
from veripo_fast.rollout.torch_engine import TorchEngine
from veripo_fast.run.atomic import atomic_write_text
from veripo_fast.run.checkpoint import latest_checkpoint, save_checkpoint
from veripo_fast.run.folder import RunDir
from veripo_fast.run.metrics import MetricsLog, read_records
from veripo_fast.run.seeds import derive_seed
from veripo_fast.stages.dpo import PairRow, dpo_update, reference_logprobs, step_order
from veripo_fast.stages.grpo import GrpoUpdate, rollout_metrics
from veripo_fast.stages.optimizer import Optimizer
from veripo_fast.types import PreferencePair, Prompt, RolloutGroup
from veripo_fast.verifier import make_judge, read_pairs, verify, write_result

log = logging.getLogger(__name__)


@dataclass
class State:
    """Where a run stands; with the weights and the optimizer this is all that resuming needs."""

    stage: int = 0
    """Number of finished stages."""
    step: int = 0
    """Finished steps of the current stage."""
    global_step: int = 0
    """Finished steps of the run."""
    position: int = 0
    """Prompts taken from the data order of the current stage."""
    policy_version: int = 0
    """Optimizer steps behind the weights."""
    stage_start: str = ""
    """Name of the checkpoint that the current stage began from; empty: the model of the configuration."""


def train(config: Config, resume: bool = False) -> None:
    """Run all stages of a configuration, or go on where its run folder stopped.

    Raises:
        UserError: anything a user can mend. KeyboardInterrupt: after Ctrl-C, with the state saved.
    """
    run = _open_run(config, resume)
    torch.set_num_threads(config.threads or torch.get_num_threads())
    loaded = False
    try:
        with _InterruptFlag() as flag, MetricsLog(run.metrics, run.tensorboard) as metrics:
            trainer = Trainer(config, run, metrics, flag.check)
            loaded = True
            try:
                trainer.run_stages()
            finally:
                trainer.loader.close()
    finally:
        if not loaded and not resume:
            _empty(run.root)  # it was free: the next attempt shall find it so


class Trainer:
    """One run: a policy, its loader and engine, and the state that moves through the stages."""

    def __init__(self, config: Config, run: RunDir, metrics: MetricsLog, check_interrupt: Callable[[], bool]) -> None:
        self.config = config
        self.run = run
        self.metrics = metrics
        self.interrupted = check_interrupt
        self.skipped = SkippedLog(run.skipped)
        self.carried: dict[str, float] = {}
        """Seconds spent between two steps (verifier, reference pass, checkpoint); the next step reports them."""
        self.checkpoint = latest_checkpoint(run.checkpoints)
        self.state = _read_state(self.checkpoint)
        metrics.truncate_after(self.state.global_step)
        self.policy = _in_own_memory(load_policy(config.model, self.checkpoint))
        self.policy.version = self.state.policy_version
        # checkpoints copy their processor files from here; the checkpoint that is resumed will be deleted
        self.policy.encoder.path = resolve_path(config.model.path)
        self.engine = TorchEngine(self.policy)
        self.loader = PromptLoader(self.policy, config.video, config.data.max_prompt_tokens, self.skipped_prompt,
                                   config.cache)

    def run_stages(self) -> None:
        """Every stage that is not finished, with evaluations between them."""
        if not self.state.step:  # inside a stage the policy is no longer the one that this evaluation is about
            self.evaluate_stage(self.state.stage)
        while self.state.stage < len(self.config.stages):
            stage = self.config.stages[self.state.stage]
            config = apply_overrides(self.config, stage.set)
            run_stage = self.grpo_stage if stage.kind == "grpo" else self.dpo_stage
            run_stage(stage, config)
            self.state = State(stage=self.state.stage + 1, global_step=self.state.global_step,
                               policy_version=self.policy.version)
            self.save(None)
            self.stop_if_interrupted()
            self.evaluate_stage(self.state.stage)

    # -- GRPO ---------------------------------------------------------------------------------------------------

    def grpo_stage(self, stage: StageConfig, config: Config) -> None:
        """Explore: rollout -> reward -> advantage -> update, `grpo.steps` times."""
        prompts = self.stage_prompts(stage, config)
        order = PromptOrder(len(prompts), derive_seed(config.seed, stage.name, "order"))
        optimizer = self.stage_optimizer(config, config.grpo.learning_rate,
                                         config.grpo.steps * config.grpo.updates_per_rollout)
        update = GrpoUpdate(self.policy, optimizer, config, self.stage_reference() if config.grpo.kl_coef else None)
        with tqdm(total=config.grpo.steps, initial=self.state.step, desc=stage.name, unit="step") as bar:
            while self.state.step < config.grpo.steps:
                seconds: dict[str, float] = {}
                indices, self.state.position = order.take(self.state.position, config.grpo.prompts_per_step)
                with self.video_work(seconds) as work:
                    loaded = self.loader.load([prompts[i] for i in indices])
                if self.state.step + 1 < config.grpo.steps:
                    following, _ = order.take(self.state.position, config.grpo.prompts_per_step)
                    self.loader.prefetch([prompts[i] for i in following])
                if not loaded and all(prompt in self.loader.bad for prompt in prompts):
                    raise DataError(f"none of the {len(prompts)} prompts of stage {stage.name} could be loaded; "
                                    f"{self.run.skipped} says why for each")
                with timed(seconds, "rollout"):
                    groups = self.engine.generate(loaded, self.sampling(stage, config))
                with timed(seconds, "reward"):
                    reward_groups(groups, config)
                    write_groups(self.run.rollouts(stage.name, self.state.step), groups, stage.name, self.state.step)
                with timed(seconds, "update"):
                    values = rollout_metrics(groups) | update.run(loaded, groups) | work
                bar.set_postfix(reward=f"{values['reward_mean']:.3f}", accuracy=f"{values['accuracy_mean']:.3f}")
                self.finish_step(stage, values, seconds, optimizer, bar)

    def sampling(self, stage: StageConfig, config: Config) -> Sampling:
        rollout = config.rollout
        seed = derive_seed(config.seed, stage.name, "rollout", self.state.step)
        return Sampling(rollout.group_size, rollout.temperature, rollout.max_new_tokens, seed, rollout.top_p,
                        rollout.top_k)

    def stage_prompts(self, stage: StageConfig, config: Config) -> list[Prompt]:
        """The prompts of a GRPO stage, without the share of easy ones that it leaves out."""
        prompts = self.load(stage.data or config.data.train)
        names = [s.name for s in self.config.stages[:self.state.stage] if s.kind == "grpo"]
        if not names or not config.grpo.drop_easy:
            return prompts
        easy = easy_prompts(self.stage_groups(names[-1]))
        dropped = {p for p in prompts if p in easy and random.Random(derive_seed(
            config.seed, stage.name, "drop", p.prompt_id)).random() < config.grpo.drop_easy}
        log.info("%s: %d of %d prompts had group accuracy 1 in %s; %d of them are left out", stage.name, len(easy),
                 len(prompts), names[-1], len(dropped))
        kept = [p for p in prompts if p not in dropped]
        if not kept:
            raise DataError(f"stage {stage.name} would leave out all {len(prompts)} prompts; lower grpo.drop_easy")
        return kept

    def stage_reference(self) -> Policy:
        """The policy at the start of the stage, frozen, for the KL term."""
        start = self.run.checkpoints / self.state.stage_start if self.state.stage_start else None
        reference = load_policy(self.config.model, start)
        reference.model.requires_grad_(False)
        return reference

    # -- verifier and DPO -----------------------------------------------------------------------------------------

    def dpo_stage(self, stage: StageConfig, config: Config) -> None:
        """Verify the rollouts of an earlier stage, then align on the pairs."""
        groups = self.stage_groups(stage.rollouts_from)
        with timed(self.carried, "verify"):
            pairs = self.verified_pairs(stage, config, groups)
        if not pairs:
            log.warning("%s: the verifier built no pairs from %s, so there is nothing to align on (%s says why)",
                        stage.name, stage.rollouts_from, self.run.verifier(stage.name) / "account.json")
            return
        prompts = {group.prompt.prompt_id: group.prompt for group in groups}
        load = partial(self.load_pairs, prompts)
        place = {id(pair): number for number, pair in enumerate(pairs)}

        def load_in_order(part: Sequence[PreferencePair]) -> list[PairRow]:
            end = place[id(part[-1])] + 1
            return load(part, pairs[end:end + config.dpo.pairs_per_step])

        path = self.run.verifier(stage.name) / "ref_logprobs.parquet"
        with timed(self.carried, "reference"), tqdm(
                total=len(pairs), desc=f"{stage.name} reference", unit="pair") as bar:
            ref_logprobs = reference_logprobs(self.policy, pairs, load_in_order, config, path, bar.update)
        if not ref_logprobs.isfinite().any():
            path.unlink()  # a resume computes them again
            raise TrainingError(f"no pair of stage {stage.name} has a finite reference log-prob: its media are gone "
                                f"({self.run.skipped} says which), or the weights hold NaN or infinity")
        steps = [[pairs[n] for n in numbers if ref_logprobs[n].isfinite().all()]
                 for numbers in step_order(len(pairs), config, derive_seed(config.seed, stage.name))]
        optimizer = self.stage_optimizer(config, config.dpo.learning_rate, len(steps))
        with tqdm(total=len(steps), initial=self.state.step, desc=stage.name, unit="step") as bar:
            for chosen, following in zip(steps[self.state.step:], [*steps[self.state.step + 1:], []], strict=False):
                seconds: dict[str, float] = {}
                with self.video_work(seconds) as work:
                    rows = load(chosen, following)
                with timed(seconds, "update"):
                    used = torch.tensor([place[id(pair)] for _, pair in rows], dtype=torch.long)
                    values = dpo_update(self.policy, optimizer, rows, ref_logprobs[used], config) if rows else {}
                    values |= work
                if rows:
                    bar.set_postfix(loss=f"{values.get('loss', float('nan')):.3f}")
                self.finish_step(stage, values, seconds, optimizer, bar)

    def verified_pairs(self, stage: StageConfig, config: Config, groups: list[RolloutGroup]) -> list[PreferencePair]:
        """Pairs of the stage, from disk when the verifier has finished before."""
        folder = self.run.verifier(stage.name)
        if not (folder / "pairs.parquet").is_file():
            (folder / "ref_logprobs.parquet").unlink(missing_ok=True)  # of other pairs
            encoder = self.policy.encoder
            judge = make_judge(config.verifier, folder / "judge_cache.jsonl",
                               lambda: answer_scorer(self.policy, self.loader.load_one))
            result = verify(groups, config.verifier, judge, lambda text: len(encoder.encode_completion(text)),
                            encoder.encode_completion, encoder.eos_id, derive_seed(config.seed, stage.name, "pairs"))
            write_result(folder, result)
        return read_pairs(folder / "pairs.parquet")

    def load_pairs(self, prompts: dict[str, Prompt], pairs: Sequence[PreferencePair],
                   following: Sequence[PreferencePair]) -> list[PairRow]:
        """Pairs with their loaded prompts; those whose media are gone are left out. `following` come next."""
        wanted = {pair.prompt_id: prompts[pair.prompt_id] for pair in pairs}
        loaded = {item.prompt.prompt_id: item for item in self.loader.load(list(wanted.values()))}
        self.loader.prefetch([prompts[pair.prompt_id] for pair in following])
        return [(loaded[pair.prompt_id], pair) for pair in pairs if pair.prompt_id in loaded]

    def stage_groups(self, name: str) -> list[RolloutGroup]:
        """All rollouts of an earlier stage, in the order they were made."""
        return [group for path in self.run.rollout_files(name) for group in read_groups(path)]

    # -- common -------------------------------------------------------------------------------------------------

    def stage_optimizer(self, config: Config, peak: float, total_steps: int) -> Optimizer:
        """A new optimizer, or the saved one inside a stage."""
        optimizer = Optimizer(self.policy.parameters(), config.optimizer, peak, total_steps)
        if self.state.step and self.checkpoint is not None:
            optimizer.load(self.checkpoint / "trainer" / "optimizer.pt")
        elif not self.state.step:
            self.state.stage_start = self.checkpoint.name if self.checkpoint else ""
        return optimizer

    def finish_step(self, stage: StageConfig, values: dict[str, float], seconds: dict[str, float],
                    optimizer: Optimizer, bar: Any) -> None:
        """Count the step, write its metrics, then save if it is time or Ctrl-C was pressed.

        In this order a run killed in between resumes before the step and writes the same line again.
        """
        self.state.step += 1
        self.state.global_step += 1
        self.state.policy_version = self.policy.version
        self.metrics.log({"global_step": self.state.global_step, "stage": stage.name, "kind": stage.kind,
                          "step": self.state.step - 1, **values, "seconds": seconds | self.carried})
        self.carried = {}
        bar.update(1)
        if self.state.step == bar.total:
            return
        if self.state.global_step % self.config.checkpoint.every == 0 or self.interrupted():
            with timed(self.carried, "checkpoint"):
                self.save(optimizer)
        self.stop_if_interrupted()

    def save(self, optimizer: Optimizer | None) -> None:
        """Write a checkpoint of the state as it is; without optimizer at the end of a stage."""

        def write(folder: Path) -> None:
            save_policy(self.policy, folder)
            (folder / "trainer").mkdir()
            (folder / "trainer" / "state.json").write_text(json.dumps(asdict(self.state), indent=2) + "\n")
            if optimizer is not None:
                optimizer.save(folder / "trainer" / "optimizer.pt")

        protect = [self.run.checkpoints / self.state.stage_start] if self.state.stage_start else []
        self.checkpoint = save_checkpoint(self.run.checkpoints, self.state.global_step, write,
                                          self.config.checkpoint.keep, protect)

    def evaluate_stage(self, finished: int) -> None:
        """Evaluate the policy after `finished` stages, unless it is recorded already or not wanted."""
        if not self.config.data.eval or not self._evaluation_due(finished):
            return
        names = ["start", *(stage.name for stage in self.config.stages[:finished])]
        done = [record for record in read_records(self.run.evals) if record["stage"] in names]
        if any(record["stage"] == names[-1] for record in done):
            return
        records = evaluate(self.engine, self.loader, self.load(self.config.data.eval), self.config, stage=names[-1],
                           rows=partial(self.run.eval_rows, names[-1]), check=self.stop_if_interrupted)
        atomic_write_text(self.run.evals, "".join(json.dumps(record) + "\n" for record in [*done, *records]))
        for record in records:
            tqdm.write(summary(record))

    def _evaluation_due(self, finished: int) -> bool:
        at = self.config.eval.at
        return at == "stages" or (at == "ends" and finished in (0, len(self.config.stages)))

    @contextmanager
    def video_work(self, seconds: dict[str, float]) -> Iterator[dict[str, float]]:
        """Time a block that loads prompts, waiting for video apart from the tower; gives its counts at its end."""
        before, counts = self.loader.work, dict[str, float]()
        with timed(seconds, "vision"):
            yield counts
        work = self.loader.work - before
        seconds["vision"] -= work.wait_seconds
        seconds["decode"] = work.wait_seconds
        counts.update(video_decodes=work.video_decodes, tower_runs=work.tower_runs, cache_hits=work.cache_hits,
                      decoder_fallbacks=work.decoder_fallbacks)

    def load(self, files: tuple[str, ...]) -> list[Prompt]:
        """Prompts of data files; records that cannot be used are named in skipped.jsonl."""
        prompts, skipped = load_prompts(files, self.config.data)
        for item in skipped:
            self.skipped.add(item)
        return prompts

    def skipped_prompt(self, prompt: Prompt, reason: str) -> None:
        paths = ", ".join(medium.path for medium in prompt.media)
        self.skipped.add(Skipped(record=prompt.prompt_id, path=paths, reason=reason))

    def stop_if_interrupted(self) -> None:
        if self.interrupted():
            raise KeyboardInterrupt


def easy_prompts(groups: Sequence[RolloutGroup]) -> set[Prompt]:
    """Prompts whose latest group was answered right by every completion (VerIPO: group accuracy 1)."""
    latest = {group.prompt: group for group in groups}
    return {prompt for prompt, group in latest.items() if all(c.accuracy == 1 for c in group.completions)}


@contextmanager
def timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Add the wall time of a block to `seconds[phase]`."""
    started = time.perf_counter()
    try:
        yield
    finally:
        seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - started


class _InterruptFlag:
    """First Ctrl-C: finish the step, save, leave. Second: leave at once."""

    def __enter__(self) -> _InterruptFlag:
        self.raised = False
        self.previous = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGINT, self.previous)

    def check(self) -> bool:
        return self.raised

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.raised:
            raise KeyboardInterrupt
        self.raised = True
        log.warning("Ctrl-C: finishing this step, then saving; press again to leave at once")


def _open_run(config: Config, resume: bool) -> RunDir:
    """Make the run folder, or find the one to resume."""
    run = RunDir(config.run_dir)
    if not config.stages:
        raise ConfigError("stages is empty: the configuration says nothing to train")
    if resume:
        if not run.config.is_file():
            raise ConfigError(f"{run.root} is no run to resume: it has no config.yaml")
        _warn_of_changes(load_config(run.config), config)
    elif not _is_free(run.root):
        raise ConfigError(f"run_dir {run.root} exists already; resume it with --resume or name another folder")
    if not resolve_path(config.model.path).is_dir():
        raise ConfigError(f"model.path {config.model.path} is not a folder")
    if any(stage.kind == "grpo" and not stage.data for stage in config.stages) and not config.data.train:
        raise ConfigError("data.train names no files")
    for file in (*config.data.train, *config.data.eval, *(file for stage in config.stages for file in stage.data)):
        if not Path(file).exists():
            raise DataError(f"data file {file} does not exist")
    run.root.mkdir(parents=True, exist_ok=True)
    atomic_write_text(run.config, to_yaml(config))
    return run


def _is_free(root: Path) -> bool:
    """Whether nothing is there, or at most what a kill leaves before config.yaml has its name."""
    return not root.exists() or (root.is_dir() and all(entry.name.startswith(".tmp-") for entry in root.iterdir()))


def _empty(root: Path) -> None:
    """Remove what is in a folder, and the folder unless it is a mount point or a link."""
    for entry in root.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)
    with suppress(OSError):
        root.rmdir()


def _warn_of_changes(before: Config, now: Config) -> None:
    for item in fields(Config):
        if item.name != "cache" and getattr(before, item.name) != getattr(now, item.name):  # a cache changes no result
            log.warning("%s differs from the run that is resumed: the result is no longer that of one configuration",
                        item.name)


def _in_own_memory(policy: Policy) -> Policy:
    """Copy the weights out of the mapped file, where they lie at any offset: a matmul of one row depends on alignment
    (1e-7 in greedy log-probs between a resumed run and an uninterrupted one), and the file may be deleted."""
    for parameter in policy.model.parameters():
        parameter.data = parameter.data.clone()
    return policy


def _read_state(checkpoint: Path | None) -> State:
    if checkpoint is None:
        return State()
    return State(**json.loads((checkpoint / "trainer" / "state.json").read_text()))
