"""Memory that is used again: never while somebody holds it, never more of it than the bound."""

from __future__ import annotations

import gc
import threading

import pytest
import torch

from veripo_fast.video import buffers as module
from veripo_fast.video.buffers import Room

BYTES = 1 << 20  # what is smaller is not kept


def filled(room: Room, value: int, count: int = BYTES) -> torch.Tensor:
    return room.take((count,), torch.uint8).fill_(value)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32])
def test_a_buffer_comes_back_when_the_last_tensor_on_it_is_gone(dtype: torch.dtype) -> None:
    room = Room(10 * BYTES)
    first = room.take((3, 5, 1 << 17), dtype)
    assert first.shape == (3, 5, 1 << 17) and first.dtype == dtype
    assert first.is_contiguous() and first.data_ptr() % 64 == 0
    place, part = first.data_ptr(), first[1].view(torch.uint8)
    del first
    assert room.free_bytes == 0, "a view still holds it"
    other = room.take((3, 5, 1 << 17), dtype)
    assert other.data_ptr() != place
    del part
    assert room.free_bytes > 0
    assert room.take((3, 5, 1 << 17), dtype).data_ptr() == place


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of every buffer that is new."""
    sizes: list[int] = []
    plain = module.np.empty
    monkeypatch.setattr(module.np, "empty", lambda nbytes, dtype: sizes.append(nbytes) or plain(nbytes, dtype))
    return sizes


def test_a_buffer_is_taken_for_less_and_not_for_much_less(made: list[int]) -> None:
    room = Room(10 * BYTES)
    large, small = room.take((2 * BYTES,), torch.uint8), room.take((BYTES * 7 // 4,), torch.uint8)
    place = small.data_ptr()
    del large, small
    smaller = room.take((BYTES * 7 // 4 - 100,), torch.uint8)
    assert smaller.data_ptr() == place and len(made) == 2, "the smallest that does"
    room.take((BYTES * 5 // 4,), torch.uint8)
    assert len(made) == 3, "a third of the other would be wasted"


def test_sizes_that_take_turns_are_both_used_again(made: list[int]) -> None:
    """A short clip between two long ones must not cost the long one's memory."""
    room = Room(20 * BYTES)
    for _ in range(10):
        filled(room, 1, 8 * BYTES)
        filled(room, 2, 2 * BYTES)
    assert len(made) == 2


def test_what_is_small_is_left_to_the_system(made: list[int]) -> None:
    room = Room(20 * BYTES)
    del [filled(room, 1, 1000)][:]
    assert room.free_bytes == 0 and not made


def test_what_is_free_is_bounded_and_sizes_of_the_past_make_room(made: list[int]) -> None:
    room = Room(8 * BYTES)
    tensors = [filled(room, number, 2 * BYTES) for number in range(9)]
    del tensors
    assert room.free_bytes == 3 * made[0] <= 8 * BYTES
    for _ in range(3):
        filled(room, 9, 5 * BYTES)
    assert len(made) == 10 and room.free_bytes == made[9] + made[0]


def test_nothing_is_held_by_cycles_or_by_an_exception() -> None:
    room = Room(10 * BYTES)

    def fails() -> None:
        held = [filled(room, 1)]
        held.append(held)  # type: ignore[arg-type]
        raise ValueError

    with pytest.raises(ValueError):
        fails()
    gc.collect()
    assert room.free_bytes > 0


def test_many_threads_never_share_a_buffer() -> None:
    room, wrong = Room(8 * BYTES), []

    def work(number: int) -> None:
        for turn in range(200):
            tensor = filled(room, number, BYTES + turn * 8)
            if not bool((tensor == number).all()):
                wrong.append((number, turn))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and 0 < room.free_bytes <= 8 * BYTES
