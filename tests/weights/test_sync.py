"""The whole hand-over: real models whose parameters become views, the self-test, and what a report says."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from tests.support import policies
from tests.support.engine_weights import Sizes, Weights, engine_weights, policy_weights
from tests.weights.test_plan import geometry_of
from tests.weights.test_transfer import case, unequal
from veripo_fast.errors import TrainingError
from veripo_fast.weights.layouts import Geometry
from veripo_fast.weights.sync import SyncReport, WeightSync


def loader(sizes: Sizes, engine: Weights, spoil: Callable[[Weights], None] = lambda weights: None
           ) -> Callable[[Iterator[tuple[str, torch.Tensor]]], None]:
    """An engine's own way of loading, made by hand; `spoil` changes what it is given."""
    def reload(named: Iterator[tuple[str, torch.Tensor]]) -> None:
        weights = dict(named)
        spoil(weights)
        for name, values in engine_weights(weights, sizes).items():
            engine[name].copy_(values)

    return reload


def synced(sizes: Sizes, mode: str, **dtypes: torch.dtype) -> tuple[WeightSync, dict, Weights, Weights]:
    _, policy, engine, expected = case(sizes, **dtypes)
    return WeightSync(policy.items(), engine.items(), geometry_of(sizes), mode=mode), policy, engine, expected


