"""Attention backends of a packed row against the SDPA definition: index arithmetic, plumbing, choice, and real kernels.

Libraries that need a GPU are stood in for by plain torch functions with their signatures, so that everything around the
kernels runs on the CPU; the kernels themselves run where there is a GPU.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from tests.support import policies
from veripo_fast.config.inputs import ModelConfig
from veripo_fast.errors import ConfigError
from veripo_fast.model import attention as backends
from veripo_fast.model import packed_attention, shared_prefix
from veripo_fast.model.attention import PROBE, AttentionShape
from veripo_fast.model.packing import pack
from veripo_fast.model.policy import load_policy
from veripo_fast.model.shared_prefix import GroupSpan

CPU = torch.device("cpu")
SHAPE = AttentionShape(CPU, torch.float32, heads=6, key_heads=2, head_size=16)
ROWS = {
    "one_group": (GroupSpan(0, 5, (3, 1, 4)),),
    "no_completions": (GroupSpan(0, 4), GroupSpan(4, 9)),
    "one_completion": (GroupSpan(0, 7, (5,)), GroupSpan(12, 3, (2,))),
    "empty_completions": (GroupSpan(0, 2, (0, 0, 3, 0, 2)), GroupSpan(7, 3, (0, 0))),
    "block_edges": (GroupSpan(0, 128, (128, 129, 1)), GroupSpan(386, 127, (1, 130))),
    "probe": PROBE,
}
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: the kernels have no CPU version")


@pytest.fixture(autouse=True)
def forget_choices() -> Iterator[None]:
    """The choice and the libraries behind it are looked up once per process."""
    backends.select.cache_clear()
    packed_attention._varlen_function.cache_clear()
    yield
    backends.select.cache_clear()
    packed_attention._varlen_function.cache_clear()


def sides(groups: tuple[GroupSpan, ...], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Random query, key and value of a packed row."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, heads, groups[-1].end, 16, generator=generator, dtype=torch.float64).to(dtype)
            for heads in (6, 2, 2)]


def loop_varlen(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_q: torch.Tensor, cu_k: torch.Tensor,
                scaling: float | None, from_the_end: bool = True) -> torch.Tensor:
    """Varlen attention written out: one sequence and one softmax after another, causal from the last key.

    Adds in more than the precision of its inputs, as the kernels that it stands for do: what remains is our own error.
    """
    wider = torch.float32 if query.dtype == torch.bfloat16 else torch.float64
    dtype, repeat = query.dtype, query.shape[1] // key.shape[1]
    query, key, value = (side.to(wider) for side in (query, key, value))
    out = []
    for s in range(len(cu_q) - 1):
        q, k, v = query[cu_q[s]:cu_q[s + 1]], key[cu_k[s]:cu_k[s + 1]], value[cu_k[s]:cu_k[s + 1]]
        k, v = (side.repeat_interleave(repeat, 1) for side in (k, v))
        hidden = torch.ones(len(q), len(k), dtype=torch.bool).triu(1 + (len(k) - len(q) if from_the_end else 0))
        scores = torch.einsum("qhd,khd->hqk", q, k) * (scaling or q.shape[-1] ** -0.5)
        out.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, float("-inf")).softmax(-1), v))
    return torch.cat(out).to(dtype)


def flash_stand_in(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor,
                   cu_seqlens_k: torch.Tensor, max_seqlen_q: int, max_seqlen_k: int, softmax_scale: float | None = None,
                   causal: bool = False, return_lse: bool = True) -> Any:
    """The arguments that flash-attn 2, 3 and 4 share."""
    assert causal and cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert (max_seqlen_q, max_seqlen_k) == (int(cu_seqlens_q.diff().max()), int(cu_seqlens_k.diff().max()))
    assert len(q) == cu_seqlens_q[-1] and len(k) == len(v) == cu_seqlens_k[-1]
    out = loop_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale)
    return (out, None) if return_lse else out


def plain_flash_stand_in(*args: Any, **options: Any) -> Any:
    """As flash-attn 2 gives its output: alone."""
    return flash_stand_in(*args, **options, return_lse=False)


def torch_stand_in(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seq_q: torch.Tensor,
                   cu_seq_k: torch.Tensor, max_q: int, max_k: int, *, return_aux: Any = None,
                   scale: float | None = None, window_size: tuple[int, int] = (-1, -1),
                   enable_gqa: bool = False) -> torch.Tensor:
    """torch 2.13's varlen_attn."""
    assert window_size == (-1, 0), "not causal"
    assert enable_gqa, "fewer key heads without consent"
    return plain_flash_stand_in(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, True)


