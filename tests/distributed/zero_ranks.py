"""Two ranks under torchrun: ZeRO against one process. Run by test_zero.py; rank 0 prints a line of JSON per case.

    python -m torch.distributed.run --nproc-per-node 2 -m tests.distributed.zero_ranks TIED UNTIED OUT
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from tests.distributed.updates import OPTIMIZER, RATE, Groups, groups_of, load, one_update, run
from veripo_fast.config.schema import OptimizerConfig
from veripo_fast.distributed.backend import LocalBackend, Named
from veripo_fast.distributed.fsdp import FsdpBackend
from veripo_fast.distributed.zero import ZeroBackend
from veripo_fast.distributed.zero_config import ZeroOptions
from veripo_fast.model.policy import Policy, save_policy, weights_on_host
from veripo_fast.model.step import LogprobInputs

UPDATES, FRESH = 20, OptimizerConfig(betas=(0.8, 0.9))
SHARD_EVERYTHING = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}


class Ranks:
    """This rank's policies and backends, and what is compared."""

    def __init__(self, tied: Path, untied: Path, out: Path) -> None:
        self.rank = dist.get_rank()
        self.folders = {"tied": tied, "untied": untied}
        self.out = out
        self.start = time.monotonic()
        self.references: dict[tuple, tuple[list, dict[str, torch.Tensor]]] = {}

    def zero(self, stage: int, folder: str = "tied", *, frozen: bool = True, offload: str = "none",
             weights: dict[str, torch.Tensor] | None = None, **options: Any) -> tuple[Policy, ZeroBackend]:
        policy = load(self.folders[folder], frozen=frozen, **options)
        put(policy, weights)
        backend = ZeroBackend(policy.step, named(policy), ZeroOptions(stage, offload, SHARD_EVERYTHING))
        backend.begin(OPTIMIZER, RATE)
        return policy, backend

    def local(self, folder: str = "tied", *, frozen: bool = True, weights: dict[str, torch.Tensor] | None = None,
              **options: Any) -> tuple[Policy, LocalBackend]:
        policy = load(self.folders[folder], frozen=frozen, **options)
        put(policy, weights)
        backend = LocalBackend(policy.step, named(policy))
        backend.begin(OPTIMIZER, RATE)
        return policy, backend

    def fsdp(self, weights: dict[str, torch.Tensor] | None = None) -> tuple[Policy, FsdpBackend]:
        policy = load(self.folders["tied"], frozen=False)
        put(policy, weights)
        backend = FsdpBackend(policy.step, named(policy), lambda step: step(*policy.idle_inputs()))
        backend.begin(OPTIMIZER, RATE)
        return policy, backend

    @cache  # noqa: B019
    def groups(self, folder: str = "tied", dtype: str = "float32") -> Groups:
        return groups_of(load(self.folders[folder], frozen=True, dtype=dtype))

    def say(self, case: str, **measured: Any) -> None:
        """One line of what all ranks measured: the largest number, and whether everything that has to hold does."""
        everywhere: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, {**measured, "total_seconds": time.monotonic() - self.start})
        self.start = time.monotonic()
        if self.rank == 0:
            line = {name: all(m[name] for m in everywhere) if isinstance(value, bool)
                    else max(m[name] for m in everywhere) for name, value in everywhere[0].items()}
            sys.stdout.write(json.dumps({"case": case, **line}) + "\n")
            sys.stdout.flush()


def named(policy: Policy) -> Callable[[], Named]:
    return lambda: list(policy.model.named_parameters())


def put(policy: Policy, weights: dict[str, torch.Tensor] | None) -> None:
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters() if weights else []:
            parameter.copy_(weights[name])


def weights_of(backend: Any) -> dict[str, torch.Tensor]:
    """Rank 0's, on every rank."""
    found = [{name: value.detach().clone() for name, value in backend.weights()}]
    if dist.is_initialized() and not isinstance(backend, LocalBackend):
        dist.broadcast_object_list(found, src=0)
    return found[0]


def state_of(backend: Any) -> dict[str, torch.Tensor]:
    """The whole optimizer state."""
    return {key: value.full_tensor().clone() if hasattr(value, "full_tensor") else value.detach().clone()
            for key, value in backend.optimizer_state().items()}


