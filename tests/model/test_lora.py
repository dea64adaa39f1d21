"""Adapters in a policy: what they are put into, what trains, what is saved, and who is refused; peft is the oracle."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from tests.support import policies
from veripo_fast.config.inputs import ModelConfig
from veripo_fast.config.load import apply_overrides
from veripo_fast.config.lora import LoraConfig
from veripo_fast.config.schema import Config
from veripo_fast.errors import CheckpointError, ConfigError
from veripo_fast.model import merge
from veripo_fast.model.adapter_files import CONFIG, WEIGHTS
from veripo_fast.model.packing import pack
from veripo_fast.model.policy import Policy, load_policy, save_policy
from veripo_fast.model.step import SupervisedLossInputs

LENGTHS = [5, 3, 4]
ALL = ("language", "merger", "head")


def config_of(family: str, *targets: str, tied: bool = True, **options: object) -> ModelConfig:
    folder = policies.checkpoint(family) if tied else policies.untied_checkpoint(family)
    lora = LoraConfig(rank=4, targets=targets or ("language",), **options)
    return ModelConfig(path=str(folder), device="cpu", freeze_vision="merger" not in targets, lora=lora)


def moved(policy: Policy, seed: int = 0) -> Policy:
    """With matrices B that are not 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in policy.adapters.parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return policy


def logprobs_of(policy: Policy) -> torch.Tensor:
    prompt = policies.loaded(policy, [("video", 4, 2, 2)])
    batch = pack([(prompt.encoded, policies.random_completions(LENGTHS))])
    with torch.no_grad():
        return policy.completion_logprobs(batch, policy.features_of([prompt]))


def loss_of(policy: Policy) -> torch.Tensor:
    prompt = policies.loaded(policy, [("video", 4, 2, 2)])
    batch = pack([(prompt.encoded, policies.random_completions(LENGTHS))])
    inputs = SupervisedLossInputs(torch.ones(sum(LENGTHS)), sum(LENGTHS))
    loss = policy.forward(batch, policy.features_of([prompt]), inputs).loss
    assert loss is not None
    return loss


@pytest.mark.parametrize("family", policies.FAMILIES)
def test_what_trains(family: str) -> None:
    """Every linear layer of the language model by default: 7 in a layer, two matrices each; nothing else."""
    policy = load_policy(config_of(family))
    layers = policy.num_layers
    assert len(policy.parameters()) == 7 * 2 * layers
    assert all("language_model.layers" in name for name, _ in policy.parameters())
    assert len(load_policy(config_of(family, "q_proj", "down_proj")).parameters()) == 2 * 2 * layers
    mergers = 1 if family == "qwen2_5_vl" else 1 + len(policy.model.config.vision_config.deepstack_visual_indexes)
    every = load_policy(config_of(family, *ALL, tied=False)).parameters()
    assert len(every) == 7 * 2 * layers + 2 * 2 * mergers + 2
    assert [name for name, _ in every if ".visual.blocks" in name] == []