@pytest.mark.parametrize("family", policies.FAMILIES)
def test_views_are_trained_like_parameters_of_their_own(family: str) -> None:
    """Three AdamW steps of a real model on views: the same weights as without, and the engine has them at once."""
    plain, shared = (copy.deepcopy(policies.policy(family).model).train() for _ in range(2))
    for model in (plain, shared):
        model.model.language_model.set_attn_implementation("sdpa")
    sizes = sizes_of(plain)
    engine = {name: torch.zeros_like(tensor)
              for name, tensor in engine_weights(dict(plain.named_parameters()), sizes).items()}
    sync = WeightSync(shared.named_parameters(), engine.items(), Geometry.of(shared.config))
    aliasing, report = sync.start(0)
    assert len(aliasing.aliased) == len(list(shared.parameters())) and report.bytes == 0
    for model in (plain, shared):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for step in range(3):
            ids = torch.randint(20, 400, (1, 12), generator=torch.Generator().manual_seed(step))
            loss = model(input_ids=ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    trained = dict(plain.named_parameters())
    assert unequal(dict(shared.named_parameters()), trained) == []
    assert sync.sync(3).bytes == 0 and sync.version == 3
    assert unequal(engine, engine_weights(trained, sizes)) == []


def sizes_of(model: torch.nn.Module) -> Sizes:
    text, vision = model.config.get_text_config(), model.config.vision_config
    geometry = Geometry.of(model.config)
    return Sizes(geometry.family, geometry.tied, text.num_hidden_layers, geometry.heads, geometry.kv_heads,
                 geometry.head_dim, depth=vision.depth, tower_heads=geometry.tower_heads)


def test_a_policy_of_views_is_saved_whole(tmp_path: Path) -> None:
    """Views share memory, which safetensors refuses for tensors that overlap; these do not."""
    model = copy.deepcopy(policies.policy("qwen3_vl").model)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    engine = engine_weights(before, sizes_of(model))
    WeightSync(model.named_parameters(), engine.items(), Geometry.of(model.config)).start(0)
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert unequal(dict(again.named_parameters()), before) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copies_follow_the_policy(dtype: torch.dtype) -> None:
    sizes = Sizes("qwen2_5_vl", tied=False)
    sync, policy, engine, expected = synced(sizes, "copy", engine_dtype=dtype)
    aliasing, report = sync.start(0)
    assert unequal(engine, expected) == [] and set(aliasing.copied) == set(policy) and aliasing.aliased == ()
    assert report.bytes == dtype.itemsize * sum(parameter.numel() for parameter in policy.values())
    assert report.ratio_to_plain_copy > 0
    with torch.no_grad():
        for parameter in policy.values():
            parameter.mul_(2)
    assert sync.sync(1).bytes == report.bytes
    assert unequal(engine, {name: tensor * 2 for name, tensor in expected.items()}) == []


# -- the self-test ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("mode", ["alias", "copy"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", policies.FAMILIES)
def test_the_self_test_agrees_and_leaves_no_trace(family: str, tied: bool, mode: str) -> None:
    sizes = Sizes(family, tied)
    sync, policy, engine, expected = synced(sizes, mode, engine_dtype=torch.bfloat16)
    sync.start(0)
    before = {name: parameter.detach().clone() for name, parameter in policy.items()}
    sync.self_test(loader(sizes, engine))
    assert unequal(engine, expected) == [] and unequal(policy, before) == []


def swap(weights: Weights, one: str, other: str) -> None:
    weights[one], weights[other] = weights[other], weights[one]


LAYER = "model.language_model.layers.0."


@pytest.mark.parametrize(("spoil", "name"), [
    (lambda weights: swap(weights, LAYER + "mlp.gate_proj.weight", LAYER + "mlp.up_proj.weight"), "mlp.gate_up_proj"),
    (lambda weights: swap(weights, LAYER + "self_attn.k_proj.weight", LAYER + "self_attn.v_proj.weight"), "qkv_proj"),
    (lambda weights: weights["model.language_model.norm.weight"].view(-1)[0].add_(1), "language_model.model.norm"),
    (lambda weights: weights[LAYER + "self_attn.q_norm.weight"].neg_(), "q_norm"),
])
def test_a_loader_that_does_otherwise_is_found_by_name(spoil: Callable[[Weights], None], name: str) -> None:
    sizes = Sizes()
    sync, _, engine, expected = synced(sizes, "alias")
    sync.start(0)
    with pytest.raises(TrainingError, match=rf"{name}\S*: the plan writes other weights than the engine's reload"):
        sync.self_test(loader(sizes, engine, spoil))
    assert unequal(engine, expected) == []


def test_a_loader_that_moves_parameters_is_found() -> None:
    sizes = Sizes()
    sync, _, engine, _ = synced(sizes, "copy")

    def reload(named: Iterator[tuple[str, torch.Tensor]]) -> None:
        loader(sizes, engine)(named)
        moved = sync.targets["language_model.model.norm.weight"]
        moved.data = moved.clone()

    with pytest.raises(TrainingError, match=r"reload has moved language_model\.model\.norm\.weight to other memory"):
        sync.self_test(reload)


def test_a_loader_that_fails_leaves_the_weights_as_they_were() -> None:
    sync, _, engine, expected = synced(Sizes(), "alias")
    sync.start(0)

    def reload(named: Iterator[tuple[str, torch.Tensor]]) -> None:
        next(named)
        raise OSError("no such file")

    with pytest.raises(OSError, match="no such file"):
        sync.self_test(reload)
    assert unequal(engine, expected) == []


# -- what is said -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("report", "line"), [
    (SyncReport(1, 12_300_000, 0.004, 1.1),
     "12.3 MB in 4 ms, 1.1x a plain copy of the same bytes (measured at start)"),
    (SyncReport(1, 800_000_000, 1.5, 1.24),
     "800 MB in 1.5 s, 1.2x a plain copy of the same bytes (measured at start)"),
    (SyncReport(1, 0, 0.0001, None), "0 bytes moved: the engine's weights are the policy's"),
])
def test_a_report_is_one_line(report: SyncReport, line: str) -> None:
    assert str(report) == line


def test_weights_of_the_policy_are_never_changed() -> None:
    sizes = Sizes()
    sync, policy, _, _ = synced(sizes, "copy", engine_dtype=torch.bfloat16)
    sync.start(0)
    assert unequal(policy, policy_weights(sizes)) == []
