"""../formulas.py compiled by Triton: the same file, loaded a second time with `xp` bound to triton.language."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import triton
import triton.language as tl

_FILE = Path(__file__).parents[1] / "formulas.py"


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{__name__}.compiled", _FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    module.__dict__["xp"] = tl
    spec.loader.exec_module(module)
    for name, value in list(vars(module).items()):
        if callable(value) and getattr(value, "__module__", None) == spec.name:
            setattr(module, name, triton.jit(value))
    return module


_compiled = _load()
clip_surrogate = _compiled.clip_surrogate
cispo_surrogate = _compiled.cispo_surrogate
sapo_surrogate = _compiled.sapo_surrogate
reinforce_surrogate = _compiled.reinforce_surrogate
squared_log_ratio = _compiled.squared_log_ratio
gmpo_log_ratio = _compiled.gmpo_log_ratio
kl_penalty = _compiled.kl_penalty
importance_weight = _compiled.importance_weight
importance_log = _compiled.importance_log
vespo_surrogate = _compiled.vespo_surrogate
divergence_score = _compiled.divergence_score
preference_loss = _compiled.preference_loss
