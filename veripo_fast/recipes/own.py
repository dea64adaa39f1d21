"""Functions that a configuration names: an entry of a table, or the user's own, as module:function or file.py:function.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import math
import sys
import sysconfig
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from veripo_fast.config.checks import OWN
from veripo_fast.errors import ConfigError, TrainingError

_LIBRARIES = (str(Path(__file__).parents[1]), "<frozen", *map(sysconfig.get_path, ("stdlib", "purelib", "platlib")))
"""Where frames of a traceback are not the user's own, most often."""


def named(name: str, table: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    """The entry of a table, or the user's function. Raises ConfigError where there is none."""
    return table[name] if name in table else own_function(name)


@lru_cache
def own_function(name: str) -> Callable[..., Any]:
    """The function that `module:function` or `path/file.py:function` names.

    Raises:
        ConfigError: there is no such module, file or function, or importing it fails; names the line.
    """
    place, _, attribute = name.rpartition(":")
    function = getattr(_module(place), attribute, None)
    if not callable(function):
        raise ConfigError(f"{place} has no function {attribute}, which the configuration names")
    found: Callable[..., Any] = function
    return found


@lru_cache
def _module(place: str) -> ModuleType:
    is_file = place.endswith(".py")
    if is_file and not Path(place).is_file():
        raise ConfigError(f"{place} is no file: the configuration names a function in it")
    try:
        return _from_file(Path(place).resolve()) if is_file else importlib.import_module(place)
    except Exception as error:  # of whatever a user's module does
        missing = isinstance(error, ModuleNotFoundError) and not is_file and error.name == place.split(".")[0]
        advice = "; a file is named path/file.py:function" if missing else ""
        raise ConfigError(f"{place} cannot be imported: {described(error)}{advice}") from error


def _from_file(path: Path) -> ModuleType:
    name = f"veripo_own_{path.stem}_{hashlib.blake2b(str(path).encode(), digest_size=8).hexdigest()}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look a module up by its name
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def own_file(name: str) -> Path | None:
    """The file of a user's function; None for an entry of a table, and for a function without one."""
    if OWN.fullmatch(name) is None:
        return None
    file = getattr(_module(name.rpartition(":")[0]), "__file__", None)
    return None if file is None else Path(file)


def check_call(what: str, name: str, function: Callable[..., Any], arguments: Sequence[str],
               options: Mapping[str, Any]) -> None:
    """Refuse a function that cannot be called with some arguments and the options of the configuration.

    Raises:
        ConfigError: naming the function and what does not fit.
    """
    try:
        inspect.signature(function).bind(*arguments, **options)
    except ValueError:  # written in C: what it takes is known when it is called
        return
    except TypeError as error:
        call = ", ".join([*arguments, *(f"{key}={value!r}" for key, value in options.items())])
        raise ConfigError(f"{what} {name} cannot be called as {name.rpartition(':')[2]}({call}): {error}") from None


def described(error: BaseException) -> str:
    """What an error says, and the last line outside of libraries that it came through."""
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(_LIBRARIES)]
    where = f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}{': ' if text else ''}{text}{where}"


def as_column(values: Any, count: int, what: str) -> list[float]:
    """What a function returned as a list of floats.

    Raises:
        TrainingError: it is not a number for every completion, by name.
    """
    plain = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(plain, (list, tuple)):
        raise TrainingError(f"{what} returned {type(values).__name__}; it must return a list, a number per completion")
    if len(plain) != count:
        raise TrainingError(f"{what} returned {len(plain)} numbers for {count} completions")
    column: list[float] = []
    for number, value in enumerate(plain):
        value = value.item() if hasattr(value, "item") else value
        if not isinstance(value, (int, float)):
            raise TrainingError(f"{what} returned {value!r:.60} for completion {number}; it must be a number")
        if not math.isfinite(value):
            raise TrainingError(f"{what} returned {value} for completion {number}; it must be finite")
        column.append(float(value))
    return column
