"""`model.liger`: Liger's RMSNorm, SwiGLU and rotary embedding in the language model of one policy.

Of Qwen3.5 the rotary embedding stays transformers': it turns a quarter of a head, and Liger 0.8.5 refuses it. So do the
gated norms of recurrent layers, which Liger does not have, and routed experts: the backward pass of its fused kernel
adds up with atomics, so a resumed run would have other bits. The expert that all tokens pass gets Liger's SwiGLU.

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

from veripo_fast.config.families import FAMILIES
from veripo_fast.errors import ConfigError

_ROTARY = "apply_rotary_pos_emb"


def apply_liger(model: Any) -> None:
    """Replace the layers of a language model in place; its parameters and names stay.

    Raises:
        ConfigError: triton or liger-kernel is missing, the model is not on a GPU, or transformers' layers are not those
            that this was written for.
    """
    reason = dispatch.refusal("triton", model.device)
    if reason is None and importlib.util.find_spec("liger_kernel") is None:
        reason = "liger-kernel is not installed"
    if reason is not None:
        raise ConfigError(f"model.liger cannot be used: {reason}")
    from liger_kernel.transformers import liger_rotary_pos_emb

    language_model = model.model.language_model
    turns_whole_heads = not FAMILIES[model.config.model_type].delta_class
    for layer in language_model.layers:
        if turns_whole_heads:
            attention = layer.self_attn
            attention.forward = types.MethodType(_with_rotary(type(attention).forward, liger_rotary_pos_emb), attention)
        for parent, name in ((layer, "mlp"), (layer.mlp, "shared_expert")):
            if hasattr(getattr(parent, name, None), "gate_proj"):
                setattr(parent, name, _swiglu(getattr(parent, name), language_model.config))
    for parent in [*language_model.modules()]:
        for name, child in [*parent.named_children()]:
            if type(child).__name__.endswith("RMSNorm"):
                setattr(parent, name, _rms_norm(child))


def _swiglu(mlp: Any, config: Any) -> nn.Module:
    """Liger's module with the projections of transformers'."""
    from liger_kernel.transformers import LigerSwiGLUMLP

    with torch.device("meta"):  # its weights are replaced by the model's own
        replacement = LigerSwiGLUMLP(config, intermediate_size=mlp.gate_proj.out_features)
    for name, projection in mlp.named_children():
        if isinstance(projection, nn.Linear):
            setattr(replacement, name, projection)
    return replacement


def _rms_norm(norm: Any) -> nn.Module:
    """Liger's module with the parameter of transformers'. Qwen3.5's multiplies by 1 + weight, in float32."""
    from liger_kernel.transformers import LigerRMSNorm

    centred = not hasattr(norm, "variance_epsilon")
    options: dict[str, Any] = {"offset": 1.0, "casting_mode": "gemma", "in_place": False} if centred else {}
    with torch.device("meta"):
        replacement = LigerRMSNorm(len(norm.weight), eps=norm.eps if centred else norm.variance_epsilon, **options)
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
