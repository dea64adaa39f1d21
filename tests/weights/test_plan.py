"""The plan against engine parameters made by hand, for random sizes, every family, and one to four ranks."""

from __future__ import annotations

import dataclasses
import types

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from tests.support import policies
from tests.support.engine_weights import Sizes, Weights, engine_weights, policy_shapes, policy_weights
from veripo_fast.errors import ConfigError
from veripo_fast.weights.layouts import Geometry, Recurrent, stored
from veripo_fast.weights.parts import Part, SliceCopy
from veripo_fast.weights.plan import plan


def geometry_of(sizes: Sizes) -> Geometry:
    recurrent = Recurrent(sizes.key_heads, sizes.value_heads, sizes.key_dim, sizes.value_dim)
    return Geometry(sizes.family, sizes.heads, sizes.kv_heads, sizes.head_dim, sizes.vocabulary, sizes.tied,
                    sizes.tower_heads, sizes.expert_width if sizes.mixed else 0, recurrent if sizes.hybrid else None)


def shapes_of(weights: Weights) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in weights.items()}


def of(part: Part, tensors: Weights) -> torch.Tensor:
    """The part, as a view."""
    whole = tensors[part.name].view(-1, part.width)
    return whole[slice(*part.rows), slice(*part.columns)]


def planned(weights: Weights, sizes: Sizes, tp: int = 1, rank: int = 0) -> tuple[list[SliceCopy], Weights]:
    """The copies, and what they make of an engine full of zeros."""
    engine = {name: torch.zeros_like(tensor) for name, tensor in engine_weights(weights, sizes, tp, rank).items()}
    copies = plan(shapes_of(weights), shapes_of(engine), geometry_of(sizes), tp=tp, rank=rank)
    for copy in copies:
        of(copy.target, engine).copy_(of(copy.source, weights))
    return copies, engine


@st.composite
def layouts(draw) -> tuple[Sizes, int]:
    """Sizes that `tp` ranks can share, and `tp`."""
    tp = draw(st.sampled_from([1, 2, 4]))
    small = lambda most: draw(st.integers(1, most))
    kv_heads = draw(st.sampled_from([count for count in (1, 2, 4, 8) if count % tp == 0 or tp % count == 0]))
    heads = kv_heads * small(3) * (tp if kv_heads < tp else 1)
    tower_heads = tp * small(2)
    return Sizes(draw(st.sampled_from(policies.ALL_FAMILIES)), draw(st.booleans()), layers=small(2), heads=heads,
                 kv_heads=kv_heads, head_dim=2 * small(3), hidden=small(20), intermediate=tp * small(9),
                 vocabulary=small(300), depth=small(2), tower_heads=tower_heads, tower_hidden=tower_heads * small(4),
                 tower_intermediate=tp * small(9), deepstack=draw(st.integers(0, 2)), experts=small(4),
                 expert_width=tp * small(5), shared_width=tp * small(5), key_heads=tp * small(2),
                 value_heads=tp * small(3), key_dim=small(5), value_dim=small(5)), tp


@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(layouts())
def test_every_rank_holds_what_was_made_by_hand(layout: tuple[Sizes, int]) -> None:
    sizes, tp = layout
    weights = policy_weights(sizes)
    for rank in range(tp):
        _, engine = planned(weights, sizes, tp, rank)
        expected = engine_weights(weights, sizes, tp, rank)
        assert engine.keys() == expected.keys()
        assert [name for name in engine if not torch.equal(engine[name], expected[name])] == []


@pytest.mark.parametrize(("change", "tp"), [
    ({"heads": 8, "kv_heads": 2}, 4),  # each key head on two ranks, next to each other
    ({"heads": 8, "kv_heads": 1}, 4),
    ({"heads": 8, "kv_heads": 4}, 2),
    ({"vocabulary": 10}, 4),  # three ranks have nothing but padding
    ({"vocabulary": 64}, 2),  # no padding
    ({"vocabulary": 65}, 2),  # the second rank has one token
])
@pytest.mark.parametrize("family", policies.ALL_FAMILIES)
def test_layouts_that_chance_may_miss(family: str, change: dict, tp: int) -> None:
    sizes = dataclasses.replace(Sizes(family, tied=False), **change)
    weights = policy_weights(sizes)
    for rank in range(tp):
        _, engine = planned(weights, sizes, tp, rank)
        expected = engine_weights(weights, sizes, tp, rank)
        assert [name for name in engine if not torch.equal(engine[name], expected[name])] == []


