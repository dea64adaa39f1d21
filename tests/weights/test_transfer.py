"""Moving the slices: dtypes, buckets, checksums, what is skipped, and views in place of copies."""

from __future__ import annotations

import pytest
import torch
from torch.nn import Parameter

from tests.support import policies
from tests.support.engine_weights import Sizes, Weights, engine_weights, policy_weights
from tests.weights.test_plan import geometry_of, shapes_of
from veripo_fast.errors import TrainingError
from veripo_fast.weights import transfer as transfer_module
from veripo_fast.weights.alias import alias
from veripo_fast.weights.parts import SliceCopy
from veripo_fast.weights.plan import plan
from veripo_fast.weights.staging import Staging
from veripo_fast.weights.transfer import BUCKET_BYTES, Transfer

SIZES = [Sizes(family, tied) for family in policies.FAMILIES for tied in (True, False)]


def empty_engine(expected: Weights) -> Weights:
    return {name: torch.zeros_like(tensor) for name, tensor in expected.items()}


def case(sizes: Sizes, tp: int = 1, rank: int = 0, dtype: torch.dtype = torch.float32,
         engine_dtype: torch.dtype = torch.float32) -> tuple[list[SliceCopy], dict[str, Parameter], Weights, Weights]:
    """Copies, parameters of the policy, those of an engine full of zeros, and what it has to hold."""
    weights = policy_weights(sizes, dtype)
    expected = {name: tensor.to(engine_dtype) for name, tensor in engine_weights(weights, sizes, tp, rank).items()}
    copies = plan(shapes_of(weights), shapes_of(expected), geometry_of(sizes), tp=tp, rank=rank)
    return copies, {name: Parameter(tensor) for name, tensor in weights.items()}, empty_engine(expected), expected


def unequal(engine: Weights, expected: Weights) -> list[str]:
    return [name for name in expected if not torch.equal(engine[name], expected[name])]


@pytest.mark.parametrize("bucket_bytes", [BUCKET_BYTES, 1, 1000])  # one bucket, one for each row, some
@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_the_engine_holds_what_was_made_by_hand(sizes: Sizes, tp: int, bucket_bytes: int) -> None:
    for rank in range(tp):
        copies, policy, engine, expected = case(sizes, tp, rank)
        moved = Transfer(copies, policy, engine, bucket_bytes=bucket_bytes).send()
        assert unequal(engine, expected) == []
        assert moved == 4 * sum(copy.target.numel for copy in copies)


@pytest.mark.parametrize(("dtype", "engine_dtype"), [
    (torch.float32, torch.bfloat16), (torch.float32, torch.float16), (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32), (torch.float64, torch.float32)])
def test_weights_are_rounded_to_the_engines_dtype(dtype: torch.dtype, engine_dtype: torch.dtype) -> None:
    copies, policy, engine, expected = case(Sizes(), 2, 1, dtype, engine_dtype)
    Transfer(copies, policy, engine, bucket_bytes=1000).send()
    assert unequal(engine, expected) == []


@pytest.mark.parametrize("bucket_bytes", [64, 1000, 1 << 20])
def test_a_bucket_is_no_larger_than_asked_unless_a_row_is(bucket_bytes: int) -> None:
    copies, policy, engine, _ = case(Sizes())
    transfer = Transfer(copies, policy, engine, bucket_bytes=bucket_bytes)
    buckets = list(transfer._buckets(transfer.pieces))
    sizes = [sum(piece.bytes for piece in bucket) for bucket in buckets]
    assert all(size <= bucket_bytes or (len(bucket) == 1 and bucket[0].size[0] == 1)
               for size, bucket in zip(sizes, buckets, strict=True))
    assert sum(sizes) == 4 * sum(copy.target.numel for copy in copies)


# -- what is skipped --------------------------------------------------------------------------------------------------

def test_frozen_parameters_are_sent_once() -> None:
    copies, policy, engine, expected = case(Sizes())
    frozen = {name for name in policy if ".visual." in name}
    for name in frozen:
        policy[name].requires_grad_(False)
    transfer = Transfer(copies, policy, engine)
    everything = transfer.send()
    tower = 4 * sum(policy[name].numel() for name in frozen)
    assert transfer.due_bytes() == transfer.send() == everything - tower
    for tensor in engine.values():
        tensor.zero_()
    transfer.send()
    assert set(unequal(engine, expected)) == {name for name in engine if name.startswith("visual.")}
    assert transfer.send(everything=True) == everything and unequal(engine, expected) == []


def test_a_parameter_that_is_trained_from_now_on_is_sent_again() -> None:
    copies, policy, engine, _ = case(Sizes())
    name = "model.visual.pos_embed.weight"
    policy[name].requires_grad_(False)
    transfer = Transfer(copies, policy, engine)
    transfer.send()
    policy[name].requires_grad_(True)
    transfer.send()  # its gradient makes it due
    with torch.no_grad():
        policy[name].add_(1)
    transfer.send()
    assert torch.equal(engine["visual.pos_embed.weight"], policy[name])


# -- faults -----------------------------------------------------------------------------------------------------------

