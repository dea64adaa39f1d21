"""The rows that bench_kernels.py and gpu_check.py share: what is measured, and what it has to reach.

Every function gives the entries of one result line, `value`, `limit` and `passed` among them. Letters: T tokens, V
vocabulary, D hidden.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

import torch
from veripo_kernels import dpo_loss, gather_logprobs, grpo_loss, reference
from veripo_kernels.options import PreferenceLossName

from bench.kernels import cases
from bench.kernels.cases import Logits, Problem, Rollouts, Shape
from bench.kernels.peers import NAIVE, OURS, PEERS, eager_policy_loss, naive_logprobs, our_policy_loss
from bench.measure import Clock, Ratio, clock_of, digits, launches, norms, paired, peak_bytes, relative_error

Row = dict[str, Any]


def build(op: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, *, idle: float = 0.0,
          train_head: bool = True, workspace_bytes: int | None = None) -> Problem | Logits | Rollouts:
    """The inputs of an op."""
    if op.startswith("gather"):
        return cases.logits(Shape(*shape), dtype, device)
    if op in ("grpo_loss", "dpo_loss"):
        return cases.rollouts(shape[0], device)
    case = cases.problem(Shape(*shape), dtype, device, idle=idle, train_head=train_head)
    return replace(case, workspace_bytes=workspace_bytes)


def verdict(value: float, limit: float) -> Row:
    return {"value": digits(value), "limit": limit, "passed": value <= limit}


def named(shape: tuple[int, ...], dtype: torch.dtype | str) -> Row:
    """A shape and type as entries of a line."""
    return {"tokens": shape[0], "hidden": shape[1], "vocabulary": shape[2], "dtype": str(dtype).removeprefix("torch.")}


# -- accuracy ---------------------------------------------------------------------------------------------------------

def accuracy(shape: list[int], device: str = "cpu", impl: str = "auto", dtype: str = "bfloat16", rows: int = 512
             ) -> Row:
    """Error of linear_policy_loss against float64 on the same rounded inputs; the limits are 2e-4, 2e-5 and 2e-3.

    `rows` at a time are computed in float64. `naive_*` is the error of plain torch, which rounds logits to `dtype`.
    """
    where, kind = torch.device(device), getattr(torch, dtype)
    case = cases.problem(Shape(*shape), kind, where)
    truth = _truth(case, rows)
    got, plain = our_policy_loss(case, impl), eager_policy_loss(naive_logprobs, case)
    errors = (got["logprobs"].double() - truth["logprobs"]).abs()
    plain_errors = (plain["logprobs"].double() - truth["logprobs"]).abs()
    values = {"logprob_error_max": float(errors.max()), "logprob_error_mean": float(errors.mean()),
              "dhead_relative_rms": relative_error(got["dhead"], truth["dhead"]),
              "dhidden_relative_rms": relative_error(got["dhidden"], truth["dhidden"]),
              "naive_logprob_error_max": float(plain_errors.max()),
              "naive_logprob_error_mean": float(plain_errors.mean()),
              "naive_dhead_relative_rms": relative_error(plain["dhead"], truth["dhead"])}
    limits = {"logprob_error_max": 2e-4, "logprob_error_mean": 2e-5, "dhead_relative_rms": 2e-3}
    return {"row": "accuracy against float64", **named(Shape(*shape), kind), "impl": impl,
            "entropy_mean": digits(cases.mean_entropy(case)),
            **{name: digits(value) for name, value in values.items()},
            "limits": limits, "passed": all(values[name] <= limit for name, limit in limits.items())}


def _truth(case: Problem, rows: int) -> dict[str, torch.Tensor]:
    """logprobs and gradients in float64; a token's gradient needs its completion's weight, not the other logits."""
    exact = case.to(torch.float64)
    logprobs = torch.cat([reference.linear_logprobs(part, exact.head, ids)
                          for part, ids in zip(exact.hidden.split(rows), exact.token_ids.split(rows), strict=True)])
    leaf = logprobs.requires_grad_()
    loss, _ = reference.grpo_loss(leaf, exact.old_logprobs, exact.advantages, exact.cu_seqlens,
                                  advantages_per="sequence")
    slopes, = torch.autograd.grad(loss, leaf)
    dhead, dhidden = torch.zeros_like(exact.head), []
    for part, ids, slope in zip(exact.hidden.split(rows), exact.token_ids.split(rows), slopes.split(rows), strict=True):
        dlogits = -(part @ exact.head.T).softmax(-1) * slope[:, None]
        dlogits[torch.arange(len(ids), device=ids.device), ids] += slope
        dhead.addmm_(dlogits.T, part)
        dhidden.append(dlogits @ exact.head)
    return {"logprobs": logprobs.detach(), "dhead": dhead, "dhidden": torch.cat(dhidden)}


# -- time against what the machine can do -----------------------------------------------------------------------------

def products(case: Problem) -> dict[str, Callable[[], object]]:
    """The matrix products that a step cannot do without, on logits in memory, in the type of the inputs."""
    logits = torch.empty(len(case.hidden), len(case.head), dtype=case.hidden.dtype, device=case.hidden.device)
    dhidden, dhead = torch.empty_like(case.hidden), torch.empty_like(case.head)
    ways: dict[str, Callable[[], object]] = {"forward": lambda: torch.mm(case.hidden, case.head.T, out=logits),
                                             "dhidden": lambda: torch.mm(logits, case.head, out=dhidden)}
    if case.train_head:
        ways["dhead"] = lambda: torch.mm(logits.T, case.hidden, out=dhead)
    return ways


def against_products(shape: Shape, device: torch.device, dtype: torch.dtype, *, train_head: bool, rounds: int,
                     clock: Clock | None = None) -> Row:
    """linear_policy_loss, forward and backward, over its two or three bare products."""
    case = cases.problem(shape, dtype, device, train_head=train_head)
    bare = products(case)

    def run_bare() -> None:
        for run in bare.values():
            run()

    seconds = paired({OURS: lambda: our_policy_loss(case), "products": run_bare}, rounds, clock or clock_of(device),
                     warmups=2 if device.type == "cuda" else 0)
    ratio = Ratio.of(seconds[OURS], seconds["products"])
    operations = 2 * len(bare) * shape.tokens * shape.hidden * shape.vocabulary
    rates = {f"{name}_tflop_per_second": digits(operations / statistics.median(values) / 1e12)
             for name, values in (("products", seconds["products"]), ("ours", seconds[OURS]))}
    return {"row": f"linear_policy_loss, {'trainable' if train_head else 'frozen'} head, over {len(bare)} products",
            **named(shape, dtype), **verdict(ratio.median, 1.15), **ratio.fields("ratio"), **rates,
            "ours_seconds": digits(statistics.median(seconds[OURS])),
            "products_seconds": digits(statistics.median(seconds["products"]))}


def against_read(shape: Shape, device: torch.device, dtype: torch.dtype, *, rounds: int, clock: Clock | None = None
                 ) -> Row:
    """gather_logprobs forward over one read of the logits at the speed of a device copy."""
    case = cases.logits(shape, dtype, device)
    target = torch.empty_like(case.logits)

    def run() -> None:
        with torch.no_grad():
            gather_logprobs(case.logits, case.token_ids)

    seconds = paired({OURS: run, "copy": lambda: target.copy_(case.logits)}, rounds, clock or clock_of(device),
                     warmups=2 if device.type == "cuda" else 0)
    one_read = [value / 2 for value in seconds["copy"]]  # a copy moves the logits twice
    ratio = Ratio.of(seconds[OURS], one_read)
    rate = {f"{name}_gb_per_second": digits(case.logits.nbytes * passes / statistics.median(seconds[name]) / 1e9)
            for name, passes in ((OURS, 1), ("copy", 2))}
    return {"row": "gather_logprobs forward, over one read at copy speed", **named(shape, dtype),
            **verdict(ratio.median, 1.1), **ratio.fields("ratio"), **rate,
            "ours_seconds": digits(statistics.median(seconds[OURS]))}


def against_eager(op: str, tokens: int, device: torch.device, *, rounds: int, clock: Clock | None = None) -> Row:
    """A loss of given log-probs with its backward: launches, and time over that of the definition run eagerly."""
    case = cases.rollouts(tokens, device)
    given = (case.old_logprobs, case.advantages) if op == "grpo_loss" else (case.ref_logprobs,)
    meant = {"advantages_per": "sequence"} if op == "grpo_loss" else {}
    upstream = torch.ones((), device=device)  # made here: it is the caller's, not the op's

    def step(loss_of: Callable[..., Any]) -> Callable[[], object]:
        leaf = case.policy_logprobs.detach().requires_grad_()
        return lambda: torch.autograd.grad(loss_of(leaf, *given, case.cu_seqlens, **meant)[0], leaf, upstream)

    fused = step(grpo_loss if op == "grpo_loss" else dpo_loss)
    eager = step(reference.grpo_loss if op == "grpo_loss" else reference.dpo_loss)
    seconds = paired({OURS: fused, "eager": eager}, rounds, clock or clock_of(device, calls=20),
                     warmups=2 if device.type == "cuda" else 0)
    ratio = Ratio.of(seconds[OURS], seconds["eager"])
    started, eager_started = launches(fused, device), launches(eager, device)
    row = {"row": f"{op} with backward, {tokens} tokens", "tokens": tokens, "dtype": "float32",
           **verdict(ratio.median, 0.1), **ratio.fields("ratio"), "launches": started,
           "eager_launches": None if eager_started is None else len(eager_started),
           "ours_seconds": digits(statistics.median(seconds[OURS])),
           "eager_seconds": digits(statistics.median(seconds["eager"]))}
    if started is not None:
        row |= {"launches_limit": 3, "passed": row["passed"] and len(started) <= 3}
    return row


def against_plainest(name: str, tokens: int, device: torch.device, *, rounds: int, clock: Clock | None = None) -> Row:
    """A loss of given log-probs with its backward, over `grpo` (of pairs: `sigmoid`) on the same tokens."""
    case, of_pairs = cases.rollouts(tokens, device), name in get_args(PreferenceLossName)
    given = (case.ref_logprobs,) if of_pairs else (case.old_logprobs, case.advantages)
    meant: Row = {} if of_pairs else {"advantages_per": "sequence"}
    upstream = torch.ones((), device=device)

    def step(loss: str) -> Callable[[], object]:
        op: Callable[..., Any] = dpo_loss if of_pairs else grpo_loss
        leaf = case.policy_logprobs.detach().requires_grad_()
        return lambda: torch.autograd.grad(op(leaf, *given, case.cu_seqlens, loss=loss, **meant)[0], leaf, upstream)

    plainest = "sigmoid" if of_pairs else "grpo"
    ways = {name: step(name), plainest: step(plainest)}
    seconds = paired(ways, rounds, clock or clock_of(device, calls=20), warmups=2)
    ratio, started = Ratio.of(seconds[name], seconds[plainest]), launches(ways[name], device)
    row = {"row": f"{name} over {plainest}", **named((tokens, 1, 1), torch.float32), **verdict(ratio.median, 1.2),
           **ratio.fields("ratio"), "launches": None if started is None else len(started),
           "seconds": digits(statistics.median(seconds[name]))}
    return row | ({} if started is None else {"passed": row["passed"] and len(started) <= 3})


def idle_tokens(shape: Shape, device: torch.device, dtype: torch.dtype, *, rounds: int, clock: Clock | None = None,
                workspace_bytes: int | None = None) -> Row:
    """linear_policy_loss with half of the tokens without an advantage over all of them with one."""
    ways = {}
    for name, idle in (("dense", 0.0), ("half", 0.5)):
        case = replace(cases.problem(shape, dtype, device, idle=idle), workspace_bytes=workspace_bytes)
        ways[name] = lambda case=case: our_policy_loss(case)
    seconds = paired(ways, rounds, clock or clock_of(device), warmups=2 if device.type == "cuda" else 0)
    ratio = Ratio.of(seconds["half"], seconds["dense"])
    return {"row": "half of the tokens idle, over dense", **named(shape, dtype), **verdict(ratio.median, 0.7),
            **ratio.fields("ratio"), "dense_seconds": digits(statistics.median(seconds["dense"])),
            "half_seconds": digits(statistics.median(seconds["half"]))}


# -- memory -----------------------------------------------------------------------------------------------------------

def peak_here(op: str, peer: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, *,
              idle: float = 0.0,
              workspace_bytes: int | None = None) -> Row:
    """peak_bytes of a step above its inputs, gradient_bytes that it hands back, and norms of its results."""
    run, results = PEERS[op][peer].run, []
    run(build(op, (32, 16, 512), dtype, device))  # loads libraries and compiles: not what the op needs
    case = build(op, shape, dtype, device, idle=idle, workspace_bytes=workspace_bytes)
    found = peak_bytes(lambda: results.append(run(case)), device)
    back = sum(value.nbytes for name, value in results[0].items() if name.startswith("d"))
    return {"peak_bytes": found, "gradient_bytes": back, "norms": norms(results[0])}


def memory(shape: Shape, device: torch.device, dtype: torch.dtype, *, long_tokens: int, peak: Callable[..., Row],
           workspace_bytes: int | None = None) -> list[Row]:
    """Rows on linear_policy_loss: transient memory at `long_tokens` over that at T, and at T over naive torch's peak.

    Transient is the peak above the inputs without the gradients that are handed back. `peak` is `child.peak_of`.
    """
    def of(peer: str, tokens: int) -> Row:
        return peak("linear_policy_loss", peer, shape._replace(tokens=tokens), dtype, device,
                    workspace_bytes=workspace_bytes)

    short, long, naive = of(OURS, shape.tokens), of(OURS, long_tokens), of(NAIVE, shape.tokens)
    transient = {name: row["peak_bytes"] - row["gradient_bytes"] for name, row in (("short", short), ("long", long))}
    common = {**named(shape, dtype), "workspace_bytes": workspace_bytes}
    return [{"row": f"transient memory at {long_tokens} tokens over that at {shape.tokens}", **common,
             **verdict(transient["long"] / transient["short"], 1.1), "long_tokens": long_tokens,
             "transient_bytes": transient["short"], "long_transient_bytes": transient["long"]},
            {"row": "transient memory over the peak of naive torch", **common,
             **verdict(transient["short"] / naive["peak_bytes"], 0.2), "transient_bytes": transient["short"],
             "peak_bytes": short["peak_bytes"], "naive_peak_bytes": naive["peak_bytes"],
             "peak_ratio": digits(short["peak_bytes"] / naive["peak_bytes"])}]
