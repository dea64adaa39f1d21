"""Predicted activations against every storage that autograd saves in a forward pass of a real policy."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support import policies
from veripo_fast.model import recomputation, step
from veripo_fast.model.packing import pack
from veripo_fast.model.policy import Policy
from veripo_fast.model.shared_prefix import GroupSpan
from veripo_fast.schedule import activations, blocks
from veripo_fast.schedule.activations import Row, row_of, saved_bytes, tower_saved_bytes
from veripo_fast.schedule.shapes import read_shape

DTYPES = {"float32": (torch.float32, 4), "bfloat16": (torch.bfloat16, 2)}


def saved_by(policy: Policy, forward: Callable[[], object]) -> int:
    """Bytes of all storages that autograd saves, and of those from which it computes others again; weights left out."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in policy.model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}  # holds them, so that no address comes twice

    def keep(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage
        elif isinstance(value, (list, tuple)):
            [keep(item) for item in value]
        return value

    def pack(known: recomputation._Known, tensor: torch.Tensor) -> Any:
        packed = plain_pack(known, tensor)
        if isinstance(packed, torch.Tensor):
            keep(packed)
        else:
            keep([cell.cell_contents for cell in packed[0].compute.__closure__])
        return packed

    plain_pack = recomputation._Known.pack
    with pytest.MonkeyPatch.context() as patch, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        patch.setattr(recomputation._Known, "pack", pack)
        result = forward()
    assert result is not None
    return sum(storage.nbytes() for storage in kept.values())


@pytest.fixture(params=[(family, dtype) for family in policies.ALL_FAMILIES for dtype in DTYPES], ids="-".join)
def typed(request: pytest.FixtureRequest) -> object:
    """A policy in a dtype, which is float32 again afterwards."""
    family, dtype = request.param
    with policies.typed(family, DTYPES[dtype][0]) as policy:
        yield policy, read_shape(policies.checkpoint(family)), DTYPES[dtype][1]


@pytest.mark.parametrize(("groups", "completions", "length"), [(1, 4, 17), (2, 3, 40), (3, 8, 5), (1, 2, 150)])
def test_language_model(typed, groups: int, completions: int, length: int) -> None:
    policy, shape, itemsize = typed
    item = policies.loaded(policy, [("video", 8, 4, 4)])
    written = policies.random_completions([length] * completions)
    batch = pack([(item.encoded, written)] * groups)
    row = Row(groups, len(item.encoded.token_ids), completions, length)
    assert row.tokens == len(batch.token_ids) and row.predicted == len(batch.targets)

    saved = saved_by(policy, lambda: policy.hidden(batch, [item.features] * groups))

    predicted = saved_bytes(shape, row, itemsize, masked=True, checkpointing=False, trimmed=shape.trims_last_layer())
    assert predicted == pytest.approx(saved, rel=0.02)


@pytest.mark.parametrize("family", policies.FAMILIES)
def test_outputs_that_nothing_computes_again(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Liger's modules leave to the linear layers behind them is what ours leave without the hooks."""
    policy, shape = policies.policy(family), read_shape(policies.checkpoint(family))
    item = policies.loaded(policy, [("video", 8, 4, 4)])
    batch = pack([(item.encoded, policies.random_completions([30] * 4))])
    row = Row(1, len(item.encoded.token_ids), 4, 30)
    computed_again = saved_by(policy, lambda: policy.hidden(batch, [item.features]))
    monkeypatch.setattr(step, "recomputing", nullcontext)
    more = saved_by(policy, lambda: policy.hidden(batch, [item.features])) - computed_again

    unread = row.unread * (shape.hidden + shape.intermediate) * 4  # of the trimmed last layer
    copies = (shape.layers - 1) * row.tokens * shape.queries * 4  # of what attention read, which stay computed again
    assert activations.liger_bytes(shape, row, 4) - unread + copies == pytest.approx(more, rel=0.02)


def test_tower(typed) -> None:
    policy, shape, itemsize = typed
    media = policies.random_media(policy.encoder, [("video", 8, 4, 6)])

    saved = saved_by(policy, lambda: policy.vision_features_of([media]))

    predicted = tower_saved_bytes(shape.tower, int(media.grid_thw.prod()), itemsize)
    assert predicted == pytest.approx(saved, rel=0.05)


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3_5_moe"])
def test_gradient_checkpointing_keeps_one_input_a_layer(family: str) -> None:
    policy, shape = policies.policy(family), read_shape(policies.checkpoint(family))
    item = policies.loaded(policy, [("video", 8, 4, 4)])
    batch = pack([(item.encoded, policies.random_completions([30] * 4))])
    row = Row(1, len(item.encoded.token_ids), 4, 30)
    policy.model.gradient_checkpointing_enable({"use_reentrant": False})
    policy.model.train()
    try:
        saved = saved_by(policy, lambda: policy.hidden(batch, [item.features]))
    finally:
        policy.model.gradient_checkpointing_disable()
        policy.model.eval()
    kept = saved_bytes(shape, row, 4, masked=True, checkpointing=True, trimmed=shape.trims_last_layer())
    kept -= activations.layer_bytes(shape, row, 4, True)
    kept -= (row.mask_numbers + row.tokens * 2 * shape.queries // shape.heads) * 4  # masks and angles, held otherwise
    assert kept == pytest.approx(saved, rel=0.1), "one layer more is there while it runs again"


def test_blocks_are_those_of_the_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "MAX_MASK_ELEMENTS", 5000)
    span = GroupSpan(0, 90, (16,) * 7)
    assert Row(1, 90, 7, 17).blocks() == [tokens for tokens, _ in span.blocks]
    assert len(span.blocks) > 2
    assert Row(1, 90, 7, 17).mask_numbers == sum(mask.numel() for _, mask in span.blocks)


def test_constants_are_those_of_the_kernels() -> None:
    from veripo_kernels import linear_torch, linear_triton

    from veripo_fast.model import delta_rule, layer_memory, shared_prefix, skinny
    from veripo_fast.schedule import layer_bytes, ledger, sampling
    from veripo_fast.video import buffers

    assert ledger.ROOM_BYTES == buffers.MAX_BYTES
    assert layer_bytes.CHUNK == delta_rule.CHUNK
    assert sampling.FEWEST_TOKENS == skinny.FEWEST_TOKENS
    assert sampling.MOST_SCORES == shared_prefix.MOST_SCORES
    assert sampling.MOST_SCORES_ON_GPU == shared_prefix.MOST_SCORES_ON_GPU
    for name in ("TILE", "WORKSPACE_BYTES", "RUN_BYTES"):
        assert getattr(activations, name) == getattr(linear_torch, name)
    assert activations.GPU_WORKSPACE_BYTES == linear_triton.WORKSPACE_BYTES == linear_triton.RUN_BYTES
    assert ledger.IDLE_BYTES == layer_memory.IDLE_BYTES


def test_a_gpu_holds_a_head_of_two_bytes_once_more() -> None:
    shape: Any = SimpleNamespace(vocabulary=1000, hidden=8, head_numbers=8000)
    logits = {size: activations.loss_bytes(shape, Row(1, 90, 7, 17), size, True)["logits"] for size in (2, 4)}
    assert logits[2] - logits[4] == 1000 * 8 * 2


@pytest.mark.parametrize(("share", "max_tokens", "tokens"), [(4, 10, 130), (4, 300, 300), (4, 10_000, 520)])
def test_rows_fill_up_to_the_limit_unless_a_group_is_larger(share: int, max_tokens: int, tokens: int) -> None:
    assert row_of(100, 3, 11, share, max_tokens).tokens == tokens
