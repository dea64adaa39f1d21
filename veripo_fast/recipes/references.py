"""The references that are shipped: where the weights lie that the KL pulls towards.

Args of each: the folder of the run's model (`model.path`), and that of the checkpoint that the stage began from.
"""

from __future__ import annotations

from pathlib import Path


def stage_start(model: Path, started_from: Path) -> Path:
    """The policy at the start of the stage."""
    return started_from


def ema(model: Path, started_from: Path) -> Path:
    """The policy at the start of the stage, which it then follows (`stages.moving_reference.MovingReference`)."""
    return started_from


def base(model: Path, started_from: Path) -> Path:
    """The model of the configuration, in every stage."""
    return model
