"""Memory of a rollout by the torch engine beside its keys and values, for more and more prompts.

    python bench/bench_rollout_memory.py [--prompts 8,16,32,64] [--group 8] [--tokens 16] [--size 30m]

One video per prompt. `whole` is the same engine with all prompts in one forward pass and all logits at once. Peak
resident memory is measured above what the process held before the call.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":  # bench/ itself on the path would offer bench/kernels as `kernels`, a Hugging Face package
    sys.path[0] = __file__.rpartition("/bench/")[0]

import torch

from bench import recipe
from bench.measure import peak_bytes
from bench.wide_model import TEXT, video_prompts, write_checkpoint
from veripo_fast.config.inputs import ModelConfig
from veripo_fast.model.policy import Policy, load_policy
from veripo_fast.rollout import torch_engine
from veripo_fast.rollout.limits import kv_bytes_per_token
from veripo_fast.rollout.protocol import Sampling
from veripo_fast.rollout.torch_engine import TorchEngine
from veripo_fast.text import memory
from veripo_fast.types import LoadedPrompt

BOUNDS = {"parts": (torch_engine.PREFILL_TOKENS, torch_engine.MOST_LOGITS), "whole": (1 << 60, 1 << 60)}
"""Prompt tokens of a forward pass, and logits that exist at once."""


def beside_cache(policy: Policy, prompts: list[LoadedPrompt], sampling: Sampling) -> tuple[int, int]:
    """Peak bytes of a rollout without its keys and values, and bytes of those."""
    engine = TorchEngine(policy)
    tokens = sum(len(item.encoded.token_ids) for item in prompts)
    written = len(prompts) * sampling.group_size * sampling.max_new_tokens
    cache = (tokens + written) * kv_bytes_per_token(policy)
    return peak_bytes(lambda: engine.generate(prompts, sampling), policy.device) - cache, cache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prompts", default="8,16,32,64")
    parser.add_argument("--size", default="30m", choices=sorted(TEXT))
    for name, value in (("group", 8), ("tokens", 16), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    counts = [int(count) for count in args.prompts.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), args.size)
        policy = load_policy(ModelConfig(path=folder, device="cpu"))
    prompts = video_prompts(policy, max(counts))
    sampling = Sampling(args.group, 1.0, args.tokens, 0)
    TorchEngine(policy).generate(prompts[:2], sampling)  # what is allocated once
    for way, (prefill, logits) in BOUNDS.items():
        torch_engine.PREFILL_TOKENS, torch_engine.MOST_LOGITS = prefill, logits
        for count in counts:
            peak, cache = beside_cache(policy, prompts[:count], sampling)
            print(f"{way}: {count} prompts of {len(prompts[0].encoded.token_ids)} tokens: {memory(peak)} beside "
                  f"{memory(cache)} of keys and values", flush=True)
            recipe.append("rollout_memory", {
                "bench": "rollout_memory", "way": way, "size": args.size, "prompts": count, "group": args.group,
                "prompt_tokens": len(prompts[0].encoded.token_ids), "tokens": args.tokens,
                "vocabulary": policy.vocabulary, "peak_bytes_beside_cache": peak, "cache_bytes": cache})


if __name__ == "__main__":
    main()
