"""The order of prompts is a pure function of (seed, position), and the skip log lists every item once."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from veripo_fast.data.order import PromptOrder
from veripo_fast.data.skipped import Skipped, SkippedLog


def test_every_prompt_once_per_epoch_and_reshuffled() -> None:
    order = PromptOrder(10, seed=3)
    first, position = order.take(0, 10)
    second, position = order.take(position, 10)
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert position == 20
    assert PromptOrder(10, seed=4).take(0, 10)[0] != first


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(0, 5), st.integers(1, 4), st.integers(1, 9), st.integers(1, 12))
def test_ranks_together_take_what_one_would(prompts: int, seed: int, ranks: int, count: int, steps: int) -> None:
    alone, together, position = PromptOrder(prompts, seed), [], 0
    for _ in range(steps):
        taken = [PromptOrder(prompts, seed, rank, ranks).take(position, count) for rank in range(ranks)]
        assert len({after for _, after in taken}) == 1
        together += [index for indices, _ in taken for index in indices]
        position = taken[0][1]
    assert together == alone.take(0, steps * count * ranks)[0]
    whole = len(together) // prompts * prompts
    assert all(sorted(together[i:i + prompts]) == list(range(prompts)) for i in range(0, whole, prompts))


def test_resuming_needs_the_position_alone() -> None:
    straight, _ = PromptOrder(7, 0).take(0, 20)
    head, position = PromptOrder(7, 0).take(0, 11)
    tail, _ = PromptOrder(7, 0).take(position, 9)
    assert head + tail == straight


def test_the_order_never_changes() -> None:
    assert PromptOrder(8, seed=0).take(0, 8)[0] == EXPECTED


EXPECTED = [7, 0, 1, 5, 3, 4, 2, 6]


def test_order_checks_its_arguments() -> None:
    with pytest.raises(ValueError, match="num_prompts must be at least 1, got 0"):
        PromptOrder(0, 0)
    with pytest.raises(ValueError, match=r"rank must be in \[0, 2\), got 2"):
        PromptOrder(4, 0, rank=2, world_size=2)


def test_skipped_log_lists_every_item_once_also_after_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "run" / "skipped.jsonl"
    items = [Skipped("d.jsonl:1", "a.mp4", "is empty"), Skipped("d.jsonl:2", "b.mp4", "does not exist")]
    log = SkippedLog(path)
    assert not path.exists()
    assert log.add(*items, items[0]) == 2
    assert log.add(items[1]) == 0
    path.write_bytes(path.read_bytes()[:-5])  # killed while writing the second
    assert SkippedLog(path).add(*items) == 1
    lines = path.read_text().splitlines()
    assert len(lines) == 2, "the torn line was cut"
    assert json.loads(lines[0]) == {"record": "d.jsonl:1", "path": "a.mp4", "reason": "is empty"}
    assert json.loads(lines[1])["path"] == "b.mp4"
