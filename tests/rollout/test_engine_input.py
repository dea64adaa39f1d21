"""Where media lie in a prompt, and positions that are found again by tokens and media."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.support import policies
from tests.support.engine_runs import MEDIA, prompts_of
from veripo_fast.rollout.engine_input import PositionTable, media_of

MIXED = [("image", 2, 2, 3), ("video", 6, 2, 2), ("image", 2, 3, 3), ("video", 4, 2, 3)]


@pytest.mark.parametrize("family", policies.ALL_FAMILIES)
@pytest.mark.parametrize("vision", ["output", "pixels"])
def test_every_pad_belongs_to_one_medium(family: str, vision: str) -> None:
    """In the order of the text, whatever the order of kinds; what each gets is its own part of the values."""
    policy = policies.policy(family)
    for item in prompts_of(policy, [*MEDIA, MIXED]):
        media = item.encoded.media
        found = media_of(policy.encoder, item, vision)
        if media is None:
            assert found == []
            continue
        assert [medium.kind for medium in found] == list(media.kinds)
        ids = item.encoded.token_ids
        owned = torch.zeros(len(ids), dtype=torch.long)
        for medium, grid in zip(found, media.grid_thw, strict=True):
            span = slice(medium.first, medium.first + len(medium.is_pad))
            owned[span] += medium.is_pad
            assert torch.equal(medium.is_pad, ids[span] == policy.encoder.pad_ids[medium.kind])
            assert len(medium.values) == int(grid.prod()) // (4 if vision == "output" else 1)
            timed = medium.kind == "video" and family == "qwen2_5_vl"
            assert (medium.seconds_per_grid is not None) == timed
        assert torch.equal(owned.bool(), torch.isin(ids, torch.tensor(list(policy.encoder.pad_ids.values()))))
        assert owned.max() == 1
        if vision == "output":
            own = torch.cat([item.features.embeddings, *item.features.deepstack], 1)
            assert torch.equal(torch.cat([medium.values for medium in found]), own)
        else:
            assert torch.equal(torch.cat([medium.values for medium in found]), media.pixel_values)
        assert len({medium.key for medium in found}) == len(found)


def test_both_forms_have_other_keys() -> None:
    """One cached under the key of the other would be read as something else."""
    policy = policies.policy("qwen3_vl")
    (item,) = prompts_of(policy, [MIXED])
    keys = [{medium.key for medium in media_of(policy.encoder, item, vision)} for vision in ("output", "pixels")]
    assert keys[0].isdisjoint(keys[1])


def test_positions_of_a_prompt_and_of_what_follows() -> None:
    policy = policies.policy("qwen2_5_vl")
    items = prompts_of(policy)
    table = PositionTable()
    for number, item in enumerate(items):
        table.add(item.encoded, [f"key-{number}"])
    for number, item in enumerate(items):
        ids = item.encoded.token_ids.tolist()
        positions, delta = table.find(ids, [f"key-{number}"])
        assert torch.equal(positions, item.encoded.positions) and len(ids) + delta == item.encoded.next_position
        longer, same = table.find([*ids, 30, 31], [f"key-{number}"])
        assert same == delta and torch.equal(longer[:, :len(ids)], item.encoded.positions)
        assert longer[:, len(ids):].tolist() == [[item.encoded.next_position, item.encoded.next_position + 1]] * 3
        assert table.find(ids, ["another video"]) is None and table.find(ids[:-1], [f"key-{number}"]) is None
    table.clear()
    assert table.find(items[0].encoded.token_ids.tolist(), ["key-0"]) is None


def test_equal_tokens_with_other_media_have_their_own_positions() -> None:
    policy = policies.policy("qwen2_5_vl")
    wide, high = prompts_of(policy, [[("video", 4, 2, 3)], [("video", 4, 3, 2)]])
    assert torch.equal(wide.encoded.token_ids, high.encoded.token_ids)
    table = PositionTable()
    table.add(wide.encoded, ["wide"])
    table.add(replace(high.encoded), ["high"])
    ids = wide.encoded.token_ids.tolist()
    assert torch.equal(table.find(ids, ["high"])[0], high.encoded.positions)
    assert torch.equal(table.find(ids, ["wide"])[0], wide.encoded.positions)
