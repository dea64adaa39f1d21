"""What compiles again when a number or a length changes: at most once, when torch.compile first sees that it may.

Graphs are counted with autograd's graph behind them (AOT), which holds floats as constants where dynamo alone does not.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager
from veripo_kernels import (
    PolicyLoss,
    PreferenceLoss,
    dispatch,
    dpo_loss,
    gather_logprobs,
    gather_logprobs_fused,
    group_advantages,
    grpo_loss,
    linear_dpo_loss,
    linear_logprobs,
    linear_policy_loss,
)
from veripo_kernels.scalars import as_tensor

from tests.support.children import run
from tests.support.paths import PYTHONPATH, REPOSITORY

DEVICE = torch.device("cuda" if torch.cuda.is_available() and not dispatch.interpreted() else "cpu")
IMPLS = ["torch", "triton"]


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


BOUNDS = torch.tensor([0, 2, 2, 3, 4], device=DEVICE)
GAINS = torch.tensor([1.0, -3.0, 0.5, 2.0], device=DEVICE)
IDS = torch.arange(4, device=DEVICE)
HIDDEN, HEAD, REF, OLD = rand(4, 6, seed=1), rand(9, 6, seed=2), rand(4, seed=3), rand(4, seed=4)

TEMPERATURES = (0.7, 0.9, 1.0, 1.3, 2.0, 0.5)
SHARES = (0.1, 0.2, 0.35, 0.4, 0.5)
COUNTS = (3, 4, 5, 6, 7)


def policy(**options: Any) -> PolicyLoss:
    return PolicyLoss(**({"kl_coef": 0.1} | options))


def grpo(impl: Any, **options: Any) -> torch.Tensor:
    return grpo_loss(REF, OLD, GAINS, BOUNDS, ref_logprobs=OLD, rollout_logprobs=OLD, advantages_per="token",
                     impl=impl, **options)[0]


def linear(impl: Any, **options: Any) -> torch.Tensor:
    return linear_policy_loss(HIDDEN, HEAD, IDS, OLD, GAINS, BOUNDS, ref_logprobs=OLD, rollout_logprobs=OLD,
                              advantages_per="token", impl=impl, **options)[0]


def pairs(impl: Any, **options: Any) -> torch.Tensor:
    return dpo_loss(REF, OLD, BOUNDS, impl=impl, **options)[0]


def linear_pairs(impl: Any, **options: Any) -> torch.Tensor:
    return linear_dpo_loss(HIDDEN, HEAD, IDS, REF, BOUNDS, impl=impl, **options)[0]


Numbers = tuple[Callable[[Any, Any], torch.Tensor], Iterable[Any]]

NUMBERS: dict[str, Numbers] = {
    "temperature of linear_logprobs": (
        lambda impl, t: linear_logprobs(HIDDEN, HEAD, IDS, temperature=t, impl=impl), TEMPERATURES),
    "softcap": (lambda impl, c: linear_logprobs(HIDDEN, HEAD, IDS, softcap=c, impl=impl), TEMPERATURES),
    "temperature of gather_logprobs": (
        lambda impl, t: gather_logprobs(HIDDEN, IDS, temperature=t, impl=impl), TEMPERATURES),
    "temperature of gather_logprobs_fused": (
        lambda impl, t: gather_logprobs_fused(HIDDEN, IDS, GAINS, temperature=t, impl=impl)[1], TEMPERATURES),
    "temperature of linear_policy_loss": (lambda impl, t: linear(impl, temperature=t), TEMPERATURES),
    "temperature of linear_dpo_loss": (lambda impl, t: linear_pairs(impl, temperature=t), TEMPERATURES),
    "eps": (lambda impl, eps: group_advantages(GAINS, IDS // 2, eps=eps, impl=impl), SHARES),
    "num_tokens": (lambda impl, n: grpo(impl, loss="dapo", num_tokens=n), COUNTS),
    "num_sequences": (lambda impl, n: linear(impl, num_sequences=n), COUNTS),
    "num_pairs": (lambda impl, n: pairs(impl, num_pairs=n), COUNTS),
    "num_pairs of linear_dpo_loss": (lambda impl, n: linear_pairs(impl, num_pairs=n), COUNTS),
    "workspace_bytes": (lambda impl, n: linear(impl, workspace_bytes=1000 * n), COUNTS),
    **{f"{name} of {op.__name__}": (lambda impl, loss, op=op: op(impl, loss=loss),
                                    [policy(**{name: share}) for share in SHARES])
       for op in (grpo, linear) for name in ("clip_low", "clip_high", "kl_coef", "importance_floor")},
    **{f"{name} of gmpo in {op.__name__}": (lambda impl, loss, op=op: op(impl, loss=loss),
                                            [policy(loss="gmpo", **{name: share}) for share in SHARES])
       for op in (grpo, linear) for name in ("clip_low", "clip_high")},
    "dual_clip": (lambda impl, loss: grpo(impl, loss=loss), [policy(dual_clip=2 + share) for share in SHARES]),
    "sapo's temperature": (lambda impl, loss: grpo(impl, loss=loss),
                           [policy(loss="sapo", sapo_temperature_pos=share) for share in SHARES]),
    **{f"{name} of {op.__name__}": (lambda impl, loss, op=op: op(impl, loss=loss),
                                    [PreferenceLoss(**{name: share}) for share in SHARES])
       for op in (pairs, linear_pairs) for name in ("dpo_beta", "nll_coef", "ld_alpha")}}


def graphs(function: Callable[..., torch.Tensor], calls: Iterable[tuple[Any, ...]]) -> int:
    """How many graphs a function is compiled into over some calls; each gives what it gives uncompiled."""
    torch._dynamo.reset()
    count = 0

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        nonlocal count
        count += 1
        return aot_eager(graph, inputs)

    compiled = torch.compile(function, fullgraph=True, backend=backend)
    for arguments in calls:
        torch.testing.assert_close(compiled(*arguments), function(*arguments))
    return count


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_does_not_compile_again(name: str, impl: Any) -> None:
    function, values = NUMBERS[name]
    assert graphs(lambda value: function(impl, value), [(value,) for value in values]) <= 2


@pytest.mark.parametrize("impl", IMPLS)
def test_lengths_do_not_compile_again(impl: Any) -> None:
    """Tokens, completions and pairs; a length of 1 always does in torch."""

    def batch(tokens: int, count: int) -> tuple[torch.Tensor, ...]:
        bounds = torch.linspace(0, tokens, 2 * count + 1).long().to(DEVICE)
        return rand(tokens, 6), torch.arange(tokens, device=DEVICE) % 6, rand(tokens), rand(tokens, seed=5), bounds

    batches = [batch(8, 3), batch(9, 2), batch(13, 4), batch(20, 5)]
    functions: list[Callable[..., torch.Tensor]] = [
        lambda x, ids, a, b, cu: linear_policy_loss(x, HEAD, ids, a, b, cu, advantages_per="token", impl=impl)[0],
        lambda x, ids, a, b, cu: linear_dpo_loss(x, HEAD, ids, a, cu, impl=impl)[0],
        lambda x, ids, a, b, cu: linear_logprobs(x, HEAD, ids, impl=impl),
        lambda x, ids, a, b, cu: gather_logprobs(x, ids, impl=impl),
        lambda x, ids, a, b, cu: grpo_loss(a, b, b, cu, advantages_per="token", impl=impl)[0],
        lambda x, ids, a, b, cu: dpo_loss(a, b, cu, impl=impl)[0]]
    for function in functions:
        assert graphs(function, batches) <= 2


def test_numbers_arrive_as_they_were() -> None:
    numbers = (0.1, 1, 1e-300, float("inf"), None)
    arrived = as_tensor(*numbers).tolist()
    assert arrived[:4] == [0.1, 1.0, 1e-300, float("inf")] and arrived[4] != arrived[4]
    assert as_tensor(*numbers).device.type == "cpu"


COUNT_KEYS = """
import json, torch
from veripo_kernels import linear_torch, linear_triton
from veripo_kernels.jit import advantages, linear
from veripo_kernels.testing.sm90 import launch_keys