def older_torch_stand_in(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seq_q: torch.Tensor,
                         cu_seq_k: torch.Tensor, max_q: int, max_k: int, *, scale: float | None = None,
                         window_size: tuple[int, int] = (-1, -1)) -> torch.Tensor:
    """torch 2.11's, which does not know enable_gqa."""
    return torch_stand_in(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size,
                          enable_gqa=True)


STAND_INS = [("flash2", plain_flash_stand_in), ("flash3", plain_flash_stand_in), ("flash3", flash_stand_in),
             ("flash4", flash_stand_in), ("varlen", torch_stand_in), ("varlen", older_torch_stand_in)]


def install(monkeypatch: pytest.MonkeyPatch, name: str, function: Callable[..., Any] | None) -> None:
    """Put a stand-in where a library would be; None: the library is not there."""
    library = packed_attention.LIBRARIES[name]
    module: Any = None if function is None else ModuleType(library.module)
    if function is not None:
        setattr(module, library.function, function)
    monkeypatch.setitem(sys.modules, library.module, module)


# -- index arithmetic --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", ROWS)
def test_a_sequence_has_its_own_queries_and_all_the_keys_it_may_see(row: str) -> None:
    groups = ROWS[row]
    plan = packed_attention.varlen_plan(groups, CPU)
    run, prompt_run = (part.tolist() for part in packed_attention.token_runs(groups, CPU))
    assert plan.cu_seqlens_q[-1] == groups[-1].end
    assert plan.cu_seqlens_q.diff().min() > 0, "a sequence without queries"
    for s in range(len(plan.cu_seqlens_q) - 1):
        queries = list(range(plan.cu_seqlens_q[s], plan.cu_seqlens_q[s + 1]))
        keys = plan.key_index[plan.cu_seqlens_k[s]:plan.cu_seqlens_k[s + 1]].tolist()
        for back, query in enumerate(reversed(queries)):  # causal from the end
            expected = [k for k in range(query + 1) if run[k] in (run[query], prompt_run[query])]
            assert keys[:len(keys) - back] == expected


def test_the_prompt_is_copied_once_less_than_there_are_completions() -> None:
    plan = packed_attention.varlen_plan((GroupSpan(0, 100, (4, 0, 4, 4)), GroupSpan(112, 50, (6,))), CPU)
    assert plan.cu_seqlens_q.tolist() == [0, 104, 108, 112, 168]
    assert plan.cu_seqlens_k.tolist() == [0, 104, 208, 312, 368]
    assert (plan.max_seqlen_q, plan.max_seqlen_k) == (104, 104)
    assert [len(tokens) for tokens, _ in plan.copies] == [168, 100, 100]


def test_keys_are_not_copied_where_every_token_is_in_one_sequence() -> None:
    plan = packed_attention.varlen_plan(ROWS["one_completion"], CPU)
    keys = torch.randn(17, 2, 4)
    assert packed_attention.copy_keys(keys, plan) is keys
    assert torch.equal(plan.key_index, torch.arange(17))


def test_gradients_of_copied_keys() -> None:
    plan = packed_attention.varlen_plan(ROWS["empty_completions"], CPU)
    keys = torch.randn(10, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda k: packed_attention.copy_keys(k, plan), (keys,))


def test_copies_are_added_in_float32_and_rounded_once() -> None:
    plan = packed_attention.varlen_plan((GroupSpan(0, 2, (1,) * 384),), CPU)
    keys = torch.zeros(386, 1, 1, dtype=torch.bfloat16, requires_grad=True)
    upstream = torch.ones(len(plan.key_index), 1, 1, dtype=torch.bfloat16)
    (grad,) = torch.autograd.grad(packed_attention.copy_keys(keys, plan), keys, upstream)
    assert grad[:3].flatten().tolist() == [384.0, 384.0, 1.0]  # in bfloat16 256 + 1 is 256


# -- varlen calls ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "function"), STAND_INS)
@pytest.mark.parametrize("row", ROWS)
def test_varlen_call_computes_the_definition(name: str, function: Callable[..., Any], row: str,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, name, function)
    assert backends.disagreement(backends.ATTEND[name], SHAPE, ROWS[row]) is None


def test_bfloat16_stays_within_twice_the_error_of_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "flash2", plain_flash_stand_in)
    shape = AttentionShape(CPU, torch.bfloat16, heads=6, key_heads=2, head_size=16)
    assert backends.disagreement(backends.ATTEND["flash2"], shape) is None


def wrong_alignment(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, softmax_scale: float, **lengths: Any) -> Any:
    return loop_varlen(q, k, v, lengths["cu_seqlens_q"], lengths["cu_seqlens_k"], softmax_scale, from_the_end=False)