@pytest.mark.parametrize("family", policies.FAMILIES)
def test_new_adapters_change_nothing(family: str) -> None:
    """B is 0. A is the same for the same seed, whatever was drawn before, and draws nothing of the process."""
    base = load_policy(ModelConfig(path=str(policies.checkpoint(family)), device="cpu"))
    state = torch.random.get_rng_state()
    policy = load_policy(config_of(family), seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(logprobs_of(policy), logprobs_of(base))
    torch.rand(5)
    again, other = load_policy(config_of(family), seed=3), load_policy(config_of(family), seed=4)
    named = dict(policy.parameters())
    assert all(torch.equal(named[name], parameter) for name, parameter in again.parameters())
    assert not all(torch.equal(named[name], parameter) for name, parameter in other.parameters())


@pytest.mark.parametrize("family", policies.FAMILIES)
def test_off_is_the_base(family: str) -> None:
    base = load_policy(ModelConfig(path=str(policies.untied_checkpoint(family)), device="cpu"))
    policy = moved(load_policy(config_of(family, *ALL, tied=False)))
    changed = logprobs_of(policy)
    with policy.adapters.off():
        assert torch.equal(logprobs_of(policy), logprobs_of(base))
    assert torch.equal(logprobs_of(policy), changed) and (changed - logprobs_of(base)).abs().max() > 1e-3


@pytest.mark.parametrize("family", policies.FAMILIES)
def test_adapters_of_the_head_are_in_the_loss(family: str) -> None:
    """The fused loss takes no module but a weight: that of the base would give other log-probs and no gradient."""
    policy = moved(load_policy(config_of(family, "head", tied=False)))
    prompt = policies.loaded(policy, [("video", 4, 2, 2)])
    [completion] = policies.random_completions([6])
    logits = policies.plain_logits(policy, prompt.encoded, completion)[:-1].float()
    expected = torch.log_softmax(logits, -1)[torch.arange(6), torch.tensor(completion)]
    batch = pack([(prompt.encoded, [completion])])
    with torch.no_grad():
        found = policy.completion_logprobs(batch, [prompt.features])
    assert torch.allclose(found, expected, atol=1e-5)
    loss_of(policy).backward()
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for _, parameter in policy.parameters())


def test_gradients_are_those_of_the_merged_weights() -> None:
    """dL/dA = s B^T dL/dW and dL/dB = s dL/dW A^T, in float64 sums of float32 gradients."""
    policy = moved(load_policy(config_of("qwen3_vl", "head", "o_proj", tied=False)))
    loss_of(policy).backward()
    whole = load_policy(ModelConfig(path=str(policies.untied_checkpoint("qwen3_vl")), device="cpu"))
    merged = {name: parameter.data for name, parameter in whole.model.named_parameters()}
    policy.adapters.merge_into(merged)
    loss_of(whole).backward()
    for name, layer in policy.adapters.layers.items():
        slope = whole.model.get_submodule(name).weight.grad
        a, b, scale = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]
        assert torch.allclose(a.grad, scale * b.T @ slope, rtol=1e-3, atol=1e-6), name
        assert torch.allclose(b.grad, scale * slope @ a.T, rtol=1e-3, atol=1e-6), name


# -- dropout ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout(checkpointing: bool) -> None:
    """It draws in passes with a gradient alone, by step, rank and pass; a recomputed pass drops the same."""
    config = replace(config_of("qwen3_vl", dropout=0.5), gradient_checkpointing=checkpointing)
    policy = moved(load_policy(config))
    without = moved(load_policy(config_of("qwen3_vl")))
    assert torch.equal(logprobs_of(policy), logprobs_of(without))

    def update(step: int, rank: int = 0) -> list[torch.Tensor]:
        policy.adapters.begin_step(step, rank)
        for parameter in policy.model.parameters():
            parameter.grad = None
        losses = [loss_of(policy), loss_of(policy)]
        (losses[0] + losses[1]).backward()
        return [*(loss.detach() for loss in losses), *(p.grad for _, p in policy.parameters())]

    state = torch.random.get_rng_state()
    first, again = update(7), update(7)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    assert first[0] != first[1] and update(8)[0] != first[0] and update(7, rank=1)[0] != first[0]
    assert torch.equal(torch.random.get_rng_state(), state)
    if checkpointing:
        plain = moved(load_policy(replace(config, gradient_checkpointing=False)))
        plain.adapters.begin_step(7, 0)
        loss_of(plain).backward()
        policy.adapters.begin_step(7, 0)
        for parameter in policy.model.parameters():
            parameter.grad = None
        loss_of(policy).backward()
        assert all(torch.allclose(one.grad, other.grad, atol=1e-6) for (_, one), (_, other) in
                   zip(policy.parameters(), plain.parameters(), strict=True))


