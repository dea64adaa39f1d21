"""No op reads or hands out memory that nobody wrote: torch fills what it allocates with NaN, and outputs are looked at.

The outputs of the ops themselves are taken (also those that only backward reads), and the gradients of the leaves. None
may hold NaN, and all must have the bits that they have in memory that is not filled. What is allocated beside torch, by
the C++ op and by the interpreter's numpy, is filled by glibc in processes of their own.
Letters: T rows, M packed tokens, V vocabulary, D hidden.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils import deterministic
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from veripo_kernels import (
    PolicyLoss,
    PreferenceLoss,
    copy_slices,
    dispatch,
    dpo_loss,
    frames_to_patches,
    frames_torch,
    gather_logprobs,
    gather_logprobs_fused,
    group_advantages,
    grpo_loss,
    linear_dpo_loss,
    linear_logprobs,
    linear_policy_loss,
    linear_torch,
    planes_to_frames,
    planes_to_patches,
    reference,
    resize_frames,
)
from veripo_kernels.options import PolicyLossName
from veripo_kernels.scalars import as_tensor

from tests.support.children import run
from tests.support.op_cases import CASES
from tests.support.paths import PYTHONPATH

WIDTH, VOCABULARY = 12, 70
SHORT = (torch.float32, torch.bfloat16, torch.float16)
DTYPES = [(impl, dtype) for impl in ("torch", "triton", "cpp") for dtype in SHORT] + [("torch", torch.float64)]
LINEAR = [(impl, dtype) for impl, dtype in DTYPES if impl != "cpp"]
ROWS = [("none", 0), ("some", 12), ("all", 12)]
"""Which rows have nothing to say (no slope, no advantage, or a mask of 0), and how many there are."""
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not dispatch.interpreted() else "cpu")


@contextmanager
def poisoned() -> Iterator[None]:
    """Fresh memory is full of NaN (integers: of their largest number), also where compiled code asks torch for it."""
    with deterministic_algorithms(fill=True):
        assert torch.empty(9, dtype=torch.bfloat16).isnan().all()
        assert torch.empty(9).new_empty(9).isnan().all()
        assert torch.empty_like(torch.zeros(9)).isnan().all()
        yield


@contextmanager
def deterministic_algorithms(fill: bool) -> Iterator[None]:
    """The only ones for which torch fills fresh memory, so that the other run of a pair takes them too."""
    before = torch.are_deterministic_algorithms_enabled(), deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = fill
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        deterministic.fill_uninitialized_memory = before[1]


class Outputs(TorchDispatchMode):
    """Keeps what this package's ops return."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[tuple[str, torch.Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace.startswith("veripo"):
            self.kept += [(str(func), leaf) for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        return out


def unwritten(function: Callable[[], Any]) -> list[str]:
    """Runs a function in poisoned memory and in other; where what its ops or itself returned holds NaN or differs."""
    with deterministic_algorithms(fill=False):
        plain = outputs_of(function)
    with poisoned():
        found = outputs_of(function)
    assert [name for name, _ in plain] == [name for name, _ in found]
    left = [f"{name}: {int(value.isnan().sum())} of {value.numel()} are NaN" for name, value in found
            if value.is_floating_point() and value.isnan().any()]
    return left + [f"{name}: other bits" for (name, value), (_, other) in zip(found, plain, strict=True)
                   if not torch.equal(bits(value), bits(other))]


def outputs_of(function: Callable[[], Any]) -> list[tuple[str, torch.Tensor]]:
    outputs = Outputs()
    with outputs:
        returned = function()
    return outputs.kept + [("returned", leaf) for leaf in tree_leaves(returned) if isinstance(leaf, torch.Tensor)]


def bits(values: torch.Tensor) -> torch.Tensor:
    """uint8, the bytes of a tensor."""
    return values.detach().contiguous().reshape(-1).view(torch.uint8)


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def silenced(values: torch.Tensor, silent: str) -> torch.Tensor:
    """Values [T] with zeros at every third place, or everywhere."""
    if silent == "all":
        return torch.zeros_like(values)
    return values if silent == "none" else values * (torch.arange(len(values), device=DEVICE) % 3 != 0)


def bounds(rows: int) -> torch.Tensor:
    """cu_seqlens of two pairs, one completion of which is empty."""
    return torch.tensor([0, rows // 2, rows // 2, rows * 3 // 4, rows], device=DEVICE)


def token_ids(rows: int) -> torch.Tensor:
    return (torch.arange(rows, device=DEVICE) * 31) % VOCABULARY


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a vocabulary of 70 has borders."""
    from veripo_kernels import linear_triton
    from veripo_kernels.jit import linear as bodies

    monkeypatch.setattr(linear_torch, "TILE", 16)
    monkeypatch.setattr(linear_torch, "ROWS", 8)
    if DEVICE.type == "cpu":
        monkeypatch.setattr(linear_triton, "_SLAB", 48)
        monkeypatch.setattr(bodies, "tile_shape", lambda dtype: {"BR": 16, "BV": 32, "BD": 16, "num_warps": 4,
                                                                 "num_stages": 2})


def usable(impl: str) -> None:
    reason = dispatch.refusal(impl, DEVICE)  # type: ignore[arg-type]
    if reason is not None:
        pytest.skip(reason)


def gradients(total: torch.Tensor, *leaves: torch.Tensor) -> list[torch.Tensor | None]:
    return list(torch.autograd.grad(total, [leaf for leaf in leaves if leaf.requires_grad], allow_unused=True))


def test_what_nobody_wrote_is_seen() -> None:
    """As NaN, or as a result that is another one in other memory."""
    assert "returned: 5 of 5 are NaN" in unwritten(lambda: torch.empty(5))
    values = iter(range(2))
    assert unwritten(lambda: torch.tensor(next(values))) == ["returned: other bits"]
    assert unwritten(lambda: torch.zeros(3)) == []


# -- log-probs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("silent", "rows"), ROWS)
@pytest.mark.parametrize(("impl", "dtype"), DTYPES)
def test_gather_logprobs(impl: str, dtype: torch.dtype, silent: str, rows: int) -> None:
    usable(impl)
    slopes = silenced(rand(rows, seed=1), silent)
    for entropy in (False, True):
        def run(entropy: bool = entropy) -> Any:
            logits = rand(rows, VOCABULARY + 2).to(dtype)[:, :VOCABULARY].requires_grad_()
            out = gather_logprobs(logits, token_ids(rows), entropy=entropy, impl=impl)
            total = sum((value * slopes.to(value.dtype)).sum() for value in (out if entropy else (out,)))
            return out, gradients(total, logits)

        assert unwritten(run) == []
    assert unwritten(lambda: gather_logprobs_fused(rand(rows, VOCABULARY).to(dtype), token_ids(rows), slopes,
                                                   impl=impl)) == []


@pytest.mark.parametrize(("silent", "rows"), ROWS)
@pytest.mark.parametrize(("impl", "dtype"), LINEAR)
def test_linear_logprobs(impl: str, dtype: torch.dtype, silent: str, rows: int) -> None:
    usable(impl)
    slopes = silenced(rand(rows, seed=1), silent)
    cases = [("", False, False, None), ("", True, True, 5.0), ("head", False, True, None),
             ("hidden", False, False, None)]
    for frozen, entropy, biased, softcap in cases:
        def run(frozen: str = frozen, entropy: bool = entropy, biased: bool = biased, softcap: float | None = softcap
                ) -> Any:
            hidden = rand(rows, WIDTH).to(dtype).requires_grad_(frozen != "hidden")
            head = rand(VOCABULARY, WIDTH, seed=2).to(dtype).requires_grad_(frozen != "head")
            bias = rand(VOCABULARY, seed=3).to(dtype).requires_grad_(frozen != "head") if biased else None
            out = linear_logprobs(hidden, head, token_ids(rows), entropy=entropy, bias=bias, softcap=softcap, impl=impl)
            total = sum((value * slopes.to(value.dtype)).sum() for value in (out if entropy else (out,)))
            return out, gradients(total, hidden, head, *([] if bias is None else [bias]))

        assert unwritten(run) == []


# -- losses ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("silent", "rows"), ROWS)
@pytest.mark.parametrize(("impl", "dtype"), LINEAR)
def test_losses(impl: str, dtype: torch.dtype, silent: str, rows: int) -> None:
    usable(impl)
    mask, cu_seqlens = silenced(torch.ones(rows, device=DEVICE), silent), bounds(rows)
    names: list[PolicyLossName] = ["grpo", "dapo", "gmpo"]
    for name in names:
        def policy(loss: PolicyLoss) -> Any:
            logprobs = rand(rows).to(dtype).requires_grad_()
            entropy = rand(rows, seed=4).to(dtype).requires_grad_()
            value, metrics = grpo_loss(logprobs, None, rand(4, seed=5).to(dtype), cu_seqlens, loss=loss, loss_mask=mask,
                                       entropy=entropy, impl=impl)
            return value, metrics, gradients(value, logprobs, entropy)

        for entropy_coef in (0.0, 0.1):
            loss = PolicyLoss(name, constant_length=8, entropy_coef=entropy_coef)
            assert unwritten(lambda loss=loss: policy(loss)) == [], loss
    for preference in (PreferenceLoss(), PreferenceLoss("ipo", length_normalize=True, ld_alpha=0.5)):
        def pairs(loss: PreferenceLoss = preference) -> Any:
            logprobs = rand(rows).to(dtype).requires_grad_()
            value, metrics = dpo_loss(logprobs, rand(rows, seed=4).to(dtype), cu_seqlens, loss=loss, loss_mask=mask,
                                      impl=impl)
            return value, metrics, gradients(value, logprobs)

        assert unwritten(pairs) == [], preference


@pytest.mark.parametrize("bounded", [(0,), (2, 5, 5, 7, 9)])
def test_tokens_that_no_completion_owns_have_slope_0(bounded: tuple[int, ...]) -> None:
    """The door refuses them where it can see them; on a GPU it cannot without waiting."""
    usable("triton")
    from veripo_kernels import dpo, grpo

    cu_seqlens, loss, tokens = torch.tensor(bounded, device=DEVICE), PolicyLoss(entropy_coef=0.1), rand(12)
    advantages = torch.ones(len(bounded) - 1, device=DEVICE)
    owned = torch.zeros(12, dtype=torch.bool, device=DEVICE)
    owned[bounded[0]:bounded[-1]] = True
    with poisoned():
        *_, slopes, entropy_slopes = grpo._forward(
            tokens, None, advantages, cu_seqlens, None, None, None, tokens, grpo._kinds(loss), grpo._numbers(loss), 4,
            True)
        numbers = as_tensor(0.1, 0.0, 1.0, 0.0, 0.05, 0.5)
        _, _, pair_slopes = dpo._forward(tokens, tokens, cu_seqlens, None, None, "sigmoid reverse_kl", numbers, False,
                                         2)
    for values in (slopes, entropy_slopes, pair_slopes):
        assert torch.equal(values != 0, owned)
    for impl in ("torch", "triton"):
        if DEVICE.type == "cpu":
            with pytest.raises(ValueError, match=r"cu_seqlens must run from 0 to 12, the number of tokens, got \d to"):
                grpo_loss(tokens, None, advantages, cu_seqlens, impl=impl)  # type: ignore[arg-type]


@pytest.mark.parametrize(("silent", "rows"), ROWS)
@pytest.mark.parametrize("room", [1, 1 << 20])
@pytest.mark.parametrize(("impl", "dtype"), LINEAR)
def test_linear_losses(impl: str, dtype: torch.dtype, room: int, silent: str, rows: int) -> None:
    """`room`: bytes of the workspace; with 1 each completion that must be whole has its logits computed again."""
    usable(impl)
    cu_seqlens, mask = bounds(rows), silenced(torch.ones(rows, device=DEVICE), silent)

    def run(op: Callable[..., Any], *tensors: torch.Tensor | None, **options: Any) -> Any:
        hidden = rand(rows, WIDTH).to(dtype).requires_grad_()
        head = rand(VOCABULARY, WIDTH, seed=2).to(dtype).requires_grad_()
        out = op(hidden, head, token_ids(rows), *tensors, workspace_bytes=room, impl=impl, **options)
        return out, gradients(out[0], hidden, head)

    names: list[PolicyLossName] = ["grpo", "gspo"]
    for name in names:
        loss, gains = PolicyLoss(name, entropy_coef=0.1 if silent == "some" else 0.0), silenced(rand(4), silent)
        assert unwritten(lambda loss=loss, gains=gains: run(
            linear_policy_loss, None, gains, cu_seqlens, loss=loss)) == [], loss
        assert unwritten(lambda loss=loss: run(
            linear_policy_loss, None, rand(4, seed=5), cu_seqlens, loss=loss, loss_mask=mask)) == [], loss
    assert unwritten(lambda: run(linear_dpo_loss, rand(2, 2, seed=4), cu_seqlens, loss_mask=mask)) == []


@pytest.mark.parametrize("name", ["grpo", "gspo"])
@pytest.mark.parametrize("room", [1, 1 << 20])
@pytest.mark.parametrize(("impl", "dtype"), LINEAR)
def test_equal_rewards_and_clipped_completions_give_zero_gradients(impl: str, dtype: torch.dtype, room: int, name: str
                                                                   ) -> None:
    """Equal rewards: no token may have a gradient. All clipped: every token might, and none has."""
    usable(impl)
    old = torch.full((12,), -60.0, device=DEVICE)
    for gains, before in ((torch.zeros(4, device=DEVICE), None), (torch.ones(4, device=DEVICE), old)):
        with poisoned():
            hidden = rand(12, WIDTH).to(dtype).requires_grad_()
            head = rand(VOCABULARY, WIDTH, seed=2).to(dtype).requires_grad_()
            value, metrics, _ = linear_policy_loss(
                hidden, head, token_ids(12), before, gains, bounds(12), loss=name, workspace_bytes=room,
                impl=impl)  # type: ignore[arg-type]
            value.backward()
        clipped = 0.0 if before is None else 0.75  # one completion of four is empty
        torch.testing.assert_close(float(metrics["clip_high_share"]), clipped, rtol=1e-6, atol=0)
        assert (hidden.grad == 0).all()
        assert (head.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_no_slope_gives_zero_gradients_by_a_short_head(dtype: torch.dtype) -> None:
    """TRL's GRPO with equal rewards: what `linear_logprobs` gets from the loss is 0 in every row."""
    with poisoned():
        hidden, head = (rand(rows, WIDTH).to(dtype).requires_grad_() for rows in (9, VOCABULARY))
        bias = rand(VOCABULARY, seed=3).to(dtype).requires_grad_()
        (0.0 * linear_logprobs(hidden, head, token_ids(9), bias=bias)).sum().backward()
    for leaf in (hidden, head, bias):
        assert (leaf.grad == 0).all()


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_group_advantages(impl: str) -> None:
    usable(impl)
    for dtype in (*SHORT, torch.float64):
        for kind in ("std", "no_std", "leave_one_out", "batch_std"):
            assert unwritten(lambda kind=kind, dtype=dtype: group_advantages(
                rand(19).to(dtype), torch.arange(19, device=DEVICE) % 5, kind=kind, impl=impl)) == []
    if impl == "triton":
        assert unwritten(lambda: group_advantages(rand(0), token_ids(0), impl="triton")) == []


def test_a_token_without_a_completion_is_no_index() -> None:
    """On a GPU `repeat_interleave` left it unwritten; here it has the number of the completions."""
    with poisoned():
        index = reference.sequence_index(torch.tensor([0, 2, 2, 5], device=DEVICE), 7)
    assert index.tolist() == [0, 0, 2, 2, 2, 3, 3]


# -- frames ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(28, 56), (56, 28), (84, 84)])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_frames(count: int, size: tuple[int, int]) -> None:
    """Bytes have no NaN, so the definition is compared; the last time of an odd count is filled too."""
    generator = torch.Generator().manual_seed(0)

    def levels(*shape: int) -> torch.Tensor:
        return torch.randint(0, 200, shape, dtype=torch.uint8, generator=generator)  # poison is 255

    frames = levels(count, 3, 56, 28)
    y, u, v = levels(count, 56, 28), levels(count, 28, 14), levels(count, 28, 14)
    geometry: dict[str, Any] = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4), "patch_size": 14, "merge_size": 2,
                                "temporal_patch_size": 2}
    rgb = frames_torch.planes_to_rgb(y, u, v, frames_torch.yuv_matrix("bt601", False))
    resized = frames_torch.resize_frames(frames, *size), frames_torch.resize_frames(rgb, *size)
    for dtype in (torch.float32, torch.bfloat16):
        expected = [frames_torch.frames_to_patches(source, *size, dtype=dtype, **geometry) for source in (frames, rgb)]
        outputs = Outputs()
        with poisoned(), outputs:
            got = (frames_to_patches(frames, *size, dtype=dtype, **geometry),
                   planes_to_patches(y, u, v, *size, matrix="bt601", dtype=dtype, **geometry))
            room = torch.empty_like(got[0])
            frames_to_patches(frames, *size, dtype=dtype, out=room, **geometry)
            small = resize_frames(frames, *size), planes_to_frames(y, u, v, *size, matrix="bt601")
        for ours, theirs in zip((*got, room, *small), (*expected, expected[0], *resized), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("impl", ["torch", "cpp"])
@pytest.mark.parametrize("dtype", SHORT)
def test_copy_slices(dtype: torch.dtype, impl: Any) -> None:
    usable(impl)

    def copied() -> Any:
        sources = [rand(5, 41)[:, 3:20], rand(1, 300, seed=1)]
        targets = [torch.empty(source.shape, dtype=dtype, device=DEVICE) for source in sources]
        return copy_slices(sources, targets, impl=impl), targets

    assert unwritten(copied) == []


# -- memory that torch does not allocate -----------------------------------------------------------------------------


DIGESTS = """
import hashlib, json, os, sys
if os.environ.get("TRITON_INTERPRET") == "1":
    from veripo_kernels.testing import interpreter
    interpreter.install()
import numpy as np, torch
from torch.utils._pytree import tree_leaves
from tests.support.op_cases import CASES

def digest(out):
    tensors = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
    data = b"".join(leaf.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for leaf in tensors)
    return hashlib.sha256(data).hexdigest()

print(json.dumps({"fresh": [digest(torch.from_numpy(np.empty(5000))), digest(torch.empty(5000))],
                  "ops": {f"{op} {impl} {dtype}": digest(run()) for (op, impl, dtype), run in CASES.items()}}))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="GLIBC_TUNABLES is glibc's")
def test_memory_that_glibc_hands_out() -> None:
    """Filled and not: vectors and rows of scratch in C++, arrays of numpy, and what torch gets from malloc."""
    missing = set(dispatch.OPS) ^ {op for op, _, _ in CASES}
    assert not missing, missing
    found = []
    for tunables in ("", "glibc.malloc.tcache_count=0:glibc.malloc.perturb=128"):  # bytes of 127: large numbers
        done = run(sys.executable, "-c", DIGESTS, env={**os.environ, "GLIBC_TUNABLES": tunables,
                                                       "PYTHONPATH": PYTHONPATH})
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout))
    assert len({json.dumps(result["fresh"]) for result in found}) == 2, "glibc filled nothing"
    plain, filled = (result["ops"] for result in found)
    assert len(plain) > 40
    assert [name for name in plain if plain[name] != filled[name]] == []