@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(layouts())
def test_the_ranks_together_hold_every_element(layout: tuple[Sizes, int]) -> None:
    """Once each, but for what every rank has whole and for key heads that are repeated."""
    sizes, tp = layout
    weights = policy_weights(sizes)
    back = {name: torch.full_like(tensor, torch.nan) for name, tensor in weights.items()}
    for rank in range(tp):
        copies, engine = planned(weights, sizes, tp, rank)
        for copy in copies:
            of(copy.source, back).copy_(of(copy.target, engine))
    assert [name for name in back if not torch.equal(back[name], weights[name])] == []


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", policies.ALL_FAMILIES)
def test_on_one_rank_each_parameter_is_one_copy_into_whole_rows(family: str, tied: bool) -> None:
    """So each can be a view of the engine's."""
    copies, _ = planned(policy_weights(Sizes(family, tied)), Sizes(family, tied))
    assert len({copy.source.name for copy in copies}) == len(copies) == len(policy_shapes(Sizes(family, tied)))
    assert all(copy.source.contiguous and copy.target.contiguous for copy in copies)


def test_parts_of_flat_memory() -> None:
    part = Part("w", (2, 5), (1, 4), 10)
    assert (part.shape, part.numel, part.offset, part.contiguous) == ((3, 3), 9, 21, False)
    assert Part("w", (2, 3), (1, 4), 10).contiguous and Part("w", (2, 5), (0, 10), 10).contiguous
    assert part.overlaps(Part("w", (4, 9), (3, 5), 10)) and not part.overlaps(Part("w", (4, 9), (4, 5), 10))
    assert not part.overlaps(Part("v", (2, 5), (1, 4), 10)) and not part.overlaps(Part("w", (5, 9), (1, 4), 10))


# -- the real models --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("family", policies.ALL_FAMILIES)
def test_the_names_are_those_of_hugging_face(family: str) -> None:
    """The names that the engine is made from by hand are those of the real model, and the plan takes all of them."""
    model = policies.policy(family).model
    config, weights = model.config, dict(model.named_parameters())
    text, vision, geometry = config.get_text_config(), config.vision_config, Geometry.of(config)
    sizes = Sizes(family, geometry.tied, text.num_hidden_layers, geometry.heads, geometry.kv_heads, geometry.head_dim,
                  text.hidden_size, getattr(text, "intermediate_size", 0), geometry.vocabulary, vision.depth,
                  geometry.tower_heads, vision.hidden_size, vision.intermediate_size,
                  len(getattr(vision, "deepstack_visual_indexes", ())))
    if sizes.mixed:
        sizes = dataclasses.replace(sizes, experts=text.num_experts, expert_width=geometry.expert_width,
                                    shared_width=getattr(text, "shared_expert_intermediate_size", 0))
    if geometry.recurrent:
        sizes = dataclasses.replace(sizes, layer_types=tuple(text.layer_types),
                                    **dataclasses.asdict(geometry.recurrent))
    assert weights.keys() == policy_shapes(sizes).keys()
    assert plan(shapes_of(weights), shapes_of(engine_weights(weights, sizes)), geometry)


@pytest.mark.parametrize("family", ["qwen3_vl_moe", "qwen3_5_moe"])
def test_experts_as_wide_as_high(family: str) -> None:
    """2 I == D: no shape tells gate from up, or rows from columns. Files of one family hold them turned, and the
    engine's loader, which reads such files, turns them back."""
    sizes = Sizes(family, hidden=16, expert_width=8)
    weights = policy_weights(sizes)
    name = "model.language_model.layers.0.mlp.experts.gate_up_proj"
    assert weights[name].shape == (3, 16, 16)
    for tp in (1, 2):
        for rank in range(tp):
            _, engine = planned(weights, sizes, tp, rank)
            expected = engine_weights(weights, sizes, tp, rank)
            assert [name for name in engine if not torch.equal(engine[name], expected[name])] == []
    as_in_files = stored(name, weights[name], family)
    turned = weights[name].transpose(1, 2) if family == "qwen3_vl_moe" else weights[name]
    assert torch.equal(as_in_files, turned)
    router = "model.language_model.layers.0.mlp.gate.weight"
    assert stored(router, weights[router], family) is weights[router]


