"""`model.liger` against the same model without it: logprobs, gradients, what else in the process it touches."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

import pytest
import torch
from liger_kernel.transformers import LigerRMSNorm, LigerSwiGLUMLP
from veripo_kernels import dispatch

from tests.support import policies
from veripo_fast.config.families import FAMILIES
from veripo_fast.config.inputs import ModelConfig
from veripo_fast.errors import ConfigError
from veripo_fast.model import liger
from veripo_fast.model.packing import pack
from veripo_fast.model.policy import Policy, load_policy, save_policy

HYBRID = [name for name, family in FAMILIES.items() if family.delta_class]


def with_liger(family: str, **options: object) -> Policy:
    return load_policy(ModelConfig(path=str(policies.checkpoint(family)), device="cpu", freeze_vision=False, liger=True,
                                   **options))


def step(policy: Policy) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logprobs and all gradients of a packed group around an image; short, the interpreter takes a token at a time."""
    prompt = policies.encoded(policy.encoder, [("image", 2, 2, 3)])
    completions = policies.random_completions([4, 1, 2])
    policy.model.zero_grad()
    logprobs = policy.completion_logprobs(pack([(prompt, completions)]), [policy.vision_features(prompt.media)],
                                          temperature=0.7)
    (logprobs * torch.randn(len(logprobs), generator=torch.Generator().manual_seed(3))).sum().backward()
    gradients = {name: p.grad.clone() for name, p in policy.model.named_parameters() if p.grad is not None}
    policy.model.zero_grad()
    return logprobs.detach(), gradients


@pytest.mark.parametrize(("family", "checkpointing"), [
    ("qwen2_5_vl", False), ("qwen3_vl", True), ("qwen3_vl_moe", False), ("qwen3_5", True), ("qwen3_5_moe", False)])
def test_logprobs_and_gradients_agree(family: str, checkpointing: bool) -> None:
    plain, plain_gradients = step(policies.policy(family))
    fused, fused_gradients = step(with_liger(family, gradient_checkpointing=checkpointing))
    assert (fused - plain).abs().max() < 1e-5
    assert fused_gradients.keys() == plain_gradients.keys()
    # the plain gradients of this Qwen3.5 are off float64 by 4e-5 as a whole, of one matrix by more (families.jsonl)
    allowed = 1e-3 if family in HYBRID else 1e-4
    for name, gradient in plain_gradients.items():
        assert (fused_gradients[name] - gradient).norm() <= allowed * gradient.norm() + 1e-7, name


@pytest.mark.parametrize("family", policies.ALL_FAMILIES)
def test_all_layers_of_the_language_model_are_replaced_and_nothing_else(family: str) -> None:
    """But for routed experts and the gated norms of recurrent layers, of which Liger has none that may be used."""
    policy, module = with_liger(family), importlib.import_module(FAMILIES[family].module)
    own = policies.policy(family).model.model.language_model
    kinds = [type(m) for m in policy.model.model.language_model.modules()]
    norms = sum(type(m).__name__.endswith("RMSNorm") for m in own.modules())
    feeds = sum(hasattr(m, "gate_proj") for m in own.modules())
    assert (kinds.count(LigerRMSNorm), kinds.count(LigerSwiGLUMLP)) == (norms, feeds)
    assert norms >= 2 * policy.num_layers + 1
    assert feeds == (0 if family == "qwen3_vl_moe" else policy.num_layers)
    assert [kind.__name__ for kind in kinds if "Experts" in kind.__name__ or "RMSNormGated" in kind.__name__] == [
        type(m).__name__ for m in own.modules() if "Experts" in type(m).__name__ or "Gated" in type(m).__name__[-5:]]
    assert not any(isinstance(m, LigerRMSNorm | LigerSwiGLUMLP) for m in policy.model.model.visual.modules())
    assert not any(p.is_meta for p in policy.model.parameters())
    assert module.apply_rotary_pos_emb.__module__ == module.__name__
    assert not any(isinstance(m, LigerRMSNorm | LigerSwiGLUMLP) for m in own.modules())
    assert not any("forward" in vars(layer.self_attn) for layer in own.layers if hasattr(layer, "self_attn"))


@pytest.mark.parametrize("family", policies.ALL_FAMILIES)
def test_the_rotary_embedding_is_ligers(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it turns whole heads; those of Qwen3.5 are turned in part."""
    import liger_kernel.transformers as library

    rotary, calls = library.liger_rotary_pos_emb, []
    monkeypatch.setattr(library, "liger_rotary_pos_emb", lambda *args: calls.append(1) or rotary(*args))
    policy = with_liger(family)
    with torch.no_grad():
        prompt = policies.encoded(policy.encoder, [])
        policy.completion_logprobs(pack([(prompt, [[30, 31]])]), [None])
    assert len(calls) == (0 if family in HYBRID else policy.num_layers)


def test_a_checkpoint_has_the_same_names(tmp_path: Path) -> None:
    policy = with_liger("qwen3_vl")
    save_policy(policy, tmp_path)
    again = load_policy(ModelConfig(path=str(tmp_path), device="cpu"))
    assert all(torch.equal(a, b) for a, b in zip(again.model.state_dict().values(), policy.model.state_dict().values(),
                                                 strict=True))
    assert again.model.state_dict().keys() == policy.model.state_dict().keys()


@pytest.mark.parametrize(("package", "sentence"), [
    ("triton", "model.liger cannot be used: triton is not installed"),
    ("liger_kernel", "model.liger cannot be used: liger-kernel is not installed")])
def test_a_missing_package_is_named(package: str, sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name, *rest))
    dispatch.missing.cache_clear()
    with pytest.raises(ConfigError) as caught:
        liger.apply_liger(policies.policy("qwen3_vl").model)
    dispatch.missing.cache_clear()
    assert str(caught.value) == sentence


def test_a_cpu_without_the_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match=r"model\.liger cannot be used: Triton kernels need CUDA tensors, not cpu"):
        liger.apply_liger(policies.policy("qwen3_vl").model)


def test_an_attention_that_does_not_call_the_rotary_function_is_refused() -> None:
    with pytest.raises(ConfigError, match="does not call apply_rotary_pos_emb"):
        liger._with_rotary(LigerRMSNorm.forward, lambda *args: args)
