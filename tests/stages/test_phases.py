"""A phase that fails gives its memory back, while somebody still holds the error: real runs, real failures."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import judges, runs
from veripo_fast.config.load import apply_overrides
from veripo_fast.config.schema import Config
from veripo_fast.errors import Interrupted
from veripo_fast.model.policy import Policy
from veripo_fast.rollout import local_texts
from veripo_fast.run.failure import forget
from veripo_fast.run.folder import RunDir
from veripo_fast.run.interrupt import StopRequests
from veripo_fast.run.metrics import MetricsLog
from veripo_fast.stages import dpo, grpo
from veripo_fast.stages import session as sessions
from veripo_fast.stages.session import Session
from veripo_fast.trainer import train

TOO_MUCH = 1 << 60
"""Bytes that no machine has: what fails is the allocation."""


@contextmanager
def session_of(config: Config) -> Iterator[Session]:
    run = RunDir(config.run_dir)
    run.root.mkdir(parents=True)
    with StopRequests(None) as requests, MetricsLog(run.metrics, run.tensorboard) as metrics:
        session = Session(config, run, metrics, requests)
        try:
            yield session
        finally:
            session.close()


class Failing:
    """Lets the last layer of a model ask for too much memory, and keeps weak references to what the layers made."""

    def __init__(self, layers: Any, when: Callable[[], bool] = lambda: True) -> None:
        self.made: list[weakref.ref[torch.Tensor]] = []
        self.failures = 0
        self.when = when
        for layer in layers[:-1]:
            layer.register_forward_hook(self._note)
        layers[-1].register_forward_hook(self._fail)

    def _note(self, layer: torch.nn.Module, inputs: Any, output: Any) -> None:
        if self.when():
            self.made.append(weakref.ref(output if isinstance(output, torch.Tensor) else output[0]))

    def _fail(self, layer: torch.nn.Module, inputs: Any, output: Any) -> None:
        if self.when():
            self.failures += 1
            torch.empty(TOO_MUCH, dtype=torch.uint8)

    def assert_gone(self) -> None:
        assert self.failures == 1 and self.made, "it did not fail where it was meant to"
        assert [reference() for reference in self.made if reference() is not None] == []


def layers_of(policy: Policy) -> Any:
    return policy.step.language_model.layers


def graphs() -> int:
    """Tensors that hold an autograd graph."""
    gc.collect()
    return sum(isinstance(thing, torch.Tensor) and thing.grad_fn is not None for thing in gc.get_objects())


def test_an_update_that_finds_no_memory(tmp_path: Path) -> None:
    """In the second micro-batch, so that gradients of the first are there."""
    config = runs.config(tmp_path / "run", optimizer__max_tokens=1)
    before = graphs()
    with session_of(config) as session:
        seen: list[bool] = []

        def second() -> bool:
            if not torch.is_grad_enabled():
                return False
            seen.append(True)
            return len(seen) > len(layers_of(session.policy))

        failing = Failing(layers_of(session.policy), second)
        with pytest.raises(RuntimeError, match="memory") as caught:
            grpo.run(session, config.stages[0], config)
        failing.assert_gone()
        assert all(parameter.grad is None for _, parameter in session.policy.parameters())
        assert graphs() == before and caught.value.__traceback__ is not None
        assert "in _fail" in caught.value.__notes__[0], "where it failed is still said"


def test_a_rollout_that_dies(tmp_path: Path) -> None:
    """The prompt's keys and values are gone, too."""
    config = runs.config(tmp_path / "run")
    with session_of(config) as session:
        failing = Failing(layers_of(session.policy))
        with pytest.raises(RuntimeError, match="memory") as caught:
            grpo.run(session, config.stages[0], config)
        failing.assert_gone()
        caches = [thing for thing in gc.get_objects() if type(thing).__name__ == "PromptCache"]
        assert caches == [] and caught.value is not None


def test_the_engine_sleeps_after_a_failure(tmp_path: Path) -> None:
    config = runs.config(tmp_path / "run")
    with session_of(config) as session:
        slept: list[bool] = []
        session.engine.sleep = lambda: slept.append(True)  # type: ignore[method-assign]
        with pytest.raises(ValueError, match="mine"), session.phase("update"):
            raise ValueError("mine")
        assert slept == [True] and session.work.seconds["update"] >= 0
        with session.phase("update"):
            pass
        assert slept == [True]


def test_a_judge_that_dies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its model goes with it."""
    config = runs.config(tmp_path / "run", verifier__judge="llm", verifier__llm_path=str(judges.judge_folder()))
    models: list[weakref.ref[Any]] = []
    found: list[Failing] = []
    make = local_texts.make_texts

    def failing(*arguments: Any) -> Any:
        engine: Any = make(*arguments)
        models.append(weakref.ref(engine.model))
        found.append(Failing(engine.model.model.layers))
        return engine

    monkeypatch.setattr(local_texts, "make_texts", failing)
    with session_of(config) as session:
        grpo.run(session, config.stages[0], config)
        session.finish_stage()
        with pytest.raises(RuntimeError, match="memory") as caught:
            dpo.run(session, config.stages[1], config)
        found[0].assert_gone()
        gc.collect()
        assert [model() for model in models] == [None] and caught.value is not None


def test_a_stage_that_ended_keeps_no_optimizer(tmp_path: Path) -> None:
    """The judge and the reference of the next stage get its room."""
    config = runs.config(tmp_path / "run", grpo__steps=1)
    with session_of(config) as session:
        grpo.run(session, config.stages[0], config)
        moments = [weakref.ref(tensor) for tensor in session.policy.backend.movable()]
        assert moments
        session.finish_stage()
        gc.collect()
        assert [reference() for reference in moments if reference() is not None] == []
        assert session.policy.backend.movable() == []


def test_who_keeps_the_error_of_a_run_keeps_no_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policies: list[weakref.ref[Policy]] = []
    load = sessions.load_policy

    def failing(*arguments: Any, **options: Any) -> Policy:
        policy = load(*arguments, **options)
        policies.append(weakref.ref(policy))
        Failing(layers_of(policy), torch.is_grad_enabled)
        return policy

    monkeypatch.setattr(sessions, "load_policy", failing)
    with pytest.raises(RuntimeError, match="memory") as caught:
        train(apply_overrides(runs.config(tmp_path / "run"), {"eval.at": "never"}))
    gc.collect()
    assert policies[0]() is None and caught.value.__traceback__ is not None


def test_errors_behind_an_error_are_forgotten_too() -> None:
    def fails(depth: int) -> None:
        tensor = torch.zeros(3)
        alive.append(weakref.ref(tensor))
        if depth:
            try:
                fails(depth - 1)
            except ValueError as error:
                raise Interrupted("stop", 1) from error
        raise ValueError

    alive: list[weakref.ref[torch.Tensor]] = []
    with pytest.raises(Interrupted) as caught:
        fails(1)
    assert all(reference() is not None for reference in alive) and len(alive) == 2
    forget(caught.value)
    assert all(reference() is None for reference in alive)
    assert caught.value.__traceback__ is not None and caught.value.__cause__ is not None
    for error in (caught.value, caught.value.__cause__):
        assert error.__notes__[0].startswith("It was raised in:\n") and "in fails" in error.__notes__[0]
    forget(caught.value)
    assert len(caught.value.__notes__) == 1, "nothing is left to cut"