def test_a_head_that_is_the_embedding_is_left_out_of_a_state_dict_too() -> None:
    sizes = Sizes(tied=True)
    shapes = policy_shapes(sizes)
    engine = shapes_of(engine_weights(policy_weights(sizes), sizes))
    with_head = shapes | {"lm_head.weight": (sizes.vocabulary, sizes.hidden)}
    assert plan(with_head, engine, geometry_of(sizes)) == plan(shapes, engine, geometry_of(sizes))


@pytest.mark.parametrize("stub", [True, False])
def test_without_a_tower_neither_side_is_looked_at(stub: bool) -> None:
    sizes = Sizes()
    weights = policy_weights(sizes)
    engine = {name: shape for name, shape in shapes_of(engine_weights(weights, sizes)).items()
              if stub or not name.startswith("visual.")}
    if stub:
        engine["visual.of_the_stub"] = (1,)
    copies = plan(shapes_of(weights), engine, geometry_of(sizes), tower=False)
    assert len(copies) == len([name for name in weights if ".visual." not in name])


# -- what is refused --------------------------------------------------------------------------------------------------

def refused(sizes: Sizes, policy: dict | None = None, engine: dict | None = None, tp: int = 1) -> str:
    """What the plan says of shapes that are changed by name; None takes one away."""
    weights = policy_weights(sizes)
    sources, targets = shapes_of(weights), shapes_of(engine_weights(weights, sizes, tp))
    for shapes, changes in ((sources, policy or {}), (targets, engine or {})):
        shapes.update(changes)
        for name in [name for name, shape in changes.items() if shape is None]:
            del shapes[name]
    with pytest.raises(ConfigError) as caught:
        plan(sources, targets, geometry_of(sizes), tp=tp)
    return str(caught.value)


LAYER, THEIRS = "model.language_model.layers.0.", "language_model.model.layers.0."


@pytest.mark.parametrize("family", policies.ALL_FAMILIES)
def test_every_missing_parameter_is_found(family: str) -> None:
    """By the engine parameter that it would have filled."""
    sizes = Sizes(family, tied=False, layers=1, depth=1)
    for name in policy_shapes(sizes):
        assert "engine parameter " in refused(sizes, {name: None})


@pytest.mark.parametrize("family", policies.ALL_FAMILIES)
def test_every_missing_engine_parameter_is_found(family: str) -> None:
    sizes = Sizes(family, tied=False, layers=1, depth=1)
    for name in engine_weights(policy_weights(sizes), sizes):
        assert f"the engine has no parameter {name} that would take it" in refused(sizes, engine={name: None})


@pytest.mark.parametrize("family", policies.ALL_FAMILIES)
def test_every_wrong_shape_is_found(family: str) -> None:
    sizes = Sizes(family, tied=False, layers=1, depth=1)
    for name, shape in policy_shapes(sizes).items():
        assert name.rsplit("_proj", 1)[0].rsplit(".", 1)[0] in refused(sizes, {name: (shape[0] + 4, *shape[1:])})
    for name, tensor in engine_weights(policy_weights(sizes), sizes).items():
        assert name in refused(sizes, engine={name: (len(tensor) + 1, *tensor.shape[1:])})


@pytest.mark.parametrize(("changes", "sentence"), [
    ({"policy": {LAYER + "self_attn.k_proj.weight": None}},
     f"engine parameter {THEIRS}self_attn.qkv_proj.weight: the policy's weights fill 1,152 of its 1,536 elements; "
     "qwen3_vl does not have it, or a parameter is missing"),
    ({"engine": {THEIRS + "mlp.adapter.weight": (3, 4)}},
     f"engine parameter {THEIRS}mlp.adapter.weight: the policy's weights fill 0 of its 12 elements; "
     "qwen3_vl does not have it, or a parameter is missing"),
    ({"policy": {LAYER + "mlp.adapter.weight": (3, 4)}},
     f"{LAYER}mlp.adapter.weight: the weights of qwen3_vl have no parameter of this name"),
    ({"policy": {LAYER + "self_attn.q_proj.bias": (32,)}},
     f"{LAYER}self_attn.q_proj.bias: the engine has no parameter {THEIRS}self_attn.qkv_proj.bias that would take it"),
    ({"policy": {LAYER + "self_attn.q_proj.weight": (40, 24)}},
     f"{LAYER}self_attn.q_proj.weight must have 4 heads of 8 rows, got 40 rows"),
    ({"policy": {"model.language_model.embed_tokens.weight": (101, 24)}},
     "model.language_model.embed_tokens.weight must have 100 rows, one a token, got 101"),
    ({"engine": {THEIRS + "mlp.down_proj.weight": (24, 20)}},
     f"{LAYER}mlp.down_proj.weight: the engine's {THEIRS}mlp.down_proj.weight must have 24 x 40 elements on this rank, "
     "got [24, 20]"),
    ({"policy": {LAYER + "mlp.experts.gate_up_proj": (8, 16, 24)}},
     f"{LAYER}mlp.experts.gate_up_proj: the weights of qwen3_vl have no parameter of this name"),
])
def test_what_is_said(changes: dict, sentence: str) -> None:
    assert refused(Sizes(), **changes) == sentence


