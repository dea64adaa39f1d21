"""Forward hooks of a module, without those of DeepSpeed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def without_deepspeeds(step: torch.nn.Module) -> Iterator[None]:
    """A block in which DeepSpeed's forward hooks of a module and those in it are off; others stay."""
    modules = list(step.modules())
    hooks = [(module._forward_pre_hooks, module._forward_hooks) for module in modules]
    for module in modules:
        module._forward_pre_hooks = _others(module._forward_pre_hooks)
        module._forward_hooks = _others(module._forward_hooks)
    try:
        yield
    finally:
        for module, (before, after) in zip(modules, hooks, strict=True):
            module._forward_pre_hooks, module._forward_hooks = before, after


def _others(hooks: Mapping[int, Any]) -> OrderedDict[int, Any]:
    """Hooks that are not DeepSpeed's."""
    return OrderedDict((number, hook) for number, hook in hooks.items()
                       if not str(getattr(hook, "__module__", "")).startswith("deepspeed"))
