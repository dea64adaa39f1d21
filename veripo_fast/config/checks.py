"""Checks that the configuration classes make of their fields, by name and value."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from veripo_fast.errors import ConfigError


@contextmanager
def as_config_error() -> Iterator[None]:
    """Let another class check the values: its ValueError becomes a ConfigError."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(str(error)) from error


def require(ok: bool, message: str) -> None:
    """ConfigError with the message unless `ok`."""
    if not ok:
        raise ConfigError(message)


def positive(owner: object, *names: str) -> None:
    """ConfigError when a field of the owner is set and not above 0."""
    for name in names:
        value = getattr(owner, name)
        require(value is None or value > 0, f"{name} must be greater than 0, got {value}")


def unit_interval(owner: object, *names: str) -> None:
    """ConfigError when a field of the owner is outside of [0, 1]."""
    for name in names:
        value = getattr(owner, name)
        require(0.0 <= value <= 1.0, f"{name} must be between 0 and 1, got {value}")