@pytest.mark.parametrize(("name", "shape", "sentence"), [
    ("mlp.experts.gate_up_proj", (3, 15, 24), " must have experts of 2 x 8 rows or columns, got 360 elements for each"),
    ("mlp.experts.gate_up_proj", (4, 16, 24), f": the engine's {THEIRS}mlp.experts.routed_experts.w13_weight must have "
     "4 x 384 elements on this rank, got [3, 16, 24]"),
    ("mlp.experts.down_proj", (3, 20, 8), f": the engine's {THEIRS}mlp.experts.routed_experts.w2_weight must have "
     "60 x 8 elements on this rank, got [3, 24, 8]"),
    ("linear_attn.in_proj_qkv.weight", (120, 24), " must have 128 rows, got 120"),
    ("linear_attn.in_proj_z.weight", (81, 24), " must have 80 rows, got 81"),
    ("linear_attn.conv1d.weight", (127, 1, 4), " must have 128 rows, got 127"),
    ("linear_attn.A_log", (9,), f": the engine's {THEIRS}linear_attn.A_log must have 9 x 1 elements on this rank, "
     "got [8]"),
])
def test_what_is_said_of_experts_and_recurrent_layers(name: str, shape: tuple[int, ...], sentence: str) -> None:
    assert refused(Sizes("qwen3_5_moe"), policy={LAYER + name: shape}) == LAYER + name + sentence


@pytest.mark.parametrize(("change", "sentence"), [
    ({"heads": 6}, "attention heads (6) cannot be split over 4 tensor-parallel ranks"),
    ({"heads": 12, "kv_heads": 3}, "3 key and value heads cannot be repeated on 4 tensor-parallel ranks"),
    ({"tower_heads": 2}, "heads of the vision tower (2) cannot be split over 4 tensor-parallel ranks"),
    ({"intermediate": 42}, f"{LAYER}mlp.gate_proj.weight (42) cannot be split over 4 tensor-parallel ranks"),
    ({"family": "qwen3_5", "key_heads": 2}, "key heads of recurrent layers (2) cannot be split over 4 tensor-parallel "
     "ranks"),
    ({"family": "qwen3_5", "value_heads": 6}, f"{LAYER}linear_attn.dt_bias (6) cannot be split over 4 tensor-parallel "
     "ranks"),
    ({"family": "qwen3_vl_moe", "expert_width": 6}, "rows of an expert's gate (6) cannot be split over 4 "
     "tensor-parallel ranks"),
])
def test_what_cannot_be_split(change: dict, sentence: str) -> None:
    sizes = dataclasses.replace(Sizes(), **change)
    whole = Sizes(sizes.family)
    with pytest.raises(ConfigError) as caught:
        plan({name: shape for name, shape in policy_shapes(sizes).items() if name.startswith((LAYER, "model.visual."))},
             shapes_of(engine_weights(policy_weights(whole), whole, 4)), geometry_of(sizes), tp=4)
    assert str(caught.value) == sentence


@pytest.mark.parametrize("rank", [-1, 2])
def test_a_rank_that_there_is_not(rank: int) -> None:
    with pytest.raises(ValueError, match=rf"rank must be 0 to 1, got {rank}"):
        plan({}, {}, geometry_of(Sizes()), tp=2, rank=rank)


@pytest.mark.parametrize(("model_type", "words"), [
    ("llava", "weights of llava cannot be handed to the engine; those of qwen2_5_vl, .* and qwen3_5_moe can")])
def test_a_family_that_there_is_not(model_type: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Geometry.of(types.SimpleNamespace(model_type=model_type))