# -- files ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("family", policies.FAMILIES)
def test_a_checkpoint_is_pefts(family: str, tmp_path: Path) -> None:
    """It holds the adapters alone, this module reads them back to the last bit, and peft gives the same logits."""
    import peft

    policy = moved(load_policy(config_of(family, *ALL, tied=False)))
    save_policy(policy, tmp_path)
    stored = load_file(tmp_path / WEIGHTS)
    assert len(stored) == len(policy.parameters()) and not list(tmp_path.glob("model*"))
    again = load_policy(config_of(family, *ALL, tied=False), tmp_path, seed=9)
    assert all(torch.equal(one, other) for (_, one), (_, other) in
               zip(policy.parameters(), again.parameters(), strict=True))
    model = AutoModelForImageTextToText.from_pretrained(policies.untied_checkpoint(family), dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(model, tmp_path).eval()
    ids = torch.arange(20, 40)[None]
    policy.model.model.language_model.set_attn_implementation("sdpa")
    with torch.no_grad():
        ours = policy.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        assert torch.allclose(ours, theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).logits, atol=1e-5)


@pytest.mark.parametrize("family", policies.FAMILIES)
def test_merge(family: str, tmp_path: Path) -> None:
    """The merged checkpoint needs no adapters, and is what was trained, up to rounding."""
    policy = moved(load_policy(config_of(family, *ALL, tied=False)))
    save_policy(policy, tmp_path / "adapters")
    merge.merge_command(str(tmp_path / "adapters"), tmp_path / "merged")
    merged = load_policy(ModelConfig(path=str(tmp_path / "merged"), device="cpu", freeze_vision=False))
    assert torch.allclose(logprobs_of(merged), logprobs_of(policy), atol=1e-5)
    assert not list((tmp_path / "merged").glob("adapter*")) and (tmp_path / "merged" / "tokenizer.json").is_file()


def test_merge_refuses(tmp_path: Path) -> None:
    policy = moved(load_policy(config_of("qwen3_vl")))
    folder = tmp_path / "adapters"
    save_policy(policy, folder)

    def merged(**changes: object) -> None:
        merge.merge_command(**{"adapter": str(folder), "out": tmp_path / "out"} | changes)

    with pytest.raises(CheckpointError, match="holds no LoRA adapters"):
        merged(adapter=str(policies.checkpoint("qwen3_vl")))
    with pytest.raises(CheckpointError, match=r"another base than .*config\.json has changed"):
        merged(base=str(policies.untied_checkpoint("qwen3_vl")))
    with pytest.raises(CheckpointError, match="gone, which is no checkpoint folder here"):
        merged(base=str(tmp_path / "gone"))
    with pytest.raises(ConfigError, match="not empty"):
        merged(out=folder)
    text = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(text | {"use_dora": True}))
    with pytest.raises(CheckpointError, match="use_dora"):
        merged()
    assert not (tmp_path / "out").exists()


# -- who is refused ---------------------------------------------------------------------------------------------------

def test_targets_that_match_nothing() -> None:
    message = r"has qkv_proj, which matches no linear layer .* language, merger, head, down_"
    with pytest.raises(ConfigError, match=message):
        load_policy(config_of("qwen3_vl", "qkv_proj"))
    with pytest.raises(ConfigError, match="head of this model is its embedding"):
        load_policy(config_of("qwen3_vl", "language", "head"))


def test_without_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"peft is not installed .*veripo-fast\[lora\]"):
        load_policy(config_of("qwen3_vl"))


def test_adapters_of_another_base(tmp_path: Path) -> None:
    policy = load_policy(config_of("qwen3_vl"))
    save_policy(policy, tmp_path / "adapters")
    adapter = str(tmp_path / "adapters")
    other = replace(config_of("qwen3_vl", tied=False), lora=LoraConfig(rank=4, adapter=adapter))
    with pytest.raises(CheckpointError, match=r"trained on another base than .*config\.json has changed"):
        load_policy(other)
    # as peft writes it, without a word on the base: names and shapes are left to compare
    (tmp_path / "adapters" / "base.json").unlink()
    wider = replace(config_of("qwen3_vl_moe"), lora=LoraConfig(rank=4, adapter=adapter))
    with pytest.raises(CheckpointError, match=r"of another base: .* has shape|of other layers: the file"):
        load_policy(wider)