def gap(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    assert found.keys() == wanted.keys(), found.keys() ^ wanted.keys()
    return max((found[key].float() - value.float()).abs().max().item() for key, value in wanted.items())


def relative(found: list[tuple[float, float]], wanted: list[tuple[float, float]]) -> list[float]:
    """The largest relative difference of losses, and of norms; losses cross zero, so below 0.1 to 0.1."""
    return [max(abs(f[i] - w[i]) / max(abs(w[i]), 0.1) for f, w in zip(found, wanted, strict=True)) for i in (0, 1)]


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Bit by bit."""
    return all(torch.equal(value, second[key]) for key, value in first.items())


def updates_match(ranks: Ranks, stage: int, folder: str, frozen: bool, updates: int = UPDATES) -> None:
    groups = ranks.groups(folder)
    if (folder, frozen) not in ranks.references:
        policy, local = ranks.local(folder, frozen=frozen)
        ranks.references[folder, frozen] = run(policy, local, groups, range(updates)), weights_of(local)
    wanted, weights = ranks.references[folder, frozen]
    policy, zero = ranks.zero(stage, folder, frozen=frozen)
    start = time.monotonic()
    found = run(policy, zero, groups, range(updates), ranks.rank)
    seconds = time.monotonic() - start
    loss, norm = relative(found, wanted)
    ranks.say(f"updates {stage} {folder} {'frozen' if frozen else 'trained'}", loss=loss, norm=norm,
              weights=gap(weights_of(zero), weights), seconds=seconds)


def guarded(ranks: Ranks, stage: int) -> None:
    """A NaN loss, a NaN gradient of one rank and `discard` change nothing; then all goes on, also in a fresh stage."""
    groups = ranks.groups()
    (policy, zero), (single, local) = ranks.zero(stage, frozen=False), ranks.local(frozen=False)
    run(single, local, groups, range(2))
    run(policy, zero, groups, range(2), ranks.rank)
    before = weights_of(zero), state_of(zero)
    _, nan_loss = one_update(policy, zero, groups, 2, rank=ranks.rank, told=float("nan"))
    _, nan_norm = one_update(policy, zero, groups, 2, rank=ranks.rank, broken=ranks.rank == 1, told=1.0)
    zero.backward(zero.forward(*policy.idle_inputs()).logprobs.sum())
    zero.discard()
    kept = same(before[0], weights_of(zero)) and same(before[1], state_of(zero))
    wanted = run(single, local, groups, range(2, 5))
    found = run(policy, zero, groups, range(2, 5), ranks.rank)
    for backend in (zero, local):
        backend.begin(FRESH, RATE)
    fresh = gap(state_of(zero), state_of(local)) == 0.0
    wanted += run(single, local, groups, range(3))
    found += run(policy, zero, groups, range(3), ranks.rank)
    loss, norm = relative(found, wanted)
    ranks.say(f"guard {stage}", kept=kept, fresh=fresh, finite=nan_loss < 1e9, nan=nan_norm != nan_norm, loss=loss,
              norm=norm, weights=gap(weights_of(zero), weights_of(local)))


def exchanged(ranks: Ranks, stage: int) -> None:
    """A checkpoint of ZeRO goes on under one process and under FSDP2; theirs go on under a fresh ZeRO."""
    groups, folder = ranks.groups(), ranks.out / f"state{stage}"
    policy, zero = ranks.zero(stage, frozen=False)
    run(policy, zero, groups, range(3), ranks.rank)
    weights, state = weights_of(zero), state_of(zero)
    dcp.save(zero.optimizer_state(), checkpoint_id=folder / "zero")
    wanted = run(policy, zero, groups, range(3, 6), ranks.rank)
    measured: dict[str, Any] = {}
    makers = {"local": ranks.local, "fsdp": ranks.fsdp, "zero": lambda **given: ranks.zero(stage, **given)}
    for name, maker in makers.items():
        other, backend = maker(weights=weights, **({} if name == "fsdp" else {"frozen": False}))
        read = backend.optimizer_state()
        dcp.load(read, checkpoint_id=folder / "zero")
        backend.restored(read)
        measured[f"{name}_state"] = gap(state_of(backend), state)
        if name != "zero":
            rank0 = {"no_dist": True} if name == "local" else {}
            if name == "fsdp" or ranks.rank == 0:
                dcp.save(backend.optimizer_state(), checkpoint_id=folder / name, **rank0)
            dist.barrier()
            back, again = ranks.zero(stage, frozen=False, weights=weights)
            read = again.optimizer_state()
            dcp.load(read, checkpoint_id=folder / name)
            again.restored(read)
            measured[f"from_{name}_state"] = gap(state_of(again), state)
            measured[f"from_{name}_loss"] = relative(run(back, again, groups, range(3, 6), ranks.rank), wanted)[0]
        found = run(other, backend, groups, range(3, 6), None if name == "local" else ranks.rank)
        measured[f"{name}_loss"] = relative(found, wanted)[0]
        measured[f"{name}_weights"] = gap(weights_of(backend), weights_of(zero))
    ranks.say(f"exchange {stage}", **measured)


def held_and_whole(ranks: Ranks, stage: int) -> None:
    """What the ranks hold covers every weight; inside `whole` a rank runs alone; a saved checkpoint is whole."""
    groups = ranks.groups()
    policy, zero = ranks.zero(stage, frozen=False)
    run(policy, zero, groups, range(1), ranks.rank)
    pieces: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(pieces, {name: (first, value.clone()) for name, (first, value) in zero.held().items()})
    covered = True
    for name, value in weights_of(zero).items():
        built = torch.full((value.numel(),), float("nan"))
        for piece in pieces:
            first, part = piece[name]
            built[first:first + len(part)] = part
        covered &= torch.equal(built.view_as(value), value)
    single, _ = ranks.local(frozen=False, weights=weights_of(zero))
    batch, features = groups.batches[0], [groups.prompts[0].features]
    difference = 0.0
    with zero.whole(), torch.no_grad():
        for _ in range(3 if ranks.rank == 0 else 0):
            difference = max(difference, (policy.step.hidden(batch, features)
                                          - single.step.hidden(batch, features)).abs().max().item())
    with torch.no_grad():
        logprobs = zero.forward(batch, features, LogprobInputs()).logprobs
        difference = max(difference, (logprobs - single.step(batch, features, LogprobInputs()).logprobs)
                         .abs().max().item())
    part = sum(part.numel() for name, (_, part) in zero.held().items() if "visual" not in name)
    parameters = sum(p.numel() for name, p in single.model.named_parameters() if "visual" not in name)
    policy.backend = zero
    copies = weights_on_host(policy, keep=ranks.rank == 0)
    if copies is not None:
        save_policy(policy, ranks.out / f"saved{stage}", copies)
    dist.barrier()
    saved = load(ranks.out / f"saved{stage}", frozen=False)
    covered &= same(weights_of(zero), {name: value.detach() for name, value in saved.model.named_parameters()})
    run(policy, zero, groups, range(1, 3), ranks.rank)
    ranks.say(f"held {stage}", covered=covered, difference=difference, share=part / parameters,
              sharded=zero.sharded == (stage == 3))


def others(ranks: Ranks, stage: int, **options: Any) -> None:
    """Other weights, the optimizer in host memory, gradient checkpointing; `own_`: how far one process is from float32.

    Buffers keep their values, and a fresh engine goes on from the state bit by bit.
    """
    given = {key: value for key, value in options.items() if key != "offload"}
    groups = ranks.groups(dtype=options.get("dtype", "float32"))
    (policy, zero), (single, local) = ranks.zero(stage, frozen=False, **options), ranks.local(frozen=False, **given)
    exact_policy, exact = ranks.local(frozen=False, weights=weights_of(local))
    kept = all(mine.dtype == theirs.dtype and torch.equal(mine, theirs) for mine, theirs in zip(
        policy.step.buffers(), single.step.buffers(), strict=True))
    wanted = run(single, local, groups, range(3))
    loss, norm = relative(run(policy, zero, groups, range(3), ranks.rank), wanted)
    own_loss, own_norm = relative(wanted, run(exact_policy, exact, groups, range(3)))
    weights, state = weights_of(zero), state_of(zero)
    masters = {key.removeprefix("master/"): value for key, value in state.items() if key.startswith("master/")}
    rounded = all(torch.equal(weights[name], value.bfloat16()) for name, value in masters.items())
    back, again = ranks.zero(stage, frozen=False, weights=weights, **options)
    read = again.optimizer_state()
    for key, value in zero.optimizer_state().items():
        read[key].copy_(value)
    again.restored(read)
    goes_on = run(back, again, groups, range(3, 5), ranks.rank) == run(policy, zero, groups, range(3, 5), ranks.rank)
    ranks.say(f"{' '.join(map(str, options.values()))} {stage}", loss=loss, norm=norm, own_loss=own_loss,
              own_norm=own_norm, kept=kept, rounded=rounded, goes_on=goes_on, masters=len(masters))


def main(tied: Path, untied: Path, out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=300))
    functions = {name: getattr(torch.nn.functional, name) for name in dir(torch.nn.functional)}
    ranks = Ranks(tied, untied, out)
    for stage in (1, 2, 3):
        for folder in ("tied", "untied"):
            for frozen in (True, False):
                updates_match(ranks, stage, folder, frozen)
        guarded(ranks, stage)
        held_and_whole(ranks, stage)
    for stage in (1, 3):  # stage 2 keeps its state as 1 does
        exchanged(ranks, stage)
        others(ranks, stage, dtype="bfloat16")
    for stage in (2, 3):
        others(ranks, stage, offload="cpu")
    others(ranks, 3, checkpointing=True)
    ranks.say("process", torch_as_it_was=all(getattr(torch.nn.functional, name) is value
                                             for name, value in functions.items()))
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
