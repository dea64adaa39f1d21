"""What DeepSpeed is told: a user's own JSON, checked against what veripo decides, and filled.

DeepSpeed passes over top-level keys that it does not know, and some that it knows do nothing here. So a key is either
ours (then "auto" or our value is right), or one of a few that are taken as given, or refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from veripo_fast.errors import ConfigError

_NAME = "distributed.deepspeed_config"
_GIVEN = {"zero_optimization", "communication_data_type", "disable_python_gc"}
"""Top-level keys of a user."""
_UNPRINTED = {"steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state"}
"""They are in every example and only make DeepSpeed print, which it is kept from: False, null and "auto" pass."""
_WRONG_RESULT = {
    "zero_optimization.zenflow": "steps weights with gradients of earlier updates",
    "zero_optimization.offload_optimizer.super_offload": "replaces the optimizer that veripo steps",
    "zero_optimization.zero_quantized_weights": "makes rows of weights that cannot be copied into an engine",
    "zero_optimization.zero_quantized_nontrainable_weights": "makes rows that cannot be copied into an engine",
    "zero_optimization.zero_quantized_gradients": "rounds gradients to 4 bits",
}


@dataclass(frozen=True)
class ZeroOptions:
    """What a run asks of `ZeroBackend`."""

    stage: int = 2
    """1: moments are sharded, 2: gradients too, 3: weights too."""
    offload: str = "none"
    """cpu: moments and float32 masters lie in host memory, and the host steps them."""
    deepspeed: Mapping[str, Any] = field(default_factory=dict)
    """A user's DeepSpeed configuration."""


def read_json(path: Path) -> dict[str, Any]:
    """A user's DeepSpeed configuration.

    Raises:
        ConfigError: no such file, or no JSON object in it.
    """
    try:
        config = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{_NAME}: {path} cannot be read as JSON: {str(error).splitlines()[0]}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{_NAME}: {path} holds no JSON object")
    return config


def deepspeed_config(options: ZeroOptions, *, bfloat16: bool, hidden_size: int) -> dict[str, Any]:
    """DeepSpeed's configuration for these options.

    Args:
        hidden_size: buckets that are "auto" follow it, as Hugging Face's Trainer fills them.

    Raises:
        ConfigError: a key of the user's contradicts veripo, or would be passed over.
    """
    theirs = {key: value for key, value in options.deepspeed.items() if key not in _UNPRINTED}
    for key in _UNPRINTED & options.deepspeed.keys():
        if key != "steps_per_print" and options.deepspeed[key] not in (False, None, "auto"):
            raise ConfigError(f"{_NAME}: {key} makes DeepSpeed print, which veripo keeps it from; remove it")
    ours = _ours(options, bfloat16)
    for key in theirs.keys() - ours.keys() - _GIVEN:
        raise ConfigError(f"{_NAME}: {key} is decided by veripo or does nothing here; remove it (what can be given: "
                          f"{', '.join(sorted(_GIVEN))})")
    for path, effect in _WRONG_RESULT.items():
        if _at(theirs, path) not in (None, False, "auto"):
            raise ConfigError(f"{_NAME}: {path} {effect}; remove it")
    if options.stage == 1 and _at(theirs, "zero_optimization.overlap_comm") not in (None, False, "auto"):
        raise ConfigError(f"{_NAME}: zero_optimization.overlap_comm has nothing to overlap at distributed.zero_stage "
                          "1, which sends gradients once, before the step; remove it, or take zero_stage 2")
    _check_offload_param(theirs, options.stage)
    merged = _merged(_filled(theirs, hidden_size), ours, closed=("bf16", "data_types"))
    return {**merged, "gradient_clipping": 1.0}  # DeepSpeed's default; `ZeroBackend.step` sets it for each step


def _check_offload_param(theirs: Mapping[str, Any], stage: int) -> None:
    device = _at(theirs, "zero_optimization.offload_param.device")
    if device in (None, "none", "auto") or (device == "cpu" and stage == 3):
        return
    raise ConfigError(f"{_NAME}: zero_optimization.offload_param.device is {device!r}, and weights can be offloaded to "
                      f"cpu alone, at distributed.zero_stage 3 (it is {stage}); remove it")


def _ours(options: ZeroOptions, bfloat16: bool) -> dict[str, Any]:
    """What veripo decides: one step() is one update of any number of micro-batches, by torch's AdamW.

    Micro-batches of an update add up in float32. At ZeRO-1 those of bfloat16 weights add up in bfloat16, as in one
    process: asked for float32 there, DeepSpeed takes another optimizer, which has none of our hooks.
    """
    in_bfloat16 = options.stage == 1 and options.offload == "none"
    return {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "fp16": {"enabled": False},
        "bf16": {"enabled": bfloat16},
        "data_types": {"grad_accum_dtype": "bf16" if bfloat16 and in_bfloat16 else "fp32"},
        "zero_optimization": {
            "stage": options.stage,
            "offload_optimizer": {"device": options.offload, "ratio": 1.0},
            "memory_efficient_linear": False,  # it is put into our layers: `zero.py`
        },
    }


def _filled(theirs: Mapping[str, Any], hidden_size: int) -> dict[str, Any]:
    """With numbers where the buckets are "auto", and gradients summed in float32 where nothing else is asked."""
    sizes = {"reduce_bucket_size": hidden_size ** 2, "stage3_prefetch_bucket_size": int(0.9 * hidden_size ** 2),
             "stage3_param_persistence_threshold": 10 * hidden_size}
    zero = theirs.get("zero_optimization", {})
    if not isinstance(zero, Mapping):
        raise ConfigError(f"{_NAME}: zero_optimization is {zero!r}, and should be an object")
    filled = {key: sizes.get(key, value) if value == "auto" else value for key, value in zero.items()}
    communication = theirs.get("communication_data_type", "auto")
    return {**theirs, "zero_optimization": filled,
            "communication_data_type": "fp32" if communication == "auto" else communication}


def _merged(theirs: Mapping[str, Any], ours: Mapping[str, Any], closed: tuple[str, ...] = (), above: str = ""
            ) -> dict[str, Any]:
    """Both; refuses a key of theirs that is ours and says something else. `closed`: sections that are ours alone."""
    merged = dict(theirs)
    for key, value in ours.items():
        said = theirs.get(key, "auto")
        if isinstance(value, Mapping):
            inner = {} if said == "auto" else said
            if not isinstance(inner, Mapping):
                raise ConfigError(f"{_NAME}: {above}{key} is {inner!r}, and should be an object")
            if key in closed and (extra := sorted(inner.keys() - value.keys())):
                raise ConfigError(f"{_NAME}: {above}{key}.{extra[0]} is decided by veripo; remove it")
            merged[key] = _merged(inner, value, above=f"{above}{key}.")
        elif said not in ("auto", value):
            decided = f"veripo's own settings make it {value!r}" if value != "auto" else "veripo decides it"
            raise ConfigError(f'{_NAME}: {above}{key} is {said!r}, and {decided}; remove it, or write "auto"')
        else:
            merged[key] = value
    return {key: value for key, value in merged.items() if value != "auto"}


def _at(config: Mapping[str, Any], path: str) -> Any:
    """What is at a dotted path, or None."""
    value: Any = config
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value