def default_scale(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> Any:
    return plain_flash_stand_in(q, k, v, **{**options, "softmax_scale": None})


def no_gradient_of_values(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> Any:
    return plain_flash_stand_in(q, k, v.detach() + 0 * v, **options)


def nan_rows(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> Any:
    out = plain_flash_stand_in(q, k, v, **options)
    return torch.where(torch.arange(len(out))[:, None, None] == 7, torch.nan, out)


WRONG = [(wrong_alignment, "output"), (default_scale, "output"), (no_gradient_of_values, "gradient of the value"),
         (nan_rows, "output")]


@pytest.mark.parametrize(("function", "part"), WRONG)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_kernel_is_found_out(function: Callable[..., Any], part: str, dtype: torch.dtype,
                                     monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "flash2", function)
    shape = AttentionShape(CPU, dtype, heads=6, key_heads=2, head_size=16)
    sentence = backends.disagreement(backends.ATTEND["flash2"], shape)
    assert sentence is not None and f"its {part} is off by" in sentence


@pytest.mark.parametrize("family", policies.FAMILIES)
def test_a_policy_runs_on_the_registered_name(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    install(monkeypatch, "flash3", lambda *args, **options: calls.append(1) or flash_stand_in(*args, **options))
    policy = policies.policy(family)
    prompt = policies.encoded(policy.encoder, [("video", 4, 2, 2)])
    batch = pack([(prompt, policies.random_completions([6, 1, 3])), (prompt, policies.random_completions([2, 5]))])
    with torch.no_grad():
        features = [policy.vision_features(prompt.media)] * 2
        plain = policy.completion_logprobs(batch, features)
        assert not calls
        policy.model.model.language_model.set_attn_implementation(backends.implementation("flash3"))
        try:
            got = policy.completion_logprobs(batch, features)
        finally:
            policy.model.model.language_model.set_attn_implementation(shared_prefix.NAME)
    assert len(calls) == policy.num_layers
    assert (got - plain).abs().max() < 1e-5


# -- FlexAttention -----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("row", ROWS)
def test_flex_attention_on_the_cpu_computes_the_definition(row: str) -> None:
    groups = ROWS[row]
    exact = shared_prefix.attend_packed(*sides(groups, torch.float64), groups, 0.2)
    got = packed_attention.attend_flex(*sides(groups), groups, 0.2)
    # scores of up to 3 from 16 products, an exponential, a mean: eight roundings of half a step of the largest value
    assert (got - exact).abs().max() <= 4 * torch.finfo(torch.float32).eps * exact.abs().max()


@pytest.mark.parametrize("row", ROWS)
def test_block_mask_is_what_torch_makes_of_the_whole_mask(row: str) -> None:
    groups = ROWS[row]
    ours = packed_attention.flex_block_mask(groups, CPU)
    run, prompt_run = packed_attention.token_runs(groups, CPU)
    query = torch.arange(len(run))[:, None]
    dense = (query >= query.T) & ((run == run[:, None]) | (run == prompt_run[:, None]))
    theirs = create_block_mask(lambda b, h, q, k: dense[q, k], 1, 1, len(run), len(run), device="cpu")
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    for blocks in ("kv", "full_kv", "q", "full_q"):
        counts = getattr(ours, f"{blocks}_num_blocks")
        assert torch.equal(counts, getattr(theirs, f"{blocks}_num_blocks"))
        rows = zip(*(getattr(mask, f"{blocks}_indices")[0, 0] for mask in (ours, theirs)), counts[0, 0], strict=True)
        assert all(torch.equal(mine[:count], other[:count]) for mine, other, count in rows)


# -- choice ------------------------------------------------------------------------------------------------------------


def pretend_gpu(monkeypatch: pytest.MonkeyPatch, major: int,
                installed: dict[str, Callable[..., Any]]) -> AttentionShape:
    """A bf16 shape on a GPU of compute capability major.0 with these libraries; trials run on the CPU."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (major, 0))
    for name in packed_attention.LIBRARIES:
        install(monkeypatch, name, installed.get(name))
    trial = backends.disagreement
    monkeypatch.setattr(backends, "disagreement", lambda attend, shape: trial(
        attend, AttentionShape(CPU, torch.float32, shape.heads, shape.key_heads, shape.head_size)))
    monkeypatch.setitem(backends.ATTEND, "flex", shared_prefix.attend_packed)
    return AttentionShape(torch.device("cuda"), torch.bfloat16, heads=6, key_heads=2, head_size=16)


EVERYTHING: dict[str, Callable[..., Any]] = {
    "flash2": plain_flash_stand_in, "flash3": plain_flash_stand_in, "flash4": flash_stand_in, "varlen": torch_stand_in}


@pytest.mark.parametrize(("major", "missing", "expected"), [
    (9, (), "flash3"), (9, ("flash3",), "flash4"), (9, ("flash3", "flash4"), "varlen"), (10, (), "flash4"),
    (8, (), "varlen"), (8, ("varlen",), "flash2"), (7, (), "flex")])
def test_auto_takes_the_best_that_is_there(major: int, missing: tuple[str, ...], expected: str,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {name: function for name, function in EVERYTHING.items() if name not in missing}
    assert backends.select("auto", pretend_gpu(monkeypatch, major, installed)) == expected


def test_auto_says_once_what_it_took_and_why_not_another(monkeypatch: pytest.MonkeyPatch,
                                                         caplog: pytest.LogCaptureFixture) -> None:
    shape = pretend_gpu(monkeypatch, 9, {"flash3": wrong_alignment, "varlen": torch_stand_in})
    with caplog.at_level(logging.INFO, "veripo_fast"):
        assert backends.select("auto", shape) == backends.select("auto", shape) == "varlen"
    (line,) = caplog.messages
    assert line.startswith("attention: varlen (flash3: its output is off by ")
    assert "flash4: cannot be imported (" in line and "flash_attn.cute" in line


def refuses(*args: Any, **options: Any) -> Any:
    raise RuntimeError("no kernel image is available\nmore lines")


def test_a_kernel_that_fails_is_passed_over(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    shape = pretend_gpu(monkeypatch, 8, {"varlen": refuses})
    with caplog.at_level(logging.INFO, "veripo_fast"):
        assert backends.select("auto", shape) == "flex"
    assert "varlen: fails on a small example (RuntimeError no kernel image is available);" in caplog.text


def test_auto_on_the_cpu_is_the_definition(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "veripo_fast"):
        assert backends.select("auto", SHAPE) == "sdpa"
    assert caplog.messages == ["attention: sdpa (flash3, flash4, varlen, flash2, flex: needs a GPU, not cpu)"]


@pytest.mark.parametrize(("backend", "change", "reason"), [
    ("flash3", {"device": CPU}, "needs a GPU, not cpu"),
    ("flex", {"device": CPU}, "needs a GPU, not cpu"),
    ("varlen", {"dtype": torch.float32}, "computes in bfloat16 or float16, not float32"),
    ("flash3", {}, "has no kernel for compute capability 8.x"),
    ("flash2", {"head_size": 20}, "takes heads of up to 256 in steps of 8, not 20"),
    ("flash2", {"head_size": 264}, "takes heads of up to 256 in steps of 8, not 264"),
    ("flash2", {}, "cannot be imported ("),
    ("varlen", {}, "torch.nn.attention.varlen has no varlen_attn"),
])
def test_naming_one_that_cannot_run_says_why(backend: str, change: dict[str, Any], reason: str,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    shape = pretend_gpu(monkeypatch, 8, {})
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", ModuleType("empty"))
    with pytest.raises(ConfigError, match=f"model.attention is '{backend}', which cannot be used: ") as caught:
        backends.select(backend, AttentionShape(**{**vars(shape), **change}))
    assert reason in str(caught.value)


def test_the_option_reaches_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(policies.checkpoint("qwen3_vl"))
    with pytest.raises(ConfigError, match="'flash3', which cannot be used: needs a GPU, not cpu"):
        load_policy(ModelConfig(path=path, device="cpu", attention="flash3"))
    install(monkeypatch, "flash3", plain_flash_stand_in)
    monkeypatch.setattr(backends, "refusal", lambda backend, shape: None)
    policy = load_policy(ModelConfig(path=path, device="cpu", attention="flash3"))
    chosen = policy.model.model.language_model.config._attn_implementation
    assert chosen == backends.implementation("flash3") == "veripo_shared_prefix_fa3"


def test_the_shape_is_read_from_the_model() -> None:
    for family in policies.FAMILIES:
        assert AttentionShape.of(policies.policy(family).model) == AttentionShape(CPU, torch.float32, 4, 2, 32)


# -- real kernels ------------------------------------------------------------------------------------------------------


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("heads", "key_heads", "head_size"), [(28, 4, 128), (32, 8, 128), (8, 2, 64)])
@pytest.mark.parametrize("row", ["block_edges", "long_prompt"])
def test_every_kernel_that_is_there_computes_the_definition(dtype: torch.dtype, heads: int, key_heads: int,
                                                            head_size: int, row: str) -> None:
    shape = AttentionShape(torch.device("cuda", 0), dtype, heads, key_heads, head_size)
    groups = ROWS.get(row, (GroupSpan(0, 2000, (256, 1, 300, 77, 513)),))
    usable = [name for name in backends.PREFERENCE if name != "sdpa" and backends.refusal(name, shape) is None]
    assert "flex" in usable
    found = {name: backends.disagreement(backends.ATTEND[name], shape, groups) for name in usable}
    assert found == dict.fromkeys(usable)
