"""Bytes that the fused losses move on a GPU beside their products, and how often the host waits: counted, not measured.

    python bench/bench_traffic.py

`veripo_kernels.testing.traffic` says what is counted. No GPU and no kernel runs; the lines are appended to
bench/results/traffic.jsonl.
"""

from __future__ import annotations

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"  # before Triton: the launch code takes CPU tensors then
if __name__ == "__main__":  # bench/ itself on the path would offer bench/kernels as `kernels`, a Hugging Face package
    sys.path[0] = __file__.rpartition("/bench/")[0]

import torch
from veripo_kernels import PolicyLoss, dpo_loss, grpo_loss, linear_dpo_loss, linear_logprobs, linear_policy_loss
from veripo_kernels.testing.traffic import Traffic, counted

from bench import recipe

TOKENS, WIDTH, VOCABULARY, COMPLETION = 8192, 2048, 151_936, 512
CASES = ("linear_policy_loss", "linear_policy_loss, frozen head", "linear_policy_loss, gspo",
         "linear_policy_loss, entropy bonus", "linear_policy_loss, entropy unasked", "linear_dpo_loss",
         "linear_dpo_loss, frozen head", "linear_logprobs", "linear_logprobs, frozen head", "grpo_loss", "dpo_loss")


def count(case: str, tokens: int = TOKENS, width: int = WIDTH, vocabulary: int = VOCABULARY,
          workspace_bytes: int | None = None) -> Traffic:
    """Forward and backward of a case: bfloat16, completions of 512 tokens, nothing masked, an old log-prob of -1."""
    name, _, variant = case.partition(", ")
    hidden = torch.empty(tokens, width, dtype=torch.bfloat16).requires_grad_()
    head = torch.empty(vocabulary, width, dtype=torch.bfloat16).requires_grad_(variant != "frozen head")
    ids, known = torch.zeros(tokens, dtype=torch.int64), torch.full((tokens,), -1.0)
    cu_seqlens = torch.arange(0, tokens + 1, COMPLETION)
    advantages = torch.ones(len(cu_seqlens) - 1)
    with counted() as traffic:
        if name == "linear_logprobs":
            loss = linear_logprobs(hidden, head, ids, impl="triton").sum()
        elif name == "linear_dpo_loss":
            loss = linear_dpo_loss(hidden, head, ids, known, cu_seqlens, impl="triton")[0]
        elif name == "grpo_loss":
            loss = grpo_loss(known.clone().requires_grad_(), known, advantages, cu_seqlens, impl="triton")[0]
        elif name == "dpo_loss":
            loss = dpo_loss(known.clone().requires_grad_(), known, cu_seqlens, impl="triton")[0]
        else:
            loss = linear_policy_loss(hidden, head, ids, known, advantages, cu_seqlens, impl="triton",
                                      entropy=variant != "entropy unasked", loss=_policy(variant),
                                      workspace_bytes=workspace_bytes)[0]
        loss.backward()
    return traffic


def _policy(variant: str) -> PolicyLoss | str:
    if variant == "entropy bonus":
        return PolicyLoss(entropy_coef=0.01)
    return "gspo" if variant == "gspo" else "grpo"


def main() -> None:
    for case in CASES:
        traffic = count(case)
        row = {"bench": "traffic", "case": case, "tokens": TOKENS, "hidden": WIDTH, "vocabulary": VOCABULARY,
               "dtype": "bfloat16", "beside_gb": round(traffic.beside / 1e9, 3),
               "launches": traffic.launches.total(), "waits": traffic.waits.total(),
               "waits_by_op": dict(traffic.waits), "rows_of_runs": traffic.rows,
               "modes": sorted({f"{mode}{' with entropy' if entropy else ''}" for mode, entropy in traffic.modes}),
               "largest_gb": {name: round(size / 1e9, 3) for name, size in traffic.largest().items()}}
        print(row)
        recipe.append("traffic", row)


if __name__ == "__main__":
    main()
