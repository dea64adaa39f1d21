"""Experiment trackers beside metrics.jsonl: trackio and Weights & Biases. What they get is what TensorBoard gets.

They are libraries of others that talk to a network, so whatever one raises costs its own records and never the run: it
is said once, and counted. metrics.jsonl stays the record of a run.
"""

from __future__ import annotations

import importlib.util
import io
import json
import logging
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Literal, Protocol

from veripo_fast.errors import ConfigError
from veripo_fast.run.atomic import atomic_write_text
from veripo_fast.run.jsonlines import parse_object

log = logging.getLogger(__name__)
SECONDS = 60
"""That W&B may take to begin and to end."""
X = "global_step"


class Library(Protocol):
    """An opened tracker."""

    def log(self, scalars: Mapping[str, float], global_step: int) -> None: ...

    def close(self) -> None: ...


class Tracker:
    """A tracker that may fail.

    Args:
        name: for people. start: opens it, with the first record.
    """

    def __init__(self, name: str, start: Callable[[], Library]) -> None:
        self.name, self._start = name, start
        self._library: Library | None = None
        self._broken = False
        self.missed = 0
        """Records that it did not take."""

    def log(self, scalars: Mapping[str, float], global_step: int) -> None:
        """Hand over a record, as far as it can be."""
        if self._broken:
            self.missed += 1
            return
        try:
            if self._library is None:
                self._library = self._start()
            self._library.log(scalars, global_step)
        except Exception as error:  # of whatever a library does about its network and its files
            self._fail(error)

    def close(self) -> None:
        """End it; a record behind that opens it again."""
        library, self._library = self._library, None
        try:
            if library is not None:
                library.close()
        except Exception as error:  # as above
            self._say(error)
        if self._broken:
            log.warning("%s missed %d records; metrics.jsonl has all of them", self.name, self.missed)

    def _fail(self, error: Exception) -> None:
        """One that could not begin is not tried again: each try may take a minute. One that has begun is."""
        if not self.missed:
            self._say(error)
        self.missed += 1
        self._broken = self._library is None

    def _say(self, error: Exception) -> None:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        log.warning("%s failed (%s); the run goes on without it, and metrics.jsonl has everything", self.name, reason)


def check_trackers(names: Sequence[str]) -> None:
    """ConfigError where a tracker's library is not installed."""
    for name in names:
        if name != "tensorboard" and importlib.util.find_spec(name) is None:
            raise ConfigError(f"train.trackers has {name}, which is not installed; pip install 'veripo-fast[{name}]'")


def trackers_of(names: Sequence[str], project: str, root: Path, config: Mapping[str, Any]) -> list[Tracker]:
    """Those that are asked for, TensorBoard aside; nothing is opened yet.

    Args:
        root: the run folder; its name is that of the run, and trackers.json in it keeps what a resume goes on with.
        config: as a tree of plain values.
    """
    starts: dict[str, Callable[[], Library]] = {
        "trackio": lambda: _Trackio(project, root, config), "wandb": lambda: _Wandb(project, root, config)}
    return [Tracker(name, starts[name]) for name in names if name != "tensorboard"]


def run_id(root: Path) -> str:
    """What a tracker knows the run by: the same in every process that works on it."""
    path = root / "trackers.json"
    known = (parse_object(path.read_bytes()) or {}).get("id") if path.is_file() else None
    if isinstance(known, str) and known:
        return known
    made = secrets.token_hex(4)
    atomic_write_text(path, json.dumps({"id": made}) + "\n")
    return made


class _Trackio:
    """Keeps its files in TRACKIO_DIR, by default in Hugging Face's cache."""

    def __init__(self, project: str, root: Path, config: Mapping[str, Any]) -> None:
        import trackio

        name = f"{root.resolve().name}-{run_id(root)}"
        with redirect_stdout(io.StringIO()):  # it prints how to open its dashboard
            self.run = trackio.init(project=project, name=name, config=dict(config), resume="allow", embed=False,
                                    auto_log_gpu=False, auto_log_cpu=False)

    def log(self, scalars: Mapping[str, float], global_step: int) -> None:
        own = {name: value for name, value in scalars.items() if name != "step"}  # a name that it keeps for its own
        self.run.log(own, step=global_step)

    def close(self) -> None:
        with redirect_stdout(io.StringIO()):
            self.run.finish()


class _Wandb:
    """Without a key it notes offline, into RUN/wandb, which `wandb sync` sends later."""

    def __init__(self, project: str, root: Path, config: Mapping[str, Any]) -> None:
        import wandb

        mode: Literal["offline"] | None = None
        if not os.environ.get("WANDB_MODE") and not wandb.api.api_key:
            log.warning("wandb has no key, so it notes offline: wandb sync sends what lies in %s", root / "wandb")
            mode = "offline"
        settings = wandb.Settings(init_timeout=SECONDS, finish_timeout=SECONDS, silent=True, console="off",
                                  disable_git=True, disable_code=True)
        self.run = wandb.init(project=project, name=root.resolve().name, id=run_id(root), resume="allow", dir=str(root),
                              config=dict(config), mode=mode, settings=settings)
        self.run.define_metric("*", step_metric=X)

    def log(self, scalars: Mapping[str, float], global_step: int) -> None:
        self.run.log({**scalars, X: global_step})  # not as its step, which may not go back: a resume's does

    def close(self) -> None:
        self.run.finish()
