"""Predicted bytes against the tensors of real small policies."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.support import policies
from veripo_fast.config.inputs import ModelConfig
from veripo_fast.config.schema import OptimizerConfig
from veripo_fast.distributed.rows import rows_of
from veripo_fast.errors import CheckpointError
from veripo_fast.model.policy import in_own_memory, load_policy
from veripo_fast.schedule.placement import Placement, held_by, rows_share
from veripo_fast.schedule.shapes import read_shape, shape_of
from veripo_fast.stages.memory import exact_owners
from veripo_fast.stages.optimizer import Optimizer


def checkpoint(family: str, tied: bool) -> Path:
    return policies.checkpoint(family) if tied else policies.untied_checkpoint(family)


def storages(tensors: list[torch.Tensor]) -> int:
    """Bytes of the storages behind some tensors, each once."""
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", policies.ALL_FAMILIES)
def test_what_one_process_holds(family: str, tied: bool, frozen: bool, dtype: str) -> None:
    folder = checkpoint(family, tied)
    policy = in_own_memory(load_policy(ModelConfig(str(folder), device="cpu", dtype=dtype, freeze_vision=frozen)))
    optimizer = Optimizer(policy.backend, OptimizerConfig(), 1e-3, 1)
    for _, parameter in policy.parameters():
        parameter.grad = torch.ones_like(parameter)
    gradients = storages([parameter.grad for _, parameter in policy.parameters()])
    optimizer.loss = 0.0
    optimizer.step()
    backend = policy.backend

    held = held_by(read_shape(folder), Placement("none"), 4 if dtype == "float32" else 2, not frozen, on_gpu=False)

    weights = storages([parameter for _, parameter in policy.all_parameters()])
    assert held.resident["weights"] + held.resident["tower"] == weights
    assert held.gradients == gradients
    moments = [state[name] for state in backend.adamw.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert held.resident["AdamW's moments"] == storages(moments)
    masters = [master for master, own in zip(backend.masters, backend.parameters, strict=True) if master is not own]
    assert held.resident["masters"] == storages(masters)
    told = exact_owners(optimizer)
    assert told["weights"] == weights and told["AdamW's moments"] == held.resident["AdamW's moments"]
    assert told.get("masters", 0) == held.resident["masters"]


@pytest.mark.parametrize("family", policies.ALL_FAMILIES)
def test_widths_are_those_of_the_model(family: str) -> None:
    shape, policy = read_shape(policies.checkpoint(family)), policies.policy(family)
    text, vision = policy.model.config.get_text_config(), policy.model.config.vision_config
    layers = policy.model.model.language_model.layers
    attention = next(layer.self_attn for layer in layers if hasattr(layer, "self_attn"))
    assert (shape.layers, shape.hidden, shape.vocabulary, shape.heads, shape.positions) == (
        text.num_hidden_layers, text.hidden_size, text.vocab_size, text.num_attention_heads,
        text.max_position_embeddings)
    dense = [layer.mlp.gate_proj.out_features for layer in layers if hasattr(layer.mlp, "gate_proj")]
    assert shape.intermediate == max(dense, default=0)
    assert (shape.queries, shape.keys) == (attention.o_proj.in_features, attention.k_proj.out_features)
    sizes = [sum(parameter.numel() for parameter in layer.parameters()) for layer in layers]
    assert shape.layer_numbers == max(sizes) and shape.outside_numbers == shape.language_numbers - sum(sizes)
    assert (shape.tower.depth, shape.tower.hidden, shape.tower.factor, shape.tower.heads) == (
        vision.depth, vision.hidden_size, policy.encoder.vision.factor, vision.num_heads)
    assert shape.tower.features == policy.encoder.vision.features
    assert shape.tower.deepstack == len(getattr(vision, "deepstack_visual_indexes", ()))


def test_experts_of_a_file_with_a_matrix_for_each() -> None:
    """Such a file gives the same shape as one with one tensor for all, as the model holds them."""
    policy, folder = policies.policy("qwen3_5_moe"), policies.checkpoint("qwen3_5_moe")
    config = json.loads((folder / "config.json").read_text())
    whole = {name: tuple(parameter.shape) for name, parameter in policy.model.named_parameters()}
    apart: dict[str, tuple[int, ...]] = {}
    for name, shape in whole.items():
        if not name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
            apart[name] = shape
            continue
        count, rows, columns = shape
        for expert in range(count):
            prefix = f"{name.rpartition('.')[0]}.{expert}."
            if name.endswith("down_proj"):
                apart[f"{prefix}down_proj.weight"] = (rows, columns)
            else:
                apart |= {f"{prefix}{part}_proj.weight": (rows // 2, columns) for part in ("gate", "up")}
    drafts = {"mtp.layers.0.mlp.experts.0.down_proj.weight": (7, 9), "mtp.fc.weight": (3, 5)}
    read = [shape_of(config, {name: (shape, 4) for name, shape in tensors.items()}, folder)
            for tensors in (whole, apart, apart | drafts)]
    assert sorted(read[0].named) == sorted(read[1].named) == sorted(read[2].named)
    assert read[0].experts == read[1].experts and read[1] == read[2]
    assert read[0].apart == 0 and read[1].apart == sum(
        math.prod(shape) for name, shape in whole.items() if ".experts." in name)
    assert read[0].language_numbers == sum(
        parameter.numel() for name, parameter in policy.model.named_parameters() if "visual" not in name)


def test_a_flat_configuration_of_an_older_checkpoint(tmp_path: Path) -> None:
    folder = policies.checkpoint("qwen2_5_vl")
    config = json.loads((folder / "config.json").read_text())
    config |= config.pop("text_config") | {"model_type": "qwen2_5_vl"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    assert read_shape(tmp_path) == read_shape(folder)


@pytest.mark.parametrize("size", [2, 3, 8, 1000])
def test_rows_of_the_first_rank_are_the_most(size: int) -> None:
    shapes = ((7, 3), (512, 128), (1,), (128,))
    shares = [sum((rows_of(shape[0], rank, size)[1] - rows_of(shape[0], rank, size)[0])
                  * (shape[1] if len(shape) > 1 else 1) for shape in shapes) for rank in range(size)]
    assert rows_share(shapes, size) == shares[0] == max(shares)


def test_more_ranks_hold_less_and_each_stage_less_than_the_one_before() -> None:
    shape = read_shape(policies.untied_checkpoint("qwen3_vl"))

    def total(backend: str, ranks: int) -> int:
        held = held_by(shape, Placement(backend, ranks), 2, False, on_gpu=False)
        return sum(held.resident.values()) + held.gradients

    assert total("fsdp", 8) < total("fsdp", 2) < total("none", 1)
    assert total("zero3", 8) < total("zero2", 8) < total("zero1", 8) < total("none", 1)


@pytest.mark.parametrize("content", [b"", b"\xff" * 16, (3).to_bytes(8, "little") + b"[1]"])
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        read_shape(tmp_path)


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    header = json.dumps({"wte.weight": {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]}}).encode()
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError, match=r"does not hold the weights of a family that is trained \(qwen2_5_vl, "):
        read_shape(tmp_path)


def test_tied_by_necessity() -> None:
    shape = read_shape(policies.checkpoint("qwen3_vl"))
    untied = read_shape(policies.untied_checkpoint("qwen3_vl"))
    assert shape.tied and not untied.tied
    assert untied.language_numbers - shape.language_numbers == shape.head_numbers
    assert replace(untied, tied=True).layer_numbers > 0