@pytest.mark.parametrize(("lora", "message"), [
    (LoraConfig(rank=8), "have rank 4, and model.lora.rank is 8; set it to 4"),
    (LoraConfig(rank=4, alpha=8.0), "have alpha 32.0, and model.lora.alpha is 8.0"),
    (LoraConfig(rank=4, targets=("q_proj",)), "of other layers: the file has .*targets does not name it"),
])
def test_other_adapters(lora: LoraConfig, message: str, tmp_path: Path) -> None:
    save_policy(load_policy(config_of("qwen3_vl")), tmp_path / "adapters")
    config = replace(config_of("qwen3_vl"), lora=replace(lora, adapter=str(tmp_path / "adapters")))
    with pytest.raises(CheckpointError, match=message):
        load_policy(config)


def test_adapters_are_no_model(tmp_path: Path) -> None:
    save_policy(load_policy(config_of("qwen3_vl")), tmp_path / "adapters")
    base = policies.checkpoint("qwen3_vl")
    with pytest.raises(CheckpointError, match=f"not the model that they belong to .{base}.*model.lora.adapter"):
        load_policy(ModelConfig(path=str(tmp_path / "adapters"), device="cpu"))
    shutil.rmtree(tmp_path / "adapters")
    with pytest.raises(CheckpointError, match="holds no LoRA adapters"):
        load_policy(replace(config_of("qwen3_vl"), lora=LoraConfig(rank=4, adapter=str(base))))


@pytest.mark.parametrize(("options", "message"), [
    ({"model.lora.alpha": 8.0}, "alpha changes nothing while rank is 0"),
    ({"model.lora.rank": -1}, "rank must be 0 or larger"),
    ({"model.lora.rank": 4, "model.lora.targets": ["head"], "model.lora.dropout": 0.1}, "without head, or dropout 0"),
    ({"model.lora.rank": 4, "model.lora.targets": ["merger"]}, "set it to false"),
    ({"model.lora.rank": 4, "model.freeze_vision": False}, "lora trains nothing before the language model"),
    ({"model.lora.rank": 4, "model.lora.targets": []}, "targets names nothing"),
    ({"model.lora.rank": 4, "model.lora.targets": ["a.b"]}, "or names of layers such as q_proj, got 'a.b'"),
    ({"model.lora.rank": 4, "distributed.backend": "deepspeed"}, "deepspeed; take fsdp"),
])
def test_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        apply_overrides(Config(), options)


@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_5_moe", "qwen3_vl_moe"])
def test_families_with_recurrent_layers_and_experts(family: str, caplog: pytest.LogCaptureFixture) -> None:
    """Packed completions are those that run alone, every adapter has a gradient, and off is the base."""
    policy = moved(load_policy(config_of(family)))
    parts = {name.split(".")[-4] for name, _ in policy.adapters.parameters()}
    assert {"q_proj", "o_proj"} <= parts and ("in_proj_qkv" in parts) == ("qwen3_5" in family)
    assert ("no linear layers" in caplog.text) == ("moe" in family)
    prompt = policies.loaded(policy, [("video", 4, 2, 2)])
    completions = policies.random_completions(LENGTHS)
    together = policy.completion_logprobs(pack([(prompt.encoded, completions)]), [prompt.features])
    alone = [policy.completion_logprobs(pack([(prompt.encoded, [ids])]), [prompt.features]) for ids in completions]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-4)
    together.sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0
               for _, parameter in policy.adapters.parameters())
    with policy.adapters.off():
        torch.testing.assert_close(logprobs_of(policy), logprobs_of(policies.policy(family, freeze_vision=True)),
                                   rtol=0, atol=1e-5)
