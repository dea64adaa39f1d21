"""What is put into vLLM's model, the trainer's temperature and positions, and what is put around a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch

from veripo_fast.errors import UserError
from veripo_fast.rollout.engine_input import PositionTable
from veripo_fast.rollout.protocol import OnGroup
from veripo_fast.rollout.watchdog import Watchdog
from veripo_fast.types import RolloutGroup


class EngineFailure(RuntimeError):
    """The engine stopped working in the middle of a batch."""


class CallerError(Exception):
    """What a caller's own function raised in the middle of a batch; its cause is that error."""


def call(on_group: OnGroup, number: int, group: RolloutGroup) -> None:
    """Give a finished group to the caller."""
    try:
        on_group(number, group)
    except Exception as error:  # the caller's, not the engine's
        raise CallerError from error


@contextmanager
def guarded(abort: Callable[[], None], watchdog: Watchdog | None = None) -> Iterator[None]:
    """Whatever vLLM raises in the block becomes an EngineFailure, after `abort` has taken its requests out of the
    engine. Ctrl-C, what the user can mend, and what a caller's function raised pass."""
    try:
        with torch.random.fork_rng(devices=()), watchdog.watching() if watchdog else nullcontext():
            yield
    except BaseException as error:
        with suppress(Exception):  # an engine that failed may not abort either
            abort()
        if isinstance(error, CallerError) and error.__cause__ is not None:
            raise error.__cause__ from None
        if isinstance(error, (UserError, EngineFailure)) or not isinstance(error, Exception):
            raise
        raise EngineFailure(f"{type(error).__name__}: {error}") from error


class Hooks:
    """What is put into a model, and how often it was called."""

    def __init__(self) -> None:
        self.temperature = 1.0
        self.positions = PositionTable()
        self.calls = {"compute_logits": 0, "get_mrope_input_positions": 0}

    def install(self, model: Any) -> None:
        """Replace `compute_logits` and `get_mrope_input_positions` of a model."""
        plain = model.compute_logits

        def compute_logits(*arguments: Any, **named: Any) -> torch.Tensor | None:
            self.calls["compute_logits"] += 1
            return self._divided(plain(*arguments, **named))

        model.compute_logits = compute_logits
        model.get_mrope_input_positions = self._positions_of

    def _divided(self, logits: torch.Tensor | None) -> torch.Tensor | None:
        """Logits float32 over the temperature; None where another tensor-parallel rank has them."""
        if logits is None or self.temperature == 1:
            return None if logits is None else logits.float()
        return logits.float().div_(self.temperature)

    def _positions_of(self, input_tokens: Sequence[int], mm_features: Sequence[Any]) -> tuple[torch.Tensor, int]:
        self.calls["get_mrope_input_positions"] += 1
        media = sorted(mm_features, key=lambda feature: feature.mm_position.offset)
        found = self.positions.find(list(input_tokens), [feature.identifier for feature in media])
        if found is None:
            raise EngineFailure(f"it asks for positions of {len(input_tokens)} tokens that it was not given")
        return found


def let_seeds_work_on_cpu(runner: Any) -> None:
    """Let a prompt with a seed be prefilled in several steps.

    Each step draws a token that is thrown away, and the V1 runner then moves the generator back by its offset, which a
    generator of a CPU does not have. The draws stay in the sequence; how many there are depends on prompts and limits
    only.
    """
    runner.input_batch.generators = _Generators()


class _Generators(dict[int, Any]):
    """Row of the batch -> generator. `get` is what the runner moves generators back with; where it changes the order of
    rows, as models with recurrent layers want it, it writes what `get` gave to another row."""

    def get(self, key: Any, default: Any = None) -> Any:
        return _Unmoved(self[key]) if key in self else default

    def __setitem__(self, key: int, value: Any) -> None:
        super().__setitem__(key, value.generator if isinstance(value, _Unmoved) else value)


class _Unmoved:
    """A generator that stays where it is."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def get_offset(self) -> int:
        return 0

    def set_offset(self, offset: int) -> None:
        """Nothing."""


class TowerStub(torch.nn.Module):
    """In place of a tower whose output is given: what the model asks it for, without its weights."""

    def __init__(self, tower: torch.nn.Module) -> None:
        super().__init__()
        parameter = next(tower.parameters())
        self.dtype, self.device = parameter.dtype, parameter.device
        for name, value in vars(tower).items():
            if isinstance(value, (int, float, str)) and not name.startswith("_"):
                setattr(self, name, value)

    def forward(self, *arguments: object, **named: object) -> torch.Tensor:
        raise RuntimeError("the engine was asked to run a vision tower that it does not have")
