"""Checks that the configuration classes make of their fields, by name and value."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

from veripo_fast.errors import ConfigError

OWN = re.compile(r"([^:]+\.py|[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):([A-Za-z_]\w*)")
"""How a configuration names a user's function: path/file.py:function or module:function."""


@contextmanager
def as_config_error() -> Iterator[None]:
    """Let another class check the values: its ValueError becomes a ConfigError."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(str(error)) from error


@contextmanager
def inside(where: str) -> Iterator[None]:
    """Name the place in the errors of checks that are made for a part."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


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


def known_or_own(field: str, value: str, known: Collection[str]) -> None:
    """ConfigError unless the value is one of the known names, or names a user's function."""
    match = difflib.get_close_matches(value, known, n=1)
    require(value in known or OWN.fullmatch(value) is not None,
            f"{field} must be one of {', '.join(known)}, or a function of your own as module:function or "
            f"path/file.py:function, got {value!r}" + (f"; did you mean {match[0]}?" if match else ""))


def check_loss_options(loss: str, given: Mapping[str, float], known: tuple[str, ...]) -> None:
    """ConfigError unless the numbers of a loss are among those that it knows, and make sense."""
    for name, value in given.items():
        require(name in known, f"loss_options.{name} changes nothing while loss is {loss}"
                + (f"; it takes {', '.join(known)}" if known else ""))
        require(isinstance(value, (int, float)) and math.isfinite(value) and (value > 0 or name == "entropy_coef"),
                f"loss_options.{name} must be a number above 0, got {value!r}")