def test_an_engine_that_lost_what_was_written_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    copies, policy, engine, _ = case(Sizes())
    honest = transfer_module.copy_slices

    def forgetful(sources, targets):
        sums = honest(sources, targets)
        if targets[0].data_ptr() == engine["language_model.model.norm.weight"].data_ptr():
            targets[0].view(-1)[0] += 1
            sums[1] = honest(targets, [torch.empty_like(target) for target in targets])[0]
        return sums

    monkeypatch.setattr(transfer_module, "copy_slices", forgetful)
    with pytest.raises(TrainingError, match=r"in the bucket from language_model\.model\.norm\.weight to "
                                            r"language_model\.model\.norm\.weight the checksum is -?\d+, not -?\d+"):
        Transfer(copies, policy, engine, bucket_bytes=1).send()


def test_a_parameter_that_is_not_contiguous_is_refused() -> None:
    copies, policy, engine, _ = case(Sizes())
    name = "model.language_model.layers.1.mlp.down_proj.weight"
    transfer = Transfer(copies, policy, engine)
    policy[name].data = policy[name].detach().t().contiguous().t()
    for refused in (transfer.send, lambda: Transfer(copies, policy, engine)):
        with pytest.raises(ValueError, match=rf"{name} and the engine's \S+down_proj.weight must be contiguous, "
                                             r"got strides \(1, 24\) and \(40, 1\)"):
            refused()


def test_weights_that_the_trainer_moved_elsewhere_are_found() -> None:
    """Offloaded and loaded again, or put into one flat buffer: `.data` is another tensor then."""
    copies, policy, engine, expected = case(Sizes())
    transfer = Transfer(copies, policy, engine)
    flat = torch.cat([parameter.detach().view(-1) for parameter in policy.values()])
    for parameter, part in zip(policy.values(), flat.split([p.numel() for p in policy.values()]), strict=True):
        parameter.data = part.view(parameter.shape)
    transfer.send()
    assert unequal(engine, expected) == []


# -- staging ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slices_arrive_through_the_two_buffers(dtype: torch.dtype) -> None:
    """More buckets than buffers, slices that leave holes, one that is larger than the buffer."""
    staging = Staging(64, torch.device("cpu"))
    for number in range(5):
        sources = [torch.randn(rows, 3 + number) for rows in (1, 2, 7)]
        targets = [torch.zeros(len(source), 2 * source.shape[1], dtype=dtype)[:, 1:1 + source.shape[1]]
                   for source in sources]
        staging.move(sources, targets)
        for source, target in zip(sources, targets, strict=True):
            assert torch.equal(target, source.to(dtype))


# -- views ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_on_one_rank_every_parameter_is_a_view(sizes: Sizes) -> None:
    copies, policy, engine, expected = case(sizes)
    before = {name: parameter.detach().clone() for name, parameter in policy.items()}
    result = alias(copies, policy, engine)
    assert (set(result.aliased), result.copied, result.skipped) == (set(policy), (), ())
    assert unequal(engine, expected) == [] and unequal(policy, before) == []
    own = {tensor.untyped_storage().data_ptr() for tensor in engine.values()}
    assert {parameter.untyped_storage().data_ptr() for parameter in policy.values()} == own
    transfer = Transfer(copies, policy, engine)
    with torch.no_grad():
        for parameter in policy.values():
            parameter.mul_(2)
    assert transfer.send(everything=True) == 0
    assert unequal(engine, {name: tensor * 2 for name, tensor in expected.items()}) == []


def test_views_that_the_trainer_gave_up_are_copied_again() -> None:
    copies, policy, engine, expected = case(Sizes())
    alias(copies, policy, engine)
    name = "model.language_model.layers.0.self_attn.k_proj.weight"
    policy[name].data = policy[name].detach() + 1
    assert Transfer(copies, policy, engine).send() == 4 * policy[name].numel()
    fused = "language_model.model.layers.0.self_attn.qkv_proj.weight"
    expected[fused][32:48] += 1
    assert unequal(engine, expected) == []


def test_what_cannot_be_a_view_is_copied() -> None:
    copies, policy, engine, expected = case(Sizes(), 2, 1)
    result = alias(copies, policy, engine)
    assert "model.language_model.norm.weight" in result.aliased
    assert "model.visual.blocks.0.attn.qkv.weight" in result.copied  # three blocks
    assert "model.language_model.layers.0.mlp.down_proj.weight" in result.copied  # columns
    assert Transfer(copies, policy, engine).send() > 0 and unequal(engine, expected) == []


def test_another_dtype_is_copied_and_a_tower_that_is_not_there_skipped() -> None:
    _, policy, engine, expected = case(Sizes(), engine_dtype=torch.bfloat16)
    copies = plan(shapes_of(policy), shapes_of(engine), geometry_of(Sizes()), tower=False)
    result = alias(copies, policy, engine)
    assert result.aliased == () and set(result.skipped) == {name for name in policy if ".visual." in name}
    assert set(result.copied) | set(result.skipped) == set(policy)
    Transfer(copies, policy, engine).send()
    assert unequal(engine, expected) == [name for name in expected if name.startswith("visual.")]


def test_tensors_of_inference_mode_are_no_place_for_parameters() -> None:
    copies, policy, engine, _ = case(Sizes())
    with torch.inference_mode():
        engine = {name: torch.zeros_like(tensor) for name, tensor in engine.items()}
    assert alias(copies, policy, engine).aliased == ()
