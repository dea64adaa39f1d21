"""Which function computes the recurrent layers on a GPU. The kernels themselves need one; their choice does not."""

from __future__ import annotations

import logging
import sys
from types import ModuleType

import pytest
import torch

from veripo_fast.model import delta_fla, delta_layers
from veripo_fast.model.delta_rule import delta_rule, normalised

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def asked_anew():
    for function in (delta_fla.refusal, delta_layers.select):
        function.cache_clear()
    yield
    for function in (delta_fla.refusal, delta_layers.select):
        function.cache_clear()


def library(monkeypatch: pytest.MonkeyPatch, function) -> None:
    """A package `fla` with a function of that name and of its signature."""
    for name in ("fla", "fla.ops", "fla.ops.gated_delta_rule"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["fla.ops.gated_delta_rule"].chunk_gated_delta_rule = function


def by_sequence(query, key, value, *, g, beta, initial_state, output_final_state, use_qk_l2norm_in_kernel, cu_seqlens):
    """What fla documents: [1, T, H, d], sequences between `cu_seqlens`, a state for each."""
    assert output_final_state and use_qk_l2norm_in_kernel and g.dtype == torch.float32
    lengths = tuple(cu_seqlens.diff().tolist())
    out, state = delta_rule(query[0], key[0], value[0], g[0], beta[0], lengths, initial_state)
    return out[None], state


def test_what_the_kernels_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    library(monkeypatch, by_sequence)
    assert delta_fla.refusal(CPU) is None


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "fla", None)
    with caplog.at_level(logging.INFO):
        assert delta_layers.select(GPU) is delta_rule
        assert delta_layers.select(GPU) is delta_rule
    assert len(caplog.records) == 1, "said once"
    assert "torch, by chunks (fla cannot be imported: " in caplog.text and "veripo-fast[fla]" in caplog.text


@pytest.mark.parametrize("wrong", ["forgets its start", "does not decay", "is NaN"])
def test_kernels_that_are_wrong_are_passed_over(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    def broken(query, key, value, *, g, initial_state, **others):
        if wrong == "does not decay":
            g = g * 0.0
        out, state = by_sequence(query, key, value, g=g, initial_state=initial_state, **others)
        if wrong == "forgets its start":
            out, _ = by_sequence(query, key, value, g=g, initial_state=initial_state * 0.0, **others)
        return out * (float("nan") if wrong == "is NaN" else 1.0), state

    library(monkeypatch, broken)
    assert "is off by" in delta_fla.refusal(CPU)


def test_kernels_that_fail_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*sides, **options):
        raise RuntimeError("no kernel image\nfor this device")

    library(monkeypatch, failing)
    assert delta_fla.refusal(CPU) == "fails on a small example: RuntimeError no kernel image"


def test_normalised_rows_have_length_1() -> None:
    rows = torch.randn(5, 3, 16, dtype=torch.bfloat16)
    assert (normalised(rows).norm(dim=-1) - 1).abs().max() < 1e-5
