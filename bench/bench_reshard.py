"""Bytes between ranks when a sharded policy goes to its engines, against gathering whole parameters; counted, not sent.

    python bench/bench_reshard.py [--ranks 8] [--ranks-per-node 8]

Names and shapes are those of Qwen2.5-VL-7B and Qwen3-VL-8B, from configurations on the meta device. Every rank trains a
share (FSDP2: rows, ZeRO-3: flat pieces) and hosts a tensor-parallel rank of an engine in bfloat16. A full gather gives
every rank the parameters that it lacks, in the trainer's dtype. `ratio` is what all ranks receive over that. A tower
that is trained is sharded and sent like the rest; a frozen one is no part of the engine. One line for each goes to
bench/results/reshard.jsonl; sizes that the model cannot be split into are printed only.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from typing import Any

import torch
import transformers

if __name__ == "__main__":  # bench/ itself on the path would offer bench/kernels as `kernels`, a Hugging Face package
    sys.path[0] = __file__.rpartition("/bench/")[0]

from bench import measure, recipe
from veripo_fast.errors import ConfigError
from veripo_fast.weights.layouts import Geometry, Rules
from veripo_fast.weights.parts import Range, Shape, SliceCopy
from veripo_fast.weights.plan import plan
from veripo_fast.weights.reshard import reshard, traffic
from veripo_fast.weights.rounds import rounds_of
from veripo_fast.weights.transfer import BUCKET_BYTES

Shapes = dict[str, Shape]

TEXT_7B = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
           "num_key_value_heads": 4, "vocab_size": 152064}
VISION_7B = {"hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 3584}
TEXT_8B = {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
           "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936}
VISION_8B = {"out_hidden_size": 4096}
MODELS: dict[str, Any] = {
    "Qwen2.5-VL-7B": (transformers.Qwen2_5_VLConfig, transformers.Qwen2_5_VLForConditionalGeneration, TEXT_7B,
                      VISION_7B),
    "Qwen3-VL-8B": (transformers.Qwen3VLConfig, transformers.Qwen3VLForConditionalGeneration, TEXT_8B, VISION_8B),
}
ITEMSIZE = torch.bfloat16.itemsize
MOST = BUCKET_BYTES // ITEMSIZE


def policy_of(model: str) -> tuple[Shapes, Geometry]:
    """Names and shapes of a model's parameters, and its geometry."""
    config_class, model_class, text, vision = MODELS[model]
    config = config_class(text_config=text, vision_config=vision, tie_word_embeddings=False)
    with torch.device("meta"):
        policy = model_class(config)
    return {name: tuple(parameter.shape) for name, parameter in policy.named_parameters()}, Geometry.of(config)


def wanted_by(shapes: Shapes, geometry: Geometry, tp: int, tower: bool) -> list[list[SliceCopy]]:
    """The copies of each tensor-parallel rank, into an engine of the sizes that the layouts have."""
    wanted = []
    for rank in range(tp):
        places = [Rules(geometry, tp, rank).place(name, shape) for name, shape in shapes.items()
                  if tower or ".visual." not in name]
        wanted.append(plan(shapes, {place.target: place.size for place in places}, geometry, tp=tp, rank=rank,
                           tower=tower))
    return wanted


def rows(shape: Shape, ranks: int, rank: int) -> Range:
    """Elements of the rows that FSDP2 gives a rank."""
    width = math.prod(shape[1:])
    each = -(-shape[0] // ranks)
    return min(rank * each, shape[0]) * width, min((rank + 1) * each, shape[0]) * width


def flat(shape: Shape, ranks: int, rank: int) -> Range:
    """Elements that ZeRO-3 gives a rank, without its padding."""
    return rows((math.prod(shape),), ranks, rank)


TRAINERS = {"FSDP2": rows, "ZeRO-3": flat}


def counted(shapes: Shapes, wanted: list[list[SliceCopy]], trainer: str, ranks: int, ranks_per_node: int
            ) -> dict[str, Any]:
    """What one hand-over moves."""
    holdings = [{name: TRAINERS[trainer](shape, ranks, rank) for name, shape in shapes.items()}
                for rank in range(ranks)]
    started = time.perf_counter()
    messages = reshard(holdings, [wanted[rank % len(wanted)] for rank in range(ranks)], shapes, most=MOST // 8,
                       ranks_per_node=ranks_per_node)
    rounds = rounds_of(messages, 0, size=ranks, most=MOST)
    seconds = time.perf_counter() - started
    of = {itemsize: traffic(messages, holdings, shapes, itemsize=ITEMSIZE,
                            trainer_itemsizes=dict.fromkeys(shapes, itemsize)) for itemsize in (2, 4)}
    stays = [0] * ranks
    for message in messages:
        if message.sender == message.receiver:
            stays[message.sender] += message.source.numel * ITEMSIZE
    busiest = max(*of[4].sent, *of[4].received, *stays)
    return {"received_bytes": sum(of[4].received), "received_most": max(of[4].received), "sent_most": max(of[4].sent),
            "gathered_bytes_float32": sum(of[4].gathered), "gathered_bytes_bfloat16": sum(of[2].gathered),
            "ratio_to_float32": measure.digits(of[4].ratio or 0), "ratio_to_bfloat16": measure.digits(of[2].ratio or 0),
            "messages": len(messages), "rounds": len(rounds), "fewest_rounds": -(-busiest // BUCKET_BYTES),
            "planning_seconds": measure.digits(seconds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--ranks-per-node", type=int, default=8)
    args = parser.parse_args()
    for model in MODELS:
        shapes, geometry = policy_of(model)
        for tower in (False, True):
            for tp in (tp for tp in (1, 2, 4, 8) if args.ranks % tp == 0):
                try:
                    wanted = wanted_by(shapes, geometry, tp, tower)
                except ConfigError as error:
                    print(f"{model}, TP={tp}: {error}")
                    continue
                for trainer in TRAINERS:
                    line = {"bench": "reshard", "model": model, "trainer": trainer, "ranks": args.ranks, "tp": tp,
                            "ranks_per_node": args.ranks_per_node, "tower": tower,
                            **counted(shapes, wanted, trainer, args.ranks, args.ranks_per_node)}
                    print({name: line[name] for name in ("model", "trainer", "tp", "tower", "ratio_to_float32",
                                                         "ratio_to_bfloat16", "rounds", "fewest_rounds")})
                    recipe.append("reshard", line)


if __name__ == "__main__":
    main()
