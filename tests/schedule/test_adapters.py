"""What is predicted of adapters, against those that peft makes and what autograd saves of them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.distributed.test_flops import NaiveHead, attention_flops, counted, unread_pairs
from tests.schedule.test_activations import saved_by
from tests.support import policies
from veripo_fast.config.inputs import ModelConfig
from veripo_fast.config.load import apply_overrides
from veripo_fast.config.lora import LoraConfig
from veripo_fast.config.schema import Config
from veripo_fast.distributed.flops import attention_pairs, group_flops
from veripo_fast.model.packing import pack
from veripo_fast.model.policy import Policy, load_policy
from veripo_fast.schedule.activations import Row, saved_bytes
from veripo_fast.schedule.adapters import adapter_shapes, saved_by_adapters
from veripo_fast.schedule.costs import model_cost
from veripo_fast.schedule.ledger import predict
from veripo_fast.schedule.shapes import numbers, read_shape

EVERYTHING = ("language", "merger", "head")


def policy_config(family: str, lora: LoraConfig) -> ModelConfig:
    return ModelConfig(path=str(policies.untied_checkpoint(family)), device="cpu",
                       freeze_vision="merger" not in lora.targets, lora=lora)


def policy_of(family: str, lora: LoraConfig) -> Policy:
    return load_policy(policy_config(family, lora))


@pytest.mark.parametrize("targets", [("language",), EVERYTHING, ("q_proj", "o_proj", "head")], ids="-".join)
@pytest.mark.parametrize("family", policies.ALL_FAMILIES)
def test_shapes(family: str, targets: tuple[str, ...]) -> None:
    lora = LoraConfig(rank=4, targets=targets)
    policy, shape = policy_of(family, lora), read_shape(policies.untied_checkpoint(family))
    made = adapter_shapes(shape, lora)
    assert made is not None
    assert sorted(made.all) == sorted(tuple(parameter.shape) for _, parameter in policy.parameters())
    assert policy.text_cost == replace(model_cost(shape, policy_config(family, lora)), tower=None)
    assert policy.text_cost.adapters == numbers(made.language)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("family", policies.FAMILIES)
def test_activations(family: str, dropout: float) -> None:
    """Never less than autograd saves; more by what a gradient of norms and of the first layer's inputs would need."""
    lora = LoraConfig(rank=4, dropout=dropout)
    policy, shape = policy_of(family, lora), read_shape(policies.untied_checkpoint(family))
    item = policies.loaded(policy, [("video", 8, 4, 4)])
    batch = pack([(item.encoded, policies.random_completions([17] * 4))])
    row = Row(1, len(item.encoded.token_ids), 4, 17)
    saved = saved_by(policy, lambda: policy.hidden(batch, [item.features]))
    predicted = saved_bytes(shape, row, 4, masked=True, checkpointing=False, trimmed=shape.trims_last_layer())
    predicted += saved_by_adapters(adapter_shapes(shape, lora), lora, row.tokens, 4, on_gpu=False)
    assert saved <= predicted <= 1.4 * saved


@pytest.mark.parametrize("family", policies.FAMILIES)
def test_flops_are_those_that_torch_counts(family: str) -> None:
    """But for the first layer, whose inputs need no gradient: neither of queries, keys and values, nor of their A."""
    policy, lengths = policy_of(family, LoraConfig(rank=4)), [9, 1, 30, 17]
    loaded = policies.loaded(policy, [("video", 4, 3, 4)])
    batch = pack([(loaded.encoded, policies.random_completions(lengths))])
    linear, _ = counted(lambda: policy.step(batch, [loaded.features], NaiveHead()).loss.backward())
    cost = policy.text_cost
    prompt, packed = len(loaded.encoded.token_ids), [length - 1 for length in lengths]
    ours = group_flops(cost, prompt, lengths)
    ours -= attention_flops(cost, attention_pairs(prompt, packed), unread_pairs(cost, prompt))
    first = 2 * cost.hidden * (cost.head_dim * (cost.heads + 2 * cost.kv_heads) + 3 * 4)
    assert linear == ours - first * (prompt + sum(packed))


def test_the_ledger() -> None:
    """AdamW's state, gradients and checkpoints are the adapters'; a KL term costs two copies of them."""
    folder = policies.checkpoint("qwen3_vl")
    shape = read_shape(folder)
    options = {"model.path": str(folder), "stages": [{"kind": "grpo"}], "grpo.kl_coef": 0.1, "model.device": "cpu"}
    whole, lora = (predict(shape, apply_overrides(Config(), options | more))["grpo-1"]
                   for more in ({}, {"model.lora.rank": 4}))
    made = adapter_shapes(shape, LoraConfig(rank=4))
    assert made is not None
    count = numbers(made.all)
    update = {phase.name: phase for phase in lora}["update"].device
    assert update["AdamW's moments"] == 8 * count
    assert update["weights"] == 4 * (shape.language_numbers + count)
    assert update["reference policy"] == 8 * count
    assert {phase.name: phase for phase in lora}["checkpoint"].device["checkpoint"] == 4 * count
    full = {phase.name: phase for phase in whole}["update"].device
    assert full["AdamW's moments"] == 8 * shape.language_numbers
    assert sum(update.values()) < sum(full.values())
