"""A hand-over of weights into an engine's layout, beside a plain copy of the same bytes, on a CPU.

    python bench/bench_sync.py [--rounds 9] [--threads 1] [--dtype bfloat16]

The policy has the shapes of a Qwen2.5-VL of 400 M parameters, without its tower, in bfloat16, or in the float32 of a
policy whose engine has bfloat16. `sync` is the whole call: buckets are made, slices rounded, moved and read back for
the checksums. `loop` copies slice by slice with torch and checks nothing. `plain` is one copy from and to the very same
memory. Ratios are those of one round. One line goes to bench/results/sync.jsonl.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

if __name__ == "__main__":  # bench/ itself on the path would offer bench/kernels as `kernels`, a Hugging Face package
    sys.path[0] = __file__.rpartition("/bench/")[0]

from bench import measure, recipe
from veripo_fast.weights.layouts import Geometry
from veripo_fast.weights.sync import WeightSync

Shapes = dict[str, tuple[int, ...]]

HIDDEN, INTERMEDIATE, LAYERS, VOCABULARY, HEADS, KV_HEADS, HEAD_DIM = 1024, 4096, 22, 64000, 16, 4, 64
GEOMETRY = Geometry("qwen2_5_vl", HEADS, KV_HEADS, HEAD_DIM, VOCABULARY, tied=True, tower_heads=16)
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def shapes() -> tuple[Shapes, Shapes]:
    """Names and shapes of the policy's parameters and of the engine's."""
    policy: Shapes = {"model.language_model.embed_tokens.weight": (VOCABULARY, HIDDEN),
                      "model.language_model.norm.weight": (HIDDEN,)}
    engine: Shapes = {name.replace("model.language_model", "language_model.model"): shape
                      for name, shape in policy.items()}
    rows = {"q": HEADS * HEAD_DIM, "k": KV_HEADS * HEAD_DIM, "v": KV_HEADS * HEAD_DIM}
    for number in range(LAYERS):
        ours, theirs = f"model.language_model.layers.{number}.", f"language_model.model.layers.{number}."
        whole = {"self_attn.o_proj.weight": (HIDDEN, rows["q"]), "mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
                 "input_layernorm.weight": (HIDDEN,), "post_attention_layernorm.weight": (HIDDEN,)}
        for kind, count in rows.items():
            policy |= {f"{ours}self_attn.{kind}_proj.weight": (count, HIDDEN),
                       f"{ours}self_attn.{kind}_proj.bias": (count,)}
        for kind in ("gate", "up"):
            policy[f"{ours}mlp.{kind}_proj.weight"] = (INTERMEDIATE, HIDDEN)
        total = sum(rows.values())
        engine |= {f"{theirs}self_attn.qkv_proj.weight": (total, HIDDEN), f"{theirs}self_attn.qkv_proj.bias": (total,),
                   f"{theirs}mlp.gate_up_proj.weight": (2 * INTERMEDIATE, HIDDEN)}
        policy |= {f"{ours}{name}": shape for name, shape in whole.items()}
        engine |= {f"{theirs}{name}": shape for name, shape in whole.items()}
    return policy, engine


def carve(flat: torch.Tensor, sizes: Shapes) -> dict[str, torch.Tensor]:
    """Parameters that lie one behind the other in flat memory."""
    parts = flat.split([math.prod(shape) for shape in sizes.values()])
    return {name: part.view(shape) for (name, shape), part in zip(sizes.items(), parts, strict=True)}


def loop(sync: WeightSync) -> Callable[[], None]:
    """Slice by slice, by torch."""
    pairs = [sync.transfer.views(piece) for piece in sync.transfer.pieces]

    def run() -> None:
        for source, target in pairs:
            target.copy_(source)

    return run


def row(sync: WeightSync, seconds: Mapping[str, list[float]], bytes_moved: int) -> dict[str, Any]:
    """The result line."""
    plain = statistics.median(seconds["plain"])
    line: dict[str, Any] = {"bench": "sync", "copies": len(sync.copies), "bytes": bytes_moved,
                            "plain_seconds": measure.digits(plain),
                            "plain_gb_per_second": measure.digits(2 * bytes_moved / plain / 1e9)}
    for name in ("sync", "loop"):
        line |= measure.Ratio.of(seconds[name], seconds["plain"]).fields(f"{name}_over_plain")
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="the policy's; the engine has bfloat16")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    policy, engine = shapes()
    count = sum(map(math.prod, policy.values()))
    source = torch.empty(count, dtype=DTYPES[args.dtype]).normal_(std=0.02)
    target = torch.zeros(count, dtype=torch.bfloat16)
    started = time.perf_counter()
    sync = WeightSync(((name, part.requires_grad_()) for name, part in carve(source, policy).items()),
                      carve(target, engine).items(), GEOMETRY, mode="copy", tower=False)
    planning_seconds = time.perf_counter() - started
    report = sync.start(0)[1]
    ways = {"plain": lambda: target.copy_(source), "sync": lambda: sync.sync(1), "loop": loop(sync)}
    seconds = measure.paired(ways, args.rounds, measure.wall_clock, warmups=1)
    line = {"parameters": count, "policy_dtype": args.dtype, "engine_dtype": "bfloat16", "threads": args.threads,
            "rounds": args.rounds, "planning_seconds": measure.digits(planning_seconds)}
    print(recipe.append("sync", {**row(sync, seconds, report.bytes), **line}))


if __name__ == "__main__":
    main()
