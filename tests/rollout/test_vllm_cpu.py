"""What torch computes in an engine without a GPU, against transformers; tests/engines/ runs it inside of vLLM."""

from __future__ import annotations

import pytest
import torch

from tests.support import policies
from veripo_fast.rollout.vllm_cpu import experts


@pytest.mark.parametrize("family", ["qwen3_vl_moe", "qwen3_5_moe"])
def test_experts_are_those_of_transformers(family: str) -> None:
    """Also where one of them is chosen by no token."""
    module = policies.policy(family).model.model.language_model.layers[0].mlp.experts
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(7, 128, generator=generator)
    chosen = torch.stack([torch.randperm(5, generator=generator)[:2] for _ in range(7)])
    weights = torch.rand(7, 2, generator=generator)
    with torch.no_grad():
        expected = module(tokens, chosen, weights)
        found = experts(tokens, module.gate_up_proj, module.down_proj, weights, chosen.int())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert expected.abs().max() > 0.1 and not (chosen == 5).any()
