"""The policy that the KL term pulls towards: frozen, as it was at the start of a stage or of the run.

Of a policy that trains whole it is a second model, loaded again. Of one that trains adapters it is the same model: with
its adapters off, or with those that the stage began with in their place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch

from veripo_fast.distributed.backend import Held
from veripo_fast.distributed.choice import distribute_frozen
from veripo_fast.errors import ConfigError
from veripo_fast.model.adapter_files import file_name, is_adapter_folder
from veripo_fast.model.checkpoint_files import resolve_path
from veripo_fast.model.packing import PackedBatch
from veripo_fast.model.policy import Policy, load_policy
from veripo_fast.recipes.own import described, named
from veripo_fast.recipes.tables import REFERENCES
from veripo_fast.stages.session import Session
from veripo_fast.types import LoadedPrompt, VisionFeatures


class Reference(Protocol):
    """What an update asks of it; see `Policy`."""

    def completion_logprobs(self, batch: PackedBatch, features: Sequence[VisionFeatures | None], *,
                            temperature: float = 1.0) -> torch.Tensor: ...

    def features_of(self, prompts: Sequence[LoadedPrompt]) -> list[VisionFeatures | None]: ...

    def idle(self) -> torch.Tensor: ...

    @property
    def device(self) -> torch.device: ...


def stage_reference(session: Session, reference: str = "stage_start") -> Reference:
    """The reference of the stage that runs. Raises ConfigError where the user's function names none."""
    config = session.config.model
    model = resolve_path(config.path)
    adapters = resolve_path(config.lora.adapter) if config.lora.adapter else model
    folder = reference_folder(reference, model, session.stage_start() or adapters)
    if session.policy.adapters is not None:
        return EarlierAdapters(session.policy, None if folder == model else folder)
    policy = load_policy(config, folder)
    policy.model.requires_grad_(False)
    policy.passes = session.policy.passes
    distribute_frozen(policy, session.world)
    return policy


def reference_folder(reference: str, model: Path, started_from: Path) -> Path:
    """Where the weights of a reference lie. Raises ConfigError."""
    function = named(reference, REFERENCES)
    try:
        return Path(function(model, started_from))
    except Exception as error:  # of whatever a user's function does
        raise ConfigError(f"reference {reference} names no folder: {described(error)}") from error


class EarlierAdapters:
    """A policy with its adapters off, or with earlier ones in their place; as a `Reference`.

    Args:
        folder: of the earlier ones; None: off.

    Raises:
        ConfigError: the folder holds a model, which a policy with adapters cannot be.
        CheckpointError: its adapters are not those of this policy.
    """

    def __init__(self, policy: Policy, folder: Path | None) -> None:
        self.policy = policy
        self.earlier: dict[str, torch.Tensor] | None = None if folder is None else self._read(folder)

    def completion_logprobs(self, batch: PackedBatch, features: Sequence[VisionFeatures | None], *,
                            temperature: float = 1.0) -> torch.Tensor:
        """See `Policy`."""
        with self._as_it_was():
            return self.policy.completion_logprobs(batch, features, temperature=temperature)

    def features_of(self, prompts: Sequence[LoadedPrompt]) -> list[VisionFeatures | None]:
        """See `Policy`."""
        with self._as_it_was():
            return self.policy.features_of(prompts)

    def idle(self) -> torch.Tensor:
        """See `Policy`."""
        with self._as_it_was():
            return self.policy.idle()

    @property
    def device(self) -> torch.device:
        """See `Policy`."""
        return self.policy.device

    @contextmanager
    def _as_it_was(self) -> Iterator[None]:
        assert self.policy.adapters is not None
        if self.earlier is None:
            with self.policy.adapters.off():
                yield
            return
        own = self._own()
        now = {name: rows.clone() for name, (_, rows) in own.items()}
        with torch.no_grad():
            for name, (first, rows) in own.items():
                rows.copy_(self.earlier[name][first:first + len(rows)])
        try:
            yield
        finally:
            with torch.no_grad():
                for name, (_, rows) in self._own().items():
                    rows.copy_(now[name])

    def _own(self) -> Held:
        """What this rank holds of each matrix."""
        assert self.policy.adapters is not None
        held = self.policy.backend.held()
        return {name: held[name] for name, _ in self.policy.adapters.parameters()}

    def _read(self, folder: Path) -> dict[str, torch.Tensor]:
        """Each matrix of an adapter folder, flattened, in the dtype and on the device of the policy's."""
        adapters = self.policy.adapters
        assert adapters is not None
        if not is_adapter_folder(folder):
            raise ConfigError(f"grpo.reference names {folder}, a whole model; with model.lora it is the base without "
                              "adapters (base), or a folder of adapters")
        stored = adapters.check(folder)
        return {name: stored[file_name(name)].to(self.policy.device, parameter.dtype).flatten()
                for name, parameter in adapters.parameters()}
