"""Ranks under torchrun that share a policy and its engines. Run by test_sharded.py; prints a line of JSON per rank."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from tests.support.engine_weights import Weights, engine_weights, policy_shapes, policy_weights
from tests.support.sharding import held_by, sizes_for
from tests.weights.test_plan import geometry_of
from tests.weights.test_transfer import unequal
from veripo_fast.errors import ConfigError, TrainingError
from veripo_fast.weights import exchange
from veripo_fast.weights.sharded import ShardedSync


class Ranks:
    """One rank's trainer and engine, and what they find."""

    def __init__(self, kind: str, family: str, tied: bool, tp: int) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.kind, self.tp, self.sizes = kind, tp, sizes_for(tp, family, tied)
        self.weights = policy_weights(self.sizes)
        self.engine = {name: torch.ones_like(tensor) for name, tensor in self.expected().items()}
        self.frozen = {name for name in self.weights if ".visual." in name}
        self.sync = self.make()

    def make(self, **changes: Any) -> ShardedSync:
        arguments = {"trained": self.weights.keys() - self.frozen, "tp": self.tp, "bucket_bytes": 5000, **changes}
        return ShardedSync(policy_shapes(self.sizes), self.held, self.engine.items(), geometry_of(self.sizes),
                           **arguments)

    def held(self) -> exchange.Held:
        return held_by(self.kind, self.weights, self.size, self.rank)

    def expected(self) -> Weights:
        engine = engine_weights(self.weights, self.sizes, self.tp, self.rank % self.tp)
        return {name: tensor if name.endswith(".A_log") else tensor.bfloat16() for name, tensor in engine.items()}

    def unequal(self) -> list[str]:
        """Engine parameters that are wrong; rows that pad the vocabulary are nobody's."""
        expected = self.expected()
        for name in expected:
            if "embed_tokens" in name or "lm_head" in name:
                padding = self.engine[name] == 1
                expected[name] = torch.where(padding, self.engine[name], expected[name])
        return unequal(self.engine, expected)

    def train(self) -> None:
        for name in self.weights.keys() - self.frozen:
            self.weights[name] += 1 / 8

    def reload(self, spoil: Callable[[Weights], None] = lambda weights: None
               ) -> Callable[[Iterator[tuple[str, torch.Tensor]]], None]:
        def load(named: Iterator[tuple[str, torch.Tensor]]) -> None:
            weights = dict(named)
            spoil(weights)
            for name, values in engine_weights(weights, self.sizes, self.tp, self.rank % self.tp).items():
                self.engine[name].copy_(values)

        return load


def follow(ranks: Ranks) -> dict[str, Any]:
    """The self-test, the first hand-over, two more, and one into an engine that lost its weights."""
    before = {name: tensor.clone() for name, tensor in ranks.engine.items()}
    ranks.sync.self_test(ranks.reload())
    wrong = unequal(ranks.engine, before)
    aliasing, first = ranks.sync.start(0)
    wrong += ranks.unequal()
    sent = []
    for version in (1, 2):
        ranks.train()
        report = ranks.sync.sync(version)
        wrong += ranks.unequal()
        sent.append(report.between_ranks)
    for tensor in ranks.engine.values():
        tensor.fill_(1)
    again = ranks.sync.sync(2, everything=True)
    wrong += ranks.unequal()
    return {"wrong": wrong, "aliased": len(aliasing.aliased), "bytes": [first.bytes, report.bytes, again.bytes],
            "between": [first.between_ranks, *sent, again.between_ranks], "full": first.full_gather,
            "received": ranks.sync.traffic.received[ranks.rank], "line": str(first), "version": ranks.sync.version}


def count(ranks: Ranks) -> dict[str, Any]:
    """Bytes that were really given to the process group, and the largest buffer."""
    given, started = [], dist.batch_isend_irecv

    def counting(operations: list[dist.P2POp]) -> list[dist.Work]:
        given.append([(operation.op is dist.isend, operation.tensor.nbytes) for operation in operations])
        return started(operations)

    dist.batch_isend_irecv = counting
    ranks.sync.sync(0)
    most = max((sum(size for sends, size in part if sends == side) for part in given for side in (True, False)),
               default=0)
    sent, received = (sum(size for part in given for sends, size in part if sends == side) for side in (True, False))
    return {"given": [sent, received], "planned": [ranks.sync.traffic.sent[ranks.rank],
                                                   ranks.sync.traffic.received[ranks.rank]], "most": most}


def flip(ranks: Ranks) -> dict[str, Any]:
    """The last rank's buffer changes by one bit between packing and sending."""
    honest = exchange.pack

    def faulty(messages: Any, held: Any, region: torch.Tensor) -> torch.Tensor:
        total = honest(messages, held, region)
        if ranks.rank == ranks.size - 1 and messages[0].receiver == 0:
            region.view(torch.int16)[len(region) // 2] ^= 4
        return total

    exchange.pack = faulty
    return {"message": refused(TrainingError, lambda: ranks.sync.sync(0))}


def spoil(ranks: Ranks) -> dict[str, Any]:
    """The loader of the last rank's engine does otherwise; then rank 0 is given other arguments; then other ranges."""
    last = ranks.rank == ranks.size - 1

    def otherwise(weights: Weights) -> None:
        if last:
            weights["model.language_model.norm.weight"].neg_()

    before = {name: tensor.clone() for name, tensor in ranks.engine.items()}
    found = [refused(TrainingError, lambda: ranks.sync.self_test(ranks.reload(otherwise)))]
    restored = unequal(ranks.engine, before) == []
    found.append(refused(ConfigError, lambda: ranks.make(trained=["w"] if last else [])))
    found.append(refused(ConfigError, lambda: ranks.make(tp=3)))
    return {"messages": found, "restored": restored}


def nothing(ranks: Ranks) -> dict[str, Any]:
    """The last rank holds nothing: all that it has for its engine comes from the others."""
    others = ranks.size - 1
    held = {} if ranks.rank == others else held_by(ranks.kind, ranks.weights, others, ranks.rank)
    ranks.held = lambda: held
    sync = ranks.make()
    sync.sync(0)
    return {"wrong": ranks.unequal(), "sent": sync.traffic.sent[ranks.rank]}


def refused(kind: type[Exception], call: Callable[[], object]) -> str:
    try:
        call()
    except kind as error:
        return str(error)
    return ""


def main(kind: str, family: str, tied: str, tp: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results = {case.__name__: case(Ranks(kind, family, tied == "tied", int(tp)))
               for case in (follow, count, nothing, spoil, flip)}
    sys.stdout.write(json.dumps({"rank": dist.get_rank(), **results}) + "\n")
    sys.stdout.flush()
    dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
