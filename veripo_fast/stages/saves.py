"""Checkpoints of a run: the state, the policy, the optimizer. On rank 0 the files, on the others their shares.

An asynchronous one is copied to host memory first; a thread writes the copy while training goes on. It gets its name
when it is whole, so a crash in between leaves the last one.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from veripo_fast.config.schema import CheckpointConfig
from veripo_fast.distributed.state_files import on_host, write_state
from veripo_fast.distributed.world import World
from veripo_fast.errors import CheckpointError
from veripo_fast.model.policy import Policy, save_policy, weights_on_host
from veripo_fast.run.atomic import atomic_write_text
from veripo_fast.run.checkpoint import checkpoint_path, save_checkpoint
from veripo_fast.schedule.timeline import FOR_CHECKPOINT, span
from veripo_fast.stages.optimizer import Optimizer


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
    """Optimizer steps behind the weights, when the state was written."""
    stage_start: str = ""
    """Name of the checkpoint that the current stage began from; empty: the model of the configuration."""
    moments: dict[str, list[float]] = field(default_factory=dict)
    """What the stage's advantage remembers of each task; empty for most."""
    best: str = ""
    """Name of the checkpoint of the best evaluation inside of a stage (`eval.keep_best`); empty: none yet."""
    best_score: float | None = None
    """Its metric."""
    stage_best: float | None = None
    """The best metric of the current stage."""
    stale: int = 0
    """Evaluations in a row since, which were no better."""


def read_state(checkpoint: Path | None) -> State:
    """The state in a checkpoint, or that of a new run. Raises CheckpointError."""
    if checkpoint is None:
        return State()
    path = checkpoint / "trainer" / "state.json"
    try:
        return State(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); another version of veripo-fast may have written it: "
                              "inputs.json in the run folder says which") from error


def name_best(root: Path, state: State) -> None:
    """Let the file `best` name the best checkpoint that there is. A run that is resumed does it too: a crash may have
    come right behind the checkpoint, or the newest ones may be damaged."""
    path = root / "best"
    if not state.best or not (root / state.best).is_dir():
        return
    if not path.is_file() or path.read_text("utf-8", errors="replace").strip() != state.best:
        atomic_write_text(path, state.best + "\n")


@dataclass(frozen=True)
class _Content:
    """What a checkpoint is made of."""

    state: State
    weights: dict[str, torch.Tensor] | None
    """Whole ones, on rank 0; None: the policy's own."""
    optimizer: dict[str, Any] | None
    """This rank's share; None at the end of a stage."""
    protect: Sequence[Path]
    """Earlier checkpoints that are still needed."""


class Saves:
    """Writes the checkpoints of a run, one at a time. Its methods are collective.

    Args:
        root: the folder of all of them.
    """

    def __init__(self, root: Path, policy: Policy, config: CheckpointConfig, world: World) -> None:
        self.root, self.policy, self.config, self.world = root, policy, config, world
        self._apart = world.apart() if config.asynchronous else world
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, state: State, optimizer: Optimizer | None, protect: Sequence[Path], *, wait: bool) -> Path:
        """Write a checkpoint of the state as it is; returns its folder, which may not be there yet unless `wait`.

        Args:
            optimizer: None at the end of a stage.

        Raises:
            CheckpointError: this one, or the one before, cannot be written.
        """
        self.flush()
        distributed = self.policy.backend.distributed
        behind = self.config.asynchronous and not wait
        weights = weights_on_host(self.policy, self.world.main) if distributed or behind else None
        content = _Content(replace(state), weights, None if optimizer is None else optimizer.state(), protect)
        if behind:
            content = replace(content, optimizer=on_host(content.optimizer))
            self._thread = threading.Thread(target=self._write_behind, args=(content,), name="checkpoint")
            self._thread.start()
        else:
            self._write(content, self.world)
        return checkpoint_path(self.root, state.global_step)

    def check(self) -> None:
        """Raise what went wrong with the checkpoint that is being written, if anything has."""
        if self._error is not None:
            raise self._error

    def flush(self) -> None:
        """Wait for the checkpoint that is being written. Raises what went wrong with it."""
        if self._thread is None:
            return
        self.check()
        with span(FOR_CHECKPOINT):
            self._thread.join()
        self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _write_behind(self, content: _Content) -> None:
        try:
            with span("write checkpoint"):
                self._write(content, self._apart)
        except Exception as error:  # of whatever storage does; it belongs to the thread that trains
            self._error = error

    def _write(self, content: _Content, world: World) -> None:
        if world.main:
            save_checkpoint(self.root, content.state.global_step, partial(self._fill, content, world),
                            self.config.keep, content.protect)
            name_best(self.root, content.state)
        elif content.optimizer is not None:
            write_state(world.broadcast(Path()), content.optimizer, world)
        world.barrier()  # what others read next is whole

    def _fill(self, content: _Content, world: World, folder: Path) -> None:
        save_policy(self.policy, folder, content.weights)
        (folder / "trainer").mkdir()
        (folder / "trainer" / "state.json").write_text(json.dumps(asdict(content.state), indent=2) + "\n")
        if content.optimizer is not None:
            write_state(world.broadcast(folder / "trainer" / "optimizer"), content.optimizer, world)
