"""Attention of a packed group on a CPU: completions attended together, each alone, and as the trainer chooses.

    python bench/bench_blocks.py [--prompts 100,882,3000] [--completions 8,32,64,128,256,512] [--group 8]

Forward and backward of `attend_packed`, without the prompt's own attention. A row is the time over that of one block
for each completion; smaller is better, and `chosen` should not exceed 1.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial

if __name__ == "__main__":  # bench/ itself on the path would offer bench/kernels as `kernels`, a Hugging Face package
    sys.path[0] = __file__.rpartition("/bench/")[0]

import torch
import torch.nn.functional as F

from bench import recipe
from bench.measure import Ratio, clock_of, paired
from veripo_fast.model.shared_prefix import GroupSpan
from veripo_fast.schedule import blocks

HEADS, KEY_HEADS, HEAD_SIZE = 8, 2, 64
ALL = 1 << 60
WAYS = {"together": (ALL, 0), "alone": (-1, 0), "chosen": (blocks.CALL_PAIRS, blocks.COPY_PAIRS)}
"""CALL_PAIRS and COPY_PAIRS of each."""


def group_of(way: str, prompt: int, completion: int, group: int) -> GroupSpan:
    """A group whose blocks are made as `way` says."""
    blocks.CALL_PAIRS, blocks.COPY_PAIRS = WAYS[way]
    span = GroupSpan(0, prompt, (completion,) * group)
    assert len(span.blocks) >= 1  # made now, and kept
    return span


def step(span: GroupSpan, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    """Forward and backward of the completions' attention."""
    sizes = [span.prompt, *(tokens for tokens, _ in span.blocks)]
    queries, keys, values = query.split(sizes[1:], 2), key.split(sizes, 2), value.split(sizes, 2)
    outputs = [F.scaled_dot_product_attention(
        queries[number], torch.cat([keys[0], keys[number + 1]], 2), torch.cat([values[0], values[number + 1]], 2),
        attn_mask=mask, enable_gqa=True) for number, (_, mask) in enumerate(span.blocks)]
    torch.cat(outputs, 2).sum().backward()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prompts", default="100,882,3000")
    parser.add_argument("--completions", default="8,32,64,128,256,512")
    for name, value in (("group", 8), ("rounds", 5), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for prompt in map(int, args.prompts.split(",")):
        for completion in map(int, args.completions.split(",")):
            tokens = completion * args.group
            query, key, value = (torch.randn(1, heads, length, HEAD_SIZE, requires_grad=True) for heads, length in (
                (HEADS, tokens), (KEY_HEADS, prompt + tokens), (KEY_HEADS, prompt + tokens)))
            spans = {way: group_of(way, prompt, completion, args.group) for way in WAYS}
            seconds = paired({way: partial(step, span, query, key, value) for way, span in spans.items()},
                             args.rounds, clock_of(torch.device("cpu")))
            ratios = {way: Ratio.of(seconds[way], seconds["alone"]) for way in ("together", "chosen")}
            print(f"prompt {prompt}, completion {completion}: " + ", ".join(
                f"{way} {ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})" for way, ratio in ratios.items()),
                flush=True)
            recipe.append("blocks", {
                "bench": "blocks", "prompt": prompt, "completion": completion, "group": args.group,
                "heads": [HEADS, KEY_HEADS, HEAD_SIZE], "rounds": args.rounds,
                "blocks": {way: len(span.blocks) for way, span in spans.items()},
                "over_alone": {way: [round(value, 3) for value in (ratio.median, ratio.low, ratio.high)]
                               for way, ratio in ratios.items()}})


if __name__ == "__main__":
    main()
