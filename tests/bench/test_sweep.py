"""The sweep over all ops on interpreted kernels: a part of the GPU check, and what judges another Triton.

`make test-engines` runs it on vLLM's Triton, `make test` on the one that is pinned. Nothing here needs more than torch.
"""

from __future__ import annotations

import pytest
import torch
from veripo_kernels import dispatch

from bench import gpu_parts
from bench.kernels import cases, sweep

CPU = torch.device("cpu")

SWEEP = ("gather_logprobs torch.bfloat16 [33, 300]", "gather_logprobs torch.float32 [3, 129]",
         "linear_policy_loss torch.bfloat16 (65, 40, 257) trainable head",
         "linear_policy_loss torch.float32 (65, 40, 257) frozen head",
         "linear_logprobs torch.float32 (7, 16, 130)", "linear_dpo_loss torch.bfloat16 (65, 40, 257)", "grpo_loss gspo",
         "grpo_loss grpo", "dpo_loss exo", "group_advantages std", "opcheck linear_logprobs",
         "gather_logprobs with 12000 logits",
         "linear_policy_loss with 12000 logits")


def test_the_sweep_runs_on_interpreted_kernels():
    """Some cases of each kind; all of them take a minute and a half."""
    cases = dict(sweep.sweep(CPU, sweep.TINY))
    assert len(cases) > 50 and set(SWEEP) <= cases.keys()
    for name in SWEEP:
        cases[name]()


def test_the_smoke_knows_every_op():
    assert set(sweep.smoke(CPU)) == set(dispatch.OPS)


def test_the_smoke_sees_wrong_frames_and_copies(monkeypatch):
    """Kernels are the sweep's; frames and slices have a check of their own."""
    smoke = sweep.smoke(CPU)
    for name, right in sweep.FRAME_OPS.items():
        smoke[name]()
        monkeypatch.setitem(sweep.FRAME_OPS, name, lambda *args, right=right, **options: right(*args, **options) + 3)
        with pytest.raises(AssertionError, match=f"{name}: .* levels off"):
            smoke[name]()
    smoke["copy_slices"]()
    monkeypatch.setattr(sweep, "copy_slices", lambda sources, targets: torch.zeros(2))
    with pytest.raises(AssertionError, match="another element"):
        smoke["copy_slices"]()


def test_the_sweep_sees_a_wrong_kernel(monkeypatch):
    right = sweep.our_policy_loss

    def wrong(case, impl):
        found = right(case, impl)
        return found | {"dhead": found["dhead"] * 1.01}

    monkeypatch.setattr(sweep, "our_policy_loss", wrong)
    shape = cases.Shape(7, 16, 130)
    with pytest.raises(AssertionError, match="dhead: relative error 1"):
        sweep._policy(CPU, torch.float32, shape, True)
    monkeypatch.setattr(sweep, "sweep", lambda device, sizes: iter([("bad", lambda: sweep._policy(
        CPU, torch.float32, shape, True)), ("good", lambda: None)]))
    row, = gpu_parts.part_sweep(CPU, gpu_parts.TINY)
    assert (row["cases"], row["passed"], list(row["wrong"])) == (2, False, ["bad"])
