"""Steps of an engine -> the experts of each request: chunks, other orders of rows, prefixes of others, preemption."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from veripo_fast.rollout.vllm_experts import ExpertRecorder

LAYERS, TOP_K, BLOCK = 3, 2, 4


@dataclass
class Request:
    """What the recorder reads of vLLM's."""

    request_id: str
    num_prompt_tokens: int
    num_tokens: int
    block_hashes: list[str] = field(default_factory=list)


def chosen(mark: int, first: int, count: int) -> np.ndarray:
    """int16 [count, layers, k] that tell whose they are, and where."""
    tokens = np.arange(first, first + count)
    return np.stack([np.stack([tokens, mark + 10 * layer + 0 * tokens], -1) for layer in range(LAYERS)], 1
                    ).astype(np.int16)


def run(recorder: ExpertRecorder, *parts: tuple[Request, int, int, int], padding: int = 0) -> None:
    """One step: (request, first token, tokens, mark) in the order of rows; vLLM may pad behind them."""
    rows = np.concatenate([*(chosen(mark, first, count) for _, first, count, mark in parts),
                           np.full((padding, LAYERS, TOP_K), 77, np.int16)])
    for layer in range(LAYERS):
        recorder.capture(layer, torch.from_numpy(rows[:, layer]).int())
    recorder.read_step([(request, first, count) for request, first, count, _ in parts])


def test_chunks_and_rows_that_change_places() -> None:
    recorder = ExpertRecorder(LAYERS, TOP_K, BLOCK)
    one, other = Request("a", 6, 9), Request("b", 3, 6)
    run(recorder, (one, 0, 5, 1), padding=3)
    run(recorder, (other, 0, 3, 2), (one, 5, 1, 1))
    run(recorder, (one, 6, 1, 1), (other, 3, 1, 2))
    run(recorder, (other, 4, 1, 2), (one, 7, 1, 1), padding=1)
    assert np.array_equal(recorder.finished("a"), chosen(1, 0, 8))
    assert np.array_equal(recorder.finished("b"), chosen(2, 0, 5))


def test_a_step_that_ran_ahead_is_cut() -> None:
    """The last token was sampled and not read; what an engine ran behind it is nobody's."""
    recorder = ExpertRecorder(LAYERS, TOP_K, BLOCK)
    one = Request("a", 2, 4)
    run(recorder, (one, 0, 2, 1))
    run(recorder, (one, 2, 1, 1))
    run(recorder, (one, 3, 1, 1))
    assert np.array_equal(recorder.finished("a"), chosen(1, 0, 3))


def test_a_prefix_is_that_of_the_request_that_ran_it() -> None:
    """Also in the same step and behind it in the rows; further tokens are its own."""
    recorder = ExpertRecorder(LAYERS, TOP_K, BLOCK)
    one = Request("a", 10, 11, ["x", "y"])
    other = Request("b", 9, 11, ["x", "y"])
    run(recorder, (other, 8, 1, 2), (one, 0, 10, 1))
    run(recorder, (other, 9, 1, 2))
    assert np.array_equal(recorder.finished("a"), chosen(1, 0, 10))
    assert np.array_equal(recorder.finished("b"), np.concatenate([chosen(1, 0, 8), chosen(2, 8, 2)]))


def test_a_prefix_of_a_prefix() -> None:
    """The second block was run by a request that had the first one from the cache."""
    recorder = ExpertRecorder(LAYERS, TOP_K, BLOCK)
    first, second, third = Request("a", 4, 6, ["x"]), Request("b", 8, 10, ["x", "y"]), Request("c", 9, 10, ["x", "y"])
    run(recorder, (first, 0, 4, 1))
    run(recorder, (first, 4, 1, 1), (second, 4, 4, 2))
    run(recorder, (second, 8, 1, 2), (third, 8, 1, 3))
    assert np.array_equal(recorder.finished("c"), np.concatenate(
        [chosen(1, 0, 4), chosen(2, 4, 4), chosen(3, 8, 1)]))


def test_completions_start_no_other_request() -> None:
    recorder = ExpertRecorder(LAYERS, TOP_K, BLOCK)
    one, other = Request("a", 4, 10, ["x", "y"]), Request("b", 9, 10, ["x", "y"])
    run(recorder, (one, 0, 4, 1))
    run(recorder, (one, 4, 4, 1))
    run(recorder, (other, 8, 1, 2))
    found = recorder.finished("b")
    assert np.array_equal(found[:4], chosen(1, 0, 4)) and np.array_equal(found[8:], chosen(2, 8, 1))
    assert (found[4:8] == -1).all(), "not known, and said so"


def test_a_request_that_runs_again_keeps_its_first_choice() -> None:
    recorder = ExpertRecorder(LAYERS, TOP_K, BLOCK)
    one = Request("a", 5, 9, ["x", "y"])
    run(recorder, (one, 0, 5, 1))
    run(recorder, (one, 5, 1, 1))
    run(recorder, (one, 4, 3, 2))
    run(recorder, (one, 7, 1, 2))
    assert np.array_equal(recorder.finished("a"), np.concatenate([chosen(1, 0, 6), chosen(2, 6, 2)]))


def test_what_the_cache_forgets_is_forgotten() -> None:
    recorder = ExpertRecorder(LAYERS, TOP_K, BLOCK)
    run(recorder, (Request("a", 4, 5, ["x"]), 0, 4, 1))
    recorder.forget()
    run(recorder, (Request("b", 5, 6, ["x"]), 4, 1, 2))
    found = recorder.finished("b")
    assert (found[:4] == -1).all() and np.array_equal(found[4:], chosen(2, 4, 1))
    with pytest.raises(KeyError):
        recorder.finished("a")
