"""The gated delta rule by chunks, against the rule itself token by token and against transformers' function."""

from __future__ import annotations

import pytest
import torch
from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule

from veripo_fast.model.delta_rule import CHUNK, chunk_plan, delta_rule, delta_step

KEY_HEADS, HEADS, KEY_DIM, VALUE_DIM = 2, 4, 8, 12
LENGTHS = [(1,), (CHUNK,), (CHUNK + 1, 3), (3, 2 * CHUNK + 5, 1, CHUNK), (7, 7, 7)]


def inputs(tokens: int, sequences: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """query, key, value, decay, strength and the states at the start."""
    generator = torch.Generator().manual_seed(tokens)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return [random(tokens, KEY_HEADS, KEY_DIM), random(tokens, KEY_HEADS, KEY_DIM), random(tokens, HEADS, VALUE_DIM),
            -random(tokens, HEADS).exp(), random(tokens, HEADS).sigmoid(),
            random(sequences, HEADS, KEY_DIM, VALUE_DIM)]


def by_token(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, decay: torch.Tensor, strength: torch.Tensor,
             lengths: tuple[int, ...], initial: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition."""
    outputs, finals, start = [], [], 0
    for number, length in enumerate(lengths):
        state = initial[number:number + 1]
        for token in range(start, start + length):
            own = slice(token, token + 1)
            out, state = delta_step(query[own], key[own], value[own], decay[own], strength[own], state)
            outputs.append(out)
        finals.append(state)
        start += length
    return torch.cat(outputs), torch.cat(finals)


@pytest.mark.parametrize("lengths", LENGTHS)
def test_chunks_are_the_rule_forward_and_backward(lengths: tuple[int, ...]) -> None:
    sides = inputs(sum(lengths), len(lengths))
    upstream = torch.randn(sum(lengths), HEADS, VALUE_DIM, dtype=torch.float64)
    results = []
    for function in (by_token, delta_rule):
        leaves = [side.clone().requires_grad_() for side in sides]
        out, final = function(*leaves[:5], lengths, leaves[5])
        loss = (out * upstream).sum() + (final ** 2).sum()
        results.append([out, final, *torch.autograd.grad(loss, leaves)])
    for exact, ours in zip(*results, strict=True):
        assert (ours - exact).norm() <= 1e-10 * exact.norm()


@pytest.mark.parametrize("length", [1, CHUNK - 1, 2 * CHUNK, 2 * CHUNK + 9])
def test_one_sequence_is_as_transformers_has_it(length: int) -> None:
    query, key, value, decay, strength, initial = inputs(length, 1, torch.float32)
    theirs, state = torch_chunk_gated_delta_rule(
        query.repeat_interleave(2, 1)[None], key.repeat_interleave(2, 1)[None], value[None], decay[None],
        strength[None], initial_state=initial, output_final_state=True, use_qk_l2norm_in_kernel=True)
    ours, final = delta_rule(query, key, value, decay, strength, (length,), initial)
    assert (ours - theirs[0]).norm() <= 1e-5 * ours.norm() and (final - state).norm() <= 1e-5 * final.norm()


def test_no_state_is_a_state_of_zeros() -> None:
    query, key, value, decay, strength, initial = inputs(90, 2)
    without = delta_rule(query, key, value, decay, strength, (70, 20))
    zeros = delta_rule(query, key, value, decay, strength, (70, 20), torch.zeros_like(initial))
    assert all(torch.equal(one, other) for one, other in zip(without, zeros, strict=True))


def test_a_sequence_does_not_see_the_others() -> None:
    """Not by a bit: neither the other sequences of a batch, nor tokens that stand where a chunk is not full."""
    lengths = (5, CHUNK + 3, 70)
    sides = inputs(sum(lengths), 3, torch.float32)
    changed = [side.clone() for side in sides[:5]]
    own = slice(5, 5 + CHUNK + 3)
    for side in changed:
        side[own] = side[own].flip(0) * 0.9
    before, after = (delta_rule(*given, lengths, sides[5]) for given in (sides[:5], changed))
    for (one, state), others in ((before, after),):
        assert torch.equal(one[:5], others[0][:5]) and torch.equal(one[own.stop:], others[0][own.stop:])
        assert torch.equal(state[[0, 2]], others[1][[0, 2]])
        assert not torch.allclose(one[own], others[0][own])


def test_the_plan_holds_every_token_once() -> None:
    plan = chunk_plan((3, 2 * CHUNK + 5, 1, CHUNK), torch.device("cpu"))
    assert plan.counts == (4, 1, 1)
    assert plan.rows[plan.places].tolist() == list(range(3 + 2 * CHUNK + 5 + 1 + CHUNK))
    assert int(plan.filled.sum()) == len(plan.places)