def launches(rows, temperature, softcap, scale):
    hidden, ids = torch.empty(rows, 64, dtype=torch.bfloat16), torch.zeros(rows, dtype=torch.int64)
    head = linear_torch.Head(weight, None, softcap, temperature)
    space = linear_triton.Workspace(head, hidden, rows, needs_hidden=False, needs_weight=False, every_row=True)
    space.open(hidden, ids, None, entropy=False)
    space.close(torch.ones(rows), None, torch.arange(rows))
    linear_triton.statistics(hidden, head, ids, entropy=False)
    advantages.forward(torch.empty(rows), ids, "std", scale)

weight = torch.empty(512, 64, dtype=torch.bfloat16)
bodies = [linear.logit_tile, linear.own_logit, linear.combine, linear.settle, advantages.advantages_kernel]
count = lambda cases: len(launch_keys(bodies, lambda: [launches(*case) for case in cases]))
plain = [(16, 1.0, None, 1e-6), (17, 0.7, None, 1.0), (1, 2.0, None, 16.0), (160, 1 / 3, None, 0.0)]
capped = [(16, 1.0, 30.0, 1e-6), (33, 0.7, 1.0, 1e-6), (1, 16.0, 16.0, 1e-6)]
print(json.dumps([count(plain[:1]), count(plain), count(capped[:1]), count(capped)]))
"""


def test_no_number_and_no_length_compiles_a_linear_kernel_again() -> None:
    """The same kernels for one launch and for several with other rows, temperatures, softcaps and eps."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    counted = run(sys.executable, "-c", COUNT_KEYS, cwd=REPOSITORY, env={**environment, "PYTHONPATH": PYTHONPATH})
    assert counted.returncode == 0, counted.stderr
    one, several, one_capped, several_capped = json.loads(counted.stdout)
    assert (several, several_capped) == (one, one_capped)
