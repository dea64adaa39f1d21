"""The policy that the KL term pulls towards: frozen, and loaded at the start of a stage."""

from __future__ import annotations

from pathlib import Path

from veripo_fast.distributed.choice import distribute_frozen
from veripo_fast.errors import ConfigError
from veripo_fast.model.checkpoint_files import resolve_path
from veripo_fast.model.policy import Policy, load_policy
from veripo_fast.recipes.own import described, named
from veripo_fast.recipes.tables import REFERENCES
from veripo_fast.stages.session import Session


def stage_reference(session: Session, reference: str = "stage_start") -> Policy:
    """The reference of the stage that runs. Raises ConfigError where the user's function names none."""
    model = resolve_path(session.config.model.path)
    policy = load_policy(session.config.model, reference_folder(reference, model, session.stage_start() or model))
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
