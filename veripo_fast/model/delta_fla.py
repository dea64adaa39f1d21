"""The gated delta rule by flash-linear-attention's kernels, on GPUs where that is installed (the extra `fla`)."""

from __future__ import annotations

import importlib
from itertools import accumulate

import torch
from veripo_kernels.once import once

from veripo_fast.model.delta_rule import DeltaRule, delta_rule

_LENGTHS = (70, 3, 129)
"""Of the sequences on which the kernels are compared with the definition."""


def fla_delta_rule(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, decay: torch.Tensor,
                   strength: torch.Tensor, lengths: tuple[int, ...], initial: torch.Tensor | None = None,
                   ) -> tuple[torch.Tensor, torch.Tensor]:
    """`delta_rule` by one call with `cu_seqlens` and initial states."""
    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.long, device=query.device)
    function = importlib.import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule
    out, final = function(query[None], key[None], value[None], g=decay[None].float(), beta=strength[None],
                          initial_state=initial, output_final_state=True, use_qk_l2norm_in_kernel=True,
                          cu_seqlens=ends)
    return out[0], final


@once
def refusal(device: torch.device) -> str | None:
    """Why fla cannot be used on a GPU; None when its kernels compute what the definition does."""
    try:
        importlib.import_module("fla.ops.gated_delta_rule")
        refused = importlib.import_module("triton.errors").TritonError
    except ImportError as error:
        return f"cannot be imported: {error}; pip install 'veripo-fast[fla]'"
    try:
        return disagreement(device)
    except (refused, RuntimeError, ValueError, TypeError, AssertionError) as error:
        return f"fails on a small example: {type(error).__name__} {str(error).partition(chr(10))[0]}"


def disagreement(device: torch.device) -> str | None:
    """Where the kernels differ from the definition on random numbers, forward or backward, by more than twice what the
    definition itself does in bfloat16; None when they agree."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    tokens = sum(_LENGTHS)
    exact = [random(tokens, 2, 64), random(tokens, 2, 64), random(tokens, 4, 64), -random(tokens, 4).exp() * 0.1,
             random(tokens, 4).sigmoid(), random(len(_LENGTHS), 4, 64, 64) * 0.1]
    upstream = random(tokens, 4, 64)
    rounded = [part.bfloat16() for part in exact[:3]] + [exact[3], exact[4].bfloat16(), exact[5]]
    results = []
    cases: list[tuple[DeltaRule, list[torch.Tensor]]] = [
        (delta_rule, exact), (delta_rule, rounded), (fla_delta_rule, rounded)]
    for function, inputs in cases:
        leaves = [part.detach().clone().requires_grad_() for part in inputs]
        out, final = function(*leaves[:5], _LENGTHS, leaves[5])
        loss = (out.float() * upstream).sum() + final.sum()
        results.append([out, final, *torch.autograd.grad(loss, leaves)])
    parts = ("output", "state", *(f"gradient of the {name}" for name in (
        "query", "key", "value", "decay", "strength", "state")))
    for name, truth, own, theirs in zip(parts, *results, strict=True):
        size = truth.float().norm()
        own_error, error = ((part.float() - truth.float()).norm() / size for part in (own, theirs))
        if not error <= 2 * own_error + 0.01:  # a NaN is no agreement
            return f"is off by {error:.1e} in the {name}, allowed {2 * own_error + 0.01:.1e}"
    return None
