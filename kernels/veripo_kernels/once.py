"""`once`: `functools.cache` for functions that load, register or say something.

functools.cache keeps results, but runs the function in every thread that calls before there is one: a library's fakes
are then registered twice, which torch 2.11 refuses, and a warning is said twice.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache, wraps
from typing import ParamSpec, TypeVar, cast

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def once(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """The function, run once per arguments of a process; threads that call meanwhile wait for the result.

    An error is kept by nobody: it is raised in the thread that ran the function, and the next call runs it again. The
    lock may be taken again by its thread, so that a function may call itself.
    """
    cached, lock = cache(function), threading.RLock()
    kept = cast(Callable[Arguments, Result], cached)  # for mypy, a cached function has lost its signature

    @wraps(function)
    def call(*arguments: Arguments.args, **options: Arguments.kwargs) -> Result:
        with lock:
            return kept(*arguments, **options)

    call.cache_clear = cached.cache_clear  # type: ignore[attr-defined]  # as functools.cache has it
    return call
