"""`model.liger`: Liger's RMSNorm, SwiGLU and rotary embedding in the language model of one policy.

Liger's own `apply_liger_kernel_to_*` replaces names in transformers' modules for the whole process, and its M-RoPE
patch for Qwen2.5-VL names a function that transformers 5.17 no longer has (the three axes are merged before the
layers), so it does nothing. Here Liger's public modules and function go into one model. The vision tower stays as it
is: frozen, it runs once per video.
"""

from __future__ import annotations

import importlib.util
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from veripo_kernels import dispatch

from veripo_fast.errors import ConfigError

_ROTARY = "apply_rotary_pos_emb"


def apply_liger(model: Any) -> None:
    """Replace the layers of a Qwen2.5-VL's or Qwen3-VL's language model in place; its parameters and names stay.

    Raises:
        ConfigError: triton or liger-kernel is missing, the model is not on a GPU, or transformers' layers are not those
            that this was written for.
    """
    reason = dispatch.refusal("triton", model.device)
    if reason is None and importlib.util.find_spec("liger_kernel") is None:
        reason = "liger-kernel is not installed"
    if reason is not None:
        raise ConfigError(f"model.liger cannot be used: {reason}")
    from liger_kernel.transformers import LigerSwiGLUMLP, liger_rotary_pos_emb

    language_model = model.model.language_model
    for layer in language_model.layers:
        attention = layer.self_attn
        attention.forward = types.MethodType(_with_rotary(type(attention).forward, liger_rotary_pos_emb), attention)
        with torch.device("meta"):  # its weights are replaced by the model's own
            mlp = LigerSwiGLUMLP(language_model.config)
        for name, projection in layer.mlp.named_children():
            if isinstance(projection, nn.Linear):
                setattr(mlp, name, projection)
        layer.mlp = mlp
    for parent in [*language_model.modules()]:
        for name, child in [*parent.named_children()]:
            if type(child).__name__.endswith("RMSNorm"):
                setattr(parent, name, _rms_norm(child))


def _rms_norm(norm: Any) -> nn.Module:
    """Liger's module with the parameter of transformers'."""
    from liger_kernel.transformers import LigerRMSNorm

    with torch.device("meta"):
        replacement = LigerRMSNorm(len(norm.weight), eps=norm.variance_epsilon)
    replacement.weight = norm.weight
    return replacement


def _with_rotary(forward: Any, rotary: Callable[..., Any]) -> types.FunctionType:
    """A copy of an attention layer's forward that calls `rotary` where the original calls transformers' function."""
    if _ROTARY not in forward.__code__.co_names:
        raise ConfigError(f"model.liger cannot be used: {forward.__qualname__} of this version of transformers "
                          f"does not call {_ROTARY}")
    copy = types.FunctionType(forward.__code__, {**forward.__globals__, _ROTARY: rotary}, forward.__name__,
                              forward.__defaults__, forward.__closure__)
    copy.__kwdefaults__ = forward.__kwdefaults__
    return copy
